"""Finds the experts modules ("containers") of a model, and describes the weights, the layout and the router of each.

A container is recognised by its parameters and its class, never by the name of its module. Facts about single
architectures are data in `architectures.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import nn

from .architectures import (
    ADOPTABLE,
    GATED_PROJECTIONS,
    KNOWN_CONTAINERS,
    REGISTERED_LAYOUTS,
    SHARED_EXPERTS,
    STANDARD_CALL,
    UNFLAGGED_LAYOUTS,
    ExpertsLayout,
    KnownContainer,
)
from .foreign_experts import is_parametrized, quantised_weights
from .routing import RoutingSource, read_router_result
from .stored_experts import StoredExperts
from .weights import ExpertWeight, ListedWeight, StackedWeight, fused_weights, whole_shape


ContainerKind = Literal["fused", "listed", "stacked", "module"]


@dataclass(frozen=True)
class ModuleLocation:
    """The location of a module in the model.

    Attributes:
        path: the module's path, without the prefix of a PEFT wrapper.
        called: the module that the forward pass calls: an adapter layer around the module if there is one.
        module: the module itself.
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

    def path_of(self, name: str) -> str:
        """The path of something in the module. `torch.compile`'s wrapper is not a part of it."""
        if name == "_orig_mod":
            return self.path
        return f"{self.path}.{name}" if self.path else name

    def children(self) -> Iterator[ModuleLocation]:
        """The modules in this module."""
        for name, child in self.module.named_children():
            yield ModuleLocation(self.path_of(name), child, getattr(child, "base_layer", child), self.module)


@dataclass(frozen=True)
class ExpertsContainer:
    """An experts module: it holds the routed experts of a layer.

    Attributes:
        places: locations of the module; there are several if other modules share all of its weights.
        kind: "fused" for experts in fused 3-D parameters behind `forward(hidden_states, top_k_index, top_k_weights)`;
            "listed" for a list of experts that are modules; "stacked" for any other layout with the experts on one
            dimension of a parameter; "module" for a module that is trained whole, as if it were one expert.
        num_experts: number of routed experts that have weights.
        weights: how each weight of the experts is stored.
        layout: the flags of fused experts.
        routing: where the routing can be seen; None if only the calls of the single experts can be seen.
        refusal: why the experts cannot be trained, and what to do instead; None if they can be trained.
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
        """The module's path in the model, without the prefix of a PEFT wrapper; the first path of a tied module."""
        return self.places[0].path

    @property
    def module(self) -> Any:
        """The module itself, without an adapter layer around it."""
        return self.places[0].module

    @property
    def wrapper_or_module(self) -> Any:
        """The module that the forward pass calls: an adapter layer around the container if there is one."""
        return self.places[0].called

    @property
    def layer_index(self) -> int | None:
        """The number of the layer in the path; None if the path has no number."""
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
        """Number of experts without weights. They have the ids from `num_experts` on and return their input."""
        return getattr(self.module, self.layout.identity_experts) if self.layout.identity_experts else 0

    @property
    def parameters_per_expert(self) -> int:
        """Number of weights of one expert."""
        return sum(map(math.prod, self.weight_shapes.values()))

    @property
    def nbytes_per_expert(self) -> int:
        """Bytes of the weights of one expert."""
        dtypes = {weight.name: weight.dtype(self.module) for weight in self.weights}
        return sum(math.prod(shape) * dtypes[name].itemsize for name, shape in self.weight_shapes.items())

    def parameters(self) -> list[nn.Parameter]:
        """All parameters that hold weights of the experts."""
        return [parameter for weight in self.weights for parameter in weight.parameters(self.module)]


def layer_number(path: str) -> int | None:
    """The first number of a path; None if it has none."""
    number = re.search(r"(?:^|\.)(\d+)(?=\.|$)", path)
    return int(number[1]) if number else None


def find_experts(model: nn.Module) -> dict[str, ExpertsContainer]:
    """Finds the experts modules of any model.

    Args:
        model: a transformers model, a `PeftModel` around one, or any module that contains one.

    Returns:
        A description of each experts module by its path, in the order of the model's modules. Empty if the model has
        no experts of a known kind. Modules that share all their weights have one description with several places.

    Example:
        >>> find_experts(model)["model.layers.0.mlp.experts"].num_experts
        64
    """
    return _join_tied(_search(_root(model), _describe))


def no_experts(model: nn.Module) -> str:
    """Says that a model has no experts of a known kind, and what to do if it seems to have some of another kind."""
    message = f"{type(model).__name__} has no experts module of a known kind"
    for path, module in model.named_modules():
        stacked = {name: list(p.shape) for name, p in module.named_parameters(recurse=False) if p.dim() == 3}
        if len(stacked) > 1 and len({shape[0] for shape in stacked.values()}) == 1:
            return (
                f"{message}. If {path} ({type(module).__name__}) holds experts, with {stacked}, describe its "
                "class first: peft_esft.register_experts(type(module), has_gate=..., has_bias=..., "
                "is_transposed=..., has_post_expert_norm=...). Its documentation explains the arguments"
            )
    if (method := quantisation_of(getattr(model, "config", None))) is not None:
        return (
            f"{message}. Its weights are quantised ({method}); if it has experts, they are in a form that is not "
            "supported. Load the checkpoint in bfloat16, and call peft_esft.quantize_experts(model)"
        )
    return message


