"""Protected concepts: the formula in float64, a planted direction, and a run with --protect."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from abl_mlx.choices import Measuring
from abl_mlx.cli.main import cli
from abl_mlx.commands import find
from abl_mlx.demo import MODEL_PATH
from abl_mlx.directions import protecting
from abl_mlx.inputs import prompts
from abl_mlx.models.chat_model import load
from abl_mlx.models.writers import find_writers
from convert.base.errors import UserError
from tests.directions.test_methods import D, cosine, planted, unit


def test_the_residual_is_that_of_a_ridge_regression():
    rng = np.random.default_rng(0)
    rows, atoms = rng.normal(size=(2, 9)), rng.normal(size=(3, 9))
    a = np.stack([unit(one) for one in atoms]).T
    expected = [r - a @ np.linalg.inv(a.T @ a + 0.3 * np.eye(3)) @ a.T @ r for r in rows]
    np.testing.assert_allclose(protecting.residual(rows, atoms, 0.3), expected, atol=1e-12)
    # Along one atom a share of λ / (1 + λ) is left; what is orthogonal to all stays.
    left = protecting.residual(a.T[:1], a.T[:1], 0.25)
    np.testing.assert_allclose(left, a.T[:1] * 0.2, atol=1e-12)
    beside = rows[:1] - rows[:1] @ np.linalg.pinv(a.T) @ a.T
    np.testing.assert_allclose(protecting.residual(beside, atoms), beside, atol=1e-9)


def test_a_planted_direction_is_found_under_a_concept_that_harmful_prompts_share():
    harmful, harmless, r = planted()
    rng = np.random.default_rng(1)
    concept = unit(rng.normal(size=D))
    concept = unit(concept - r * (concept @ r))
    about = harmless + 6 * concept + rng.normal(size=harmless.shape)
    mixed = (harmful + 8 * concept).mean(axis=0) - harmless.mean(axis=0)
    assert cosine(mixed, r) < 0.8
    atom = about.mean(axis=0) - harmless.mean(axis=0)
    assert cosine(protecting.residual(mixed[None], atom[None])[0], r) >= 0.99


def concept_file(folder: Path) -> Path:
    """Allowed prompts of the demo in two concepts."""
    texts = prompts.load_demo().harmless.train.texts
    lines = [
        json.dumps({"text": text, "category": "first" if n % 2 else "second"})
        for n, text in enumerate(texts[:48])
    ]
    path = folder / "concepts.jsonl"
    path.write_text("\n".join(lines))
    return path


def test_a_run_leaves_the_concepts_and_ends_refusals(tmp_path):
    path = concept_file(tmp_path)
    out = tmp_path / "out"
    asked = ["run", "demo", "-o", str(out), "--limit", "32", "--max-tokens", "16"]
    result = CliRunner().invoke(cli, [*asked, "--protect", str(path)])
    assert result.exit_code == 0, result.output
    record = json.loads((out / "abl.json").read_text())
    assert record["options"]["protect"] == str(path)
    assert record["direction"]["parameters"] == {"ridge": protecting.RIDGE}
    assert all(0 < one["unprotected"] <= 1.001 for one in record["scores"])
    assert record["after"]["harmful_refusal_rate"] <= 0.1


def test_what_does_not_go_with_it_and_too_few_prompts_are_told(tmp_path):
    chat, sets = load(MODEL_PATH), prompts.load_demo()
    writers = find_writers(chat)
    path = tmp_path / "few.txt"
    path.write_text("Plan a garden.")
    with pytest.raises(UserError, match=r"--protect .*few.txt: few has 1 of the 16 prompts"):
        find.find_direction(chat, writers, sets, Measuring.of(protect=str(path)))
    with pytest.raises(UserError, match="--protect and --method rdo do not go together"):
        find.find_direction(chat, writers, sets, Measuring.of(protect=str(path), method="rdo"))
