"""`python -m abl_mlx`."""

from abl_mlx.cli.main import main

main()
