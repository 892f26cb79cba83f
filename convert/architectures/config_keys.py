"""Keys that config.json and a GGUF's metadata both have, under names of their own.

Each pair stands here once and is used both ways. What a missing key means differs by direction, and
is said where the key is read.
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
"""Key of config.json -> key under the architecture's name, of nearly every model."""

EXPERTS: dict[str, str] = {
    "moe_intermediate_size": "expert_feed_forward_length",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
}
"""The same for Qwen's mixtures of experts."""
