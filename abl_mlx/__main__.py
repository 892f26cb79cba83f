"""`python -m abl_mlx`."""

from abl_mlx.cli import main

main()
