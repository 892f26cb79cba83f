"""Prompt sets: the bundled ones, files, Hugging Face datasets, and how a set is split.

A direction is a difference between two sets of prompts, so everything that makes the result
trustworthy starts here: no prompt in two parts, none in both sets, the same split for the same
seed. Nothing in this module imports MLX, and ``huggingface_hub`` and ``pyarrow`` only when a
dataset needs them.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from convert.base import json_text
from convert.base.errors import UserError
from convert.base.schema import Refused

COLUMNS = ("text", "prompt", "instruction", "goal")
"""Names a prompt column is looked for under, in this order, when none is given."""

BUNDLED = ("harmful", "harmless", "borderline")
"""Names that :func:`bundled` knows."""

MINIMUM = 16
"""Fewest different prompts :func:`load_sets` accepts in a set."""

_SETS_FOLDER = Path(__file__).parent / "prompt_sets"
_DEMO_FILE = Path(__file__).parent.parent / "demo" / "prompts.jsonl"
_DATA_SUFFIXES = (".parquet", ".jsonl", ".csv")
_SUFFIXES = (".txt", *_DATA_SUFFIXES)
_SPLIT_SYNONYMS = (
    ("train", "training"),
    ("validation", "valid", "val", "dev"),
    ("test", "testing", "eval", "evaluation"),
)


@dataclass(frozen=True)
class Prompt:
    """One user message. ``answer`` is a reference reply; only the demo's prompts have one."""

    text: str
    category: str = ""
    answer: str | None = None


@dataclass(frozen=True)
class PromptSet:
    """Prompts in a fixed order, and where they came from."""

    name: str
    prompts: tuple[Prompt, ...]

    @property
    def texts(self) -> tuple[str, ...]:
        """The prompts' texts, in order."""
        return tuple(prompt.text for prompt in self.prompts)

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) of the texts in order, each in UTF-8 and followed by one NUL byte.

        Names, categories and answers do not enter; a loaded text never holds a NUL.
        """
        digest = hashlib.sha256()
        for text in self.texts:
            digest.update(text.encode() + b"\0")
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, n: int) -> PromptSet:
        """The first ``n`` prompts, or all when there are fewer.

        A part made by :func:`split` spreads its categories evenly, so its first ``n`` do too.

        Raises:
            ValueError: when ``n`` is negative.
        """
        if n < 0:
            raise ValueError(f"cannot take {n} prompts")
        return PromptSet(self.name, self.prompts[:n])


@dataclass(frozen=True)
class Split:
    """Three parts of one set without a prompt in common."""

    train: PromptSet
    validation: PromptSet
    test: PromptSet


@dataclass(frozen=True)
class PromptSets:
    """All prompts of a run. ``borderline`` is for over-refusal only, never for a direction."""

    harmful: Split
    harmless: Split
    borderline: PromptSet | None


class Hub(Protocol):
    """Where dataset files come from. Files are named by their path inside the repository."""

    def files(self, repo: str) -> list[str]:
        """Paths of all files in dataset ``repo`` ("owner/name")."""
        ...

    def fetch(self, repo: str, file: str) -> Path:
        """A local copy of one of them, under a name with the same extension."""
        ...


class HuggingFaceHub:
    """The real hub, with the login, cache and mirror settings of ``huggingface_hub``."""

    def files(self, repo: str) -> list[str]:
        from huggingface_hub import HfApi

        return HfApi().list_repo_files(repo, repo_type="dataset")

    def fetch(self, repo: str, file: str) -> Path:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(repo, file, repo_type="dataset"))


# --------------------------------------------------------------------------- the public verbs


def bundled(name: str) -> PromptSet:
    """One of the sets that come with the package.

    Raises:
        ValueError: when ``name`` is not in :data:`BUNDLED`.
    """
    if name not in BUNDLED:
        raise ValueError(f"no bundled prompt set {name!r}: there are {', '.join(BUNDLED)}")
    path = _SETS_FOLDER / f"{name}.jsonl"
    return PromptSet(f"bundled:{name}", _read_file(path, "text", f"bundled {path}"))


def load(spec: str, flag: str, hub: Hub | None = None) -> PromptSet:
    """Prompts from what a person typed after ``flag``.

    ``spec`` is a file, ``.txt`` (a prompt a line; blank lines are skipped), ``.jsonl``, ``.csv`` or
    ``.parquet``, where ``file.csv[column]`` picks a column; or a dataset
    ``owner/name[split][column]`` with split ``train`` and the first of :data:`COLUMNS` by default.
    Where a dataset keeps configurations in folders, ``owner/name[folder/train]`` picks one. A
    field or column ``category`` is read along. A path that exists is always a file. The order is
    kept, and so are duplicates: :func:`split` removes them.

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
        return PromptSet(spec, _read_file(path, column, f"{flag} {path}"))
    repo = spec.split("[", 1)[0]
    wanted_split = selectors[0] if selectors else "train"
    column = selectors[1] if len(selectors) > 1 else None
    prompts = _read_dataset(repo, wanted_split, column, flag, hub or HuggingFaceHub())
    return PromptSet(spec, prompts)


