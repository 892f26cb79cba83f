"""Do mlx-lm and llama.cpp say the same about one GGUF?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model

from abl_mlx.behaviour.llamacpp import LlamaCpp


def float32(folder: Path, **config: Any) -> nn.Module:
    """The folder's model, computing in float32 from the stored weights."""
    model, _ = load_model(folder, model_config=config)
    model.set_dtype(mx.float32)
    return model


def interleave_rows(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from (first half, second half) to alternating order."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def logprobs(model: nn.Module, tokens: list[int]) -> np.ndarray:
    """Log-probabilities after each token, float32 (T, V)."""
    logits = model(mx.array([tokens]))[0].astype(mx.float32)
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


def greedy(model: nn.Module, prompt: list[int], n: int) -> list[int]:
    """mlx-lm's own next n tokens, one at a time, through its cache."""
    steps = generate_step(mx.array(prompt), model, max_tokens=n)
    return [int(token) for token, _ in steps]


def disagreement(
    model: nn.Module, gguf: Path, prompt: list[int], *, near: float, n: int = 32, n_ctx: int = 512
) -> float:
    """The worst difference of llama.cpp's top-5 log-probabilities over n greedy tokens.

    Asserts that llama.cpp's every token is the model's likeliest, or within ``near`` of it, and
    that mlx-lm's own generation through its cache agrees with its forward pass.
    """
    with LlamaCpp(gguf, n_ctx=n_ctx, n_parallel=1, n_threads=1) as runtime:
        reply = runtime.greedy(prompt, n)
        tops = runtime.top_logprobs(prompt, reply)
    assert len(reply) == n, f"llama.cpp ended its reply after {len(reply)} tokens"
    rows = logprobs(model, prompt + reply)[len(prompt) - 1 : -1]
    short = [float(row.max() - row[token]) for row, token in zip(rows, reply, strict=True)]
    assert max(short) < near, f"llama.cpp's token is {max(short):.3f} less likely in MLX"
    steps = greedy(model, prompt, min(n, 12))  # past the end of every recipe's window
    own = logprobs(model, prompt + steps)[len(prompt) - 1 : -1]
    assert all(row.max() - row[token] < 1e-3 for row, token in zip(own, steps, strict=True))
    return max(
        abs(float(row[token]) - logprob)
        for row, top in zip(rows, tops, strict=True)
        for token, logprob in top.items()
    )
