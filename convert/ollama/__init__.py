"""Ollama: its store, its server and its Modelfiles."""
