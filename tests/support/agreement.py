"""Do mlx-lm and llama.cpp say the same about one GGUF?"""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import generate_step

from abl_mlx.behaviour.llamacpp import LlamaCpp


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
    steps = greedy(model, prompt, n)
    own = logprobs(model, prompt + steps)[len(prompt) - 1 : -1]
    assert all(row.max() - row[token] < 1e-3 for row, token in zip(own, steps, strict=True))
    return max(
        abs(float(row[token]) - logprob)
        for row, top in zip(rows, tops, strict=True)
        for token, logprob in top.items()
    )
