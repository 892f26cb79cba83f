"""Model files in every format: reading, editing, writing, and undoing an edit."""
