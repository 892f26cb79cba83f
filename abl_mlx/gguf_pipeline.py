"""`apply` and `diff` on GGUF files: the edit in the file's own types, tensor by tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from abl_mlx import directions, outputs
from abl_mlx.clock import Clock
from abl_mlx.edits import total_leak
from abl_mlx.gguf_edit import (
    TensorPlan,
    TensorReport,
    bytes_changed,
    compare,
    largest,
    plan,
    replacement,
)
from abl_mlx.measurement import make_edit
from abl_mlx.models import progress
from abl_mlx.options import Options
from abl_mlx.records import combined_hash, start_record, worst_leak
from abl_mlx.report import card, to_json
from abl_mlx.sources import Source
from convert import gguf_writers
from convert.atomic import check_new, new_files
from convert.errors import UserError
from convert.gguf_file import GgufSource, part_paths
from convert.gguf_rewrite import rewrite
from convert.ollama import modelfile

Record = dict[str, Any]


def apply(
    direction: directions.DirectionFile,
    source: Source,
    paths: Sequence[Path],
    options: Options,
) -> Record:
    """Edit a GGUF of any type into new GGUFs, and measure in the written bytes what is left.

    Raises:
        UserError: an output that is no .gguf, an architecture or a tensor that cannot be edited,
            a leak above the limit; nothing is left behind.
    """
    clock = Clock()
    for path in paths:
        if path.suffix != ".gguf":
            raise UserError(
                f"{path}: an edited GGUF is written as a GGUF; give the output a name that ends "
                "in .gguf."
            )
    if options.quantize != "F16":
        raise UserError(
            "--quantize: a GGUF source keeps the type of every tensor; leave the flag out, or "
            "quantize the float model."
        )
    with GgufSource(source.path) as gguf:
        with clock.step("find the residual writers"):
            plans = plan(gguf, make_edit(direction.selected, options), find_writers(gguf, options),
                         strict_types=options.strict_types)  # fmt: skip
        outputs.check_space(paths, sum(part.stat().st_size for part in gguf.parts))
        record = start_record(source, paths, options, direction)
        with clock.step("hash the source"):
            record["hashes"] = {
                "source": {part.name: _sha256(part) for part in gguf.parts},
                "direction": direction.sha256,
                "options": combined_hash({"options": to_json(options.record())}),
            }
        written = [_write(gguf, source, path, plans, record, options, clock) for path in paths]
    record.update(leak=worst_leak(written), written=written, seconds=clock.seconds)
    return record


def find_writers(gguf: GgufSource, options: Options) -> list[gguf_writers.GgufWriter]:
    """The residual writers of a GGUF, by its architecture or by ``--tensors``."""
    shapes = {name: entry.shape for name, entry in gguf.tensors.items()}
    return gguf_writers.find(gguf.architecture, shapes, gguf.metadata, options.tensors)


def _write(
    gguf: GgufSource,
    source: Source,
    path: Path,
    plans: Mapping[str, TensorPlan],
    record: Record,
    options: Options,
    clock: Clock,
) -> Record:
    """Write one output, measure it, and give it and its companions their names."""
    names = [part.name for part in part_paths(path, len(gguf.parts))]
    for name in names:
        check_new(path.with_name(name))
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    with new_files(path.absolute().parent) as folder:
        staged = folder / path.name
        with clock.step("write"), progress(1, f"write {path.name}", "B") as bar:

            def moved(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            files = rewrite(
                gguf,
                staged,
                tensors={
                    name: replacement(gguf, one, grid=options.grid, plain=options.plain_rounding)
                    for name, one in plans.items()
                },
                metadata=_provenance(gguf, source, record["direction"]["sha256"], options),
                progress=moved,
            )
        with clock.step("measure the leak"), GgufSource(files[0]) as after:
            reports = compare_all(gguf, after, plans)
        one = {
            "output": str(path.with_name(names[0])),
            "format": "GGUF",
            "files": names,
            **leak_record(reports),
        }
        _check(path, reports, one["leak"], options)
        whole = {**record, "leak": worst_leak([one]), "written": [one], "seconds": clock.seconds}
        companions = outputs.companions(folder / path.name)
        companions["record"].write_text(to_json(whole) + "\n", encoding="utf-8")
        companions["card"].write_text(card(whole, None, source.title), encoding="utf-8")
        if len(names) == 1:  # Ollama takes no split files
            text = modelfile(files[0], None, path.name)
            companions["modelfile"].write_text(text, encoding="utf-8")
    return one


def compare_all(
    before: GgufSource, after: GgufSource, plans: Mapping[str, TensorPlan]
) -> dict[str, TensorReport]:
    """Every edited tensor of two files compared."""
    reports = {}
    with progress(len(plans), "read back", "tensor") as bar:
        for name, one in plans.items():
            reports[name] = compare(before, after, one)
            bar.update()
    return reports


def leak_record(reports: Mapping[str, TensorReport]) -> Record:
    """What the comparison of all edited tensors says, as JSON values."""
    leaks = [report.leak for report in reports.values()]
    whole = sum(leaks[1:], start=leaks[0])
    return {
        "types": sorted({report.type for report in reports.values()}),
        "leak": {
            "total": total_leak(leaks),
            "max": largest(reports)[1],
            "tensors": {name: report.record() for name, report in reports.items()},
        },
        "weight_error": whole.error,
    }


def _check(
    path: Path, reports: Mapping[str, TensorReport], leak: Mapping[str, Any], options: Options
) -> None:
    if leak["total"] <= options.max_leak:
        return
    name, value = largest(reports)
    mend = (
        "leave out --plain-rounding" if options.plain_rounding else "choose a file of a finer type"
    )
    raise UserError(
        f"the edit did not survive in {path}: {leak['total']:.1%} of the component is still in the "
        f"weights (most in {name}: {value:.1%}) and --max-leak is {options.max_leak:g}; {mend}, or "
        "raise --max-leak."
    )


def _provenance(
    gguf: GgufSource, source: Source, direction_sha256: str, options: Options
) -> dict[str, Any]:
    """Metadata that says what was edited, and from what."""
    known = gguf.metadata
    name = known.get("general.name", source.title)
    index = int(known.get("general.base_model.count", 0))
    base = f"general.base_model.{index}"
    changes: dict[str, Any] = {
        "general.name": f"{name}-abliterated",
        "general.tags": [
            *(known.get("general.tags") or []),
            *(tag for tag in outputs.TAGS if tag not in (known.get("general.tags") or [])),
        ],
        "general.base_model.count": index + 1,
        f"{base}.name": name,
    }
    for key in ("organization", "version", "repo_url"):
        if f"general.{key}" in known:
            changes[f"{base}.{key}"] = known[f"general.{key}"]
    label = outputs.edit_label(direction_sha256, options, source)
    changes |= {f"abl_mlx.{key}": value for key, value in label.items()}
    return changes


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# --- diff --------------------------------------------------------------------------------------


def diff(first: Path, second: Path, direction_path: Path | None, options: Options) -> Record:
    """`abl-mlx diff`: what differs between two GGUFs, and what is left of a direction.

    Args:
        direction_path: with it, the leak of its full removal from ``first`` in ``second``.
    """
    with GgufSource(first) as before, GgufSource(second) as after:
        missing = sorted(set(before.tensors) ^ set(after.tensors))
        if missing:
            raise UserError(
                f"{first} and {second} do not hold the same tensors ({missing[0]} is in one of "
                "them alone): these are not the same model."
            )
        changed: dict[str, Record] = {}
        with progress(len(before.tensors), "compare", "tensor") as bar:
            for name, entry in before.tensors.items():
                other = after.tensors[name]
                if other.shape != entry.shape:
                    raise UserError(
                        f"{name} has the shape {entry.shape} in {first} and {other.shape} in "
                        f"{second}: these are not the same model."
                    )
                if other.type != entry.type:
                    changed[name] = {"type": f"{entry.type.name} -> {other.type.name}"}
                else:
                    count = bytes_changed(before.raw(name), after.raw(name))
                    before.release(name)
                    after.release(name)
                    if count:
                        changed[name] = {"type": entry.type.name, "bytes_changed": count}
                bar.update()
        record: Record = {
            "first": str(first),
            "second": str(second),
            "tensors": len(before.tensors),
            "changed": changed,
        }
        if direction_path is not None:
            direction = directions.read(direction_path)
            plans = plan(
                before, make_edit(direction.selected, options), find_writers(before, options)
            )
            record |= leak_record(compare_all(before, after, plans))
            record["direction"] = direction.sha256
    return record
