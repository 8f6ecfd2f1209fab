"""The PEFT tuner: its config, its model, its layers, and what is done with adapters.

May import `scoring`, `moe` and `ops`.

Begin with `model.py`, which PEFT calls; `config.py` has the options, `layers/layer.py` what happens in a forward pass.
"""
