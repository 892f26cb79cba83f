"""Reading sparse autoencoders: the folders of SAELens and of Gemma Scope.

- SAELens: ``cfg.json`` and ``sae_weights.safetensors``, of any version: version 6 keeps the place
  in the model under ``metadata``, earlier ones beside the sizes; the first ones call it hook_point.
- Gemma Scope (Lieberum et al. 2024, arXiv 2408.05147): ``params.npz`` in a folder whose path names
  the layer. Gemma Scope 2: ``params.safetensors`` beside a ``config.json``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from abl_mlx.directions.foreign import safetensors
from abl_mlx.directions.sae import ARCHITECTURES, NORMALIZATIONS, Gate, Sae
from abl_mlx.inputs import hub
from abl_mlx.support.numpy_files import Archive
from convert.base import json_text
from convert.base.errors import UserError
from convert.base.schema import FLAG, NULL, TEXT, Kind, either, number, record, whole
from convert.base.suffixes import ends_in

_CONFIG, _WEIGHTS = "cfg.json", "sae_weights.safetensors"
_SCOPE_CONFIG, _SCOPE = "config.json", ("params.npz", "params.safetensors")

# The largest array of an autoencoder: 131,072 features of width 4,096.
_MOST_NUMBERS = 1 << 29

_HINT = (
    "an autoencoder is a folder of SAELens (cfg.json and sae_weights.safetensors) or of Gemma "
    "Scope (params.npz)"
)

# Names of places in a model -> how many layers before the one that is named they are.
_PLACES = (
    (re.compile(r"blocks\.(\d{1,5})\.hook_resid_post"), 0),
    (re.compile(r"blocks\.(\d{1,5})\.hook_resid_pre"), 1),
    (re.compile(r"(?:\w+\.)*(?:layers|h|blocks)\.(\d{1,5})(?:\.output)?"), 0),
)

_LAYER_IN_PATH = re.compile(r"layer_(\d{1,5})")

_MAYBE_TEXT = either(TEXT, NULL)

_WHERE: dict[str, Kind] = {
    **dict.fromkeys(("hook_name", "hook_point", "hf_hook_name", "model_name"), _MAYBE_TEXT),
    **dict.fromkeys(("hook_layer", "hook_point_layer"), either(whole(0, 1 << 16), NULL)),
    "model_from_pretrained_kwargs": either(record({"center_writing_weights": FLAG}), NULL),
}

_KINDS = record(
    {
        **_WHERE,
        "metadata": record(_WHERE),
        "architecture": _MAYBE_TEXT,
        "apply_b_dec_to_input": either(FLAG, NULL),
        "normalize_activations": either(TEXT, FLAG, NULL),
        "k": either(whole(1), NULL),
        "rescale_acts_by_decoder_norm": either(FLAG, NULL),
        "reshape_activations": _MAYBE_TEXT,
        **dict.fromkeys(("activation_fn", "activation_fn_str"), _MAYBE_TEXT),
        "activation_fn_kwargs": either(record({"k": either(whole(1), number(), NULL)}), NULL),
    }
)

_SCOPE_KINDS = record(
    dict.fromkeys(("architecture", "hf_hook_point_in", "model_name"), _MAYBE_TEXT)
)


def read(text: str, *, layer: int | None = None) -> Sae:
    """A sparse autoencoder of the residual stream.

    Args:
        text: a folder, a file in it, or ``hf:OWNER/NAME[@REVISION]/FOLDER`` on Hugging Face.
        layer: the layer after which it reads the stream, for files that do not say it.

    Raises:
        UserError: when it is missing, damaged or of another kind, or its place in a model is not
            the residual stream.
    """
    path = _place(text)
    if path.is_file():
        folder, file = path.parent, path
    else:
        folder = path
        names = (_WEIGHTS, *_SCOPE)
        file = next((path / name for name in names if (path / name).is_file()), path / _WEIGHTS)
        if not file.is_file():
            raise UserError(f"{path} holds no sparse autoencoder: {_HINT}.")
    if not ends_in(file, ".npz", ".safetensors"):
        raise UserError(f"{file} is no sparse autoencoder: {_HINT}.")
    if ends_in(file, ".npz") or not (folder / _CONFIG).is_file():
        return _gemma_scope(file, layer)
    return _saelens(folder, file, layer)


def _place(text: str) -> Path:
    path = Path(text).expanduser()
    if path.exists():
        return path
    if text.startswith("hf:"):
        return hub.part(text, (_CONFIG, _WEIGHTS, _SCOPE_CONFIG, *_SCOPE), "--sae")
    raise UserError(f"--sae {text} does not exist: {_HINT}, here or as hf:OWNER/NAME/FOLDER.")


# --- SAELens -----------------------------------------------------------------------------------


def _saelens(folder: Path, file: Path, layer: int | None) -> Sae:
    path = folder / _CONFIG
    config = json_text.read(path, _KINDS)
    where = {**config, **config.get("metadata", {})}
    # Older versions have no architecture but a name of the activation function.
    activation = config.get("activation_fn") or config.get("activation_fn_str") or "relu"
    architecture = config.get("architecture") or "standard"
    if architecture == "standard" and activation == "topk":
        architecture = "topk"
    elif architecture == "standard" and activation != "relu":
        raise UserError(f"{path}: the activation function {activation} is not known here.")
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"{path}: the architecture {architecture} is not known here; there are "
            f"{', '.join(ARCHITECTURES)}."
        )
    if (config.get("reshape_activations") or "none") != "none":
        raise UserError(f"{path}: it reads the heads of attention, and not the residual stream.")
    kept = config.get("k") or (config.get("activation_fn_kwargs") or {}).get("k")
    if architecture == "topk" and not kept:
        raise UserError(f"{path} does not say k, the number of features that topk keeps.")
    tensors = _Tensors(*_loaded(file, architecture))
    how = _How(
        layer=_layer(path, where, layer),
        subtracts=config.get("apply_b_dec_to_input") is not False,
        normalization=_normalization(path, config),
        k=int(kept or 0) if architecture == "topk" else None,
        by_decoder_norm=bool(config.get("rescale_acts_by_decoder_norm")),
        centred=bool(
            (where.get("model_from_pretrained_kwargs") or {}).get("center_writing_weights")
        ),
        model=where.get("model_name"),
    )
    return _made(tensors, folder.name, architecture, how)


def _normalization(path: Path, config: Mapping[str, Any]) -> str:
    found = config.get("normalize_activations") or "none"
    if found in NORMALIZATIONS:
        return str(found)
    # The factor by which inputs are multiplied is in no file.
    how = "their mean length" if found is True else found
    raise UserError(
        f"{path}: inputs are normalized by {how}, which was not folded into the weights: fold it "
        "with SAELens (fold_activation_norm_scaling_factor) and save it again."
    )


def _layer(path: Path, where: Mapping[str, Any], given: int | None) -> int:
    """The layer after which the stream is read, from the name of the place in the model."""
    names = ("hook_name", "hook_point", "hf_hook_name", "hf_hook_point_in")
    name = next((where[one] for one in names if where.get(one)), None)
    if name is None:
        if given is None:
            raise UserError(f"{path} does not say which layer it reads: give it with --layer N.")
        return given
    layer = where.get("hook_layer", where.get("hook_point_layer"))
    named = str(name).replace("{layer}", str(layer))
    for pattern, before in _PLACES:
        if (found := pattern.fullmatch(named)) is not None:
            after = int(found[1]) - before
            break
    else:
        raise UserError(
            f"{path}: it reads {name}, and only autoencoders of the residual stream can be used "
            "(hook_resid_post or hook_resid_pre)."
        )
    if after < 0:
        raise UserError(
            f"{path}: it reads {name}, the embedding; states are measured after layers only."
        )
    if given is not None and given != after:
        raise UserError(
            f"--layer {given}: {path} says that it reads the stream after layer {after} ({name}); "
            "leave --layer out."
        )
    return after


# --- Gemma Scope -------------------------------------------------------------------------------


def _gemma_scope(file: Path, layer: int | None) -> Sae:
    path, where = file.parent / _SCOPE_CONFIG, dict[str, Any]()
    if path.is_file():
        where = json_text.read(path, _SCOPE_KINDS)
    absolute = str(file.resolve())
    in_path = _LAYER_IN_PATH.findall(absolute)
    site = re.search(r"gemma-scope[\w.-]*-(att|mlp)\b|(attn_out|mlp_out|transcoder)", absolute)
    if site is not None:
        raise UserError(
            f"{file} reads {site[1] or site[2]}, and only autoencoders of the residual stream can "
            "be used (those of -res, or resid_post)."
        )
    if where.get("hf_hook_point_in"):
        after = _layer(path, where, layer)
    elif in_path:
        after = _layer(file, {"hook_name": f"blocks.{in_path[-1]}.hook_resid_post"}, layer)
    else:
        after = _layer(file, {}, layer)
    # Neither b_dec nor a norm comes before the encoder of these.
    how = _How(layer=after, subtracts=False, model=where.get("model_name"))
    tensors = _Tensors(*_loaded(file, "jumprelu"))
    name = "/".join(file.parent.parts[-3:]) if in_path else file.parent.name
    return _made(tensors, name or file.name, "jumprelu", how)


# --- tensors -----------------------------------------------------------------------------------

_NEEDED = {
    "standard": ("W_enc", "b_enc", "W_dec", "b_dec"),
    "topk": ("W_enc", "b_enc", "W_dec", "b_dec"),
    "jumprelu": ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"),
    "gated": ("W_enc", "b_gate", "r_mag", "b_mag", "W_dec", "b_dec"),
}


@dataclass(frozen=True)
class _Tensors:
    """The tensors of a file by SAELens' names, float32, and the file for messages."""

    file: Path
    values: Mapping[str, mx.array]


