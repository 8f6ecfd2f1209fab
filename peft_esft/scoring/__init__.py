"""Measures which experts a task uses, and chooses which of them to train.

May import `moe` and `ops`.

Begin with `measure.py`, which has `score_experts`, and `selection.py`, which has `select_experts`.
"""
