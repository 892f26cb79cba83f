"""Reading prompts from datasets on Hugging Face, and finding the files of a split."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from abl_mlx.inputs.prompt_files import (
    DATA_SUFFIXES,
    SUFFIXES,
    first_line,
    listed,
    read_file,
)
from abl_mlx.inputs.sets import Prompt
from convert.base.errors import UserError

_SPLIT_SYNONYMS = (
    ("train", "training"),
    ("validation", "valid", "val", "dev"),
    ("test", "testing", "eval", "evaluation"),
)


class Hub(Protocol):
    """A source of dataset files, which are named by their path inside the repository."""

    def files(self, repo: str) -> list[str]:
        """Paths of all files in dataset ``repo`` ("owner/name")."""
        ...

    def fetch(self, repo: str, file: str) -> Path:
        """The path of a local copy of a file, with the same suffix."""
        ...


class HuggingFaceHub:
    """The real hub, with the login, cache and mirror settings of ``huggingface_hub``."""

    def files(self, repo: str) -> list[str]:
        from huggingface_hub import HfApi

        return HfApi().list_repo_files(repo, repo_type="dataset")

    def fetch(self, repo: str, file: str) -> Path:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(repo, file, repo_type="dataset"))


def is_dataset(base: str) -> bool:
    """Whether ``base`` can only mean "owner/name" on the hub."""
    if os.path.lexists(base) or Path(base).suffix.lower() in SUFFIXES:
        return False
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", base, re.ASCII):
        return False
    # folder/prompts.json beside an existing folder is a file whose type is unknown.
    return not (Path(base).suffix and Path(base).parent.is_dir())


def read_dataset(
    repo: str, wanted_split: str, column: str | None, flag: str, hub: Hub
) -> tuple[Prompt, ...]:
    try:
        names = hub.files(repo)
    except Exception as error:  # requests, httpx and httpx2 share no base class
        raise UserError(
            f"{flag} {repo} is no file here, and no such dataset could be reached on Hugging Face "
            f"({first_line(error)}): check the name, the login and the network."
        ) from error
    prompts: list[Prompt] = []
    for name in _split_files(names, wanted_split, repo, flag):
        try:
            path = hub.fetch(repo, name)
        except Exception as error:
            raise UserError(
                f"{flag} {repo}: {name} could not be downloaded ({first_line(error)}): try again "
                f"or give a local file."
            ) from error
        prompts += read_file(path, column, f"{flag} {repo} ({name})", skip_blank=True)
    return tuple(prompts)


def _split_files(names: Sequence[str], wanted: str, repo: str, flag: str) -> list[str]:
    """The data files of one split, sorted, by the hub's naming conventions.

    A split's name is in the file's name (``data/train-00000-of-00001.parquet``, ``test.csv``) or
    else in its folder's name, separated by anything but letters. If no file is named after a split,
    all belong to ``train``. If a split is there in several formats, parquet is preferred to .jsonl,
    and that to .csv. The dataset card's own ``configs:`` are ignored.
    Source: https://huggingface.co/docs/hub/datasets-file-names-and-splits
    """
    data = sorted(name for name in names if Path(name).suffix.lower() in DATA_SUFFIXES)
    if not data:
        raise UserError(
            f"{flag} {repo} has no {listed(DATA_SUFFIXES)} file: download it and give the "
            f"prompts as a local file."
        )
    folder, _, split_name = wanted.rpartition("/")
    inside = [name for name in data if not folder or name.startswith(f"{folder}/")]
    found = _of_split(inside, split_name)
    if not found:
        some = ", ".join(data[:5]) + (", ..." if len(data) > 5 else "")
        raise UserError(
            f"{flag} {repo} has no split {wanted}; its data files are {some}: name another split "
            f"as {repo}[split]."
        )
    found = next(
        chosen
        for suffix in DATA_SUFFIXES
        if (chosen := [name for name in found if Path(name).suffix.lower() == suffix])
    )
    folders = sorted({str(Path(name).parent) for name in found})
    if len(folders) > 1:
        raise UserError(
            f"{flag} {repo} keeps split {wanted} in several folders ({', '.join(folders)}): pick "
            f"one as {repo}[{folders[-1]}/{split_name}]."
        )
    return found


def _of_split(names: Sequence[str], split_name: str) -> list[str]:
    own = _synonyms(split_name.lower())
    for place in (lambda name: Path(name).stem, lambda name: str(Path(name).parent)):
        found = [name for name in names if _mentions(place(name), own)]
        if found:
            return found
    every = tuple(word for group in _SPLIT_SYNONYMS for word in group)
    if split_name == "train" and not any(_mentions(name, every) for name in names):
        return list(names)
    return []


def _synonyms(split_name: str) -> tuple[str, ...]:
    return next((group for group in _SPLIT_SYNONYMS if split_name in group), (split_name,))


def _mentions(name: str, words: Iterable[str]) -> bool:
    """Whether one of the words is in ``name``, separated by anything but letters."""
    any_word = "|".join(re.escape(word) for word in words)
    return re.search(rf"(?<![a-z])({any_word})(?![a-z])", name.lower()) is not None
