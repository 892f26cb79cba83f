"""The search over edits that trades refusals against KL."""
