"""Runs llama.cpp's own converter, for the scripts that record what it makes of tiny folders."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: What a record says of the converter's version.
VERSION = "as in llama-cpp-python 0.3.36"

_RUN = """
import json, sys, traceback
from pathlib import Path
where, pre, more, jobs = map(json.loads, sys.argv[1:])
sys.path.insert(0, where)
if pre is not None:
    from conversion.base import TextModel
    TextModel.get_vocab_base_pre = lambda self, tokenizer: pre
import convert_hf_to_gguf
for source, out, kind in jobs:
    sys.argv = ["convert_hf_to_gguf.py", source, "--outfile", out, "--outtype", kind.lower(), *more]
    try:
        convert_hf_to_gguf.main()
    except BaseException:
        Path(out + ".error").write_text(traceback.format_exc(limit=-2))
"""


@dataclass(frozen=True)
class TheirConverter:
    """The converter.

    Attributes:
        python: the Python that runs it.
        folder: llama.cpp's source.
        only: a part of the names of the models that are wanted.
    """

    python: str
    folder: Path
    only: str

    @classmethod
    def of_arguments(cls) -> TheirConverter:
        """The converter that the arguments of a script name."""
        parser = argparse.ArgumentParser()
        parser.add_argument("--python", required=True)
        parser.add_argument("--llama-cpp", required=True, type=Path)
        parser.add_argument("--only", default="", help="a part of the names of models")
        given = parser.parse_args()
        return cls(given.python, given.llama_cpp.resolve(), given.only)

    def written(
        self,
        names: Sequence[str],
        write: Callable[[Path, str], Path],
        kinds: Sequence[str],
        *more: str,
        pre: str | None = None,
    ) -> Iterator[tuple[str, str, Path]]:
        """Yield (model, file type, GGUF that the converter wrote); its errors go to stderr.

        A file is there only until the next one is asked for.

        Args:
            names: the models.
            write: makes a model's folder at a path and returns the folder.
            kinds: the file types.
            more: further arguments of the converter.
            pre: the name of the pre-tokenizer of every model; None for what the converter finds.
        """
        with tempfile.TemporaryDirectory() as scratch:
            jobs, places = [], {}
            for at, name in enumerate(one for one in names if self.only in one):
                folder = write(Path(scratch) / f"model{at}", name)
                for kind in kinds:
                    places[name, kind] = Path(scratch) / f"{at}-{kind}.gguf"
                    jobs.append([str(folder), str(places[name, kind]), kind])
            self._run([str(self.folder), pre, more, jobs])
            for (name, kind), path in places.items():
                error = Path(f"{path}.error")
                if error.exists():
                    print(f"{name} {kind}: {error.read_text()}", file=sys.stderr)
                    continue
                # The converter puts "mmproj-" before the name of a projector.
                projector = path.with_name(f"mmproj-{path.name}")
                yield name, kind, projector if projector.exists() else path

    def _run(self, arguments: Sequence[Any]) -> None:
        command = [self.python, "-c", _RUN, *map(json.dumps, arguments)]
        environment = {**os.environ, "PYTHONPATH": ""}
        subprocess.run(command, env=environment, stderr=subprocess.DEVNULL, check=False)
