"""Reasons, shared by several architectures, why their weights are not edited."""

from __future__ import annotations

EMBEDS = "it makes embeddings and generates no text."
DRAFTS = "it only drafts tokens for another model, from that model's hidden states."
SPEECH = "it makes sound, not text."
