"""Pairs of a key of config.json and a metadata key of a GGUF with the same meaning.

Each pair is used in both directions. The meaning of a missing key depends on the direction and is
decided where the key is read.
"""

from __future__ import annotations

SHARED: dict[str, str] = {
    "num_hidden_layers": "block_count",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
"""Key of config.json -> GGUF key under the architecture's prefix, for nearly every model."""

EXPERTS: dict[str, str] = {
    "moe_intermediate_size": "expert_feed_forward_length",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
}
"""Key of config.json -> GGUF key under the architecture's prefix, for Qwen's MoE models."""
