"""Finds the experts containers of a model and describes each: path, kind, weights, layout, number of experts.

Everything that is known of an architecture is data in this file. A container is recognised by what it is, never by the
name of its module.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn


ContainerKind = Literal["fused"]


@dataclass(frozen=True)
class ExpertsLayout:
    """How fused experts are stored and what lies between their projections.

    The first four are the flags of `transformers.integrations.use_experts_implementation`; its fifth,
    `is_concatenated`, matters only to the module's own `_apply_gate`, which is called and never rewritten.

    Attributes:
        has_gate: the up projection is `gate_up_proj`, twice as wide, and not `up_proj`.
        has_bias: there is a bias on each projection.
        is_transposed: weights are `[E, in, out]` instead of `[E, out, in]`.
        has_post_expert_norm: `post_expert_norm`, shared by all experts, follows the down projection.
        identity_experts: the attribute that holds the number of experts without weights, which have the ids from
            `num_experts` on and return their input; None if there are none.
    """

    has_gate: bool = True
    has_bias: bool = False
    is_transposed: bool = False
    has_post_expert_norm: bool = False
    identity_experts: str | None = None


UNFLAGGED_LAYOUTS: dict[str, ExpertsLayout] = {
    "Step3p7Experts": ExpertsLayout(),
    "LongcatFlashExperts": ExpertsLayout(identity_experts="zero_expert_num"),
}
"""Fused experts of transformers that share the call of the standard ones but do not carry their flags."""

READABLE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class ExpertsContainer:
    """One module that holds the routed experts of one layer.

    Attributes:
        path: the module's path in the model, without the prefix of a PEFT wrapper.
        module: the module itself; the base module where an adapter layer is wrapped around it.
        kind: "fused" for experts in fused 3-D parameters behind `forward(hidden_states, top_k_index, top_k_weights)`.
        layout: how they are stored.
        num_experts: routed experts that have weights.
        weight_names: the parameters with a leading expert dimension.
        layer_index: the number of the decoder layer, counted as the path counts it; None if the path has no number.
    """

    path: str
    module: Any = field(repr=False, compare=False)
    kind: ContainerKind
    layout: ExpertsLayout
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
        return self.module.down_proj.shape[2 if self.layout.is_transposed else 1]

    @property
    def num_identity_experts(self) -> int:
        """Experts without weights, which have the ids from `num_experts` on and return their input."""
        return getattr(self.module, self.layout.identity_experts) if self.layout.identity_experts else 0

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
    base: Any = model
    model = base.get_base_model() if hasattr(base, "get_base_model") else base
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
    called = module
    base: Any = getattr(module, "base_layer", module)
    layout = _fused_layout(base)
    if layout is None:
        return None
    up_proj = "gate_up_proj" if layout.has_gate else "up_proj"
    weight_names = [up_proj, "down_proj"]
    if layout.has_bias:
        weight_names += [f"{up_proj}_bias", "down_proj_bias"]
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", path)
    return ExpertsContainer(
        path=path,
        module=base,
        kind="fused",
        layout=layout,
        num_experts=base.down_proj.shape[0],
        weight_names=tuple(weight_names),
        layer_index=int(numbers[0]) if numbers else None,
        _called=(called,) if called is not base else (),
    )


def _walk(module: nn.Module, path: str) -> Iterator[ExpertsContainer]:
    container = describe_experts(module, path)
    if container is not None:
        yield container
        return
    for name, child in module.named_children():
        yield from _walk(child, f"{path}.{name}" if path else name)


def _fused_layout(module: Any) -> ExpertsLayout | None:
    if not isinstance(getattr(module, "down_proj", None), nn.Parameter) or module.down_proj.dim() != 3:
        return None
    if not (hasattr(module, "has_gate") and hasattr(module, "is_transposed")):
        return UNFLAGGED_LAYOUTS.get(type(module).__name__)
    return ExpertsLayout(
        has_gate=module.has_gate,
        has_bias=module.has_bias,
        is_transposed=module.is_transposed,
        has_post_expert_norm=module.has_post_expert_norm,
    )


def _shortened(containers: dict[str, ExpertsContainer], shown: int = 4) -> str:
    paths = list(containers)
    more = f" and {len(paths) - shown} more" if len(paths) > shown else ""
    return f"{paths[:shown]}{more}"
