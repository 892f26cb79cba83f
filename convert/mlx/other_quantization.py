"""Folders that are quantized in another form than MLX's own: what they are, and what helps.

mlx-lm reads some of them (AutoAWQ's, gpt-oss's MXFP4, DeepSeek's FP8 and others), and its convert
command then writes them in MLX's form. It cannot do so with the rest, of which only the float model
helps that they were made from. Which is which is not kept in a list here: mlx-lm is asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.base.errors import UserError
from convert.mlx.safetensors_files import TensorFiles

#: How the names of tensors end that only quantized modules have.
_ENDINGS = (
    ".scales", ".qweight", ".weight_packed", ".weight_scale", ".weight_scale_inv", "_blocks",
    ".SCB", ".absmax",
)  # fmt: skip

#: What scales an 8-bit float tensor: a tensor of the same name with one of these added, or put in
#: place of ``weight``.
_SCALES = ("_scale_inv", "_scale", "_scales")


@dataclass(frozen=True)
class Foreign:
    """What a folder is quantized by, as far as it says so.

    Attributes:
        method: the name of it in config.json.
        tensor: one that shows it.
        bare: the tensor is an 8-bit float without a scale, of which MLX reads the bytes as numbers.
    """

    method: str | None
    tensor: str | None
    bare: bool = False

    def __str__(self) -> str:
        by = f" by {self.method}" if self.method else ""
        return f"quantized{by}{f' ({self.tensor})' if self.tensor else ''}"

    def unreadable(self, folder: Path) -> UserError:
        """What to say where mlx-lm does not read the folder, or reads other numbers."""
        return UserError(
            f"{folder} is {self} in a form that mlx-lm cannot read: take the float model it was "
            "made from."
        )


def find(config: Mapping[str, Any], files: TensorFiles) -> Foreign | None:
    """How a folder is quantized in another form than MLX's own; None when it is not.

    Args:
        config: config.json.
    """
    bare = next((name for name in files.names if _is_bare(name, files)), None)
    if bare is not None:
        return Foreign(f"a cast to {files.info(bare).dtype}", bare, bare=True)
    if isinstance(config.get("quantization"), dict):
        return None
    text = config.get("text_config")
    method: Any = config.get("quantization_config")
    if not method and isinstance(text, dict):
        method = text.get("quantization_config") or text.get("quantization")
    packed = next((name for name in files.names if name.endswith(_ENDINGS)), None)
    if not method and packed is None:
        return None
    kind = method.get("quant_method") if isinstance(method, dict) else None
    return Foreign(str(kind) if kind else None, packed)


def _is_bare(name: str, files: TensorFiles) -> bool:
    if not files.info(name).dtype.startswith("F8"):
        return False
    stem = name.removesuffix(".weight")
    known = {f"{name}{end}" for end in _SCALES} | {f"{stem}.weight{end}" for end in _SCALES}
    known |= {f"{stem}.{end.removeprefix('_')}" for end in _SCALES}
    return not any(one in files for one in known)


def mend(folder: Path, config: Mapping[str, Any], found: Foreign, flags: str = "") -> str:
    """What helps, for the end of a sentence.

    Args:
        config: config.json.
        flags: for mlx-lm's convert command, beside the paths.
    """
    if found.bare or not _mlx_reads(folder, config):
        return "mlx-lm cannot convert it either: take the float model it was made from"
    return (
        f"convert it first with `mlx_lm.convert --hf-path {folder}{flags} --mlx-path {folder}-mlx`"
    )


def _mlx_reads(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether mlx-lm takes the folder, and writes it in a form of MLX's own."""
    from mlx_lm.utils import load_model  # lazily: it brings transformers

    method = config.get("quantization_config")
    if isinstance(method, dict) and method.get("quant_method") == "bitnet":
        return False  # it is read, and written as it was
    if config.get("model_file"):
        return False  # code in the folder, which is not run to answer a question
    try:
        load_model(folder, lazy=True, model_config=dict(config))
    except Exception:  # whatever mlx-lm trips over
        return False
    return True


def refuse_foreign(folder: Path, config: Mapping[str, Any], files: TensorFiles) -> None:
    """Refuse a folder that is quantized in another form than MLX's own.

    Raises:
        UserError: naming the folder and the mend.
    """
    found = find(config, files)
    if found is not None:
        raise UserError(
            f"{folder} is {found} in another form than MLX's own{mend(folder, config, found)}."
        )


def refuse_quantized(folder: Path, config: Mapping[str, Any], files: TensorFiles) -> None:
    """Refuse a quantized folder, whose weights are read as floats here.

    Raises:
        UserError: naming the folder and the mend.
    """
    found = find(config, files)
    said = "quantized weights of a folder do not become a GGUF here"
    if found is not None:
        raise UserError(f"{folder} is {found}, and {said}{mend(folder, config, found, ' -d')}.")
    text = config.get("text_config")
    configured = any(
        isinstance(part, dict) and (part.get("quantization") or part.get("quantization_config"))
        for part in (config, text)
    )
    packed = next((name for name in files.names if name.endswith(".scales")), None)
    if configured or packed:
        raise UserError(
            f"{folder} is quantized{f' ({packed})' if packed else ''}, and {said}: take the float "
            "model it was made from, or dequantize it first with `mlx_lm.convert --hf-path "
            f"{folder} -d --mlx-path {folder}-float`."
        )
