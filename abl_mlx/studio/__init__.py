"""`abl-mlx studio`: a model and its direction in a browser, on this machine."""
