"""Projectors: a folder's vision tower as a GGUF of its own, which llama.cpp calls mmproj.

An entry for each family says how its tensors are named in a GGUF; `folder` finds a folder's tower
and writes the file.
"""
