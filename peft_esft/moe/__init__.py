"""Finds the experts of a mixture-of-experts model, and reads their weights and their routing."""
