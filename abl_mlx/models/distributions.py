"""Distributions of the next token, as log-probabilities in float32."""

from __future__ import annotations

import mlx.core as mx


def normalized(logits: mx.array) -> mx.array:
    """Log-probabilities in float32 from raw logits along the last axis."""
    raw = logits.astype(mx.float32)
    return raw - mx.logsumexp(raw, axis=-1, keepdims=True)


def kl_divergence(base: mx.array, other: mx.array) -> mx.array:
    """KL(base ‖ other) in nats along the last axis, from log-probabilities: (…, V) -> (…).

    A token with probability 0 under ``base`` (such as a logit of −inf) adds 0, whatever its
    probability under ``other``.
    """
    p = mx.exp(base)
    return mx.where(p == 0, 0, p * (base - other)).sum(axis=-1)


def known(log_probabilities: mx.array) -> bool:
    """Whether no value is NaN; −inf is allowed."""
    return not mx.isnan(log_probabilities).any().item()
