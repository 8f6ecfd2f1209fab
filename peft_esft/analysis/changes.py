"""Measures what training changed in a model: how far experts moved, and how alike two adapters change them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..interchange.diff import compare_deltas, row_products
from ..moe.weights import ExpertWeight
from ..scoring.scores import ExpertScores
from ..tuner.layers.layer import ESFTLayer


TINY = 1e-300  # the divisor instead of 0


@dataclass(frozen=True)
class ExpertUse:
    """How often one trained expert is chosen, and how far it moved.

    Attributes:
        path: path of its container.
        expert: its id.
        pairs: how many scored tokens chose it. None without scores, and for modules that see every token.
        share: `pairs` over all choices of the layer, or None.
        relative_change: norm of the delta over the norm of the base's weights, all weights of the expert together.
    """

    path: str
    expert: int
    pairs: int | None
    share: float | None
    relative_change: float


@dataclass(frozen=True)
class SharedExpert:
    """An expert that two adapters train.

    Attributes:
        path: path of its container.
        expert: its id.
        cosine: cosine of the two deltas, all weights of the expert together; -1 if they cancel each other.
    """

    path: str
    expert: int
    cosine: float


@dataclass(frozen=True)
class ConflictReport:
    """The experts that two adapters have in common; `print` it.

    Attributes:
        adapters: names of the two adapters.
        shared: the experts that both train, layer by layer.
        num_trained: number of experts that each adapter trains.
        num_layers: number of containers that at least one of them trains.
    """

    adapters: tuple[str, str]
    shared: list[SharedExpert]
    num_trained: tuple[int, int]
    num_layers: int

    @property
    def shared_per_layer(self) -> float:
        """Shared experts per experts module, on average."""
        return len(self.shared) / max(1, self.num_layers)

    def __str__(self) -> str:
        first, second = self.adapters
        lines = [
            f"{first} trains {self.num_trained[0]} experts and {second} {self.num_trained[1]}; they share "
            f"{len(self.shared)}, {self.shared_per_layer:.2f} per layer"
        ]
        lines += [f"{shared.path} {shared.expert}: cosine {shared.cosine:+.2f}" for shared in self.shared]
        return "\n".join(lines)


@torch.no_grad()
def expert_usage(
    model: nn.Module, scores: ExpertScores | None = None, *, adapter_name: str | None = None
) -> list[ExpertUse]:
    """Counts for each trained expert how many tokens chose it, and measures how far it moved from the base.

    Args:
        model: a model with an ESFT adapter.
        scores: from `score_experts(model, training_batches)`, before or after training.
        adapter_name: which adapter; None means the active one.

    Returns:
        The trained experts, layer by layer, in the order of the adapter's ids.

    Raises:
        ValueError: if the model has no such adapter, several are active, adapters are merged into the base, or the
            scores are of another model.

    Example:
        >>> max(expert_usage(model), key=lambda use: use.relative_change)
        ExpertUse(path='model.layers.2.mlp.experts', expert=17, pairs=None, share=None, relative_change=0.031)
    """
    if scores is not None:
        scores.check_fits(model)
    if adapter_name is None:
        active = sorted({name for layer in esft_layers(model) for name in layer.active_adapters})
        if len(active) != 1:
            raise ValueError(f"the active ESFT adapters are {active}; say which one with adapter_name")
        (adapter_name,) = active
    return [use for layer in _layers_with(model, adapter_name) for use in _layer_usage(layer, adapter_name, scores)]


@torch.no_grad()
def adapter_conflicts(model: nn.Module, first: str, second: str) -> ConflictReport:
    """Compares two adapters of a model, before they are combined or active together.

    Args:
        model: a model with both adapters.
        first: name of one adapter.
        second: name of the other.

    Returns:
        The report.

    Raises:
        ValueError: if the model lacks one of them, or adapters are merged.

    Example:
        >>> print(adapter_conflicts(model, "law", "intent"))
    """
    layers = _layers_with(model, first, second)
    counts = [sum(len(layer.expert_ids.get(name, [])) for layer in layers) for name in (first, second)]
    return ConflictReport(
        adapters=(first, second),
        shared=[shared for layer in layers for shared in _shared_experts(layer, first, second)],
        num_trained=(counts[0], counts[1]),
        num_layers=len(layers),
    )


def esft_layers(model: nn.Module) -> list[ESFTLayer]:
    """Finds the ESFT layers of a model."""
    return [module for module in model.modules() if isinstance(module, ESFTLayer)]


def _layers_with(model: nn.Module, *adapter_names: str) -> list[ESFTLayer]:
    """Finds the layers that at least one of the adapters trains. Adapters that are missing or merged are refused."""
    layers = esft_layers(model)
    known = sorted({name for layer in layers for name in layer.expert_ids})
    for name in adapter_names:
        if name not in known:
            raise ValueError(f"the model has no ESFT adapter named {name!r}; it has {known}")
    layers = [layer for layer in layers if layer.adapters_here(adapter_names)]
    if any(layer.merged for layer in layers):
        raise ValueError(
            "adapters are merged into the base, so their changes cannot be measured; call unmerge_adapter first"
        )
    return layers


def _layer_usage(layer: ESFTLayer, adapter_name: str, scores: ExpertScores | None) -> list[ExpertUse]:
    ids = layer.expert_ids[adapter_name]
    deltas, bases = torch.zeros(2, len(ids), dtype=torch.float64)
    for weight in layer.weights.values():
        rows = weight.read(layer.get_base_layer(), ids)
        delta = _delta(layer, adapter_name, weight, ids)
        bases += row_products(rows, rows)
        deltas += row_products(delta, delta)
    changes = (deltas / bases.clamp(min=TINY)).sqrt().tolist()
    counts = None if scores is None else scores.containers.get(layer.path)
    if counts is None:
        return [ExpertUse(layer.path, expert, None, None, change) for expert, change in zip(ids, changes, strict=True)]
    pairs, total = counts.selected_pairs, max(1, sum(counts.selected_pairs))
    return [
        ExpertUse(layer.path, expert, pairs[expert], pairs[expert] / total, change)
        for expert, change in zip(ids, changes, strict=True)
    ]


def _shared_experts(layer: ESFTLayer, first: str, second: str) -> list[SharedExpert]:
    own, other = (layer.expert_ids.get(name, []) for name in (first, second))
    common = [expert for expert in own if expert in other]
    if not common:
        return []
    sums = torch.zeros(4, len(common), dtype=torch.float64)
    for weight in layer.weights.values():
        sums += compare_deltas(*(_delta(layer, name, weight, common) for name in (first, second)))
    squares, other_squares, products, _ = sums
    cosines = (products / (squares * other_squares).sqrt().clamp(min=TINY)).tolist()
    return [SharedExpert(layer.path, expert, cosine) for expert, cosine in zip(common, cosines, strict=True)]


def _delta(layer: ESFTLayer, adapter_name: str, weight: ExpertWeight, experts: list[int]) -> Tensor:
    """An adapter's deltas of some experts, `[n, ...]` on the CPU; zeros if the adapter leaves this weight as it is."""
    delta = layer.get_delta_weight(adapter_name, weight.name)
    if delta is None:
        return torch.zeros(len(experts), *weight.shape(layer.get_base_layer()))
    ids = layer.expert_ids[adapter_name]
    return delta[[ids.index(expert) for expert in experts]].cpu()
