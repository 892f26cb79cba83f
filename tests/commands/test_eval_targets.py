"""One model asked in MLX, in llama.cpp and over HTTP: real servers, and the figures must agree.

The model is the demo with half of its refusal direction taken out, so that about half of the locked
prompts are refused: anything that moved a prompt by a token would show.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from abl_mlx import demo
from abl_mlx.behaviour import divergence, llamacpp
from abl_mlx.behaviour.llama_server import LlamaServer, _free_port
from abl_mlx.behaviour.llamacpp import LlamaCpp
from abl_mlx.choices import ApplyOptions
from abl_mlx.commands import evaluate_model, measure_apply
from abl_mlx.commands.targets import opened
from abl_mlx.directions import measuring
from abl_mlx.eval_choices import EvalOptions
from abl_mlx.inputs import prompts
from abl_mlx.models import chat_model
from abl_mlx.outputs.model_file import find_model
from abl_mlx.support.clock import Clock
from convert.base.errors import UserError

#: How the model is asked: its replies have 17 tokens or so, and one verdict of 40 is 2.5 points.
ASKED: dict[str, Any] = {"limit": 40, "max_tokens": 32}

RATES = ("harmful_refusal_rate", "harmless_refusal_rate", "broken_rate", "expected_answer_rate")


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No cache of the machine's, and one thread: llama.cpp's wait for one another, busily."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(llamacpp, "LlamaCpp", partial(LlamaCpp, n_threads=1))


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model: ``half/model`` and ``half/model.gguf``."""
    place = tmp_path_factory.mktemp("half")
    chat = chat_model.load(demo.MODEL_PATH)
    sets = prompts.load_demo()
    found = measuring.measure(
        chat,
        harmful=[chat.encode(text) for text in sets.harmful.train.take(40).texts],
        harmless=[chat.encode(text) for text in sets.harmless.train.take(40).texts],
        positions=[-1],
    )
    np.save(place / "r.npy", np.array(found.directions[2]))
    options = ApplyOptions.of(strength=0.52, max_leak=1)
    measure_apply.apply(place / "r.npy", "demo", [place / "model", place / "model.gguf"], options)
    return place


@pytest.fixture(scope="module")
def known(half: Path) -> Path:
    """A journal in which the model in MLX has answered everything."""
    journal = half / "known.jsonl"
    evaluate_model.evaluate_model(str(half / "model"), EvalOptions.of(**ASKED, resume=journal))
    return journal


def beside_mlx(target: str, half: Path, known: Path, **chosen: Any) -> dict[str, Any]:
    """The record of a target beside the model in MLX, whose answers are there already."""
    journal = half / f"{time.monotonic_ns()}.jsonl"
    rows = [json.loads(line) | {"role": "baseline"} for line in known.read_text().splitlines()]
    journal.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = EvalOptions.of(**ASKED, baseline=str(half / "model"), resume=journal, **chosen)
    return evaluate_model.evaluate_model(target, options)


def agree(record: dict[str, Any]) -> None:
    """Within 3 points of the model in MLX, set by set; and in a way that could have failed."""
    assert record["n_harmful"] >= 40
    assert 0.2 < record["baseline"]["harmful_refusal_rate"] < 0.8
    for name in RATES:
        assert abs(record[name] - record["baseline"][name]) <= 0.03
    paired = record["paired"]["harmful"]
    assert paired["gained"] + paired["lost"] <= 1
    assert paired["p"] == 1
    assert paired["interval"][0] < 0 < paired["interval"][1]


def test_llama_cpp_in_process_agrees_with_mlx_and_tells_kl(
    half: Path, known: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(divergence, "TOP_N_PROMPTS", 3)
    record = beside_mlx(str(half / "model.gguf"), half, known, max_kl=0.01)
    assert (record["runtime"], record["baseline"]["runtime"]) == ("llama.cpp", "mlx-lm")
    agree(record)
    # The GGUF holds the same numbers, so all that is left is the two runtimes' arithmetic.
    assert record["kl"]["kind"] == f"top-{divergence.TOP_N}"
    assert 0 <= record["kl"]["k1"] < 1e-3
    assert 0 <= record["kl"]["k32"] < 1e-3
    assert record["gate"]["passed"]


def test_llama_cpp_over_http_agrees_with_mlx(half: Path, known: Path) -> None:
    with LlamaCpp(half / "model.gguf", n_ctx=512, lean=True, n_threads=1) as runtime:
        record = beside_mlx(runtime.address, half, known)
    assert record["runtime"] == "server"
    assert record["model"] == str(half / "model.gguf")
    assert "kl" not in record
    agree(record)


@contextmanager
def mlx_lm_server(folder: Path, place: Path) -> Iterator[str]:
    port = _free_port()
    log = open(place / "mlx_lm.log", "wb")  # noqa: SIM115 - a process writes to it
    # The list of models is read from the Hugging Face cache, which has to be there.
    (place / "hub").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "mlx_lm", "server", "--model", folder, "--port", str(port)],
        stdout=log, stderr=log, env={**os.environ, "HF_HUB_CACHE": str(place / "hub")},
    )  # fmt: skip
    try:
        import http.client

        end = time.monotonic() + 120
        while True:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    break
            except OSError:
                assert time.monotonic() < end, (place / "mlx_lm.log").read_text()
                assert process.poll() is None, (place / "mlx_lm.log").read_text()
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(20)
        log.close()


