"""The facts about each architecture that reading, writing and editing its models needs."""
