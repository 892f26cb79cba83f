"""Several processes of one command give what one process gives, or nothing at all."""

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from abl_mlx.demo import MODEL_PATH
from tests.support.command import abl_mlx
from tests.support.command import fails as abl_mlx_fails
from tests.support.launched import by_mlx_launch, ended, free_ports, started, wait_for

SPLIT = "--split-model"
RUN = "run", "demo", "--quick", "--max-tokens", "16"

#: What differs between two runs of one process, too.
OF_A_RUN = {"seconds", "outputs", "output"}


def same(one, other, at=""):
    """Compare two records: figures within float32's rounding, and all else exactly."""
    if isinstance(one, dict):
        keys = (one.keys() | other.keys()) - OF_A_RUN
        # The hash of the direction's bytes shows the last bit.
        for key in keys - {"sha256"} if "layer" in one else keys:
            if key != "direction" or isinstance(one[key], dict):
                same(one[key], other[key], f"{at}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), at
        for number, pair in enumerate(zip(one, other, strict=True)):
            same(*pair, f"{at}/{number}")
    elif at.endswith("/float32"):
        first, second = (np.frombuffer(base64.b64decode(text), "<f4") for text in (one, other))
        assert first == pytest.approx(second, abs=1e-5), at
    elif isinstance(one, float) and isinstance(other, float):
        assert one == pytest.approx(other, rel=2e-3, abs=2e-5), at
    else:
        assert one == other, at


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return abl_mlx(*RUN, "-o", tmp_path_factory.mktemp("alone") / "out")


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_run_has_the_record_of_one_process(alone, tmp_path, count):
    record = by_mlx_launch(count, *RUN, "-o", str(tmp_path / "out"))
    same(alone, record)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["out"]
    names = {one.name for one in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "abl.json", "README.md", "report.html"} <= names


@pytest.mark.slow
def test_a_split_model_has_the_record_of_a_whole_one(alone, tmp_path):
    processes = started(tmp_path, [[*RUN, "-o", str(tmp_path / "out"), "--json", SPLIT]] * 2)
    (code, _, printed), (other, _, nothing) = ended(processes)
    assert (code, other, nothing) == (0, 0, "")
    same(alone, json.loads(printed))


def test_a_model_is_split_among_several_processes_only(tmp_path):
    said = abl_mlx_fails(*RUN, "-o", tmp_path / "out", SPLIT)
    assert "start several" in said


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_killing_one_process_ends_all_and_leaves_nothing(tmp_path, victim):
    out = tmp_path / "made" / "out"
    processes = started(tmp_path, [[*RUN, "-o", str(out)]] * 2)
    wait_for(processes[0], "ask the model as it is")
    os.kill(processes[victim].pid, signal.SIGKILL)
    found = ended(processes)
    assert not out.exists()
    assert found[victim][0] == -signal.SIGKILL
    code, said, printed = found[1 - victim]
    assert (code, printed) == (1, "")
    assert "connection to another process" in said


def in_lockstep(tmp_path, *failing):
    """Two ranks that exchange arrays without an end, and so wait for each other in native code."""
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(2)]))
    out = str(tmp_path / "made" / "out")
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.support.lockstep", out, *failing],
            env={**os.environ, "MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_ends_that_waits_in_native_code_for_one_that_was_killed(tmp_path, victim):
    """MLX itself lets it wait forever in most of such cases."""
    processes = in_lockstep(tmp_path)
    assert processes[0].stdout.readline() == "runs\n"
    assert list((tmp_path / "made").iterdir())
    processes[victim].kill()
    code, said, _ = ended(processes)[1 - victim]
    assert (code, "connection to another process" in said) == (1, True)
    if victim == 1:
        assert not (tmp_path / "made").exists()


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_inside_of_a_split_model_ends_the_ranks_that_wait_there(tmp_path, failing):
    found = ended(in_lockstep(tmp_path, str(failing)))
    assert [code for code, *_ in found] == [1, 1]
    assert found[failing][1] == "Error: this layer has no memory."
    assert "connection to another process" in found[1 - failing][1]
    assert not (tmp_path / "made").exists()


def damaged(tmp_path: Path, change) -> list[list[str]]:
    """The commands of two ranks whose copies of the demo differ."""
    commands = []
    for rank in range(2):
        folder = tmp_path / str(rank) / "model"
        shutil.copytree(MODEL_PATH, folder)
        if rank:
            change(folder / "model.safetensors")
        commands.append(["measure", str(folder), "-o", str(tmp_path / "d.safetensors"), "--quick"])
    return commands


def another_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-4096])


@pytest.mark.parametrize(
    ("change", "says"),
    [(another_bit, "the model of rank 1"), (truncated, "rank 1 of 2: ")],
)
def test_an_unequal_model_ends_all_before_anything_is_measured(tmp_path, change, says):
    found = ended(started(tmp_path, damaged(tmp_path, change)))
    assert [code for code, *_ in found] == [1, 1]
    assert says in found[0][1]
    assert found[1][1] == ""
    assert not (tmp_path / "d.safetensors").exists()


def test_a_command_for_one_process_says_so(tmp_path):
    found = ended(started(tmp_path, [["chat", "demo"]] * 2))
    assert [code for code, *_ in found] == [2, 2]
    assert "runs in one process" in found[0][1]
    assert found[1][1] == ""


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_of_one_process_ends_all_and_leaves_nothing(tmp_path, rank):
    """The weights are 5 MB, so the disk is full in the middle of them."""
    commands = [[*RUN, "-o", str(tmp_path / "made" / "out")]] * 2
    found = ended(started(tmp_path, commands, largest={rank: 3_000_000}))
    assert [code for code, *_ in found] == [1, 1]
    assert ("rank 1 of 2: " in found[0][1]) == (rank == 1)
    assert found[1][1] == ""
    assert not (tmp_path / "made").exists()


@pytest.mark.slow
def test_a_gguf_is_edited_in_turn_to_the_same_bytes(tmp_path):
    """The edited tensors, computed by two ranks, are those of one; so is what an audit finds."""
    abl_mlx("convert", "demo", tmp_path / "demo-Q4_K_M.gguf", "--quantize", "Q4_K_M")
    direction = tmp_path / "d.safetensors"
    abl_mlx("measure", "demo", "-o", direction, "--quick")
    command = "apply", str(direction), str(tmp_path / "demo-Q4_K_M.gguf"), "-o"
    one = abl_mlx(*command, tmp_path / "one" / "out.gguf")
    two = by_mlx_launch(2, *command, str(tmp_path / "two" / "out.gguf"))
    same(one, two)
    first, second = ((tmp_path / name / "out.gguf").read_bytes() for name in ("one", "two"))
    assert first == second
    audited = "audit", str(tmp_path / "one" / "out.gguf")
    same(abl_mlx(*audited), by_mlx_launch(2, *audited))
