"""Which experts can have deltas: those whose weights can be read as plain rows."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from torch.distributed.tensor import DTensor

from ..moe.architectures import READABLE_DTYPES
from ..moe.containers import ExpertsContainer
from ..moe.weights import StoredWeight
from .layers.offload import is_offloaded


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
        if isinstance(weight, StoredWeight):
            continue
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
