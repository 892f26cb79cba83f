"""Files that were dropped on a page, kept until they were read and no longer than the app."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from convert.base.errors import UserError


class Dropped:
    """A folder of this app for dropped files."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="abl-mlx-dropped-")
        self._files: list[Path] = []

    async def take(self, request: Request) -> Response:
        """Answer a request whose body is a file, called ``name``, with the file's number."""
        name = re.sub(r"[^\w.-]", "_", request.query_params.get("name", ""))[-100:]
        if not name.endswith(".gguf"):
            return JSONResponse({"error": "drop a .gguf file; name a folder instead."}, 400)
        size = request.headers.get("content-length", "")
        if not size.isdecimal() or int(size) > shutil.disk_usage(self._folder.name).free:
            return JSONResponse({"error": "no space is left for a copy: name the file."}, 507)
        place = Path(tempfile.mkdtemp(dir=self._folder.name)) / name
        with open(place, "wb") as out:
            async for piece in request.stream():
                out.write(piece)
        self._files.append(place)
        return JSONResponse({"dropped": len(self._files) - 1})

    @contextmanager
    def file(self, number: Any) -> Iterator[Path | None]:
        """Context manager of a dropped file, at whose end it is deleted; None without a number.

        Raises:
            UserError: when there is no such file.
        """
        if number is None:
            yield None
            return
        if type(number) is not int or not 0 <= number < len(self._files):
            raise UserError("there is no such file: drop it again.")
        place = self._files[number]
        if not place.is_file():
            raise UserError("this file was read already: drop it again.")
        try:
            yield place
        finally:
            place.unlink(missing_ok=True)
