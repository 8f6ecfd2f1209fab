"""What a mixture-of-experts model has: its experts, their weights, its routing."""
