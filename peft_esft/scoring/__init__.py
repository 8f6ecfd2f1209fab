"""Measures which experts a task uses, and chooses which of them to train."""
