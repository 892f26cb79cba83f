"""What an edit does to a weight, to its rounding, and at runtime."""
