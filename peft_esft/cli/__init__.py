"""The command line `peft-esft`."""

from .main import main


__all__ = ["main"]
