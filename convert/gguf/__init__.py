"""The GGUF format and the types of its tensors."""
