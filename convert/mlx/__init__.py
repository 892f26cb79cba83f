"""Folders of MLX models, MLX's quantized matrices, and fast computation on a CPU."""
