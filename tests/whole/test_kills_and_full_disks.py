"""`attacks.killer` and `attacks.full_disk` are withstood, and find what is planted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from convert.base import scratch
from convert.base.errors import UserError
from tests.support.places import ROOT


def run(*arguments: str, planted: str = "") -> subprocess.CompletedProcess[str]:
    """An attack of one command, with a fault planted into the tool if any is given."""
    program, *rest = arguments
    code = f"{planted}\nimport sys\nfrom attacks.{program} import main\nmain()"
    return subprocess.run(
        [sys.executable, "-c", code, *rest], cwd=ROOT, capture_output=True, text=True, timeout=900
    )


@pytest.mark.slow
def test_kills_are_withstood() -> None:
    ended = run("killer", "--kills", "12")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "12 kills, 0 faults" in ended.stdout


@pytest.mark.slow
def test_full_disks_are_withstood() -> None:
    ended = run("full_disk", "measure", "apply", "convert gguf")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert " 0 faults" in ended.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "planted", "found"),
    [
        (
            ("killer", "--kills", "8", "convert gguf"),
            # Leftovers are never removed, and are there for a while.
            "import time; from convert.base import atomic\n"
            "atomic._Place._clear = lambda self: None\n"
            "named = atomic._name\n"
            "atomic._name = lambda *a, **more: (time.sleep(1), named(*a, **more))[1]",
            "the next run ends with",
        ),
        (
            ("full_disk", "convert"),
            # Written in place.
            "import contextlib; from convert import mlx_to_gguf\n"
            "from abl_mlx.outputs import other_format\n"
            "mlx_to_gguf.new_file = contextlib.contextmanager(lambda path: iter([path]))\n"
            "other_format.new_files = contextlib.contextmanager(lambda path: iter([path.parent]))",
            "bytes",
        ),
    ],
    ids=["leftovers", "in place"],
)
def test_planted_faults_are_found(program: tuple[str, ...], planted: str, found: str) -> None:
    ended = run(*program, planted=planted)
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert found in ended.stdout


def test_a_disk_without_room_for_states_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="set TMPDIR to a larger disk"):
        scratch.array(tmp_path / "states", (1 << 20, 1 << 20, 64))
    kept = scratch.array(tmp_path / "kept", (3, 4))
    kept[:] = 1
    assert (tmp_path / "kept").stat().st_size == 48
    assert kept.sum() == 12
