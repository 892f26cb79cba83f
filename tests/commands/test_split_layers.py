"""`--split-model` where mlx-lm can share out layers only: qwen3_next and bailing_hybrid."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import quantize_model

from abl_mlx.choices import Editing, Finding, RunOptions, Searching
from abl_mlx.commands import streaming
from abl_mlx.directions.trial import Trial
from abl_mlx.edits.edit import Edit
from abl_mlx.models.layer_stages import has_stages, in_stages
from abl_mlx.outputs.model_file import find_model
from abl_mlx.support import ranks
from convert.base.errors import UserError
from tests.commands.test_several_processes import another_bit, same
from tests.support import tiny, zoo
from tests.support.command import abl_mlx
from tests.support.launched import by_mlx_launch, ended, free_ports, started

#: A random model has no refusal, and the layer is no matter.
ASKED = "--quick", "--anyway", "--layer", "1"


def folder(place: Path, arch: str, bits: int | None = None, **sizes: int) -> Path:
    """A tiny model with layers of each kind that its architecture has."""
    place.mkdir()
    special = tiny.write_tokenizer(place, "bpe")
    settings = {**special, **zoo.config(arch), "vocab_size": tiny.VOCAB_SIZE, **sizes}
    model = zoo.build(settings)
    if bits is not None:
        model, settings = quantize_model(model, settings, 32, bits)
    (place / "config.json").write_text(json.dumps(settings))
    mx.save_safetensors(str(place / "model.safetensors"), dict(tree_flatten(model.parameters())))
    return place


def test_a_run_has_the_record_and_the_bytes_of_one_process(tmp_path: Path) -> None:
    model = str(folder(tmp_path / "model", "qwen3_next"))
    outs = [tmp_path / name / "out" for name in ("one", "two")]
    run = "run", model, *ASKED, "--max-tokens", "6", "-o"
    alone = abl_mlx(*run, outs[0])
    same(alone, by_mlx_launch(2, *run, str(outs[1]), "--split-model"))
    first, second = ((out / "model.safetensors").read_bytes() for out in outs)
    assert first == second


def test_layers_of_a_quantized_model_are_shared_out_unevenly(tmp_path: Path) -> None:
    model = str(folder(tmp_path / "model", "bailing_hybrid", 4, hidden_size=64))
    measure = "measure", model, *ASKED, "-o"
    alone = abl_mlx(*measure, tmp_path / "one.safetensors")
    commands = [[*measure, str(tmp_path / "two.safetensors"), "--json", "--split-model"]] * 2
    (code, _, printed), (other, _, nothing) = ended(started(tmp_path, commands))
    assert (code, other, nothing) == (0, 0, "")
    same(alone, json.loads(printed))


def test_more_processes_than_layers_are_refused(tmp_path: Path) -> None:
    model = folder(tmp_path / "model", "bailing_hybrid")
    command = ["measure", str(model), *ASKED, "-o", str(tmp_path / "d.safetensors")]
    found = ended(started(tmp_path, [[*command, "--split-model"]] * 4))
    assert [code for code, *_ in found] == [1] * 4
    assert "a model of 3 layers cannot be split among 4 processes" in found[0][1]


@pytest.mark.parametrize(
    ("flag", "given"),
    [
        ("--heads", {"editing": Editing(heads="4")}),
        ("--experts", {"editing": Editing(experts="4")}),
        ("--method rome", {"finding": Finding(method="rome")}),
        ("--learn-strengths", {"searching": Searching(learn_strengths=2)}),
    ],
)
def test_flags_that_look_inside_layers_are_refused(
    flag: str, given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank would find something else, or nothing, inside the layers of others."""
    model = folder(tmp_path / "model", "qwen3_next")
    monkeypatch.setattr(ranks, "_lockstep", True)
    with find_model(str(model), None) as found:
        with pytest.raises(UserError, match=f"{flag} needs every layer whole in one process"):
            streaming.chosen(found, RunOptions(**given))
        streaming.chosen(found, RunOptions())


