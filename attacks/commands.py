"""Commands that write something, run in forked processes: for the killer and the full disk."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from attacks.base import FORCED, SHORT

#: Name -> what is typed after abl-mlx; {base} are the sound inputs, {out} is an empty folder.
COMMANDS: dict[str, tuple[str, ...]] = {
    "run": ("run", "{base}/llama", "-o", "{out}/model", "-o", "{out}/model.gguf", *SHORT, *FORCED,
            "--report", "{out}/page.html", "--save-replies", "{out}/replies.jsonl"),
    "run gguf": ("run", "{base}/model.gguf", "-o", "{out}/model.gguf", "-o", "{out}/model",
                 *SHORT, *FORCED, "--max-leak", "1"),
    "apply": ("apply", "{base}/vector.npy", "{base}/llama", "-o", "{out}/model",
              "-o", "{out}/model.gguf", "-o", "{out}/some.adapter"),
    "apply undo": ("apply", "{base}/vector.npy", "{base}/llama", "-o", "{out}/model",
                   "--keep-undo"),
    "apply gguf": ("apply", "{base}/vector.npy", "{base}/model.gguf", "-o", "{out}/model.gguf",
                   "-o", "{out}/model", "-o", "{out}/some.lora.gguf", "--max-leak", "1"),
    "convert": ("convert", "{base}/llama", "{out}/model.gguf"),
    "convert gguf": ("convert", "{base}/model.gguf", "{out}/deep/model"),
    "measure": ("measure", "{base}/llama", "-o", "{out}/found.safetensors", "--limit", "2",
                *FORCED),
    "measure gguf": ("measure", "{base}/model.gguf", "-o", "{out}/found.safetensors", "--plot",
                     "{out}/found.svg", "--limit", "2", *FORCED),
    "undo": ("undo", "{base}/edited", "-o", "{out}/before"),
    "audit": ("audit", "{base}/edited", "-o", "{out}/found.safetensors", "--report",
              "{out}/page.html"),
    "eval": ("eval", "{base}/model.gguf", *SHORT, "--report", "{out}/page.html", "--junit",
             "{out}/junit.xml", "--save-replies", "{out}/replies.jsonl"),
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """The folders that a command uses: sound inputs, outputs, a cache and temporary files."""

    base: Path
    out: Path
    temporary: Path
    cache: Path

    @classmethod
    def make(cls, root: Path) -> Place:
        """All of these folders below ``root``, without the inputs."""
        place = cls(root / "base", root / "out", root / "temporary", root / "cache")
        place.empty()
        return place

    def empty(self) -> None:
        """Make the folders that are written to, empty."""
        for folder in (self.out, self.temporary, self.cache):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()

    def empty_outputs(self) -> None:
        """Remove files with final names; hidden files stay."""
        for entry in self.out.iterdir():
            if not entry.name.startswith("."):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def arguments(self, name: str) -> list[str]:
        """The command's arguments."""
        return [
            word.replace("{base}", str(self.base)).replace("{out}", str(self.out))
            for word in COMMANDS[name]
        ]

    def written(self) -> dict[str, bytes]:
        """Relative path -> content of every file in the output folder."""
        files = sorted(path for path in self.out.rglob("*") if path.is_file())
        return {str(path.relative_to(self.out)): path.read_bytes() for path in files}

    def entries(self) -> list[str]:
        """All paths in the output folder, with hidden files and folders."""
        return sorted(str(path.relative_to(self.out)) for path in self.out.rglob("*"))

    def wrong(self, whole: Mapping[str, bytes]) -> list[str]:
        """Files with final names that differ from what the command writes, and missing files.

        Args:
            whole: the result of `written` after the command had succeeded.
        """
        there = {name: content for name, content in self.written().items() if _is_named(name)}
        found = []
        for name, content in there.items():
            if name not in whole:
                found.append(f"{name} is no output")
            elif name.endswith((".safetensors", ".gguf")) and len(content) != len(whole[name]):
                found.append(f"{name} has {len(content)} of {len(whole[name])} bytes")
            elif not content and whole[name]:
                found.append(f"{name} is empty")
        for folder in {Path(name).parts[0] for name in there if len(Path(name).parts) > 1}:
            inside = [name for name in whole if Path(name).parts[0] == folder]
            if missing := [name for name in inside if name not in there]:
                found.append(f"{folder} is there without {missing}")
        return found


def _is_named(name: str) -> bool:
    return not any(part.startswith(".") for part in Path(name).parts)


def start(
    place: Place, name: str, log: Path | int, prepare: Callable[[], None] | None = None
) -> int:
    """Fork a process that runs a command like the installed program; returns the process id.

    Args:
        log: a file or an open descriptor for its output.
        prepare: called in the new process before the command.
    """
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        descriptor = log if isinstance(log, int) else os.open(log, flags)
        for standard in (1, 2):
            os.dup2(descriptor, standard)
        # Opened anew, since Python's streams remember whether their file was seekable.
        sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False) for n in (1, 2))
        os.environ |= {"TMPDIR": str(place.temporary), "XDG_CACHE_HOME": str(place.cache)}
        tempfile.tempdir = str(place.temporary)
        if prepare is not None:
            prepare()
        sys.argv = ["abl-mlx", *place.arguments(name)]
        from abl_mlx.cli.main import main

        main()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def finish(child: int) -> int:
    """Wait for a process; its exit code, or minus the number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
