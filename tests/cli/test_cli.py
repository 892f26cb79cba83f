"""The command line: exit codes, one sentence on stderr, one JSON object on stdout."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from click.testing import CliRunner

from abl_mlx.cli.main import cli
from tests.support import tiny_gguf
from tests.support.gguf_recipes import RECIPES


def call(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def test_help_imports_nothing_heavy():
    """What makes `--help` slow is imports; so none of the heavy ones may happen."""
    code = (
        "import sys; from abl_mlx.cli.main import cli\n"
        "try: cli(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'mlx', 'mlx.core', 'mlx_lm', 'numpy', 'transformers', 'gguf', 'pyarrow'}\n"
        "print('HEAVY', sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "HEAVY []" in done.stderr
    assert "Usage:" in done.stdout


def test_work_on_a_gguf_imports_neither_mlx_lm_nor_transformers(tmp_path):
    """They take seconds, and only a model that runs needs them."""
    source, out = tmp_path / "tiny.gguf", tmp_path / "out.gguf"
    tiny_gguf.write(source, RECIPES["llama"])
    width = RECIPES["llama"].tensors["token_embd.weight"][1]
    np.save(tmp_path / "r.npy", np.random.default_rng(0).normal(size=width).astype(np.float32))
    commands = [
        ["inspect", source],
        ["apply", tmp_path / "r.npy", source, "-o", out],
        ["diff", source, out],
        ["audit", out],
        ["audit", out, "--base", source],
    ]
    code = (
        "import json, sys; from abl_mlx.cli.main import cli\n"
        "for arguments in json.loads(sys.argv[1]):\n"
        "    cli([*arguments, '--json'], standalone_mode=False)\n"
        "    heavy = sorted({'mlx_lm', 'transformers'} & set(sys.modules))\n"
        "    assert not heavy, f'{arguments[0]} imports {heavy}'"
    )
    asked = json.dumps([[str(one) for one in command] for command in commands])
    done = subprocess.run([sys.executable, "-c", code, asked], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n{") == len(commands) - 1, done.stdout[:300]


@pytest.mark.parametrize("command", ["run", "measure", "apply", "eval", "inspect"])
def test_every_command_has_help(command):
    result = call(command, "--help")
    assert result.exit_code == 0
    assert "--json" in result.output


@pytest.mark.parametrize(
    "arguments",
    [
        ["nosuch"],
        ["run"],
        ["run", "demo"],
        ["run", "demo", "-o", "x", "--layers", "two"],
        ["run", "demo", "-o", "x", "--layers", "5-2"],
        ["run", "demo", "-o", "x", "--max-kl", "-1"],
        ["measure", "demo", "-o", "x.safetensors", "--position", "0"],
    ],
)
def test_usage_errors_exit_with_2(arguments):
    assert call(*arguments).exit_code == 2


@pytest.fixture
def place(tmp_path, tiny_folder):
    """A folder with a model, a direction, prompt files and an existing output."""
    np.save(tmp_path / "r.npy", np.random.default_rng(0).normal(size=64).astype(np.float32))
    np.save(tmp_path / "wide.npy", np.ones(65, np.float32))
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "some.txt").write_text("\n".join(f"Prompt {n}?" for n in range(40)))
    (tmp_path / "few.txt").write_text("One?\nTwo?\n")
    (tmp_path / "taken").mkdir()
    (tmp_path / "plain").write_text("a file")
    (tmp_path / "model").symlink_to(tiny_folder("llama"))
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["run", "{}/nosuch", "-o", "{}/out"], "nosuch"),
        (["run", "{}/model", "-o", "{}/taken"], "taken"),
        (["run", "{}/model", "-o", "{}/plain/out"], "plain"),
        (["run", "{}/model", "-o", "/proc/out"], "/proc"),
        (["run", "{}/model", "-o", "{}/out", "-o", "{}/out"], "twice"),
        (["run", "{}/model", "-o", "{}/out.safetensors"], "out.safetensors"),
        (["run", "{}/model", "-o", "{}/out", "--harmful", "{}/some.txt"], "--harmless"),
        (
            ["run", "{}/model", "-o", "{}/out", "--harmful", "{}/empty.txt",
             "--harmless", "{}/some.txt"],
            "empty.txt",
        ),
        (
            ["run", "{}/model", "-o", "{}/out", "--harmful", "{}/some.txt",
             "--harmless", "{}/some.txt"],
            "Prompt",
        ),
        (
            ["run", "{}/model", "-o", "{}/out", "--harmful", "{}/few.txt",
             "--harmless", "{}/some.txt"],
            "few.txt",
        ),
        (["run", "{}/model", "-o", "{}/out.gguf", "--quantize", "Q9_Z"], "Q9_Z"),
        (["run", "{}/model", "-o", "{}/out", "--layers", "7-9", "--layer", "0", "--no-embedding"],
         "--layers"),
        (["run", "{}/model", "-o", "{}/out", "--layer", "9"], "--layer 9"),
        (["run", "{}/model", "-o", "{}/out", "--save-replies", "{}/plain"], "plain"),
        (["apply", "{}/nosuch.npy", "{}/model", "-o", "{}/out"], "nosuch.npy"),
        (["apply", "{}/wide.npy", "{}/model", "-o", "{}/out"], "wide.npy"),
        (["apply", "{}/some.txt", "{}/model", "-o", "{}/out"], "some.txt"),
        (["apply", "{}/r.npy", "{}/model", "-o", "{}/out", "--strength", "0"], "--strength"),
        (["apply", "{}/r.npy", "{}/model", "-o", "{}/out", "--quantize", "Q8_0"], "out is none"),
        (["apply", "{}/r.npy", "{}/model", "-o", "{}/out", "--max-leak", "1e-9"], "--max-leak"),
        (["measure", "{}/model", "-o", "{}/direction.txt"], "direction.txt"),
        (["eval", "{}/nosuch.gguf"], "nosuch.gguf"),
        (["inspect", "{}/taken"], "config.json"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence_exit_1_and_leave_nothing(arguments, named, place):
    before = sorted(path.name for path in place.iterdir())
    result = call(*(argument.replace("{}", str(place)) for argument in arguments))
    assert result.exit_code == 1
    assert result.stdout == ""
    message = result.stderr.splitlines()[-1]
    assert message.startswith("Error: ")
    assert named in message
    assert "Traceback" not in result.stderr
    assert sorted(path.name for path in place.iterdir()) == before


def test_json_is_the_only_thing_on_stdout(place):
    """Through a real process: libraries that print, native ones included, must not get there."""
    done = subprocess.run(
        [sys.executable, "-m", "abl_mlx", "apply", place / "r.npy", place / "model",
         "-o", place / "out", "-o", place / "out.gguf", "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    record = json.loads(done.stdout)
    assert record["outputs"] == [str(place / "out"), str(place / "out.gguf")]
    assert record["leak"]["total"] < 0.01
    assert "find the residual writers" in done.stderr
    assert (place / "out.abl.json").exists()
    assert (place / "out.Modelfile").read_text().count("FROM ./out.gguf") == 1


@pytest.mark.parametrize(
    ("number", "step"),
    [
        (signal.SIGINT, "find the residual writers"),
        (signal.SIGINT, "write"),
        (signal.SIGINT, "evaluate out"),
        (signal.SIGTERM, "write"),
        (signal.SIGKILL, "write"),
    ],
)
def test_a_signal_at_any_step_leaves_no_final_name(number, step, place):
    with subprocess.Popen(
        [sys.executable, "-m", "abl_mlx", "run", "demo", "-o", place / "out", "--limit", "8"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as process:
        for line in process.stderr:
            if line == f"· {step}\n":
                time.sleep(0.02)
                process.send_signal(number)
                break
        process.stderr.read()
    assert process.returncode != 0
    assert not (place / "out").exists()
    if number != signal.SIGKILL:
        assert not list(place.glob(".out*"))


def test_inspect_says_what_an_edit_would_touch(tiny_folder):
    result = call("inspect", tiny_folder("gemma2"), "--json")
    record = json.loads(result.stdout)
    assert record["architecture"] == "gemma2"
    assert record["layers"] == 4
    assert record["width"] == 64
    assert record["tied"] is True
    assert record["edit"]["tensors"] == 9
    assert {(w["kind"], w["gain"], w["count"]) for w in record["writers"]} == {
        ("embedding", False, 1),
        ("linear", True, 4),
    }
    assert "down_proj" in call("inspect", tiny_folder("gemma2")).stdout
