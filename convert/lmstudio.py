"""Where LM Studio keeps its models on this machine.

Its home is the folder that ``~/.lmstudio-home-pointer`` names; older versions had
``~/.cache/lm-studio``, newer ones ``~/.lmstudio``. ``downloadsFolder`` in its settings.json names
the folder of models, which is ``models`` in its home otherwise; older versions kept that file with
the system's settings of applications. A model is two levels below that:
``PUBLISHER/NAME/FILE.gguf``, or the files of an MLX folder in ``PUBLISHER/NAME`` (lmstudio.ai:
docs/app/advanced/import-model).

Its program `lms import` files a GGUF there by itself (lmstudio.ai: docs/cli/local-models/import).
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from convert.base import json_text
from convert.base.errors import OPTION, UserError
from convert.base.schema import Refused

#: Longest settings file in bytes that is read.
_LONGEST = 1 << 20


def parse(text: str) -> tuple[str, str]:
    """The publisher and the name in ``PUBLISHER/NAME``.

    Raises:
        UserError: when these are no two plain names.
    """
    parts = text.split("/")
    if len(parts) != 2 or not all(re.fullmatch(r"\w[\w.+-]{0,95}", one, re.ASCII) for one in parts):
        raise UserError(
            f"{OPTION} lmstudio:{text}: write lmstudio:PUBLISHER/NAME, two names of letters, "
            "digits, dots and dashes, such as lmstudio:me/my-model.",
            option="output",
        )
    return parts[0], parts[1]


def models_folder() -> Path:
    """The folder with LM Studio's models.

    Raises:
        UserError: when LM Studio has no home on this machine.
    """
    home = _home()
    for settings in (home / "settings.json", _older_settings()):
        with suppress(OSError, UnicodeDecodeError, Refused):
            if settings.stat().st_size <= _LONGEST:
                said = json_text.parse(settings.read_text(encoding="utf-8"))
                named = said.get("downloadsFolder") if isinstance(said, dict) else None
                if isinstance(named, str) and named and Path(named).expanduser().is_absolute():
                    return Path(named).expanduser()
    return home / "models"


def _older_settings() -> Path:
    if sys.platform == "darwin":
        folder = Path.home() / "Library" / "Application Support"
    else:
        folder = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return folder / "LM Studio" / "settings.json"


def program() -> str | None:
    """The program `lms`, where it is on the PATH."""
    return shutil.which("lms")


def check_import(owner: str, name: str) -> None:
    """Check, before any long work, that `lms import` has a place for OWNER/NAME/NAME.gguf.

    Raises:
        UserError: when LM Studio is not here, or has such a file already.
    """
    place = models_folder() / owner / name / f"{name}.gguf"
    if os.path.lexists(place):
        raise UserError(
            f"{OPTION} lmstudio:{owner}/{name}: {place} already exists; give another name.",
            option="output",
        )


def import_file(path: Path, owner_and_name: str) -> None:
    """Give a GGUF to LM Studio by `lms import`; the file is gone from ``path`` afterwards.

    It is linked where both lie on one disk, else copied: the program asks before it moves a file.

    Args:
        path: the file.
        owner_and_name: ``PUBLISHER/NAME``.

    Raises:
        UserError: when the program fails. The file is still there then.
    """
    found = program() or "lms"
    last = ""
    for how in ("--hard-link", "--copy"):
        arguments = ["import", "-y", "--user-repo", owner_and_name, how, str(path.absolute())]
        try:
            done = subprocess.run(
                [found, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, encoding="utf-8", errors="replace", check=False,
            )  # fmt: skip
        except OSError as error:
            last = f"{found} could not be started: {error.strerror}"
            break
        if done.returncode == 0:
            path.unlink()
            return
        last = next(iter(done.stdout.strip().splitlines()[-1:]), f"exit status {done.returncode}")
    by_hand = shlex.join(["lms", "import", "--user-repo", owner_and_name, str(path)])
    raise UserError(f"`lms import` failed ({last.rstrip('.')}): mend that and run `{by_hand}`.")


def _home() -> Path:
    user = Path.home()
    places = [user / ".cache" / "lm-studio", user / ".lmstudio"]
    with suppress(OSError, UnicodeDecodeError):
        pointer = user / ".lmstudio-home-pointer"
        if pointer.stat().st_size <= _LONGEST:
            lines = pointer.read_text(encoding="utf-8").strip().splitlines()
            places = [*(Path(line) for line in lines[:1]), *places]
    for place in places:
        if place.is_dir():
            return place
    raise UserError(
        f"{OPTION} lmstudio:NAME: LM Studio is not here (no {places[-1]}): start it once, or write "
        "-o FOLDER or -o NAME.gguf.",
        option="output",
    )