def split(
    prompts: PromptSet, seed: int, fractions: tuple[float, float, float] = (0.5, 0.2, 0.3)
) -> Split:
    """Train, validation and test parts of a set, without duplicates.

    Prompts that are :func:`normalized` alike count once. Each prompt's place follows from a hash of
    the seed and its normalized text, so it depends on neither the file's order nor the Python
    version. Categories are spread evenly (systematic sampling): a category of n prompts gives each
    part its fraction of n, give or take about one, and any leading stretch of a part is spread
    likewise.

    Args:
        fractions: of train, validation and test; they add up to 1. Sizes are rounded.

    Raises:
        ValueError: when the fractions are negative or do not add up to 1.
    """
    if min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-9:
        raise ValueError(f"fractions {fractions} must be positive and add up to 1")
    ordered = _spread(_unique(prompts.prompts), seed)
    first = round(fractions[0] * len(ordered))
    second = round((fractions[0] + fractions[1]) * len(ordered))
    return Split(
        PromptSet(f"{prompts.name}/train", tuple(ordered[:first])),
        PromptSet(f"{prompts.name}/validation", tuple(ordered[first:second])),
        PromptSet(f"{prompts.name}/test", tuple(ordered[second:])),
    )


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
    for line, row in _jsonl_rows(_read_text(path, where), where):
        key = (str(row.get("set")), str(row.get("part")))
        if key not in parts:
            raise UserError(
                f"{where}: line {line} has set {key[0]} and part {key[1]}, where harmful or "
                f"harmless and train, validation or test are known."
            )
        text = _cell(row, "text", where, line)
        if text is None:
            raise UserError(f"{where}: line {line} has no text.")
        if normalized(text) in seen:
            raise UserError(f"{where}: line {line} repeats the prompt {text!r}.")
        seen.add(normalized(text))
        answer, category = row.get("answer"), row.get("category")
        parts[key].append(
            Prompt(
                text,
                category if isinstance(category, str) else "",
                answer if isinstance(answer, str) else None,
            )
        )

    def part_of(kind: str, part: str) -> PromptSet:
        return PromptSet(f"demo:{kind}/{part}", tuple(parts[kind, part]))

    def split_of(kind: str) -> Split:
        return Split(part_of(kind, "train"), part_of(kind, "validation"), part_of(kind, "test"))

    return PromptSets(split_of("harmful"), split_of("harmless"), None)


