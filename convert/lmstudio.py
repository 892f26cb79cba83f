"""Where LM Studio keeps its models on this machine.

Its home is the folder that ``~/.lmstudio-home-pointer`` names; older versions had
``~/.cache/lm-studio``, newer ones ``~/.lmstudio``. ``downloadsFolder`` in its settings.json names
the folder of models, which is ``models`` in its home otherwise. A model is two levels below that:
``PUBLISHER/NAME/FILE.gguf``, or the files of an MLX folder in ``PUBLISHER/NAME`` (lmstudio.ai:
docs/app/advanced/import-model).
"""

from __future__ import annotations

import re
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
    with suppress(OSError, UnicodeDecodeError, Refused):
        settings = home / "settings.json"
        if settings.stat().st_size <= _LONGEST:
            said = json_text.parse(settings.read_text(encoding="utf-8"))
            named = said.get("downloadsFolder") if isinstance(said, dict) else None
            if isinstance(named, str) and named and Path(named).expanduser().is_absolute():
                return Path(named).expanduser()
    return home / "models"


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
