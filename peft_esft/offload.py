"""Weights that accelerate keeps on the host or the disk between calls: read where and when they are computed with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from torch import nn


def is_offloaded(module: nn.Module) -> bool:
    """True if accelerate keeps weights of a module elsewhere between its calls."""
    return any("_hf_hook" in part.__dict__ and has_offloaded_params(part) for part in module.modules())


def compute_device(module: nn.Module, parameter: nn.Parameter) -> torch.device:
    """The device on which a parameter is computed with, wherever it is now."""
    if parameter.device.type != "meta" or not is_offloaded(module):
        return parameter.device
    hooks = [part._hf_hook for part in module.modules() if "_hf_hook" in part.__dict__ and has_offloaded_params(part)]
    return torch.device(hooks[0].execution_device)  # type: ignore[union-attr, arg-type]


@contextmanager
def loaded(module: nn.Module) -> Iterator[None]:
    """Has the weights of a module, and of no other, where they are computed with."""
    with ExitStack() as stack:
        for part in module.modules():
            stack.enter_context(align_module_device(part))
        yield
