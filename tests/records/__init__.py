"""Tests of abl_mlx.records."""
