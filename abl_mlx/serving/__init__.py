"""An OpenAI-compatible server on which every request chooses how strongly the model is edited."""
