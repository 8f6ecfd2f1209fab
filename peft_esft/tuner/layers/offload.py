"""Weights that accelerate keeps on the host or the disk between calls: read where and when they are computed with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from torch import nn


def is_offloaded(module: nn.Module) -> bool:
    """True if accelerate keeps weights of a module elsewhere between its calls."""
    return bool(_offloading_hooks(module))


def compute_device(module: nn.Module, parameter: nn.Parameter) -> torch.device:
    """The device on which a parameter of a module is computed with, wherever it is now."""
    hooks = _offloading_hooks(module) if parameter.device.type == "meta" else []
    return torch.device(hooks[0].execution_device) if hooks else parameter.device


def at_hand(module: nn.Module, parameter: nn.Parameter) -> AbstractContextManager[None]:
    """Has the weights of a module, and of no other, where they are computed with.

    Args:
        module: one that may be offloaded; if so, and it is not loaded yet, it is for as long as the context lasts.
        parameter: one of its own, which tells where they are now.
    """
    is_away = parameter.device.type == "meta" and is_offloaded(module)
    return _loaded(module) if is_away else nullcontext()


@contextmanager
def _loaded(module: nn.Module) -> Iterator[None]:
    with ExitStack() as stack:
        for part in module.modules():
            stack.enter_context(align_module_device(part))
        yield


def _offloading_hooks(module: nn.Module) -> list[Any]:
    """accelerate's hooks below a module that load weights around a call."""
    return [part._hf_hook for part in module.modules() if "_hf_hook" in part.__dict__ and has_offloaded_params(part)]
