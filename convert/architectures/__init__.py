"""What each architecture is in a GGUF and in MLX."""
