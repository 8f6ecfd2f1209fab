"""Loads weights that accelerate keeps on the host or the disk, for the length of a computation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from torch import nn

from .records import AdapterLayer


def is_offloaded(module: nn.Module) -> bool:
    """True if accelerate keeps weights of a module elsewhere between its calls."""
    return bool(_offloading_hooks(module))


def compute_device(module: nn.Module, parameter: nn.Parameter) -> torch.device:
    """The device on which a parameter of a module is computed with, wherever it is now."""
    hooks = _offloading_hooks(module) if parameter.device.type == "meta" else []
    return torch.device(hooks[0].execution_device) if hooks else parameter.device


@contextmanager
def load_offloaded(layer: AdapterLayer, base_layer: nn.Module, adapter_names: Sequence[str]) -> Iterator[None]:
    """Has offloaded weights of a module and of adapters where they are computed with, see `ESFTLayer.onloaded`."""
    parts = [part for name, child in layer.named_children() if name != "base_layer" for part in child.modules()]
    with ExitStack() as stack:
        for part in (*base_layer.modules(), *parts):
            stack.enter_context(align_module_device(part))
        is_away = next(iter(layer.weights.values())).parameters(base_layer)[0].is_meta
        if not is_away:
            check_loaded(layer, adapter_names)
        yield


def check_loaded(layer: AdapterLayer, adapter_names: Sequence[str]) -> None:
    """Refuses adapters without data: adding their rows would silently leave them out.

    Raises:
        RuntimeError: naming the adapter and the layer.
    """
    for name in adapter_names:
        if any(tensor.is_meta for tensor in layer.tensors_of(name).values()):
            raise RuntimeError(
                f"adapter {name!r} has no data in {layer.path}: it was added with low_cpu_mem_usage=True, and its "
                "weights were not loaded. Load them with load_adapter, or delete the adapter"
            )


def _offloading_hooks(module: nn.Module) -> list[Any]:
    """accelerate's hooks below a module that load weights around a call."""
    return [part._hf_hook for part in module.modules() if "_hf_hook" in part.__dict__ and has_offloaded_params(part)]
