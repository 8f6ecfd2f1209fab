"""Computes with tensors: products of selected and frozen experts, deltas, stored forms.

May import torch alone: no PEFT, no transformers, no other part of the package.

Begin with `split_forward.py`, the forward pass of an experts layer. `grouped_linear.py` has its products, forward and
backward.
"""
