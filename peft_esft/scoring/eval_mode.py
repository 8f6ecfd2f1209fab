"""Evaluation mode for the time of a call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Puts models in eval mode for the time of the context; then each of their modules is in the mode it was in.

    A model may be in training while some of its modules are not, for example frozen layers whose dropout is off.
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
