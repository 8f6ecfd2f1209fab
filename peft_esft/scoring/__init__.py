"""Which experts a task uses, and which of them to train."""