def normalized(text: str) -> str:
    """The form under which two prompts count as one: NFKC, casefolded, without punctuation.

    Apostrophes and invisible characters vanish, other punctuation separates words, white space
    collapses. Symbols stay (C++ is not C). A text of punctuation only is kept as it is.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    kept = []
    for char in folded:
        category = unicodedata.category(char)
        if char in "'’" or category == "Cf":
            continue
        kept.append(" " if category[0] in "PC" else char)
    return " ".join("".join(kept).split()) or " ".join(folded.split())


# --------------------------------------------------------------------------- checks and order


def _unique(prompts: Iterable[Prompt]) -> dict[str, Prompt]:
    """Normalized text -> prompt; of several alike the least by text, whatever their order."""
    chosen: dict[str, Prompt] = {}
    for prompt in prompts:
        key = normalized(prompt.text)
        other = chosen.get(key)
        if other is None or (prompt.text, prompt.category) < (other.text, other.category):
            chosen[key] = prompt
    return chosen


def _fraction_of_hash(seed: int, *parts: str) -> float:
    """A number in [0, 1) that depends on nothing but the arguments."""
    digest = hashlib.sha256("\0".join((str(seed), *parts)).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _spread(prompts: Mapping[str, Prompt], seed: int) -> list[Prompt]:
    """Shuffle each category by hash and interleave the categories in proportion to their size."""
    by_category: dict[str, list[tuple[float, str]]] = {}
    for key, prompt in prompts.items():
        place = _fraction_of_hash(seed, "prompt", key)
        by_category.setdefault(prompt.category, []).append((place, key))
    order = []
    for category, members in by_category.items():
        offset = _fraction_of_hash(seed, "category", category)
        for rank, (_, key) in enumerate(sorted(members)):
            order.append(((rank + offset) / len(members), key))
    return [prompts[key] for _, key in sorted(order)]


def _check_size(flag: str, prompts: PromptSet) -> None:
    count = len(_unique(prompts.prompts))
    if count < MINIMUM:
        raise UserError(
            f"{flag} {prompts.name} has {count} different prompts, and at least {MINIMUM} are "
            f"needed to train, validate and test on: add more."
        )


def _check_apart(harmful: PromptSet, harmless: PromptSet) -> None:
    other = _unique(harmless.prompts)
    for key, prompt in _unique(harmful.prompts).items():
        if key in other:
            raise UserError(
                f"--harmful {harmful.name} and --harmless {harmless.name} both hold the prompt "
                f"{prompt.text!r}: remove it from one of them."
            )


# --------------------------------------------------------------------------- what was typed


def _parse(spec: str, flag: str) -> tuple[Path | None, list[str]]:
    """Take ``spec`` apart: the file, or None for a dataset, and what stood in brackets."""
    whole = os.path.expanduser(spec)
    if os.path.lexists(whole):
        return _known_suffix(Path(whole), flag), []
    match = re.fullmatch(r"(?P<base>[^\[\]]+)(?P<selectors>(\[[^\[\]]+\]){0,2})", spec)
    if match is None:
        raise UserError(
            f"{flag} {spec} is no existing file and not of the form file.csv[column] or "
            f"owner/name[split][column]."
        )
    selectors = re.findall(r"\[([^\[\]]+)\]", match["selectors"])
    base = os.path.expanduser(match["base"])
    path = Path(base)
    if _is_dataset(base):
        return None, selectors
    _known_suffix(path, flag)
    if not os.path.lexists(path):
        raise UserError(
            f"{flag} {path} does not exist: give a {_listed(_SUFFIXES)} file or a Hugging Face "
            f"dataset such as owner/name[train][text]."
        )
    if path.suffix.lower() == ".txt" and selectors:
        raise UserError(f"{flag} {spec}: a .txt file has no columns, so leave out the brackets.")
    if len(selectors) > 1:
        raise UserError(f"{flag} {spec}: a file has no splits, so give one column in brackets.")
    return path, selectors


def _is_dataset(base: str) -> bool:
    """Whether ``base`` can only be meant as "owner/name" on the hub."""
    if os.path.lexists(base) or Path(base).suffix.lower() in _SUFFIXES:
        return False
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", base, re.ASCII):
        return False
    # folder/prompts.json beside an existing folder is a file whose type is unknown.
    return not (Path(base).suffix and Path(base).parent.is_dir())


def _known_suffix(path: Path, flag: str) -> Path:
    if path.is_dir():
        raise UserError(f"{flag} {path} is a folder: give a {_listed(_SUFFIXES)} file.")
    if path.suffix.lower() not in _SUFFIXES:
        raise UserError(
            f"{flag} {path} is of no known type: give a {_listed(_SUFFIXES)} file or a Hugging "
            f"Face dataset such as owner/name[train][text]."
        )
    return path


# --------------------------------------------------------------------------- files

Row = tuple[int, Mapping[str, Any]]
"""A row's line or row number, counted from 1, and its cells by column name."""


