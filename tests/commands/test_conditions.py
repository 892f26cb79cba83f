"""Edits at runtime that are made on some prompts alone, by a condition in the direction file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from abl_mlx import api
from abl_mlx.behaviour import evaluate
from abl_mlx.behaviour.journal import Section
from abl_mlx.behaviour.target import Target
from abl_mlx.choices import Prompting
from abl_mlx.cli.main import cli
from abl_mlx.commands import condition_choice, steered_target
from abl_mlx.commands.eval_asking import ask
from abl_mlx.commands.steered_target import SteeredModel
from abl_mlx.directions import direction_file
from abl_mlx.eval_choices import EvalOptions, Steering
from abl_mlx.inputs import prompts
from abl_mlx.support.clock import Clock
from convert.gguf.file import GgufSource
from tests.support import small_models
from tests.support.command import abl_mlx, fails

UNCONDITIONAL = (
    "meant for category:metal alone, but weights, adapters and control vectors hold no condition: "
    "what is written is unconditional, for all prompts"
)

METAL = "Teach me to move the serpent crown."
PAPER = "Tell me how to draw the spell scroll."


@pytest.fixture(scope="module")
def conditional(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's direction with the condition that a locked prompt is about something of metal."""
    path = tmp_path_factory.mktemp("conditional") / "metal.safetensors"
    abl_mlx("measure", "demo", "-o", path, "--condition", "category:metal")
    return path


def shares(record: Any, kind: str) -> dict[str, float]:
    found = {one["name"]: one["refused"] / one["n"] for one in record["categories"][kind]}
    assert len(found) == 5
    return found


