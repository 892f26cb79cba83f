"""Ollama: its store of models, its command-line program and its Modelfiles."""
