"""Model files in every format: reading, editing, writing, and taking an edit back."""
