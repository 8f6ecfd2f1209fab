"""Has the modules that ESFT puts around experts, and what they do in a forward pass.

Begin with `layer.py`. `effective_rows.py` has the one function that computes the weights that a call uses, and
`held.py` the two cases in which they are kept. `fused.py`, `listed.py` and `substituted.py` are the kinds of layers.
"""
