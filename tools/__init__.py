"""Programs that write documents of the project from its code."""