def quantisation_of(config: Any) -> str | None:
    """What a model's config calls the form of its weights ("gptq", "mxfp4", ...); None if it names none."""
    own = getattr(config, "quantization_config", None) or {}
    method = own.get("quant_method") if isinstance(own, dict) else own.quant_method
    return None if method is None else str(getattr(method, "value", method))


def find_shared_experts(model: nn.Module) -> dict[str, ExpertsContainer]:
    """Finds the experts that every token goes through, each a container of kind "module"."""
    experts = _paths(find_experts(model))

    def describe(location: ModuleLocation) -> list[ExpertsContainer] | None:
        is_shared = SHARED_EXPERTS.fullmatch(location.path.rpartition(".")[2]) and location.path not in experts
        return [_describe_whole(location)] if is_shared else None

    return _join_tied(_search(_root(model), describe)) if experts else {}


def find_other_modules(model: nn.Module) -> tuple[dict[str, ExpertsContainer], list[str]]:
    """Finds all modules that are neither experts nor shared experts, routers included.

    Returns:
        The smallest modules that hold parameters, each a container of kind "module"; and the names of the parameters
        that cannot be trained in this way, since they belong directly to a module that holds experts too.
    """
    taken = _paths(find_experts(model)) | _paths(find_shared_experts(model))
    left_out: list[str] = []

    def describe(location: ModuleLocation) -> list[ExpertsContainer] | None:
        if location.path in taken:
            return []
        own = [name for name, _ in location.module.named_parameters(recurse=False)]
        if own and not any(path.startswith(location.path_of("")) for path in taken):
            return [_describe_whole(location)]
        left_out.extend(map(location.path_of, own))
        return None

    return _join_tied(_search(_root(model), describe)), left_out


def _root(model: Any) -> ModuleLocation:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return ModuleLocation("", base, getattr(base, "base_layer", base), None)


def _paths(containers: dict[str, ExpertsContainer]) -> set[str]:
    return {location.path for container in containers.values() for location in container.places}


def _search(
    location: ModuleLocation, describe: Callable[[ModuleLocation], list[ExpertsContainer] | None]
) -> Iterator[ExpertsContainer]:
    """Yields what `describe` returns for a module; looks into the module where that is None."""
    found = describe(location)
    if found is not None:
        yield from found
        return
    for child in location.children():
        yield from _search(child, describe)


def _describe(location: ModuleLocation) -> list[ExpertsContainer] | None:
    """Describes a module if it is an experts module."""
    if is_parametrized(location.module):
        return [_describe_parametrized(location)]
    known = KNOWN_CONTAINERS.get(type(location.module).__name__)
    layout = _fused_layout(location.module) if known is None else None
    if layout is not None:
        return [_describe_fused(location, layout)]
    if known is not None and known.weights:
        return [_describe_stacked(location, known)]
    if known is not None or _is_list_of_experts(location):
        return [_describe_listed(location, known)]
    return None


def _describe_fused(location: ModuleLocation, layout: ExpertsLayout) -> ExpertsContainer:
    weights = fused_weights(location.module, layout.has_gate, layout.has_bias)
    return ExpertsContainer(
        (location,), "fused", weights[0].num_experts, weights, layout=layout, routing=STANDARD_CALL
    )


def _describe_stacked(location: ModuleLocation, known: KnownContainer) -> ExpertsContainer:
    num_experts = location.module.num_experts
    weights = tuple(
        StackedWeight(name, path, num_experts, known.form)
        for name, path in known.weights.items()
        if hasattr(location.module, path.partition(".")[0])
    )
    return ExpertsContainer((location,), "stacked", num_experts, weights, routing=known.routing, refusal=known.refusal)


def _describe_parametrized(location: ModuleLocation) -> ExpertsContainer:
    weights = tuple(
        StackedWeight(name, path, num_experts)
        for name, (path, num_experts) in quantised_weights(location.module).items()
    )
    num_experts = weights[0].num_experts
    return ExpertsContainer((location,), "stacked", num_experts, weights, routing=STANDARD_CALL, refusal=ADOPTABLE)


def _describe_listed(location: ModuleLocation, known: KnownContainer | None) -> ExpertsContainer:
    children = dict(location.module.named_children())
    experts = tuple(name for name, child in children.items() if any(True for _ in child.parameters()))
    weights = _listed_weights(children[experts[0]], experts)
    routing = known.routing if known else _routing_beside(location)
    return ExpertsContainer((location,), "listed", len(experts), weights, routing=routing)


