"""How benchmarks/real_models.py makes what it compares: a dialogue, requantizing, and costs."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tests.support.places import ROOT

BENCHMARKS = ROOT / "benchmarks"
sys.path.append(str(BENCHMARKS))

import plain_edit  # noqa: E402
from requantize import changed_in, requantized  # noqa: E402
from watched import cost_of  # noqa: E402

from abl_mlx.commands import conversion  # noqa: E402
from abl_mlx.demo import MODEL_PATH  # noqa: E402
from abl_mlx.outputs.model_file import find_gguf  # noqa: E402
from convert.gguf import ggml  # noqa: E402
from convert.gguf.file import GgufSource  # noqa: E402

#: A program that asks what Heretic asks, in colours, with the answers typed in a terminal.
ASKING = """\
#!{python}
import sys, time  # noqa: E402
assert sys.stdin.isatty()
print("\\33[1mRunning trial\\33[0m")
print("  * Refusals: \\33[1m2\\33[0m/8")
try:
    while True:
        sum(range(100000))
except KeyboardInterrupt:
    print("finished")
print("Which trial do you want to use? (Use arrow keys)")
print(" » [Trial   1] Refusals:  2/8, KL divergence: 0.0500")
print("   [Trial   7] Refusals:  5/8, KL divergence: 0.0100\\n   Exit program")
assert input() == ""
print("What do you want to do?\\n » Save the model\\n   Return to the trial selection menu")
assert input() == ""
print("Path to the folder:")
open(input(), "w").write(" ".join(sys.argv[1:]))
print("Model saved to it")
time.sleep(60)
"""


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("xllamacpp")
    out = tmp_path_factory.mktemp("demo") / "demo.gguf"
    conversion.convert(str(MODEL_PATH), out, quantize="Q4_K_M")
    return out


def test_heretics_questions_are_answered_in_a_terminal(tmp_path: Path) -> None:
    program = tmp_path / "venv" / "bin" / "heretic"
    program.parent.mkdir(parents=True)
    program.write_text(ASKING.format(python=sys.executable))
    program.chmod(0o755)
    out, told = tmp_path / "out", tmp_path / "told.json"
    command = [str(BENCHMARKS / "heretic_run.py"), str(tmp_path / "venv"), "model", str(out)]
    command += [str(tmp_path), str(told), "--system", "Be kind.", "--cpu-seconds", "0.5"]
    cost = cost_of([sys.executable, *command], tmp_path / "log")
    found = json.loads(told.read_text())
    assert (found["trials"], found["chosen"], found["refused"], found["asked"]) == (1, 1, 2, 8)
    assert found["kl"] == 0.05
    assert "--system-prompt Be kind." in out.read_text()
    assert cost.cpu > 0.5  # of the program in the terminal, too
    assert cost.memory > 1e6


def test_heretic_that_has_no_trial_in_time_is_ended(tmp_path: Path) -> None:
    program = tmp_path / "venv" / "bin" / "heretic"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!{sys.executable}\nwhile True: pass\n")
    program.chmod(0o755)
    command = [str(BENCHMARKS / "heretic_run.py"), str(tmp_path / "venv"), "model", "out"]
    command += [str(tmp_path), "told.json", "--system", "", "--cpu-seconds", "0.5"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert "Heretic ended no trial" in done.stderr
    assert not (tmp_path / "told.json").exists()


def test_a_command_that_fails_is_told_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no such luck"):
        cost_of([sys.executable, "-c", "raise SystemExit('no such luck')"], tmp_path / "log")


def test_what_changed_is_rounded_by_ggml_and_nothing_else(original: Path, tmp_path: Path) -> None:
    r = np.random.default_rng(0).standard_normal(256).astype(np.float32)
    r /= np.linalg.norm(r)
    out = tmp_path / "out.gguf"
    with find_gguf(str(original)) as model:
        source, writers = model.gguf, model.named_writers()
        new = {
            one.name: partial(plain_edit.without, source, one.name, one.kind, r) for one in writers
        }
        requantized(source, new, out)
        with GgufSource(out) as edited:
            for one in writers:
                left = new[one.name]()
                along = left @ r if one.kind == "embedding" else r @ left
                assert np.abs(along).max() < 1e-5
                entry = source.tensors[one.name]
                assert bytes(edited.raw(one.name)) == ggml.quantize(left, entry.type).tobytes()
            same = source.tensors.keys() - new.keys()
            assert all(bytes(source.raw(name)) == bytes(edited.raw(name)) for name in same)
            assert changed_in(source, edited).keys() == new.keys()
            assert changed_in(source, source) == {}
