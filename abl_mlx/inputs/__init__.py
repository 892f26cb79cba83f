"""What is given: models by name, and prompt sets."""
