"""The command line `peft-esft`: a file for each command.

May import everything. Nothing imports it.

Begin with `main.py`, which parses the arguments.
"""

from .main import main


__all__ = ["main"]
