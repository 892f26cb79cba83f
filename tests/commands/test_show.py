"""`abl-mlx show` reads what the stream holds of the direction, before and after the edit."""

import json

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from abl_mlx.choices import Editing
from abl_mlx.cli.main import cli
from abl_mlx.commands import show
from abl_mlx.commands.session import Steered
from abl_mlx.directions import direction_file
from abl_mlx.models.chat_model import load
from abl_mlx.models.writers import find_writers
from abl_mlx.records.looks import ShowRecord
from convert.base.errors import UserError
from tests.edits.test_edit_kinds import stream
from tests.models.test_writers import random_direction
from tests.support.command import abl_mlx

PROMPT = "How do I plan a garden?"


def made(folder, selected, **options):
    chat = load(folder)
    file = direction_file.DirectionFile(selected(chat))
    return Steered("tiny", chat, find_writers(chat), file, Editing(**options))


@pytest.mark.parametrize("kind", ["one", "two", "each layer"])
def test_the_projection_is_its_formula(kind, tiny_folder):
    def selected(chat):
        if kind == "each layer":
            return mx.stack(
                [random_direction(chat.width, seed) for seed in range(len(chat.layers))]
            )
        count = 1 if kind == "one" else 2
        return mx.concatenate([random_direction(chat.width, seed) for seed in range(count)])

    steered = made(tiny_folder("llama"), selected)
    chat = steered.chat
    tokens = mx.array([chat.encode(PROMPT)])
    found = show.project(steered, PROMPT)
    assert "".join(found.tokens).count("garden") == 1
    states = stream(chat, tokens)
    for layer, rows in enumerate(states):
        vectors = np.array(steered.direction.selected).astype(np.float64)
        q, _ = np.linalg.qr((vectors[layer] if vectors.ndim == 3 else vectors).T)
        along = rows @ q
        expected = np.linalg.norm(along, axis=1) / np.linalg.norm(rows, axis=1)
        np.testing.assert_allclose(np.abs(found.before[layer]), expected, atol=1e-5)
        if kind == "one":
            sign = np.sign(rows @ vectors[0])
            np.testing.assert_array_equal(np.sign(found.before[layer]), sign)
    if kind != "each layer":
        assert np.abs(found.after).max() < 1e-5
    assert np.abs(found.before).max() > 0.05


def test_half_the_layers_leave_something(tiny_folder):
    whole = show.project(made(tiny_folder("llama"), lambda c: random_direction(c.width)), PROMPT)
    part = show.project(
        made(
            tiny_folder("llama"), lambda c: random_direction(c.width), layers=frozenset({0})
        ), PROMPT,
    )  # fmt: skip
    np.testing.assert_array_equal(whole.before, part.before)
    assert np.abs(part.after).max() > 100 * np.abs(whole.after).max()


def test_a_stream_that_is_not_finite_is_told(tiny_folder):
    steered = made(tiny_folder("llama"), lambda chat: random_direction(chat.width))
    norm = steered.chat.layers[1].input_layernorm
    norm.weight = norm.weight * mx.array(float("nan"))
    with pytest.raises(UserError, match="tiny: the residual stream of this prompt is not finite"):
        show.project(steered, PROMPT)


def test_the_command(tmp_path):
    direction = tmp_path / "d.npy"
    np.save(direction, np.random.default_rng(0).normal(size=256).astype(np.float32))
    arguments = ["show", "demo", PROMPT, "--direction", str(direction), "--reply", "3"]
    record = json.loads(CliRunner().invoke(cli, [*arguments, "--json"]).stdout)
    assert np.shape(record["before"]) == (4, len(record["tokens"])) == np.shape(record["after"])
    lines = CliRunner().invoke(cli, arguments).stdout.splitlines()
    assert len(lines) == 2 + len(record["tokens"])
    assert "█" in "".join(lines[2:])
    assert "\x1b[" not in "".join(lines)
    assert "\x1b[3" in show.table(ShowRecord.of(record), color=True)
    missing = CliRunner().invoke(cli, ["show", "demo", PROMPT, "--direction", "none.npy"])
    assert missing.exit_code == 1
    assert "none.npy" in missing.stderr


def test_heads_are_ranked_in_the_terminal_the_record_and_the_page(tmp_path):
    """From the direction file's ranking, and from one that `show` makes."""
    file, page = tmp_path / "d.safetensors", tmp_path / "page.html"
    record = abl_mlx("measure", "demo", "-o", file, "--rank-parts", "--limit", 8, "--layer", 2)
    ranking = record["direction"]["heads"]
    shown = abl_mlx("show", "demo", PROMPT, "--direction", file, "-o", page)
    assert shown["direction"]["heads"] == ranking
    text = show.table(ShowRecord.of(shown))
    first = ranking[0]
    label = f"{first['layer']}.{first['number']}"
    row = next(line for line in text.splitlines() if line.split()[:1] == [label])
    assert float(row.split()[1]) == pytest.approx(first["harmful"], abs=1e-4)
    html = page.read_text()
    assert "Heads and experts" in html
    # The page has them all, in their order.
    places = [html.index(f">{one['layer']}.{one['number']}<") for one in ranking]
    assert places == sorted(places)
    # A file without a ranking.
    bare = tmp_path / "bare.safetensors"
    abl_mlx("measure", "demo", "-o", bare, "--limit", 8, "--layer", 2)
    plain = abl_mlx("show", "demo", PROMPT, "--direction", bare)
    assert "heads" not in plain["direction"]
    assert "writes along" not in show.table(ShowRecord.of(plain))
    ranked = abl_mlx("show", "demo", PROMPT, "--direction", bare, "--rank-parts", "--limit", 8)
    assert ranked["direction"]["heads"] == ranking
