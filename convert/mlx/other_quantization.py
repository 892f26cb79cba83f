"""Folders with quantized weights in a form other than MLX's own: recognition, and advice.

mlx-lm reads some of these forms (AutoAWQ, gpt-oss's MXFP4, DeepSeek's FP8 and others), and its
convert command can write such a model in MLX's form. For all other forms the user needs the
float model from which the folder was made. Which case applies is tested with mlx-lm, not looked up
in a list.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.base.errors import UserError
from convert.mlx.safetensors_files import TensorFiles

#: Endings of the names of tensors that only quantized modules have.
_ENDINGS = (
    ".scales", ".qweight", ".weight_packed", ".weight_scale", ".weight_scale_inv", "_blocks",
    ".SCB", ".absmax",
)  # fmt: skip

#: Endings of the names of tensors that scale an 8-bit float tensor: they are added to its name, or
#: replace ``weight`` at its end.
_SCALES = ("_scale_inv", "_scale", "_scales")


@dataclass(frozen=True)
class Foreign:
    """How a folder is quantized, as far as its files say.

    Attributes:
        method: the name of the method in config.json, if there is one.
        tensor: a tensor that shows the method, if there is one.
        bare: whether that tensor is an 8-bit float without a scale; MLX would read its bytes as
            whole numbers.
    """

    method: str | None
    tensor: str | None
    bare: bool = False

    def __str__(self) -> str:
        by = f" by {self.method}" if self.method else ""
        return f"quantized{by}{f' ({self.tensor})' if self.tensor else ''}"

    def unreadable(self, folder: Path) -> UserError:
        """The error to raise where mlx-lm cannot read the folder, or would read wrong numbers."""
        return UserError(
            f"{folder} is {self} in a form that mlx-lm cannot read: take the float model it was "
            "made from."
        )


def find(config: Mapping[str, Any], files: TensorFiles) -> Foreign | None:
    """How a folder is quantized in a form other than MLX's own; None when it is not.

    Args:
        config: the contents of config.json.
        files: the folder's tensors.
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


def mend(folder: Path, config: Mapping[str, Any], found: Foreign) -> str:
    """Advice for the user, to end a sentence with.

    Args:
        folder: the model's folder.
        config: the contents of config.json.
        found: how the folder is quantized.
    """
    if found.bare or not _mlx_reads(folder, config):
        return "mlx-lm cannot convert it either: take the float model it was made from"
    return f"convert it first with `mlx_lm.convert --hf-path {folder} --mlx-path {folder}-mlx`"


def _mlx_reads(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether mlx-lm loads the folder, and converts it to a form of MLX's own."""
    from mlx_lm.utils import load_model  # lazily: it brings transformers

    method = config.get("quantization_config")
    if isinstance(method, dict) and method.get("quant_method") == "bitnet":
        return False  # mlx-lm reads it, and writes it unchanged
    if config.get("model_file"):
        return False  # code in the folder is not run just to find this out
    try:
        load_model(folder, lazy=True, model_config=dict(config))
    except Exception:  # whatever mlx-lm trips over
        return False
    return True


def refuse_foreign(folder: Path, config: Mapping[str, Any], files: TensorFiles) -> None:
    """Refuse a folder that is quantized in a form other than MLX's own.

    Raises:
        UserError: naming the folder and what to do.
    """
    found = find(config, files)
    if found is not None:
        raise UserError(
            f"{folder} is {found} in another form than MLX's own: {mend(folder, config, found)}."
        )
