"""The PEFT tuner: its config, its model, its layers, and what is done with adapters.

May import `scoring`, `moe` and `ops`.

Begin with `model.py`, which PEFT calls; `config.py` has the options, `layers/layer.py` what happens in a forward pass.
"""

import peft  # noqa: F401 -- the tuner is registered at the end of this import, before a module of this wing is asked for
