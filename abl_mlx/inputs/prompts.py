"""Loading prompt sets: the bundled ones, files and Hugging Face datasets.

A direction is a difference between two sets of prompts, so they are checked: no prompt is in two
parts or in both sets, and the same seed gives the same split. Nothing in this module imports MLX;
``huggingface_hub`` and ``pyarrow`` are imported only if a dataset needs them.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

from abl_mlx.inputs.conversations import prompt_of_row
from abl_mlx.inputs.prompt_datasets import Hub, HuggingFaceHub, is_dataset, read_dataset
from abl_mlx.inputs.prompt_files import (
    SUFFIXES,
    jsonl_rows,
    known_suffix,
    listed,
    read_file,
    read_text,
)
from abl_mlx.inputs.sets import Prompt, PromptSet, PromptSets, Split, normalized, split, unique
from convert.base.errors import UserError

BUNDLED = ("harmful", "harmless", "borderline")
"""The names of the bundled sets."""

MINIMUM = 16
"""The smallest number of different prompts that :func:`load_sets` accepts in a set."""

#: What is meant as the name of a file rather than as a message; Qwen3's /no_think is none.
_FILE_NAME = re.compile(r"/?[\w.~:-]+/[\w.~:/-]*|\S+\.(txt|md|json|jsonl|csv)", re.ASCII)

_SETS_FOLDER = Path(__file__).parent / "prompt_sets"
_DEMO_FILE = Path(__file__).parent.parent / "demo" / "prompts.jsonl"


# --------------------------------------------------------------------------- the public verbs


def bundled(name: str) -> PromptSet:
    """One of the sets that come with the package.

    Raises:
        ValueError: when ``name`` is not in :data:`BUNDLED`.
    """
    if name not in BUNDLED:
        raise ValueError(f"no bundled prompt set {name!r}: there are {', '.join(BUNDLED)}")
    path = _SETS_FOLDER / f"{name}.jsonl"
    return PromptSet(f"bundled:{name}", read_file(path, "text", f"bundled {path}"))


def load(spec: str, flag: str, hub: Hub | None = None) -> PromptSet:
    """Prompts from the value that was given for ``flag``.

    ``spec`` is a file, ``.txt`` (a prompt a line; blank lines are skipped), ``.jsonl``, ``.csv`` or
    ``.parquet``, where ``file.csv[column]`` picks a column; or a dataset
    ``owner/name[split][column]`` with split ``train`` and the first of :data:`COLUMNS` by default.
    Where a dataset keeps configurations in folders, ``owner/name[folder/train]`` picks one. A
    field or column ``category`` is read along, and so are those of `inputs.conversations`. A path
    that exists is always a file. The order is kept, and so are duplicates: :func:`split` removes
    them.

    Args:
        flag: named in every error, such as ``--harmful``.
        hub: replaces Hugging Face as the source of dataset files.

    Raises:
        UserError: when the source is missing, unreadable or unreachable, is not UTF-8, or holds a
            row without a prompt. Rows of a dataset without a prompt are skipped, as nobody here
            can mend them.
    """
    path, selectors = _parse(spec, flag)
    if path is not None:
        column = selectors[0] if selectors else None
        return PromptSet(spec, read_file(path, column, f"{flag} {path}"))
    repo = spec.split("[", 1)[0]
    wanted_split = selectors[0] if selectors else "train"
    column = selectors[1] if len(selectors) > 1 else None
    prompts = read_dataset(repo, wanted_split, column, flag, hub or HuggingFaceHub())
    return PromptSet(spec, prompts)


def system_message(given: str | None, flag: str = "--system") -> str | None:
    """The system message of ``--system TEXT|FILE``: the text, or what the file of that name holds.

    Args:
        flag: named in every error.

    Raises:
        UserError: when the file cannot be read or is empty, and for the name of a folder or of a
            file that is not there.
    """
    if given is None:
        return None
    path = os.path.expanduser(given)
    # A text of many lines, or of more bytes than a name may have, is no file's name.
    if "\n" not in path and len(path.encode()) < 256 and os.path.isfile(path):
        where = f"{flag} {given}"
        return read_text(Path(path), where, "write the system message into it").strip()
    if not given.strip():
        raise UserError(f"{flag} is empty: give a text, or the name of a file that holds one.")
    folder = os.path.isdir(path)
    if folder or _FILE_NAME.fullmatch(path):
        there = "is a folder" if folder else "does not exist"
        raise UserError(
            f"{flag} {given} {there}: give a file with the system message, or the message itself."
        )
    return given.strip()


def load_sets(
    harmful: str | None, harmless: str | None, seed: int, hub: Hub | None = None
) -> PromptSets:
    """The prompts of a run: the bundled sets, or the two that ``--harmful``/``--harmless`` name.

    The borderline set is always the bundled one, less any prompt that a given set also holds.

    Raises:
        UserError: when one of the two is given alone (the two must match in form, or the direction
            measures style), when they share a prompt, when one has fewer than :data:`MINIMUM`
            different prompts, or for any reason of :func:`load`.
    """
    if (harmful is None) != (harmless is None):
        given, other = "--harmful", "--harmless"
        if harmful is None:
            given, other = other, given
        raise UserError(
            f"{given} was given without {other}: sets that differ in style measure style rather "
            f"than refusal, so give both, or neither for the bundled prompts."
        )
    if harmful is None or harmless is None:
        bad, good = bundled("harmful"), bundled("harmless")
    else:
        bad, good = load(harmful, "--harmful", hub), load(harmless, "--harmless", hub)
        for flag, prompts in (("--harmful", bad), ("--harmless", good)):
            _check_size(flag, prompts)
        _check_apart(bad, good)
    used = {normalized(text) for text in bad.texts + good.texts}
    borderline = bundled("borderline")
    kept = tuple(p for p in borderline.prompts if normalized(p.text) not in used)
    return PromptSets(split(bad, seed), split(good, seed), replace(borderline, prompts=kept))


def load_demo(path: Path | None = None) -> PromptSets:
    """The demo model's prompts, already split, with the answers it was trained on.

    Args:
        path: a file of lines ``{"text", "set", "part", "answer", "category"}``, where ``set`` is
            harmful or harmless and ``part`` is train, validation or test. Default: the bundled one.

    Raises:
        UserError: when the file is missing or a line is not of that kind, or when a prompt occurs
            twice.
    """
    path = path or _DEMO_FILE
    where = f"demo prompts {path}"
    parts: dict[tuple[str, str], list[Prompt]] = {
        (kind, part): []
        for kind in ("harmful", "harmless")
        for part in ("train", "validation", "test")
    }
    seen: set[str] = set()
    for line, row in jsonl_rows(read_text(path, where), where):
        key = (str(row.get("set")), str(row.get("part")))
        if key not in parts:
            raise UserError(
                f"{where}: line {line} has set {key[0]} and part {key[1]}, where harmful or "
                f"harmless and train, validation or test are known."
            )
        prompt = prompt_of_row(row, "text", f"{where}: line {line}")
        if prompt is None:
            raise UserError(f"{where}: line {line} has no text.")
        if normalized(prompt.text) in seen:
            raise UserError(f"{where}: line {line} repeats the prompt {prompt.text!r}.")
        seen.add(normalized(prompt.text))
        answer = row.get("answer")
        parts[key].append(replace(prompt, answer=answer if isinstance(answer, str) else None))

    def part_of(kind: str, part: str) -> PromptSet:
        return PromptSet(f"demo:{kind}/{part}", tuple(parts[kind, part]))

    def split_of(kind: str) -> Split:
        return Split(part_of(kind, "train"), part_of(kind, "validation"), part_of(kind, "test"))

    return PromptSets(split_of("harmful"), split_of("harmless"), None)


# --------------------------------------------------------------------------- checks and order


def _check_size(flag: str, prompts: PromptSet) -> None:
    count = len(unique(prompts.prompts))
    if count < MINIMUM:
        raise UserError(
            f"{flag} {prompts.name} has {count} different prompts, and at least {MINIMUM} are "
            f"needed to train, validate and test on: add more."
        )


def _check_apart(harmful: PromptSet, harmless: PromptSet) -> None:
    other = unique(harmless.prompts)
    for key, prompt in unique(harmful.prompts).items():
        if key in other:
            raise UserError(
                f"--harmful {harmful.name} and --harmless {harmless.name} both hold the prompt "
                f"{prompt.text!r}: remove it from one of them."
            )


# --------------------------------------------------------------------------- what was typed


def _parse(spec: str, flag: str) -> tuple[Path | None, list[str]]:
    """The parts of ``spec``: the file, or None for a dataset, and the texts in brackets."""
    whole = os.path.expanduser(spec)
    if os.path.lexists(whole):
        return known_suffix(Path(whole), flag), []
    match = re.fullmatch(r"(?P<base>[^\[\]]+)(?P<selectors>(\[[^\[\]]+\]){0,2})", spec)
    if match is None:
        raise UserError(
            f"{flag} {spec} is no existing file and not of the form file.csv[column] or "
            f"owner/name[split][column]."
        )
    selectors = re.findall(r"\[([^\[\]]+)\]", match["selectors"])
    base = os.path.expanduser(match["base"])
    path = Path(base)
    if is_dataset(base):
        return None, selectors
    known_suffix(path, flag)
    if not os.path.lexists(path):
        raise UserError(
            f"{flag} {path} does not exist: give a {listed(SUFFIXES)} file or a Hugging Face "
            f"dataset such as owner/name[train][text]."
        )
    if path.suffix.lower() == ".txt" and selectors:
        raise UserError(f"{flag} {spec}: a .txt file has no columns, so leave out the brackets.")
    if len(selectors) > 1:
        raise UserError(f"{flag} {spec}: a file has no splits, so give one column in brackets.")
    return path, selectors


# --------------------------------------------------------------------------- files


# --------------------------------------------------------------------------- datasets


# --------------------------------------------------------------------------- wording
