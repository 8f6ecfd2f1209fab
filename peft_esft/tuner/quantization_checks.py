"""Refuses experts that cannot be brought to few bits, before anything changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from ..moe.containers import ExpertsContainer
from ..moe.weights import StackedWeight, StoredWeight, is_spread
from .layers.offload import is_offloaded


def check_quantizable(model: nn.Module, containers: Mapping[str, ExpertsContainer], is_loading: bool = False) -> None:
    """Refuses experts that cannot be brought to few bits, before anything changes.

    Args:
        model: the model.
        containers: its experts.
        is_loading: its weights are not there yet.

    Raises:
        ValueError: if there are no experts, or adapters are attached.
        NotImplementedError: naming the first module and why.
    """
    if not containers:
        raise ValueError(f"{type(model).__name__} has no experts module of a known kind, so none can be quantised")
    for path, container in containers.items():
        name = f"{path} ({type(container.module).__name__})"
        if container.wrapper_or_module is not container.module:
            raise ValueError(f"{path} has an adapter. Quantise the experts first, and attach adapters then")
        if container.refusal is not None:
            raise NotImplementedError(f"{name}: {container.refusal}")
        if container.kind != "fused":
            raise NotImplementedError(
                f"{name} does not have its experts in fused parameters of a known layout, and only such experts can "
                "be quantised; load the model in bfloat16 without quantising its experts"
            )
        for weight in matrices(container):
            _check_readable(f"{path}.{weight.name}", container, weight, is_loading)
            if is_loading and {f"{path}.{weight.name}"} & set(cast(Any, model).all_tied_weights_keys):
                raise NotImplementedError(
                    f"{name} shares its weights with another module, which cannot be quantised while it is loaded. "
                    "Load the model without a quantization_config, and call quantize_experts(model)"
                )


def _check_readable(name: str, container: ExpertsContainer, weight: StackedWeight, is_loading: bool) -> None:
    if isinstance(weight, StoredWeight):
        form = weight.stored(container.module).format.name
        raise NotImplementedError(f"{name} is quantised already ({form}), and would lose precision once more")
    parameter = weight.parameters(container.module)[0]
    if type(parameter.data) is not Tensor or is_spread(parameter):
        raise NotImplementedError(
            f"{name} is a {type(parameter.data).__name__}, which cannot be quantised. Quantise the experts before the "
            "model is sharded, and load it without another quantiser for its experts"
        )
    if not is_loading and (is_offloaded(container.module) or parameter.is_meta):
        raise NotImplementedError(
            f"{name} is not loaded (offloaded, or on the meta device). Load the model with "
            "quantization_config=ESFTQuantizationConfig(...), or without device_map"
        )
    if not parameter.is_floating_point():
        raise NotImplementedError(f"{name} has dtype {parameter.dtype}: it is quantised already")
    if not is_loading and (refusals := not_finite(name, cast(Tensor, weight.whole(container.module)))):
        raise ValueError(refusals[0])


def not_finite(name: str, rows: Tensor) -> list[str]:
    """What to say of experts `[E, ...]` with values that are no numbers: one such would spoil a block or a row."""
    if all(bool(row.isfinite().all()) for row in rows.detach()):
        return []
    return [f"{name} has values that are not finite, and cannot be quantised: the model is damaged"]


def matrices(container: ExpertsContainer) -> list[StackedWeight]:
    """The weights that are quantised: those of the projections, not their biases."""
    return [w for w in container.weights if isinstance(w, StackedWeight) and len(w.shape(container.module)) == 2]
