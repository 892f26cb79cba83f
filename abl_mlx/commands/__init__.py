"""The commands: each is a function from flags to a record."""
