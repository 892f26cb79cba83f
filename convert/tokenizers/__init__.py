"""Tokenizers and chat templates, from and to a GGUF."""
