"""Every method of the table from prompts to a written, asked model, on few prompts of the demo."""

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner

from abl_mlx.cli.main import cli
from abl_mlx.directions import methods

#: Of the methods whose constants make them long, shorter ones.
SHORT = {"rdo": {"steps": 2, "prompts": 4, "reply_tokens": 4}}

#: The one needs borderline prompts (tests/commands/test_measurement.py runs it), the other an
#: autoencoder (tests/commands/test_sae.py).
OTHERS = ("over-refusal", "sae")


#: Methods whose every step other tests take; these runs are slow together.
KNOWN = ("winsorized-means", "median-means", "projected", "biprojected", "svd", "probe")

NAMES = [
    pytest.param(one, marks=[pytest.mark.slow] if one in KNOWN else [])
    for one in methods.METHODS
    if one not in OTHERS
]


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_from_prompts_to_an_edited_model(name, tmp_path, monkeypatch):
    table = [
        replace(one, parameters={**one.parameters, **SHORT.get(one.name, {})})
        for one in methods.TABLE
    ]
    monkeypatch.setattr(methods, "TABLE", tuple(table))
    asked = ["run", "demo", "--method", name, "-o", str(tmp_path / "out"), "--limit", "16",
             "--max-tokens", "16"]  # fmt: skip
    result = CliRunner().invoke(cli, asked)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "out" / "abl.json").read_text())
    found = record["direction"]
    assert name == methods.ROME or found["method"] == name
    assert found.get("parameters", {}) == methods.named(name).parameters
    assert record["after"]["harmful_refusal_rate"] <= 0.2
    assert record["kl"]["k1"] <= 0.1