def _read_file(
    path: Path, column: str | None, where: str, skip_blank: bool = False
) -> tuple[Prompt, ...]:
    """The prompts of a file whose extension is one of ``_SUFFIXES``; ``where`` begins errors."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _prompts(*_parquet_rows(path, column, where), where, "row", skip_blank)
    text = _read_text(path, where)
    if suffix == ".csv":
        return _prompts(*_csv_rows(text, column, where), where, "line", skip_blank)
    if suffix == ".jsonl":
        rows = _jsonl_rows(text, where)
        field = _pick(list(rows[0][1]), column, where, "field") if rows else ""
        return _prompts(rows, field, where, "line", skip_blank)
    lines = [{"text": line} for line in text.split("\n")]
    full = [(n, row) for n, row in enumerate(lines, 1) if row["text"].strip()]
    return _prompts(full, "text", where, "line", skip_blank)


def _read_text(path: Path, where: str) -> str:
    """A file's text with "\\n" line ends and no byte order mark."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{where} does not exist.") from None
    except OSError as error:
        raise UserError(f"{where} cannot be read: {error.strerror or error}.") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{where} is not UTF-8 (line {line}): save it as UTF-8.") from None
    if not text.strip():
        raise UserError(f"{where} is empty: put a prompt on each line.")
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{where} holds a NUL byte (line {line}): save it as plain UTF-8 text.")
    # Not splitlines(): it also cuts at U+2028 and others that may stand inside a prompt.
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _jsonl_rows(text: str, where: str) -> list[Row]:
    rows: list[Row] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json_text.parse(line)
        except Refused as refused:
            raise UserError(f"{where}: of line {number}, {refused}: mend or remove it.") from None
        if not isinstance(row, dict):
            raise UserError(
                f'{where}: line {number} is not a JSON object: write {{"text": "..."}} on each '
                f"line."
            )
        rows.append((number, row))
    return rows