def _describe_whole(location: ModuleLocation) -> ExpertsContainer:
    names = [name for name, _ in location.module.named_parameters()]
    weights = tuple(StackedWeight(_weight_name(name), name, 1, "single") for name in names)
    return ExpertsContainer((location,), "module", 1, weights)


def _fused_layout(module: Any) -> ExpertsLayout | None:
    if isinstance(module, StoredExperts):
        return module.esft_layout
    registered = next((REGISTERED_LAYOUTS[c] for c in type(module).__mro__ if c in REGISTERED_LAYOUTS), None)
    if registered is not None:
        _check_registered(module, registered)
        return registered
    if not isinstance(getattr(module, "down_proj", None), nn.Parameter) or len(whole_shape(module.down_proj)) != 3:
        return None
    if not (hasattr(module, "has_gate") and hasattr(module, "is_transposed")):
        return UNFLAGGED_LAYOUTS.get(type(module).__name__)
    return ExpertsLayout(module.has_gate, module.has_bias, module.is_transposed, module.has_post_expert_norm)


def _check_registered(module: nn.Module, layout: ExpertsLayout) -> None:
    """Refuses a module that is not what it was registered as."""
    projections = ["gate_up_proj" if layout.has_gate else "up_proj", "down_proj"]
    needed = dict.fromkeys(projections, 3)
    if layout.has_bias:
        needed |= {f"{name}_bias": 2 for name in projections}
    found = {name: len(whole_shape(parameter)) for name, parameter in module.named_parameters(recurse=False)}
    modules = ["act_fn"] if not layout.has_gate or not hasattr(module, "_apply_gate") else []
    modules += ["post_expert_norm"] if layout.has_post_expert_norm else []
    wrong = [name for name in needed if found.get(name) != needed[name]]
    wrong += [name for name in modules if not hasattr(module, name)]
    if wrong:
        raise ValueError(
            f"{type(module).__name__} was registered with {layout}, but lacks {', '.join(wrong)}. It needs act_fn "
            f"or _apply_gate, and the parameters {', '.join(needed)} with {', '.join(map(str, needed.values()))} "
            "dimensions; see register_experts"
        )


def _is_list_of_experts(location: ModuleLocation) -> bool:
    """True for a list of equal feed-forward modules beside a router, whose weight is `[E, H]`."""
    module = location.module
    if not isinstance(module, nn.ModuleList | nn.ModuleDict) or len(module) < 2 or location.parent is None:
        return False
    shapes = {
        (type(expert), *((name, p.shape) for name, p in expert.named_parameters())) for expert in module.children()
    }
    parameters = dict(next(module.children()).named_parameters())
    are_plain = all(re.fullmatch(r"(\w+\.)?(weight|bias)", name) and p.dim() <= 2 for name, p in parameters.items())
    return len(shapes) == 1 and len(parameters) > 0 and are_plain and any(_routers_beside(location))


def _routers_beside(location: ModuleLocation) -> Iterator[tuple[str, nn.Module]]:
    """The modules beside a list of experts that have a weight `[E, H]`."""
    for name, child in location.parent.named_children():
        has_weight = any(p.dim() == 2 and p.shape[0] == len(location.module) for p in child.parameters())
        if child is not location.called and has_weight:
            yield name, child


def _routing_beside(location: ModuleLocation) -> RoutingSource | None:
    """The router of a list of experts, if it returns its choice. A linear layer returns only logits."""
    names = [name for name, child in _routers_beside(location) if not isinstance(child, nn.Linear)]
    return RoutingSource(read_router_result, watched=names[0], of_result=True) if names else None


def _listed_weights(expert: nn.Module, experts: tuple[str, ...]) -> tuple[ListedWeight, ...]:
    """The weights of experts that are modules, by the names that they have in the fused form of the model."""
    names = [name for name, _ in expert.named_parameters()]
    fused: dict[str, tuple[str, ...]] = {}
    for gate, up, down in GATED_PROJECTIONS:
        if not {f"{gate}.weight", f"{up}.weight", f"{down}.weight"} <= set(names):
            continue
        for leaf, suffix in (("weight", ""), ("bias", "_bias")):
            if f"{gate}.{leaf}" in names:
                fused[f"gate_up_proj{suffix}"] = (f"{gate}.{leaf}", f"{up}.{leaf}")
            if f"{down}.{leaf}" in names:
                fused[f"down_proj{suffix}"] = (f"{down}.{leaf}",)
    joined = {part for parts in fused.values() for part in parts}
    fused |= {_weight_name(name): (name,) for name in names if name not in joined}
    return tuple(ListedWeight(name, parts, experts) for name, parts in fused.items())


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
        key = tuple(map(id, container.parameters()))
        first = by_parameters.setdefault(key, container.path)
        if first != container.path:
            joined[first] = replace(joined[first], places=joined[first].places + container.places)
            continue
        shared = sorted({owners[parameter] for parameter in key if parameter in owners})
        refusal = f"it shares some, but not all, of its weights with {shared}" if shared else container.refusal
        joined[container.path] = replace(container, refusal=refusal)
        owners |= dict.fromkeys(key, container.path)
    return joined
