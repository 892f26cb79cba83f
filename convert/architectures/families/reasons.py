"""Why the weights of an architecture are not edited, where several share the reason."""

from __future__ import annotations

EMBEDS = "it makes embeddings and generates no text."
DRAFTS = "it only drafts tokens for another model, from that model's hidden states."
SPEECH = "it makes sound, not text."