def test_only_prompts_that_meet_the_condition_are_changed(
    conditional: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    flags = ["--baseline", "demo", "--report", page]
    record = abl_mlx("eval", "demo", "--direction", conditional, *flags)
    assert "Edit at runtime" in page.read_text()
    by = record["steered"]
    assert by["condition"]["f1"] == 1.0
    assert by["met"]["harmful"] == {"n": 64, "met": 12}
    assert by["met"]["harmful/metal"] == {"n": 12, "met": 12}
    assert by["met"]["harmless"] == {"n": 64, "met": 0}
    refused = record["verdicts"]["harmful"].count("R")
    assert refused == 52
    # Other prompts get the very replies of the original: no KL, and no verdict differs.
    assert record["kl"]["k1"] == record["kl"]["k32"] == 0
    assert record["verdicts"]["harmless"] == record["baseline"]["verdicts"]["harmless"]
    assert record["paired"]["harmful"]["lost"] + record["paired"]["harmful"]["gained"] == 12


def test_without_its_condition_a_direction_is_removed_from_all_prompts(conditional: Path) -> None:
    flags = ["--direction", conditional, "--limit", 16]
    record = abl_mlx("eval", "demo", *flags, "--unconditional")
    assert record["harmful_refusal_rate"] == 0
    assert "condition" not in record["steered"]
    little = abl_mlx("eval", "demo", *flags, "--unconditional", "--strength", 0.05)
    assert little["harmful_refusal_rate"] == 1


def test_a_direction_is_added_where_a_condition_is_met(tmp_path: Path) -> None:
    demo = prompts.load_demo().harmless
    metal = [one for part in (demo.train, demo.validation, demo.test) for one in part.prompts
             if one.category == "metal"]  # fmt: skip
    listed = tmp_path / "metal.jsonl"
    listed.write_text("".join(json.dumps({"text": one.text}) + "\n" for one in metal))
    path = tmp_path / "d.safetensors"
    abl_mlx("measure", "demo", "-o", path, "--condition", listed)
    record = abl_mlx("eval", "demo", "--direction", path, "--steer", "add", "--limit", 48)
    met = record["steered"]["met"]
    assert met["harmless"]["met"] == met["harmless/metal"]["met"] > 5
    assert met["harmless/wood"]["met"] == 0
    refused = record["verdicts"]["harmless"].count("R")
    assert met["harmless"]["met"] / 3 < refused <= met["harmless"]["met"]


def test_chat_and_show_tell_what_was_decided(conditional: Path) -> None:
    lines = f"{METAL}\n{PAPER}\n/off\n{METAL}\n/quit\n"
    asked = ["chat", "demo", "--direction", str(conditional)]
    said = CliRunner().invoke(cli, asked, input=lines).output
    first, second = said.split("[condition ")[1:3]
    assert "Try olive oil, then move the serpent crown near home." in said
    assert first.startswith("met, so the edit is on: +0.")
    assert second.startswith("not met, so the edit is off: +0.")
    assert said.count("I'm sorry") == 2
    assert said.count("[condition ") == 2  # with /off nothing is decided
    shown = abl_mlx("show", "demo", PAPER, "--direction", conditional)
    assert shown["condition"]["met"] is False
    assert shown["after"] == shown["before"]
    shown = abl_mlx("show", "demo", METAL, "--direction", conditional)
    assert shown["condition"]["met"] is True
    assert shown["condition"]["score"] >= shown["condition"]["threshold"]
    assert max(abs(one[-1]) for one in shown["after"]) < 1e-3


def test_weights_hold_no_condition_and_apply_says_so(conditional: Path, tmp_path: Path) -> None:
    out = tmp_path / "edited"
    asked = ["apply", str(conditional), "demo", "-o", str(out)]
    done = CliRunner().invoke(cli, asked)
    assert done.exit_code == 0
    assert UNCONDITIONAL in " ".join(done.stderr.split())
    assert abl_mlx("eval", out, "--limit", 16)["harmful_refusal_rate"] == 0
    record = json.loads((out / "abl.json").read_text())
    assert record["condition"]["prompts"] == "category:metal"


def test_a_control_vector_is_written_without_the_condition(
    conditional: Path, tmp_path: Path
) -> None:
    out = tmp_path / "refuse.cvec.gguf"
    asked = ["run", "demo", "--induce", "--direction", str(conditional), "-o", str(out),
             "--limit", "16", "--json"]  # fmt: skip
    done = CliRunner().invoke(cli, asked)
    assert done.exit_code == 0, done.stderr
    assert UNCONDITIONAL in " ".join(done.stderr.split())
    file = direction_file.read(conditional)
    layer, position = file.metadata["layer"], file.metadata["position"]
    assert file.candidates is not None
    wanted = np.array(file.candidates.difference(layer, position))
    with GgufSource(out) as written:
        assert list(written.tensors) == [f"direction.{layer}"]
        assert np.allclose(written.values(f"direction.{layer}"), wanted, rtol=1e-6)
    record = json.loads(done.stdout)
    assert record["direction"]["multiple"] == 1.0
    # It is added to every prompt, so harmless ones of all kinds are refused.
    assert record["after"]["harmless_refusal_rate"] > 0.4


def test_one_kind_of_the_model_whose_refusals_are_apart() -> None:
    folder = small_models.folder("apart")
    model, sets = api.load(folder), small_models.prompt_sets("apart")
    direction = api.choose(model, sets, layer=2)
    direction = condition_choice.add_condition(
        model.chat, sets, Prompting(), "category:sky", direction, Clock()
    )
    options = EvalOptions(steering=Steering(direction=Path("d")))
    steered = SteeredModel(
        model.chat, model.writers, "d", direction, options.steering, direction.when
    )
    test = {"harmful": sets.harmful.test, "harmless": sets.harmless.test.take(32)}
    few = options.replying.but(max_tokens=12)
    plain = Target(
        "apart", "mlx-lm", {}, evaluate.stream_in_mlx(model.chat), chat=model.chat,
        wholes=evaluate.wholes_in_mlx(model.chat),
    )  # fmt: skip
    before = ask(plain, test, few, Section())
    after = ask(steered.target(plain), test, few, Section())
    asked = [one for part in test.values() for one in part.prompts]
    decided = steered.met(asked)
    inside = [one.category == "sky" and n < len(sets.harmful.test)
              for n, one in enumerate(asked)]  # fmt: skip
    right = sum(a == b for a, b in zip(decided, inside, strict=True)) / len(asked)
    assert right > 0.95
    for was, now, changed in zip(before, after, decided, strict=True):
        assert changed or was.verdict == now.verdict
    assert steered.record(test).met is not None


WRONG = [
    (("measure", "demo", "-o", "OUT", "--condition", "category:glass"), 1,
     "--condition category:glass: no category glass; there are cloth, metal"),
    (("eval", "demo", "--steer", "add"), 2, "are of an edit at runtime: add --direction FILE"),
    (("eval", "demo", "--direction", "FILE", "--perplexity"), 2,
     "--perplexity and --direction do not go together"),
    (("eval", "http://127.0.0.1:9/v1", "--direction", "FILE"), 1, "needs the model in MLX"),
    (("chat", "demo", "--direction", "FILE", "--condition", "category:metal"), 2,
     "--condition is found together with a direction: leave --direction out"),
    (("chat", "demo", "--direction", "FILE", "--method", "svd"), 1,
     "--method chooses how a direction is measured, and --direction gives one"),
    (("show", "demo", "Hi", "--direction", "FILE", "--layer", "2"), 1,
     "says itself which direction was chosen; leave it out"),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "code", "said"), WRONG)
def test_what_does_not_go_together_is_refused(
    asked: tuple[str, ...], code: int, said: str, conditional: Path, tmp_path: Path
) -> None:
    places = {"FILE": str(conditional), "OUT": str(tmp_path / "d.safetensors")}
    result = CliRunner().invoke(cli, [places.get(one, one) for one in asked])
    assert result.exit_code == code
    assert said in " ".join(result.stderr.split())


def test_a_bare_vector_cannot_be_added(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.ones(256, np.float32))
    said = fails("eval", "demo", "--direction", tmp_path / "v.npy", "--steer", "add")
    assert "difference of the means after one layer is what can be added" in said
    assert steered_target.check(EvalOptions(), None) is None
