"""What each architecture is: one module for each group of relatives."""
