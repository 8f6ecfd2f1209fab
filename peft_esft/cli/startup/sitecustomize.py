"""Runs at the start of each Python process below `peft-esft run`: has the tuner registered when PEFT is imported.

`peft-esft run` puts this folder first in PYTHONPATH. Python imports one module of this name, so this one imports the
next one on the path, which it hides.
"""

import sys
from importlib.util import find_spec
from pathlib import Path


def _import_hidden() -> None:
    here, own = str(Path(__file__).parent), sys.modules.pop("sitecustomize")
    sys.path[:] = [entry for entry in sys.path if entry != here]
    try:
        import sitecustomize  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "sitecustomize":
            raise
        sys.modules["sitecustomize"] = own


if find_spec("peft_esft") is not None:
    import peft_esft  # noqa: F401
elif find_spec("peft") is not None:
    sys.stderr.write(f"peft-esft run: {sys.executable} has PEFT, but not peft_esft; install it there too\n")
_import_hidden()
