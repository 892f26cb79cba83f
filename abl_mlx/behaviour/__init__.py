"""What a model replies, and what that is worth: refusals, KL, perplexity, gates."""
