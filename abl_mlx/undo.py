"""`abl-mlx undo`: put back what an edit took out of a float model.

What was taken comes from one of three places: a file that `--keep-undo` wrote with the edit; the
base model; or, at a strength other than 1, the edited weights themselves, which still hold
UᵀW' = (1 − α) UᵀW. At strength 1 without the first two nothing knows it.

On a quantized model nothing is undone: its rounding has changed codes everywhere. Edits of those
are better made as adapters, which are undone by leaving them out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from abl_mlx import __version__, adapter_outputs, directions, models, outputs, sources
from abl_mlx.apply import Plan
from abl_mlx.apply import plan as plan_folder
from abl_mlx.arrays import number
from abl_mlx.clock import Clock
from abl_mlx.edits import Edit
from abl_mlx.gguf_edit import plan as plan_gguf
from abl_mlx.model_file import open_model
from abl_mlx.models import ChatModel
from abl_mlx.provenance import TAGS
from abl_mlx.sources import Source
from abl_mlx.taken import Taken, kept_path, read_kept, taken, taken_of_gguf
from abl_mlx.writers import find_writers
from convert import adapters, ggml_types, gguf_mtp, gguf_writers, schema
from convert.adapters import Adapter, LowRank
from convert.atomic import new_file, new_folder
from convert.errors import UserError
from convert.gguf_file import GgufSource
from convert.gguf_rewrite import Replacement
from convert.gguf_rewrite import rewrite as rewrite_gguf
from convert.hf_config import stored_config
from convert.mlx_folder import FLOAT_DTYPES, rewrite_folder
from convert.safetensors_files import TensorFiles
from convert.schema import FLAG, TEXT, Refused, check, either, one_of, record
from convert.suffixes import is_gguf_name

Record = dict[str, Any]

#: At strengths nearer to 1 too little is left in the weights to tell what was taken.
_LEAST_LEFT = 0.05

#: A weight may be so far off the base's, edited: rounding to bfloat16, and to keep the edit.
_MOST_OFF = 0.02

_ADAPTER = "undoes the removal of the refusal direction"


def undo(
    text: str,
    paths: Sequence[Path],
    *,
    factors: Path | None = None,
    direction: Path | None = None,
    base: str | None = None,
) -> Record:
    """Write the model as it was before the edit, or an adapter that undoes the edit.

    Args:
        text: the edited model: a folder or a GGUF of float weights.
        paths: outputs: of the model's own format, or adapters for the edited model.
        factors: the undo file; None for the one that lies with the model, if there is one.
        direction: the direction file of the edit, where there is no undo file.
        base: the model before the edit; with ``direction``.

    Raises:
        UserError: when what was taken cannot be known, or a tensor is quantized.
    """
    clock = Clock()
    source = sources.resolve(text)
    outputs.check(paths, source, open_model(source).adapter)
    for path in paths:
        if not _is_adapter(path) and is_gguf_name(path) != source.is_gguf:
            raise UserError(
                f"{path} has another format than {text}: undo writes the same one, or an adapter."
            )
    if factors is None and direction is None and kept_path(source.path).is_file():
        factors = kept_path(source.path)
    written = []
    with clock.step("undo"), _open(source) as model:
        found, how = _find(model, factors, direction, base)
        model.check(found)
        for path in paths:
            write = model.write_adapter if _is_adapter(path) else model.write
            written.append({"output": str(path), **write(path, found)})
    return {
        "abl_mlx": __version__,
        "source": source.name,
        "outputs": [str(path) for path in paths],
        "from": how,
        "tensors": len(found),
        "written": written,
        "seconds": clock.seconds,
    }


def _is_adapter(path: Path) -> bool:
    return adapters.is_mlx(path) or adapters.is_lora(path)


def _open(source: Source) -> _Model:
    return _Gguf(source) if source.is_gguf else _Folder(source)


# --- what was taken ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Label:
    """What an edited model says of its edit."""

    direction_sha256: str
    strength: float
    layers: frozenset[int] | None
    embedding: bool
    mtp: bool = False
    tensors: str | None = None
    is_plain: bool = True


def read_label(values: Mapping[str, Any] | None, name: str) -> Label:
    """From config.json's ``abl_mlx`` or a GGUF's ``abl_mlx.*``.

    Raises:
        UserError: when there is none: the model was not edited by abl-mlx.
    """
    if not values:
        raise UserError(f"{name} does not say that abl-mlx edited it: there is nothing to undo.")
    try:
        check(values, _LABEL)
        layers = str(values["layers"])
        return Label(
            str(values["direction_sha256"]),
            float(values["strength"]),
            None if layers == "all" else frozenset(map(int, layers.split(","))),
            str(values["embedding"]) == "True",
            str(values.get("mtp")) == "True",
            None if values.get("tensors") is None else str(values["tensors"]),
            not {"norm", "pin", "recipe"} & set(values),
        )
    except Refused as refused:
        raise UserError(
            f"{name} does not say in full how abl-mlx edited it, so there is nothing to undo by: "
            f"of its abl_mlx label, {refused}."
        ) from None


# A GGUF of an older version holds its numbers as text.
_LABEL = record(
    {
        "mtp": either(FLAG, one_of(["True", "False"])),
        "tensors": TEXT,
    },
    {
        "direction_sha256": TEXT,
        "strength": either(schema.number(), schema.text(r"-?\d{1,9}(\.\d{1,30})?", "a number")),
        "layers": schema.text(r"all|\d{1,6}(,\d{1,6}){0,9999}", '"all", or numbers of layers'),
        "embedding": either(FLAG, one_of(["True", "False"])),
    },
)


def _find(
    model: _Model, factors: Path | None, direction: Path | None, base: str | None
) -> tuple[dict[str, Taken], str]:
    """What the edit took, by tensor name, and where that is known from."""
    label, name = model.label, model.source.name
    if factors is not None:
        if not factors.is_file():
            raise UserError(f"{factors} is no file: give the undo file of {name}.")
        return read_kept(factors, label.direction_sha256), str(factors)
    if direction is None:
        raise UserError(
            f"{name} has lost what the edit took out, and no undo file lies with it: give one with "
            "--factors (--keep-undo writes it), or the --direction file with --base MODEL."
        )
    if not label.is_plain:
        raise UserError(
            f"{name} was edited in a way (--norm, --pin or a search) that only an undo file takes "
            "back: give it with --factors, or take the model it was made from."
        )
    file = directions.read(direction)
    if file.sha256 != label.direction_sha256:
        raise UserError(f"{direction} is not the direction that {name} was edited along.")
    edit = Edit(file.selected, label.strength, label.layers, label.embedding)
    if base is None:
        found = model.taken(edit, model)
        return {key: _from_rest(one, name) for key, one in found.items()}, str(direction)
    with _open(sources.resolve(base)) as before:
        if type(before) is not type(model):
            raise UserError(f"{base} has another format than {name}: give the very model.")
        found = model.taken(edit, before)
        for key, one in found.items():
            _check_base(key, base, one.put_back(model.values(key)), before.values(key))
    return found, base


def _from_rest(one: Taken, name: str) -> Taken:
    """What was taken, from the components that an edit of a strength other than 1 has left.

    Args:
        one: of the edited tensor.
    """
    left = 1 - one.strength
    if abs(left) < _LEAST_LEFT:
        raise UserError(
            f"{name} was edited at strength {one.strength:g}, which leaves nothing in its weights "
            "to tell what was taken: give --base MODEL, or the undo file with --factors."
        )
    return replace(one, along=one.along / left)


def _check_base(name: str, base: str, restored: mx.array, was: mx.array) -> None:
    """Refuse a base that is another model than the one that was edited."""
    off = restored - was
    share = (number((off * off).sum()) / max(number((was * was).sum()), 1e-30)) ** 0.5
    if not share <= _MOST_OFF:
        raise UserError(
            f"{name} in {base}, edited, is {share:.1%} off the edited model: give the very model "
            "that was edited."
        )


# --- the two formats ---------------------------------------------------------------------------


class _Model(ExitStack):
    """An edited model, or its base, in files."""

    source: Source
    label: Label

    def names(self) -> set[str]:
        """Every tensor."""
        raise NotImplementedError

    def values(self, name: str) -> mx.array:
        """A tensor in float32."""
        raise NotImplementedError

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        raise NotImplementedError

    def is_float(self, name: str) -> bool:
        """Whether a tensor is stored in a float type."""
        raise NotImplementedError

    def taken(self, edit: Edit, of: Any) -> dict[str, Taken]:
        """What an edit of this model takes out of the tensors of another (or of itself)."""
        raise NotImplementedError

    def write(self, path: Path, found: Mapping[str, Taken]) -> Record:
        """Write the model as it was."""
        raise NotImplementedError

    def write_adapter(self, path: Path, found: Mapping[str, Taken]) -> Record:
        """Write an adapter that adds what was taken."""
        raise NotImplementedError

    def check(self, found: Mapping[str, Taken]) -> None:
        """Refuse tensors that are not there, or quantized."""
        for name, one in found.items():
            if name not in self.names():
                raise UserError(
                    f"{self.source.name} has no tensor {name}, from which the edit took something: "
                    "the undo file belongs to another model."
                )
            if not self.is_float(name):
                raise _quantized(name, self.source)
            if not one.fits(self.shape(name)):
                raise UserError(
                    f"{name} in {self.source.name} has the shape {self.shape(name)}, from which "
                    "the edit cannot have taken what the undo file holds: it is damaged, or "
                    "belongs to another model."
                )


class _Folder(_Model):
    def __init__(self, source: Source) -> None:
        super().__init__()
        self.source = source
        self.files = self.enter_context(TensorFiles(source.path))

    @cached_property
    def config(self) -> dict[str, Any]:
        return stored_config(self.source.path)

    @cached_property
    def label(self) -> Label:  # type: ignore[override]
        return read_label(self.config.get("abl_mlx"), self.source.name)

    @cached_property
    def chat(self) -> ChatModel:
        return models.load_lazily(self.source.path)

    def plan(self, edit: Edit) -> Plan:
        writers = find_writers(self.chat)
        plan = plan_folder(self.chat, self.files, edit, writers, mtp=self.label.mtp)
        if plan.matrices:
            raise _quantized(next(iter(plan.matrices)), self.source)
        return plan

    def names(self) -> set[str]:
        return set(self.files.names)

    def values(self, name: str) -> mx.array:
        return self.files.read(name).astype(mx.float32)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.files.info(name).shape

    def is_float(self, name: str) -> bool:
        return self.files.info(name).dtype in FLOAT_DTYPES

    def taken(self, edit: Edit, of: _Model) -> dict[str, Taken]:
        return {name: taken(one, of.values(name)) for name, one in self.plan(edit).edits.items()}

    def write(self, path: Path, found: Mapping[str, Taken]) -> Record:
        config = {key: value for key, value in self.config.items() if key != "abl_mlx"}
        with new_folder(path) as staged:
            rewrite_folder(
                self.source.path,
                self.files,
                staged,
                {name: one.put_back for name, one in found.items()},
                config=config,
                skip=(*outputs.COMPANIONS, "README.source.md"),
            )
            card = self.source.path / "README.source.md"
            if card.is_file():
                (staged / "README.md").write_bytes(card.read_bytes())
            with TensorFiles(staged) as after:
                missing = _missing(
                    found, self.values, lambda name: after.read(name).astype(mx.float32)
                )
        return {"format": "MLX", "missing": missing}

    def write_adapter(self, path: Path, found: Mapping[str, Taken]) -> Record:
        # Only the tensors' places are asked for, which no direction changes.
        label = self.label
        edit = Edit(mx.ones((1, self.chat.width)), 1.0, label.layers, label.embedding)
        changes = {}
        plan = self.plan(edit)
        for parameter, stored in plan.places.items():
            _refuse_biases(path, [parameter])
            parts = [_low_rank(found[name], self.values(name)) for name in stored.tensors]
            changes[parameter.removesuffix(".weight")] = _stacked(parts)
        for name in plan.copies:
            if "weight" in plan.edits[name].writer.module:  # mlx-lm takes it for the head
                one = _low_rank(found[name], self.values(name))
                changes[plan.edits[name].writer.path] = replace(one, kind="linear")
        with new_folder(path) as staged:
            adapters.write_mlx(staged, Adapter(1.0, changes), {"edited": _ADAPTER})
        return {"format": "MLX adapter"}


class _Gguf(_Model):
    def __init__(self, source: Source) -> None:
        super().__init__()
        self.source = source
        self.gguf = self.enter_context(GgufSource(source.path))

    @cached_property
    def label(self) -> Label:  # type: ignore[override]
        keys = {
            key.removeprefix("abl_mlx."): value
            for key, value in self.gguf.metadata.items()
            if key.startswith("abl_mlx.")
        }
        return read_label(keys, self.source.name)

    def names(self) -> set[str]:
        return set(self.gguf.tensors)

    def values(self, name: str) -> mx.array:
        values = mx.array(self.gguf.values(name))
        self.gguf.release(name)
        return values

    def shape(self, name: str) -> tuple[int, ...]:
        return self.gguf.tensors[name].shape

    def is_float(self, name: str) -> bool:
        return self.gguf.tensors[name].type.name in FLOAT_DTYPES

    def taken(self, edit: Edit, of: _Gguf) -> dict[str, Taken]:
        gguf = self.gguf
        shapes = {name: entry.shape for name, entry in gguf.tensors.items()}
        # What --tensors named is to be found again; its regular expression is in the label.
        pattern = self.label.tensors
        writers = gguf_writers.find(gguf.architecture, shapes, gguf.metadata, pattern)
        if self.label.mtp:
            writers += gguf_mtp.find(gguf.architecture, shapes, gguf.metadata)
        plans = plan_gguf(gguf, edit, writers)
        return dict(taken_of_gguf(of.gguf, plans))

    def write(self, path: Path, found: Mapping[str, Taken]) -> Record:
        files = rewrite_gguf(
            self.gguf,
            path,
            tensors={name: self._replacement(name, one) for name, one in found.items()},
            metadata=_metadata(self.gguf),
        )
        with GgufSource(files[0]) as after:
            missing = _missing(found, self.values, lambda name: mx.array(after.values(name)))
        return {"format": "GGUF", "missing": missing}

    def _replacement(self, name: str, one: Taken) -> Replacement:
        entry = self.gguf.tensors[name]
        codec = ggml_types.codec(entry.type)
        assert isinstance(codec, ggml_types.FloatCodec)

        def chunks() -> Iterator[np.ndarray]:
            values = np.array(one.put_back(self.values(name)).astype(mx.float32))
            yield codec.encode(codec.round(values.reshape(-1, values.shape[-1])))

        return Replacement(entry.type, entry.shape, chunks)

    def write_adapter(self, path: Path, found: Mapping[str, Taken]) -> Record:
        _refuse_biases(path, found)
        adapter_outputs.check_applied(self.gguf, found)
        tied = "output.weight" not in self.gguf.tensors
        for name, one in found.items():
            if one.axis == -1 and (tied or not adapters.is_embedding(name)):
                # Without its share the head does not see what the layers write again.
                raise UserError(
                    f"{path}: {name} was edited, to which llama.cpp applies no adapter"
                    f"{', as it is the output head too' if tied else ''}; write the model instead."
                )
        changes = {name: _low_rank(one, self.values(name)) for name, one in found.items()}
        with new_file(path) as temporary:
            adapters.write_gguf(
                temporary,
                self.gguf.architecture,
                Adapter(1.0, changes),
                {"general.name": _ADAPTER},
            )
        return {"format": "GGUF LoRA"}


def _quantized(name: str, source: Source) -> UserError:
    return UserError(
        f"{name} in {source.name} is quantized, and the rounding of its edit cannot be undone: go "
        "back to the model that was edited."
    )


def _refuse_biases(path: Path, names: Iterable[str]) -> None:
    for name in names:
        if name.endswith(".bias"):
            raise UserError(
                f"{path}: {name} was edited, and an adapter cannot hold a bias; write the model "
                "instead."
            )


def _missing(
    found: Mapping[str, Taken],
    edited: Callable[[str], mx.array],
    restored: Callable[[str], mx.array],
) -> float:
    """The share of what was taken that is not back in the written weights."""
    missing = wanted = 0.0
    for name, one in found.items():
        left, lost = one.lost(restored(name)), one.lost(edited(name))
        missing += number((left * left).sum())
        wanted += number((lost * lost).sum())
    return float((missing / wanted) ** 0.5) if wanted else 0.0


def _low_rank(one: Taken, edited: mx.array) -> LowRank:
    """The change that brings an edited tensor back, for an adapter whose scale is 1."""
    along = np.array(one.lost(edited).astype(mx.float32))
    basis = np.array(one.basis.astype(mx.float32))
    if one.axis == -1:
        return LowRank("embedding", along, basis)
    left = np.broadcast_to(basis.T, (*along.shape[:-2], *basis.T.shape))
    return LowRank("experts" if along.ndim == 3 else "linear", left, along)


def _stacked(parts: Sequence[LowRank]) -> LowRank:
    """One change of a stack of experts that the files hold one by one."""
    if len(parts) == 1:
        return parts[0]
    left, right = np.stack([p.left for p in parts]), np.stack([p.right for p in parts])
    return LowRank("experts", left, right)


def _metadata(gguf: GgufSource) -> dict[str, Any]:
    """The metadata without what the edit added to it."""
    known = gguf.metadata
    changes: dict[str, Any] = {key: None for key in known if key.startswith("abl_mlx.")}
    name = known.get("general.name")
    if isinstance(name, str):
        changes["general.name"] = name.removesuffix("-abliterated")
    tags = [tag for tag in known.get("general.tags") or [] if tag not in TAGS]
    changes["general.tags"] = tags or None
    count = int(known.get("general.base_model.count", 0))
    if count:
        changes["general.base_model.count"] = count - 1 or None
        prefix = f"general.base_model.{count - 1}."
        changes |= {key: None for key in known if key.startswith(prefix)}
    return changes
