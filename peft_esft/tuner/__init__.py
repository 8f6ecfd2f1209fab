"""The PEFT tuner: the config, the model, the layers, the adapter's file, and operations on adapters.

May import `scoring`, `moe` and `ops`.

Begin with `model.py`, which PEFT calls. `config.py` has the options, `layers/layer.py` the forward
pass of a layer.
"""

import peft  # noqa: F401 -- the tuner is registered at the end of this import, before a module of this wing is asked for
