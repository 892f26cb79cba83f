"""What weights alone tell of an edit."""
