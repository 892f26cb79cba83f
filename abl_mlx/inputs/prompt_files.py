"""Reading prompts from files of text, JSON lines, CSV and Parquet."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from abl_mlx.inputs.conversations import MESSAGES, prompt_of_row
from abl_mlx.inputs.sets import Prompt
from convert.base import json_text
from convert.base.errors import UserError
from convert.base.schema import Refused

COLUMNS = ("text", "prompt", "instruction", "goal")
"""Names a prompt column is looked for under, in this order, when none is given; then `MESSAGES`."""

#: Columns that are read beside the prompt's.
_BESIDE = ("category", "system", "prefix", "suffix", "tools", MESSAGES)


DATA_SUFFIXES = (".parquet", ".jsonl", ".csv")


SUFFIXES = (".txt", *DATA_SUFFIXES)


def known_suffix(path: Path, flag: str) -> Path:
    if path.is_dir():
        raise UserError(f"{flag} {path} is a folder: give a {listed(SUFFIXES)} file.")
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(
            f"{flag} {path} is of no known type: give a {listed(SUFFIXES)} file or a Hugging "
            f"Face dataset such as owner/name[train][text]."
        )
    return path


Row = tuple[int, Mapping[str, Any]]
"""A row's line or row number, counted from 1, and its cells by column name."""


def read_file(
    path: Path, column: str | None, where: str, skip_blank: bool = False
) -> tuple[Prompt, ...]:
    """The prompts of a file whose extension is one of ``SUFFIXES``; ``where`` begins errors."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _prompts(*_parquet_rows(path, column, where), where, "row", skip_blank)
    text = read_text(path, where)
    if suffix == ".csv":
        return _prompts(*_csv_rows(text, column, where), where, "line", skip_blank)
    if suffix == ".jsonl":
        rows = jsonl_rows(text, where)
        field = _pick(list(rows[0][1]), column, where, "field") if rows else ""
        if field == MESSAGES and column is None:
            # Other lines of a file of conversations may have a text alone.
            named = {name for _, row in rows for name in row}
            field = next((name for name in COLUMNS if name in named), MESSAGES)
        return _prompts(rows, field, where, "line", skip_blank)
    lines = [{"text": line} for line in text.split("\n")]
    full = [(n, row) for n, row in enumerate(lines, 1) if row["text"].strip()]
    return _prompts(full, "text", where, "line", skip_blank)


def read_text(path: Path, where: str, empty: str = "put a prompt on each line") -> str:
    """A file's text with "\\n" as line ends and without a byte order mark.

    Args:
        where: the flag and the file, for messages.
        empty: how an empty file is mended.
    """
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
        raise UserError(f"{where} is empty: {empty}.")
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{where} holds a NUL byte (line {line}): save it as plain UTF-8 text.")
    # Not splitlines(): it also cuts at U+2028 and others that may stand inside a prompt.
    return text.replace("\r\n", "\n").replace("\r", "\n")


def jsonl_rows(text: str, where: str) -> list[Row]:
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
    """The rows of a CSV file and the name of its prompt column; a file without header has only one.

    In a file of one column the first line is a header if it is the wanted name, one of
    :data:`COLUMNS`, or a single ASCII word, which a prompt is not. Semicolons and tabs separate
    columns if they do so in a header with a known name.
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
        # line_num is the line where a row ends, if a quoted prompt has several lines.
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
    return bare.lower() if bare.lower() in (*COLUMNS, *_BESIDE) else bare


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
            wanted = [name] + [n for n in _BESIDE if n in names and n != name]
            rows = file.read(columns=wanted).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{where} is not a readable parquet file ({first_line(error)}).") from None
    return list(enumerate(rows, 1)), name


def _pick(names: Sequence[str], wanted: str | None, where: str, word: str) -> str:
    """The name of the column or field with the prompts."""
    if wanted is not None:
        if wanted in names:
            return wanted
        raise _no_column(names, wanted, where, word)
    for name in (*COLUMNS, MESSAGES):
        if name in names:
            return name
    raise _no_column(names, None, where, word)


def _no_column(names: Sequence[str], wanted: str | None, where: str, word: str) -> UserError:
    looked = wanted or listed(COLUMNS)
    found = ", ".join(str(name) for name in names) or "none"
    return UserError(f"{where} has no {word} {looked}, only {found}: name one in brackets.")


def _prompts(
    rows: Sequence[Row], name: str, where: str, word: str, skip_blank: bool
) -> tuple[Prompt, ...]:
    """One prompt a row, or an error that tells the first row without one."""
    prompts = []
    for number, row in rows:
        prompt = prompt_of_row(row, name, f"{where}: {word} {number}")
        if prompt is not None:
            prompts.append(prompt)
        elif not skip_blank:
            raise UserError(f"{where}: {word} {number} has no prompt in {name}: remove it.")
    if not prompts:
        raise UserError(f"{where} holds no prompts.")
    return tuple(prompts)


def listed(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, shortened for one sentence."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip().rstrip(".:")[:160]