@dataclass(frozen=True)
class _How:
    """What a configuration says besides the architecture, as the fields of `Sae`."""

    layer: int
    subtracts: bool
    normalization: str = "none"
    k: int | None = None
    by_decoder_norm: bool = False
    centred: bool = False
    model: str | None = None


def _loaded(file: Path, architecture: str) -> tuple[Path, dict[str, mx.array]]:
    wanted = _NEEDED[architecture]
    if ends_in(file, ".npz"):
        with Archive(file, "a sparse autoencoder", _MOST_NUMBERS) as archive:
            found = {name: archive.read(name) for name in wanted if name in archive.names}
    else:
        every, _ = safetensors(file)
        # Gemma Scope 2 writes w_enc for W_enc.
        found = {
            name: every[spelled].astype(mx.float32)
            for name in wanted
            for spelled in (name, name.lower())
            if spelled in every
        }
    if missing := [name for name in wanted if name not in found]:
        raise UserError(
            f"{file} lacks {', '.join(missing)}, which an autoencoder of the architecture "
            f"{architecture} has: fetch the folder again."
        )
    return file, found


def _made(tensors: _Tensors, name: str, architecture: str, how: _How) -> Sae:
    file, values = tensors.file, tensors.values
    encoder = values["W_enc"]
    if encoder.ndim != 2 or not encoder.size:
        raise _misshapen(file, "W_enc", encoder, "(d, F)")
    width, count = encoder.shape
    for key, tensor in values.items():
        wanted = {"W_enc": (width, count), "W_dec": (count, width), "b_dec": (width,)}
        shape = wanted.get(key, (count,))
        if tuple(tensor.shape) != shape:
            raise _misshapen(file, key, tensor, str(shape))
        if not mx.isfinite(tensor).all().item():
            raise UserError(f"{file}: {key} holds a number that is not finite: fetch it again.")
    gate = Gate(values["r_mag"], values["b_mag"]) if architecture == "gated" else None
    return Sae(
        name=name,
        architecture=architecture,
        encoder=encoder,
        bias=values["b_gate" if architecture == "gated" else "b_enc"],
        decoder=values["W_dec"],
        decoder_bias=values["b_dec"],
        threshold=values.get("threshold"),
        gate=gate,
        **vars(how),
    )


def _misshapen(file: Path, key: str, tensor: mx.array, wanted: str) -> UserError:
    return UserError(
        f"{file}: {key} must be of the shape {wanted}, not {tuple(tensor.shape)}: fetch it again."
    )
