"""What a killed run leaves is removed by the next one; a living run is not disturbed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from abl_mlx.behaviour.journal import Journal
from convert.base import atomic, locks, scratch
from convert.base.atomic import check_new, claim, claims, new_file, new_files, new_folder
from convert.base.errors import UserError
from tests.support.command import fails

#: Writes into whatever ``manager(path)`` yields, says so, and waits to be killed.
WRITES = """
import sys, time
from pathlib import Path
from convert.base.atomic import claim, claims, new_file, new_files, new_folder
from convert.base.scratch import scratch
path = Path(sys.argv[1])
def fill(folder):
    (folder / "a").write_text("a")
    (folder / "b").write_text("b")
managers = {"new_file": new_file, "new_files": new_files, "new_folder": new_folder}
kind = sys.argv[2]
if kind == "claim":
    with claims():
        claim(path)
        print("begun", flush=True)
        time.sleep(600)
with scratch() as temporary, managers[kind](path) as staged:
    fill(temporary)
    staged.write_text("half") if kind == "new_file" else fill(staged)
    print("begun", flush=True)
    time.sleep(600)
"""

KINDS = ("claim", "new_file", "new_files", "new_folder")


@contextmanager
def writing(path: Path, kind: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", WRITES, path, kind], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "begun\n"
            yield process
        finally:
            process.kill()


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own for temporary folders, for this process and the others."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_killed_run_left_is_removed_by_the_next(
    kind: str, tmp_path: Path, temporary: Path
) -> None:
    path = tmp_path / "deep" / "out"
    with writing(path, kind):
        pass
    assert (tmp_path / "deep" / ".out.partial").is_dir()
    assert not path.exists()
    with new_file(path) as staged, scratch.scratch() as folder:
        assert [entry.name for entry in temporary.iterdir()] == [folder.parent.name]
        assert not staged.exists()
        staged.write_text("whole")
    assert [entry.name for entry in path.parent.iterdir()] == ["out"]
    assert path.read_text() == "whole"
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_the_second_of_two_runs_is_refused(kind: str, tmp_path: Path, temporary: Path) -> None:
    path = tmp_path / "out"
    with writing(path, kind):
        left = sorted(str(one) for one in tmp_path.rglob("*"))
        for call in (check_new, claim):
            with pytest.raises(UserError, match="out is being written by another run"):
                call(path)
        for manager in (new_file, new_files, new_folder):
            with pytest.raises(UserError, match="another run"), manager(path):
                pytest.fail("the block must not begin")
        scratch.sweep()
        assert sorted(str(one) for one in tmp_path.rglob("*")) == left
    check_new(path)


def test_the_command_line_refuses_it_before_any_work(tmp_path: Path) -> None:
    with writing(tmp_path / "out", "claim"):
        assert "another run" in fails("run", "demo", "-o", tmp_path / "out")
    with writing(tmp_path / "d.safetensors", "claim"):
        assert "another run" in fails("measure", "demo", "-o", tmp_path / "d.safetensors")


def test_a_claim_lasts_until_the_output_is_written_or_the_command_ends(tmp_path: Path) -> None:
    path, other = tmp_path / "deep" / "out", tmp_path / "other"
    with claims():
        claim(path)
        claim(other)
        check_new(path)  # by the same command
        assert (tmp_path / "deep" / ".out.partial").is_dir()
        with new_folder(path) as staged:
            (staged / "a").write_text("a")
        assert sorted(entry.name for entry in path.parent.iterdir()) == ["out"]
    assert not (tmp_path / ".other.partial").exists()
    with claims():
        claim(tmp_path / "new" / "deep" / "out")
    assert not (tmp_path / "new").exists()


def test_names_that_a_killed_run_gave_in_part_are_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between two renames: the one file of the output goes, one of the user's stays."""
    path = tmp_path / "out.gguf"
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from convert.base import atomic\n"
        "replace = os.replace\n"
        "def once(*names):\n"
        "    replace(*names)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "atomic.os.replace = once\n"
        "with atomic.new_files(Path(sys.argv[1])) as staged:\n"
        "    (staged / 'out.README.md').write_text('card')\n"
        "    (staged / 'out.gguf').write_text('model')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, path])
    assert done.returncode == -signal.SIGKILL
    assert [one.name for one in tmp_path.glob("out.*")] == ["out.README.md"]
    (tmp_path / "out.gguf").write_text("of the user")
    with pytest.raises(UserError, match="already exists"):
        check_new(path)
    assert [one.name for one in tmp_path.glob("*out.*")] == ["out.gguf"]


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("kept")
    (tmp_path / ".link.partial").symlink_to(precious)
    shutil.copytree(precious, tmp_path / ".out.partial")
    for name in ("link", "out"):
        with pytest.raises(UserError, match="is in the way"):
            check_new(tmp_path / name)
    assert (precious / "file").read_text() == "kept"
    assert (tmp_path / ".out.partial" / "file").read_text() == "kept"


def test_without_locks_a_second_run_is_refused_and_told_the_mend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Network file systems may have none: nothing tells a dead run from a living one there."""

    def unknown(descriptor: int, operation: int) -> None:
        raise OSError(locks.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", unknown)
    path = tmp_path / "out"
    with new_file(path) as staged:
        staged.write_text("whole")
        with pytest.raises(UserError, match=r"no locks to tell .*remove the folder"):
            check_new(path)
    assert os.listdir(tmp_path / "temporary") == []
    assert sorted(one.name for one in tmp_path.iterdir()) == ["out", "temporary"]


def test_two_evaluations_or_searches_do_not_share_a_journal(tmp_path: Path) -> None:
    from abl_mlx.search import journal

    held = Journal(tmp_path / "j.jsonl", strict=True)
    with pytest.raises(UserError, match="in use by another evaluation"):
        Journal(tmp_path / "j.jsonl", strict=True)
    held.close()
    Journal(tmp_path / "j.jsonl", strict=True).close()

    path = tmp_path / "s.journal"
    search = journal.Journal(path, {"seed": "0"})
    with pytest.raises(UserError, match="in use by another search"):
        journal.Journal(path, {"seed": "0"})
    search.close()
    os.symlink(path, tmp_path / "s.journal.lock")  # of a process that was killed meanwhile
    journal.Journal(path, {"seed": "0"}).close()
    assert not (tmp_path / "s.journal.lock").is_symlink()


def test_an_exception_while_the_place_is_made_lets_go_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(atomic._Place, "_clear", interrupted)
        with pytest.raises(KeyboardInterrupt):
            check_new(tmp_path / "out")
    check_new(tmp_path / "out")