def test_a_choice_uses_no_gradients_where_layers_are_shared_out() -> None:
    """A rank knows the derivatives of its own layers only, and would choose another edit."""
    trial = Trial.__new__(Trial)
    trial._chat = zoo.chat("qwen3_next")
    assert not has_stages(trial._chat.model)
    in_stages(trial._chat.model, mx.distributed.init())
    edit = Edit(mx.ones((1, trial._chat.width)))
    assert trial.slopes(edit, np.ones((2, 4)), 4) is None


def test_unequal_files_are_refused(tmp_path: Path) -> None:
    models = [folder(tmp_path / name, "qwen3_next") for name in ("one", "two")]
    another_bit(models[1] / "model.safetensors")
    commands = [
        ["measure", str(one), *ASKED, "-o", str(tmp_path / "d.safetensors"), "--split-model"]
        for one in models
    ]
    found = ended(started(tmp_path, commands))
    assert [code for code, *_ in found] == [1, 1]
    assert "the model of rank 1" in found[0][1]
    assert not (tmp_path / "d.safetensors").exists()


#: Compares a shared-out model with the whole one, as one rank of two.
COMPARED = """
import json, sys
import mlx.core as mx
from pathlib import Path
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model
from abl_mlx.models.hooks import around
from abl_mlx.models.layer_stages import in_stages

group = mx.distributed.init()
part, whole = (load_model(Path(sys.argv[1]), lazy=True)[0] for _ in range(2))
if sys.argv[2] == "mixed":  # as checkpoints are that keep norms and biases of routers in float32
    for model in (part, whole):
        model.set_dtype(mx.bfloat16)
        for _, module in model.named_modules():
            for name, value in list(module.items()):
                if isinstance(value, mx.array) and value.ndim == 1:
                    module[name] = value.astype(mx.float32)
in_stages(part, group)
x, y = mx.array([[5, 6, 7, 8, 9], [1, 2, 3, 4, 5]]), mx.array([[5], [1]])
caches = [make_prompt_cache(model) for model in (part, whole)]
differences = [mx.abs(part(x) - whole(x)).max().item()]
for tokens in (x, y, y):
    one, other = (m(tokens, cache=c) for m, c in zip((part, whole), caches, strict=True))
    # Caches alone are evaluated first, as after each part of a long prompt.
    mx.eval([one.state for one in caches[0]])
    differences.append(mx.abs(one - other).max().item())

def loss(model, strength):
    with around([(list(model.layers)[1], lambda call, *a, **k: strength * call(*a, **k))]):
        # Two passes in one graph, whose exchanges a rank could make in any order.
        return (model(x).square().mean() + 2 * model(y).square().mean()).astype(mx.float32)

slopes = [mx.grad(lambda s: loss(model, s))(mx.array(1.0)).item() for model in (part, whole)]
sizes = [sum(value.size for _, value in tree_flatten(m.parameters())) for m in (part, whole)]
print(json.dumps([differences, slopes, sizes]))
"""


@pytest.mark.parametrize(
    ("arch", "types"),
    [("qwen3_next", "float32"), ("bailing_hybrid", "float32"), ("qwen3_next", "mixed")],
)
def test_every_rank_has_the_logits_and_gradients_of_the_whole_model(
    arch: str, types: str, tmp_path: Path
) -> None:
    model = folder(tmp_path / "model", arch)
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(2)]))
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", COMPARED, str(model), types],
            env={**os.environ, "MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank)},
            stdout=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    held = []
    for one in ranks:
        differences, (slope, expected), (part, whole) = json.loads(one.communicate(timeout=120)[0])
        assert differences == [0, 0, 0, 0]
        assert slope == pytest.approx(expected, rel=1e-5)
        assert expected != 0
        held.append(part / whole)
    outside = sum(held) - 1  # embedding, norm and output head, which both ranks have
    assert max(held) < 1
    assert 0 < outside < min(held)
