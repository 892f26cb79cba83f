"""File types of a GGUF, such as Q4_K_M: the names that llama-quantize knows.

A file type is a mix of tensor types; `convert.gguf.mix` says which tensor gets which.
"""

from __future__ import annotations

from gguf import GGMLQuantizationType as Q
from gguf import LlamaFileType

from convert.base.errors import UserError

FILE_TYPES: dict[str, tuple[LlamaFileType, Q]] = {
    "F32": (LlamaFileType.ALL_F32, Q.F32),
    "F16": (LlamaFileType.MOSTLY_F16, Q.F16),
    "BF16": (LlamaFileType.MOSTLY_BF16, Q.BF16),
    "Q8_0": (LlamaFileType.MOSTLY_Q8_0, Q.Q8_0),
    "Q4_0": (LlamaFileType.MOSTLY_Q4_0, Q.Q4_0),
    "Q4_1": (LlamaFileType.MOSTLY_Q4_1, Q.Q4_1),
    "Q5_0": (LlamaFileType.MOSTLY_Q5_0, Q.Q5_0),
    "Q5_1": (LlamaFileType.MOSTLY_Q5_1, Q.Q5_1),
    "Q2_K": (LlamaFileType.MOSTLY_Q2_K, Q.Q2_K),
    "Q2_K_S": (LlamaFileType.MOSTLY_Q2_K_S, Q.Q2_K),
    "Q3_K_S": (LlamaFileType.MOSTLY_Q3_K_S, Q.Q3_K),
    "Q3_K_M": (LlamaFileType.MOSTLY_Q3_K_M, Q.Q3_K),
    "Q3_K_L": (LlamaFileType.MOSTLY_Q3_K_L, Q.Q3_K),
    "Q4_K_S": (LlamaFileType.MOSTLY_Q4_K_S, Q.Q4_K),
    "Q4_K_M": (LlamaFileType.MOSTLY_Q4_K_M, Q.Q4_K),
    "Q5_K_S": (LlamaFileType.MOSTLY_Q5_K_S, Q.Q5_K),
    "Q5_K_M": (LlamaFileType.MOSTLY_Q5_K_M, Q.Q5_K),
    "Q6_K": (LlamaFileType.MOSTLY_Q6_K, Q.Q6_K),
    "IQ1_S": (LlamaFileType.MOSTLY_IQ1_S, Q.IQ1_S),
    "IQ1_M": (LlamaFileType.MOSTLY_IQ1_M, Q.IQ1_M),
    "IQ2_XXS": (LlamaFileType.MOSTLY_IQ2_XXS, Q.IQ2_XXS),
    "IQ2_XS": (LlamaFileType.MOSTLY_IQ2_XS, Q.IQ2_XS),
    "IQ2_S": (LlamaFileType.MOSTLY_IQ2_S, Q.IQ2_XS),
    "IQ2_M": (LlamaFileType.MOSTLY_IQ2_M, Q.IQ2_S),
    "IQ3_XXS": (LlamaFileType.MOSTLY_IQ3_XXS, Q.IQ3_XXS),
    "IQ3_XS": (LlamaFileType.MOSTLY_IQ3_XS, Q.IQ3_S),
    "IQ3_S": (LlamaFileType.MOSTLY_IQ3_S, Q.IQ3_S),
    "IQ3_M": (LlamaFileType.MOSTLY_IQ3_M, Q.IQ3_S),
    "IQ4_NL": (LlamaFileType.MOSTLY_IQ4_NL, Q.IQ4_NL),
    "IQ4_XS": (LlamaFileType.MOSTLY_IQ4_XS, Q.IQ4_XS),
    "TQ1_0": (LlamaFileType.MOSTLY_TQ1_0, Q.TQ1_0),
    "TQ2_0": (LlamaFileType.MOSTLY_TQ2_0, Q.TQ2_0),
    "MXFP4_MOE": (LlamaFileType.MOSTLY_MXFP4_MOE, Q.MXFP4),
}
"""File type as the user writes it -> (general.file_type, the type that most tensors start from)."""

ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
"""Short names of file types, as in llama-quantize -> full names."""

FLOATS = (Q.F32, Q.F16, Q.BF16)
"""The types that hold plain floats."""


def file_type(name: str) -> str:
    """The full name of a file type, which is a key of `FILE_TYPES`.

    Raises:
        UserError: when there is no such file type.
    """
    found = ALIASES.get(name.upper(), name.upper())
    if found not in FILE_TYPES:
        raise UserError(
            f"{name} is not a supported GGUF file type: choose one of {', '.join(FILE_TYPES)}."
        )
    return found
