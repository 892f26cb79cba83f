"""The program `ollama`: what it needs is checked beforehand, and it is run to create a model."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from convert.base.errors import OPTION, UserError
from convert.ollama.store import contains, parse_name


def check_create(name: str) -> None:
    """Check, before any long work, that `ollama create` can succeed.

    Raises:
        UserError: when Ollama would not accept the name, it has a model of this name already, or
            there is no `ollama` program.
    """
    wanted = parse_name(name)
    if contains(wanted):
        raise UserError(
            f"{OPTION} {name}: Ollama has a model {wanted} already; give another name, or "
            f"remove that one with `ollama rm {shlex.quote(name)}`.",
            option="ollama_create",
        )
    if shutil.which("ollama") is None:
        raise UserError(
            f"{OPTION} {name}: there is no program `ollama` here; install Ollama "
            "(https://ollama.com), or leave the flag out and use the Modelfile where it is.",
            option="ollama_create",
        )


def ollama_create(name: str, modelfile: Path) -> None:
    """Run `ollama create NAME -f MODELFILE`, with its output on standard error.

    Args:
        name: the new model's name in Ollama.
        modelfile: the file, beside the GGUF that it names.

    Raises:
        UserError: when there is no such file or program, or the program fails. The message has the
            program's last line and the command to repeat by hand. The written files stay.
    """
    parse_name(name)
    path = Path(modelfile).absolute()
    if not path.is_file():
        raise UserError(f"there is no {modelfile} to make {name} of: was the GGUF split?")
    arguments = ["create", name, "-f", str(path)]
    by_hand = shlex.join(["ollama", *arguments])
    program = shutil.which("ollama")
    if program is None:
        raise UserError(
            f"there is no program `ollama` here to make {name}: run `{by_hand}` where Ollama is "
            "installed."
        )
    last = ""
    try:
        with subprocess.Popen(
            [program, *arguments],
            cwd=path.parent,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", file=sys.stderr, flush=True)
                last = _TERMINAL.sub("", line).strip() or last
    except OSError as error:
        raise UserError(
            f"{program} could not be started ({error.strerror}): run `{by_hand}` by hand."
        ) from None
    if process.returncode != 0:
        why = last.removeprefix("Error: ").rstrip(".") or f"exit status {process.returncode}"
        raise UserError(f"ollama could not make {name} ({why}): mend that and run `{by_hand}`.")


# Escape sequences with which Ollama moves and hides the cursor while it shows its progress.
_TERMINAL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[@-_]")
