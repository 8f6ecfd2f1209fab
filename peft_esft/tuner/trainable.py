"""Which experts can have deltas: those whose weights can be read as plain rows."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from torch.distributed.tensor import DTensor

from ..moe.architectures import READABLE_DTYPES
from ..moe.containers import ExpertsContainer
from .layers.offload import is_offloaded


_WITHOUT_OWN_KERNELS = (None, "eager", "grouped_mm", "batched_mm")
"""transformers' experts implementations that are torch's operators."""


def check_trainable(container: ExpertsContainer) -> None:
    """Refuses containers whose weights cannot be read as plain rows.

    Raises:
        NotImplementedError: for quantised, distributed, partly shared or offloaded weights.
    """
    if container.refusal is not None:
        raise NotImplementedError(f"{container.path} ({type(container.module).__name__}): {container.refusal}")
    if container.kind != "fused" and is_offloaded(container.module):
        raise NotImplementedError(
            f"{container.path} ({type(container.module).__name__}) is offloaded, which only fused experts can be; "
            "keep it on a device (device_map)"
        )
    for weight in container.weights:
        for parameter in weight.parameters(container.module):
            if isinstance(parameter, DTensor):
                raise NotImplementedError(
                    f"{container.path}.{weight.name} is a distributed tensor. Attach the adapter before FSDP shards "
                    "the model. Of tensor parallelism only plans that leave experts whole are supported: expert "
                    "parallelism, DistributedConfig(ep_size=...)."
                )
            if parameter.dtype not in READABLE_DTYPES:
                raise NotImplementedError(
                    f"{container.path}.{weight.name} has dtype {parameter.dtype}, a quantised form that cannot be "
                    f"read. Load the model in one of {[str(dtype) for dtype in READABLE_DTYPES]} (dtype=...; or "
                    "dequantize=True in its quantization config)."
                )


def warn_of_slow_layouts(containers: Iterable[ExpertsContainer]) -> None:
    """Says which containers are trained at the price of full fine-tuning."""
    slow = sorted({type(container.module).__name__ for container in containers if container.kind == "stacked"})
    if slow:
        warnings.warn(
            f"{', '.join(slow)}: training writes the whole weights of all experts anew in each call, and their whole "
            "gradient. The result is exact, but time and memory are those of full fine-tuning.",
            stacklevel=2,
        )


def warn_of_replaced_kernels(containers: Iterable[ExpertsContainer]) -> None:
    """Says which kernels of transformers the split forward takes the place of."""
    modules: Iterable[Any] = (container.module for container in containers if container.kind == "fused")
    configs = (getattr(module, "config", None) for module in modules)
    names = {getattr(config, "_experts_implementation", None) for config in configs}
    for name in sorted(names.difference(_WITHOUT_OWN_KERNELS), key=str):
        warnings.warn(
            f"the experts implementation {name!r} is not used while an adapter is active: the split forward computes "
            "the same function with torch's kernels. Merged, or without an adapter, the model uses its own",
            stacklevel=2,
        )
