"""The entries of all architectures: one module for each family of related ones."""
