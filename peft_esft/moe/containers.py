"""Finds the experts containers of a model and describes each: path, kind, weights, layout, number of experts, router.

A container is recognised by what it is, never by the name of its module. What has to be known of an architecture is
data in `architectures.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn

from .architectures import (
    GATED_PROJECTIONS,
    KNOWN_CONTAINERS,
    SHARED_EXPERTS,
    STANDARD_CALL,
    UNFLAGGED_LAYOUTS,
    ExpertsLayout,
    KnownContainer,
)
from .routing import RoutingSource, read_router_result
from .weights import ExpertWeight, ListedWeight, StackedWeight, whole_shape


ContainerKind = Literal["fused", "listed", "stacked", "module"]


@dataclass(frozen=True)
class ModuleLocation:
    """Where a container stands in the model.

    Attributes:
        path: the module's path, without the prefix of a PEFT wrapper.
        called: the module that the forward pass calls: an adapter layer around the container if there is one.
        module: the container itself.
        parent: the module that holds it.
    """

    path: str
    called: Any = field(repr=False, compare=False)
    module: Any = field(repr=False, compare=False)
    parent: Any = field(repr=False, compare=False)

    def watched(self, source: RoutingSource) -> nn.Module:
        """The module whose call shows the routing."""
        watched: nn.Module = self.called if source.watched == "container" else getattr(self.parent, source.watched)
        return watched


@dataclass(frozen=True)
class ExpertsContainer:
    """One module that holds the routed experts of one layer.

    Attributes:
        places: where it stands; more than one if other modules share all of its weights.
        kind: "fused" for experts in fused 3-D parameters behind `forward(hidden_states, top_k_index, top_k_weights)`;
            "listed" for a list of experts in modules of their own; "stacked" for any other layout with the experts on
            one dimension of a parameter; "module" for a module trained whole, as if it were one expert.
        num_experts: routed experts that have weights.
        weights: how each weight of the experts is stored.
        layout: the flags of fused experts.
        routing: where the routing can be seen; None if only the calls of the single experts can.
        refusal: why its experts cannot be trained, and what would do; None if they can.
    """

    places: tuple[ModuleLocation, ...]
    kind: ContainerKind
    num_experts: int
    weights: tuple[ExpertWeight, ...] = field(repr=False)
    layout: ExpertsLayout = field(default=ExpertsLayout(), repr=False)
    routing: RoutingSource | None = field(default=None, repr=False)
    refusal: str | None = field(default=None, repr=False)

    @property
    def path(self) -> str:
        """The module's path in the model, without the prefix of a PEFT wrapper; the first one if it is tied."""
        return self.places[0].path

    @property
    def module(self) -> Any:
        """The module itself; the base module where an adapter layer is wrapped around it."""
        return self.places[0].module

    @property
    def wrapper_or_module(self) -> Any:
        """The module that is called in the forward pass: an adapter layer around the container if there is one."""
        return self.places[0].called

    @property
    def layer_index(self) -> int | None:
        """The number of the layer, counted as the path counts it; None if the path has no number."""
        return layer_number(self.path)

    @property
    def weight_names(self) -> tuple[str, ...]:
        """Names of the weights, as in adapter files."""
        return tuple(weight.name for weight in self.weights)

    @property
    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each weight for one expert, without the expert dimension."""
        return {weight.name: weight.shape(self.module) for weight in self.weights}

    @property
    def hidden_size(self) -> int:
        """The width of the experts' input, which need not be the model's."""
        if self.kind == "fused":
            return self.weight_shapes["down_proj"][1 if self.layout.is_transposed else 0]
        return next(iter(self.weight_shapes.values()))[-1]

    @property
    def num_identity_experts(self) -> int:
        """Experts without weights, which have the ids from `num_experts` on and return their input."""
        return getattr(self.module, self.layout.identity_experts) if self.layout.identity_experts else 0

    @property
    def parameters_per_expert(self) -> int:
        """Number of weights of one expert."""
        return sum(torch.Size(shape).numel() for shape in self.weight_shapes.values())

    @property
    def nbytes_per_expert(self) -> int:
        """Bytes of the weights of one expert."""
        dtypes = [weight.parameters(self.module)[0].dtype for weight in self.weights]
        shapes = self.weight_shapes.values()
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True))

    def parameters(self) -> list[nn.Parameter]:
        """All parameters that hold weights of the experts."""
        return [parameter for weight in self.weights for parameter in weight.parameters(self.module)]


def layer_number(path: str) -> int | None:
    """The first number of a path; None if it has none."""
    number = re.search(r"(?:^|\.)(\d+)(?=\.|$)", path)
    return int(number[1]) if number else None


def find_experts(model: nn.Module) -> dict[str, ExpertsContainer]:
    """Finds the experts containers of any model.

    Args:
        model: a transformers model, a `PeftModel` around one, or any module that contains one.

    Returns:
        A description for each container, keyed by its module path, in the order of the model's modules. Empty if the
        model holds no experts of a known kind. Containers that share all their weights are one, with several places.

    Example:
        >>> find_experts(model)["model.layers.0.mlp.experts"].num_experts
        64
    """
    return _join_tied(_walk(_base_model(model), "", None))


def find_shared_experts(model: nn.Module) -> dict[str, ExpertsContainer]:
    """Finds the experts that every token goes through, each a container of kind "module"."""
    containers = find_experts(model)
    experts = {location.path for container in containers.values() for location in container.places}
    if not experts:
        return {}
    found = (
        _describe_whole(location)
        for location in _places(_base_model(model), "", None)
        if SHARED_EXPERTS.fullmatch(location.path.rpartition(".")[2]) and location.path not in experts
    )
    return _join_tied(found)


def find_other_modules(model: nn.Module) -> tuple[dict[str, ExpertsContainer], list[str]]:
    """Finds all that is neither an expert nor a shared expert, routers included.

    Returns:
        The smallest modules that hold parameters, each a container of kind "module"; and the names of the parameters
        that cannot be trained so, since they belong directly to a module that holds experts too.
    """
    base = _base_model(model)
    containers = [*find_experts(model).values(), *find_shared_experts(model).values()]
    taken = {location.path for container in containers for location in container.places}
    left_out: list[str] = []
    found = list(_walk_others(ModuleLocation("", base, base, None), taken, left_out))
    return _join_tied(found), left_out


def _base_model(model: nn.Module) -> nn.Module:
    base: Any = model
    return base.get_base_model() if hasattr(base, "get_base_model") else base


def _children(location: ModuleLocation) -> Iterator[ModuleLocation]:
    for name, child in location.module.named_children():
        path = f"{location.path}.{name}" if location.path else name
        yield ModuleLocation(path, child, getattr(child, "base_layer", child), location.module)


def _places(module: nn.Module, path: str, parent: nn.Module | None) -> Iterator[ModuleLocation]:
    """All modules from here on, seen through adapter layers."""
    location = ModuleLocation(path, module, getattr(module, "base_layer", module), parent)
    yield location
    for child in _children(location):
        yield from _places(child.called, child.path, location.module)


def _walk(module: nn.Module, path: str, parent: nn.Module | None) -> Iterator[ExpertsContainer]:
    location = ModuleLocation(path, module, getattr(module, "base_layer", module), parent)
    container = _describe(location)
    if container is not None:
        yield container
        return
    for child in _children(location):
        yield from _walk(child.called, child.path, location.module)


def _walk_others(location: ModuleLocation, taken: set[str], left_out: list[str]) -> Iterator[ExpertsContainer]:
    if location.path in taken:
        return
    own = [name for name, _ in location.module.named_parameters(recurse=False)]
    if own and not any(path.startswith(f"{location.path}.") for path in taken):
        yield _describe_whole(location)
        return
    left_out += [f"{location.path}.{name}" if location.path else name for name in own]
    for child in _children(location):
        yield from _walk_others(child, taken, left_out)


def _describe(location: ModuleLocation) -> ExpertsContainer | None:
    """Describes a module if it is an experts container; None otherwise."""
    known = KNOWN_CONTAINERS.get(type(location.module).__name__)
    layout = _fused_layout(location.module) if known is None else None
    if layout is not None:
        return _describe_fused(location, layout)
    if known is not None and known.weights:
        return _describe_stacked(location, known)
    if known is not None or _is_list_of_experts(location):
        return _describe_listed(location, known)
    return None


def _describe_fused(location: ModuleLocation, layout: ExpertsLayout) -> ExpertsContainer:
    up_proj = "gate_up_proj" if layout.has_gate else "up_proj"
    names = [up_proj, "down_proj"]
    if layout.has_bias:
        names += [f"{up_proj}_bias", "down_proj_bias"]
    num_experts = whole_shape(location.module.down_proj)[0]
    return ExpertsContainer(
        places=(location,),
        kind="fused",
        num_experts=num_experts,
        weights=tuple(StackedWeight(name, name, num_experts) for name in names),
        layout=layout,
        routing=STANDARD_CALL,
    )


def _describe_stacked(location: ModuleLocation, known: KnownContainer) -> ExpertsContainer:
    num_experts = location.module.num_experts
    return ExpertsContainer(
        places=(location,),
        kind="stacked",
        num_experts=num_experts,
        weights=tuple(
            StackedWeight(name, path, num_experts, known.form)
            for name, path in known.weights.items()
            if hasattr(location.module, path.partition(".")[0])
        ),
        routing=known.routing,
        refusal=known.refusal,
    )


def _describe_listed(location: ModuleLocation, known: KnownContainer | None) -> ExpertsContainer:
    modules = {
        name: child for name, child in location.module.named_children() if any(True for _ in child.parameters())
    }
    experts = tuple(modules)
    routing = known.routing if known else _router_beside(location)
    return ExpertsContainer(
        places=(location,),
        kind="listed",
        num_experts=len(experts),
        weights=tuple(_listed_weights(modules[experts[0]], experts)),
        routing=routing,
    )


def _describe_whole(location: ModuleLocation) -> ExpertsContainer:
    names = [name for name, _ in location.module.named_parameters()]
    return ExpertsContainer(
        places=(location,),
        kind="module",
        num_experts=1,
        weights=tuple(StackedWeight(_weight_name(name), name, 1, "single") for name in names),
    )


def _fused_layout(module: Any) -> ExpertsLayout | None:
    if not isinstance(getattr(module, "down_proj", None), nn.Parameter) or len(whole_shape(module.down_proj)) != 3:
        return None
    if not (hasattr(module, "has_gate") and hasattr(module, "is_transposed")):
        return UNFLAGGED_LAYOUTS.get(type(module).__name__)
    return ExpertsLayout(
        has_gate=module.has_gate,
        has_bias=module.has_bias,
        is_transposed=module.is_transposed,
        has_post_expert_norm=module.has_post_expert_norm,
    )


def _is_list_of_experts(location: ModuleLocation) -> bool:
    """True for a list of equal feed-forward modules beside a router, whose weight is `[E, H]`."""
    if (
        not isinstance(location.module, nn.ModuleList | nn.ModuleDict)
        or len(location.module) < 2
        or location.parent is None
    ):
        return False
    experts = list(location.module.children())
    shapes = {tuple((name, p.shape) for name, p in expert.named_parameters()) for expert in experts}
    if len({type(expert) for expert in experts}) > 1 or len(shapes) > 1 or not next(iter(shapes)):
        return False
    if not all(
        re.fullmatch(r"(\w+\.)?(weight|bias)", name) and p.dim() <= 2 for name, p in experts[0].named_parameters()
    ):
        return False
    beside = (child for child in location.parent.children() if child is not location.called)
    return any(p.dim() == 2 and p.shape[0] == len(experts) for child in beside for p in child.parameters())


def _router_beside(location: ModuleLocation) -> RoutingSource | None:
    """The router of a list of experts, if it returns its choice and not just its logits."""
    for name, child in location.parent.named_children():
        weights = [p for p in child.parameters() if p.dim() == 2 and p.shape[0] == len(location.module)]
        if child is not location.called and weights and not isinstance(child, nn.Linear):
            return RoutingSource(read_router_result, watched=name, of_result=True)
    return None


def _listed_weights(expert: nn.Module, experts: tuple[str, ...]) -> Iterator[ListedWeight]:
    """The weights of experts in modules of their own, by the names that they have in the fused form of the model."""
    names = [name for name, _ in expert.named_parameters()]
    fused: dict[str, tuple[str, ...]] = {}
    for gate, up, down in GATED_PROJECTIONS:
        if {f"{gate}.weight", f"{up}.weight", f"{down}.weight"} <= set(names):
            for leaf, suffix in (("weight", ""), ("bias", "_bias")):
                if f"{gate}.{leaf}" in names:
                    fused[f"gate_up_proj{suffix}"] = (f"{gate}.{leaf}", f"{up}.{leaf}")
                if f"{down}.{leaf}" in names:
                    fused[f"down_proj{suffix}"] = (f"{down}.{leaf}",)
    joined = {part for parts in fused.values() for part in parts}
    fused |= {_weight_name(name): (name,) for name in names if name not in joined}
    for name, parts in fused.items():
        yield ListedWeight(name, parts, experts)


def _weight_name(parameter: str) -> str:
    """`up_proj.weight` is `up_proj` and `up_proj.bias` is `up_proj_bias`, as in fused experts."""
    module, _, leaf = parameter.rpartition(".")
    module = module.replace(".", "_")
    return module or leaf if leaf == "weight" else f"{module}_{leaf}".lstrip("_")


def _join_tied(containers: Iterable[ExpertsContainer]) -> dict[str, ExpertsContainer]:
    """Makes one container of those that share all their parameters."""
    joined: dict[str, ExpertsContainer] = {}
    by_parameters: dict[tuple[int, ...], str] = {}
    owners: dict[int, str] = {}
    for container in containers:
        key = tuple(id(parameter) for parameter in container.parameters())
        first = by_parameters.setdefault(key, container.path)
        if first != container.path:
            joined[first] = replace(joined[first], places=joined[first].places + container.places)
            continue
        shared = {owners[parameter] for parameter in key if parameter in owners}
        if shared:
            reason = f"it shares some, but not all, of its weights with {sorted(shared)}"
            joined[container.path] = replace(container, refusal=reason)
        else:
            joined[container.path] = container
        owners |= dict.fromkeys(key, container.path)
    return joined
