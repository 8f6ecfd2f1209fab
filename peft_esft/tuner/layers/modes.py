"""Turns off gradients, inference mode and autocast while something is made that outlives a call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def plain_modes() -> Iterator[None]:
    """Turns off gradients, inference mode and autocast, also as a decorator.

    Whatever a layer keeps beyond one call is made within it. A tensor made in the caller's inference mode could not
    take part in a later training step, and one made under autocast would be rounded for good.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for device in ("cpu", torch.accelerator.current_accelerator() or "cpu"):
            kind = torch.device(device).type
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