def _csv_rows(text: str, column: str | None, where: str) -> tuple[list[Row], str]:
    """The rows of a CSV and its prompt column; without a header there is one column only.

    In a file of one column the first line is a header when it is the wanted name, one of
    :data:`COLUMNS`, or one bare ASCII word: no prompt reads like that. Semicolons and tabs separate
    columns when they do so in a header with a known name.
    """
    column = _header(column) if column else None
    first_line = text.lstrip().split("\n", 1)[0]
    known = {column} if column else set(COLUMNS)
    separator = ","
    for other in (";", "\t"):
        if other in first_line and known & {_header(cell) for cell in first_line.split(other)}:
            separator = other
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        # line_num is where a row ends; a quoted prompt of several lines is told by its last.
        table = [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise UserError(f"{where}: line {reader.line_num} is not valid CSV ({error}).") from None
    names = [_header(cell) for cell in table[0][1]]
    if len(names) > 1:
        bare = all(_is_header(cell) or not cell for cell in table[0][1])
        if column is None and not bare and not set(COLUMNS) & set(names):
            raise UserError(
                f"{where}: line {table[0][0]} is no header, yet has {len(names)} columns: put "
                f"prompts with commas in double quotes, or add a header."
            )
        name = _pick(names, column, where, "column")
    elif names[0] == column or (column is None and _is_header(table[0][1][0])):
        name = names[0]
    elif column is not None:
        raise _no_column(names, column, where, "column")
    else:
        names, name = ["text"], "text"
        table.insert(0, (0, names))
    for line, row in table[1:]:
        if len(row) > len(names):
            raise UserError(
                f"{where}: line {line} has {len(row)} columns where {len(names)} "
                f"{'was' if len(names) == 1 else 'were'} expected: put prompts with commas in "
                f"double quotes."
            )
    return [(line, dict(zip(names, row, strict=False))) for line, row in table[1:]], name


def _header(cell: str) -> str:
    """A header cell as a name: known names in any case, others as written."""
    bare = cell.strip().strip('"')
    return bare.lower() if bare.lower() in (*COLUMNS, "category") else bare


def _is_header(cell: str) -> bool:
    return re.fullmatch(r"\s*[A-Za-z_][A-Za-z0-9_-]*\s*", cell) is not None


def _parquet_rows(path: Path, column: str | None, where: str) -> tuple[list[Row], str]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(
            f"{where} is a parquet file, which needs pyarrow: run pip install 'abl-mlx[parquet]'."
        ) from None
    try:
        with parquet.ParquetFile(path) as file:
            names = list(file.schema_arrow.names)
            name = _pick(names, column, where, "column")
            wanted = [name] + [n for n in ("category",) if n in names and n != name]
            rows = file.read(columns=wanted).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{where} is not a readable parquet file ({_first_line(error)}).") from None
    return list(enumerate(rows, 1)), name


def _pick(names: Sequence[str], wanted: str | None, where: str, word: str) -> str:
    """The column or field that holds the prompts."""
    if wanted is not None:
        if wanted in names:
            return wanted
        raise _no_column(names, wanted, where, word)
    for name in COLUMNS:
        if name in names:
            return name
    raise _no_column(names, None, where, word)


def _no_column(names: Sequence[str], wanted: str | None, where: str, word: str) -> UserError:
    looked = wanted or _listed(COLUMNS)
    found = ", ".join(str(name) for name in names) or "none"
    return UserError(f"{where} has no {word} {looked}, only {found}: name one in brackets.")


def _prompts(
    rows: Sequence[Row], name: str, where: str, word: str, skip_blank: bool
) -> tuple[Prompt, ...]:
    """One prompt a row, or an error that tells the first row without one."""
    prompts = []
    for number, row in rows:
        text = _cell(row, name, where, number, word)
        if text is None:
            if skip_blank:
                continue
            raise UserError(f"{where}: {word} {number} has no prompt in {name}: remove it.")
        category = row.get("category") if name != "category" else None
        prompts.append(Prompt(text, category.strip() if isinstance(category, str) else ""))
    if not prompts:
        raise UserError(f"{where} holds no prompts.")
    return tuple(prompts)


def _cell(
    row: Mapping[str, Any], name: str, where: str, number: int, word: str = "line"
) -> str | None:
    """A cell's text without white space around it; None when it is missing or blank."""
    value = row.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        raise UserError(
            f"{where}: {word} {number} holds a value of type {type(value).__name__} in {name}, "
            f"where a text belongs."
        )
    if "\0" in value or any("\ud800" <= char <= "\udfff" for char in value):
        raise UserError(
            f"{where}: {word} {number} holds a NUL or half a character in {name}: mend or remove "
            f"it."
        )
    return value.strip() or None


# --------------------------------------------------------------------------- datasets


def _read_dataset(
    repo: str, wanted_split: str, column: str | None, flag: str, hub: Hub
) -> tuple[Prompt, ...]:
    try:
        names = hub.files(repo)
    except Exception as error:  # requests, httpx and httpx2 share no base class
        raise UserError(
            f"{flag} {repo} is no file here, and no such dataset could be reached on Hugging Face "
            f"({_first_line(error)}): check the name, the login and the network."
        ) from error
    prompts: list[Prompt] = []
    for name in _split_files(names, wanted_split, repo, flag):
        try:
            path = hub.fetch(repo, name)
        except Exception as error:
            raise UserError(
                f"{flag} {repo}: {name} could not be downloaded ({_first_line(error)}): try again "
                f"or give a local file."
            ) from error
        prompts += _read_file(path, column, f"{flag} {repo} ({name})", skip_blank=True)
    return tuple(prompts)


def _split_files(names: Sequence[str], wanted: str, repo: str, flag: str) -> list[str]:
    """The data files of one split, sorted, by the hub's naming conventions.

    A split's name stands in the file's name (``data/train-00000-of-00001.parquet``, ``test.csv``)
    or, failing that, in its folder's, set off by anything but letters. Where no file is named by a
    split, all are ``train``. Of several formats with the split, parquet goes before .jsonl before
    .csv. The dataset card's own ``configs:`` are not read.
    Source: https://huggingface.co/docs/hub/datasets-file-names-and-splits
    """
    data = sorted(name for name in names if Path(name).suffix.lower() in _DATA_SUFFIXES)
    if not data:
        raise UserError(
            f"{flag} {repo} has no {_listed(_DATA_SUFFIXES)} file: download it and give the "
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
        for suffix in _DATA_SUFFIXES
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
    """Whether one of the words stands in ``name``, set off by anything but letters."""
    any_word = "|".join(re.escape(word) for word in words)
    return re.search(rf"(?<![a-z])({any_word})(?![a-z])", name.lower()) is not None


# --------------------------------------------------------------------------- wording


def _listed(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


def _first_line(error: BaseException) -> str:
    """What an exception says, short enough for one sentence."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip().rstrip(".:")[:160]


def prompt_hashes(sets: PromptSets) -> dict[str, str]:
    """SHA-256 of the prompts that a direction was made from and chosen on."""
    return {
        f"{name} {part}": getattr(split, part).sha256
        for name, split in (("harmful", sets.harmful), ("harmless", sets.harmless))
        for part in ("train", "validation")
    }
