"""MLX folders, and matrices of quantized types in MLX and on a CPU."""
