"""The search over edits for few refusals at a low KL."""