def test_mlx_lms_server_agrees_with_mlx(half: Path, known: Path, tmp_path: Path) -> None:
    with mlx_lm_server(half / "model", tmp_path) as url:
        record = beside_mlx(url, half, known, concurrency=16)
    assert Path(record["model"]).name == "model"
    agree(record)


def completed(target: Any, half: Path, **chosen: Any) -> None:
    """Ask a target in a template of the user's, and the model in MLX: one verdict may differ."""
    options = EvalOptions.of(limit=20, max_tokens=8, baseline=str(half / "model"), **chosen)
    record = evaluate_model.evaluate_model(str(target), options)
    assert record.baseline is not None
    assert (record.runtime, record.baseline.runtime) != ("mlx-lm", "mlx-lm")
    assert record.template == record.baseline.template is not None
    for name in ("harmful", "harmless"):
        pairs = zip(record.verdicts[name], record.baseline.verdicts[name], strict=True)
        assert sum(one != another for one, another in pairs) <= 1
    assert len(set(record.verdicts["harmful"])) > 1  # it could have failed


def test_completions_over_http_agree_with_mlx(half: Path, tmp_path: Path) -> None:
    with LlamaCpp(half / "model.gguf", n_ctx=512, lean=True, n_threads=1) as runtime:
        completed(runtime.address, half, template="plain")
    with mlx_lm_server(half / "model", tmp_path) as url:
        completed(url, half, template="plain")


# --- a llama-server on the PATH ------------------------------------------------------------------

#: The real llama.cpp behind llama-server's own flags: the HTTP server that xllamacpp packs.
PROGRAM = """#!{python}
import argparse, os, signal, sys, time
parser = argparse.ArgumentParser()
for name in ("--model", "--host", "--port", "--ctx-size", "--parallel", "--reasoning-format"):
    parser.add_argument(name, required=True)
parser.add_argument("--jinja", action="store_true", required=True)
parser.add_argument("--chat-template", default="")
given = parser.parse_args()
with open({pids!r}, "a") as stream:
    stream.write(f"{{os.getpid()}} {{given.host}} {{os.environ.get('LLAMA_API_KEY')}}\\n")
if {broken!r}:
    print("0.00.012.345 E llama_model_load: error loading model: tensor 'x' has no data")
    sys.exit(1)
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.port = given.model, int(given.port)
params.n_ctx, params.n_parallel = int(given.ctx_size), int(given.parallel)
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.use_jinja, params.warmup, params.verbosity = True, False, -1
params.chat_template = given.chat_template
assert given.reasoning_format == "none"
params.reasoning_format = xllamacpp.common_reasoning_format.COMMON_REASONING_FORMAT_NONE
server = xllamacpp.Server(params)
time.sleep(600)
"""


def program(place: Path, *, broken: bool = False) -> Path:
    """A `llama-server` in a folder of its own; it writes its process ids to ``pids`` there."""
    folder = place / "bin"
    folder.mkdir()
    path = folder / "llama-server"
    pids = str(place / "pids")
    path.write_text(PROGRAM.format(python=sys.executable, pids=pids, broken=broken))
    path.chmod(0o755)
    return path


def is_gone(line: str) -> bool:
    try:
        os.kill(int(line.split()[0]), 0)
    except ProcessLookupError:
        return True
    return False


