"""Refuses experts whose weights cannot be read as plain rows, and warns of those that are slow to train."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..moe.architectures import READABLE_DTYPES
from ..moe.containers import ExpertsContainer
from ..moe.weights import StoredWeight
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
            f"{container.path} ({type(container.module).__name__}) is offloaded. Only fused experts can be "
            "trained while they are offloaded; keep this module on a device (device_map)"
        )
    for weight in container.weights:
        if isinstance(weight, StoredWeight):
            continue
        for parameter in weight.parameters(container.module):
            if isinstance(parameter, DTensor):
                raise NotImplementedError(
                    f"{container.path}.{weight.name} is a distributed tensor. With FSDP, attach the adapter "
                    "before the model is sharded. With tensor parallelism, use a plan that keeps each expert "
                    "whole, such as expert parallelism: DistributedConfig(ep_size=...)."
                )
            if is_traceable_wrapper_subclass(parameter.data):
                raise NotImplementedError(
                    f"{container.path}.{weight.name} is a {type(parameter.data).__name__} of another package, "
                    "such as torchao's quantised tensors, and its rows cannot be read. Load the model without "
                    "quantising its experts, and call peft_esft.quantize_experts(model)"
                )
            if parameter.dtype not in READABLE_DTYPES:
                raise NotImplementedError(
                    f"{container.path}.{weight.name} has dtype {parameter.dtype}, a quantised form that cannot be "
                    f"read. Load the model with dtype=... as one of {[str(dtype) for dtype in READABLE_DTYPES]}, "
                    "or with dequantize=True in its quantization config. Then peft_esft.quantize_experts(model) "
                    "keeps its experts in 4 or 8 bits"
                )


def warn_of_unquantised_experts(model: Any, containers: Iterable[ExpertsContainer]) -> None:
    """Says how many bytes of experts a quantiser left in full precision: all but this package's own pass over them."""
    quantizer = getattr(model, "hf_quantizer", None)
    left = [c for c in containers if c.kind == "fused" and not any(isinstance(w, StoredWeight) for w in c.weights)]
    if quantizer is None or not left:
        return
    method = quantizer.quantization_config.quant_method
    size = sum(container.num_experts * container.nbytes_per_expert for container in left) / 1e9
    warnings.warn(
        f"the model was quantised ({getattr(method, 'value', method)}), but the experts of {len(left)} layers "
        f"were not: they take {size:.3g} GB. To reduce them to 0.28 of that, call "
        "peft_esft.quantize_experts(model, bits=4) before you attach the adapter, or load the model with "
        "ESFTQuantizationConfig",
        stacklevel=2,
    )


def warn_of_slow_layouts(containers: Iterable[ExpertsContainer]) -> None:
    """Says which containers are trained at the price of full fine-tuning."""
    slow = sorted({type(container.module).__name__ for container in containers if container.kind == "stacked"})
    if slow:
        warnings.warn(
            f"{', '.join(slow)}: each training step computes the weights of all experts again, and a gradient for "
            "all of them. The result is exact, but takes the time and memory of full fine-tuning.",
            stacklevel=2,
        )


def warn_of_replaced_kernels(containers: Iterable[ExpertsContainer]) -> None:
    """Says which kernels of transformers the split forward takes the place of."""
    modules: Iterable[Any] = (container.module for container in containers if container.kind == "fused")
    configs = (getattr(module, "config", None) for module in modules)
    names = {getattr(config, "_experts_implementation", None) for config in configs}
    for name in sorted(names.difference(_WITHOUT_OWN_KERNELS), key=str):
        warnings.warn(
            f"the experts implementation {name!r} is not used while an adapter is active. The split forward "
            "computes the same function with torch's kernels. The model uses its own implementation when the "
            "adapter is merged or disabled",
            stacklevel=2,
        )
