"""Describes what a mixture-of-experts model has: its experts, their weights, its routing.

May import torch and transformers, and no other part of the package.

Begin with `containers.py`, which finds the experts of any model; `architectures.py` has what is known of single ones.
"""
