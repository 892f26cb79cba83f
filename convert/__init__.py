"""What the tool knows about model file formats. Nothing here imports ``abl_mlx``."""
