"""Finds the experts containers of a model and describes each: path, kind, weights, layout, number of experts.

Everything that is known of an architecture is data in this file. A container is recognised by what it is, never by the
name of its module.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn


ContainerKind = Literal["fused", "twin"]

TWIN_CLASSES: dict[str, tuple[str, ...]] = {
    "Step3p7Experts": ("num_experts",),
    "LongcatFlashExperts": ("num_routed_experts", "total_experts"),
}
"""Fused experts of transformers that share the call of the standard ones but not their flags, by class name, and the
attributes in which such a module keeps its number of experts."""

READABLE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class ExpertsContainer:
    """One module that holds the routed experts of one layer.

    Attributes:
        path: the module's path in the model, without the prefix of a PEFT wrapper.
        module: the module itself; the base module where an adapter layer is wrapped around it.
        kind: "fused" for experts in fused parameters with the standard flags of `use_experts_implementation`; "twin"
            for fused parameters behind the same call without those flags.
        num_experts: routed experts that have weights.
        weight_names: the parameters with a leading expert dimension.
        layer_index: the number of the decoder layer, counted as the path counts it; None if the path has no number.
    """

    path: str
    module: nn.Module = field(repr=False, compare=False)
    kind: ContainerKind
    num_experts: int
    weight_names: tuple[str, ...]
    layer_index: int | None

    @property
    def wrapper_or_module(self) -> nn.Module:
        """The module that is called in the forward pass: an adapter layer around the container if there is one."""
        return self._called[0] if self._called else self.module

    _called: tuple[nn.Module, ...] = field(default=(), repr=False, compare=False)

    @property
    def hidden_size(self) -> int:
        """The width of the experts' input and output, which need not be the model's."""
        return self.module.down_proj.shape[2 if getattr(self.module, "is_transposed", False) else 1]

    @property
    def parameters_per_expert(self) -> int:
        """Number of weights of one expert."""
        return sum(getattr(self.module, name)[0].numel() for name in self.weight_names)

    @property
    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each weight for one expert, without the expert dimension."""
        return {name: tuple(getattr(self.module, name).shape[1:]) for name in self.weight_names}


def find_experts(model: nn.Module) -> dict[str, ExpertsContainer]:
    """Finds the experts containers of any model.

    Args:
        model: a transformers model, a `PeftModel` around one, or any module that contains one.

    Returns:
        A description for each container, keyed by its module path, in the order of the model's modules. Empty if the
        model holds no experts of a known kind.

    Example:
        >>> find_experts(model)["model.layers.0.mlp.experts"].num_experts
        64
    """
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    return {container.path: container for container in _walk(model, "")}


def resolve_container(key: str | int, containers: dict[str, ExpertsContainer]) -> str:
    """The path that a key of `target_experts` means: a module path, or the index of a decoder layer.

    Raises:
        ValueError: if no container, or more than one, fits the key.
    """
    if key in containers:
        return str(key)
    if re.fullmatch(r"\d+", str(key)):
        paths = [path for path, container in containers.items() if container.layer_index == int(key)]
        if len(paths) == 1:
            return paths[0]
        if paths:
            raise ValueError(f"layer {key} has several experts containers, name one of them by its path: {paths}")
        indices = sorted({c.layer_index for c in containers.values() if c.layer_index is not None})
        raise ValueError(f"layer {key} has no experts container; the layers that have one are {indices}")
    raise ValueError(
        f"{key!r} is not the path of an experts container of this model. Its containers are {_shortened(containers)}; "
        "`find_experts(model)` lists them"
    )


def describe_experts(module: nn.Module, path: str) -> ExpertsContainer | None:
    """Describes one module if it is an experts container, looking through an adapter layer; None otherwise."""
    called, module = module, getattr(module, "base_layer", module)
    kind = _kind(module)
    if kind is None:
        return None
    num_experts = module.down_proj.shape[0]
    up_proj = "up_proj" if kind == "fused" and not module.has_gate else "gate_up_proj"
    weight_names = [up_proj, "down_proj"]
    if kind == "fused" and module.has_bias:
        weight_names += [f"{up_proj}_bias", "down_proj_bias"]
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", path)
    return ExpertsContainer(
        path=path,
        module=module,
        kind=kind,
        num_experts=num_experts,
        weight_names=tuple(weight_names),
        layer_index=int(numbers[0]) if numbers else None,
        _called=(called,) if called is not module else (),
    )


def _walk(module: nn.Module, path: str) -> Iterator[ExpertsContainer]:
    container = describe_experts(module, path)
    if container is not None:
        yield container
        return
    for name, child in module.named_children():
        yield from _walk(child, f"{path}.{name}" if path else name)


def _kind(module: nn.Module) -> ContainerKind | None:
    if not isinstance(getattr(module, "down_proj", None), nn.Parameter) or module.down_proj.dim() != 3:
        return None
    if hasattr(module, "has_gate") and hasattr(module, "is_transposed"):
        return "fused"
    return "twin" if type(module).__name__ in TWIN_CLASSES else None


def _shortened(containers: dict[str, ExpertsContainer], shown: int = 4) -> str:
    paths = list(containers)
    more = f" and {len(paths) - shown} more" if len(paths) > shown else ""
    return f"{paths[:shown]}{more}"