def test_a_llama_server_is_started_agrees_and_is_stopped(
    half: Path, known: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = program(tmp_path)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("LLAMA_API_KEY", "not for this one")
    record = beside_mlx(str(half / "model.gguf"), half, known, runtime="llama-server")
    assert record["runtime"] == "llama-server"
    agree(record)
    (line,) = (tmp_path / "pids").read_text().splitlines()
    assert line.split()[1:] == ["127.0.0.1", "None"]
    assert is_gone(line)


def test_a_llama_server_completes_what_a_given_template_writes(
    half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = program(tmp_path)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
    own = tmp_path / "own.jinja"
    own.write_text((demo.MODEL_PATH / "chat_template.jinja").read_text().replace("user", "User"))
    for template in ("plain", str(own)):
        completed(half / "model.gguf", half, template=template, runtime="llama-server")


def test_a_llama_server_that_cannot_load_is_told_in_its_words(half: Path, tmp_path: Path) -> None:
    path = program(tmp_path, broken=True)
    options = EvalOptions()
    with (
        pytest.raises(UserError, match=r"error loading model: tensor 'x' has no data"),
        LlamaServer(half / "model.gguf", options.asking, str(path)),
    ):
        pytest.fail("it cannot be there")
    assert is_gone((tmp_path / "pids").read_text())


def test_ctrl_c_stops_the_llama_server_too(half: Path, tmp_path: Path) -> None:
    path = program(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-m", "abl_mlx", "eval", half / "model.gguf", "--runtime", "llama-server",
         "--max-tokens", "400"],
        stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PATH": f"{path.parent}:{os.environ['PATH']}", "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    )  # fmt: skip
    for line in process.stderr:  # type: ignore[union-attr]
        if line.startswith("· ask"):
            break
    (line,) = (tmp_path / "pids").read_text().splitlines()
    assert not is_gone(line)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert is_gone(line)


def test_a_runtime_that_is_not_there_is_told(half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="no llama-server is on the PATH"):
        evaluate_model.evaluate_model(
            str(half / "model.gguf"), EvalOptions.of(runtime="llama-server", limit=1)
        )
    with pytest.raises(UserError, match=r"--runtime llama\.cpp runs \.gguf files, and none is"):
        evaluate_model.evaluate_model(
            str(half / "model"), EvalOptions.of(runtime="llama.cpp", limit=1)
        )
    with pytest.raises(UserError, match="--model x names a model of a server"):
        evaluate_model.evaluate_model(str(half / "model"), EvalOptions.of(model="x", limit=1))


# --- KL ------------------------------------------------------------------------------------------


def random_distribution(seed: int, size: int = 200) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(scale=3.0, size=size)
    return logits - np.log(np.exp(logits).sum())


def top(logs: np.ndarray, n: int) -> dict[int, float]:
    return {int(token): float(logs[token]) for token in np.argsort(-logs)[:n]}


def test_a_cut_kl_is_a_lower_bound_and_exact_when_nothing_is_cut() -> None:
    for seed in range(20):
        p, q = random_distribution(seed), random_distribution(1000 + seed)
        exact = float((np.exp(p) * (p - q)).sum())
        assert divergence.cut_kl(top(p, 200), top(q, 200)) == pytest.approx(exact, rel=1e-9)
        cuts = [divergence.cut_kl(top(p, n), top(q, n)) for n in (60, 120, 180)]
        assert all(0 <= cut <= exact + 1e-9 for cut in cuts)
        # A near distribution, as an edit leaves it: the cut loses next to nothing.
        near = p + 0.1 * np.random.default_rng(seed).normal(size=200)
        near -= np.log(np.exp(near).sum())
        exact = float((np.exp(p) * (p - near)).sum())
        assert divergence.cut_kl(top(p, 64), top(near, 64)) == pytest.approx(exact, rel=0.05)


def test_lists_without_a_common_token_are_no_comparison() -> None:
    with pytest.raises(ValueError, match="no token"):
        divergence.cut_kl({1: -0.1}, {2: -0.1})
    never = -math.inf
    assert divergence.cut_kl({1: 0.0, 2: never}, {1: 0.0, 2: never}) == 0
    assert divergence.cut_kl({1: 0.0, 2: never}, {1: math.log(0.5), 2: -2.0}) > 0.6


def test_the_cut_kl_of_two_runtimes_is_near_the_exact_one(half: Path) -> None:
    """Original against half-edited: exact in MLX, cut in MLX, and cut through llama.cpp."""
    texts = prompts.load_demo().harmful.test.texts[:6]  # where the edit shows
    options = replace(EvalOptions(), memory_check=False)

    def target(text: str) -> Any:
        return opened(text, find_model(text), options, Clock(), None)

    with target("demo") as original:
        reference = divergence.refer(original, texts, tokens=12)
        measured = divergence.measured_against(original, texts, exactly=True)
        with measured as exactly, target(str(half / "model")) as edited:
            exact = exactly(edited)
            cut = divergence.compare(reference, edited)
    with target(str(half / "model.gguf")) as edited:
        asked = divergence.compare(reference, edited)
    assert exact.kind == "exact"
    assert math.isfinite(exact.k1)
    assert exact.k1 > 0.05
    assert cut.k1 == pytest.approx(exact.k1, rel=0.05)
    assert asked.k1 == pytest.approx(cut.k1, rel=0.05)
    assert asked.k32 == pytest.approx(cut.k32, rel=0.1, abs=1e-5)
