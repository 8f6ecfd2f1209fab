"""What training did to each expert: how many tokens chose it, and how far it moved."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..scoring.scores import ExpertScores
from ..tuner.layers.layer import ESFTLayer


@dataclass(frozen=True)
class ExpertUse:
    """One trained expert.

    Attributes:
        path: its container.
        expert: its id.
        pairs: how often the scored tokens chose it; None without scores, and for modules that see every
            token.
        share: `pairs` over all choices of the layer.
        relative_change: norm of the delta over the norm of the base's weights, all weights of the expert together.
    """

    path: str
    expert: int
    pairs: int | None
    share: float | None
    relative_change: float


@torch.no_grad()
def expert_usage(
    model: nn.Module, scores: ExpertScores | None = None, *, adapter_name: str | None = None
) -> list[ExpertUse]:
    """Says of each trained expert how many tokens chose it and how far it moved from the base.

    Args:
        model: a model with an ESFT adapter.
        scores: from `score_experts(model, training_batches)`, before or after training.
        adapter_name: which adapter; None means the active one.

    Returns:
        The trained experts, layer by layer, in the order of the adapter's ids.

    Raises:
        ValueError: if the model has no such adapter, several are active, adapters are merged into the base, or the
            scores are another model's.

    Example:
        >>> max(expert_usage(model), key=lambda use: use.relative_change)
        ExpertUse(path='model.layers.2.mlp.experts', expert=17, pairs=None, share=None, relative_change=0.031)
    """
    if scores is not None:
        scores.check_fits(model)
    layers = [module for module in model.modules() if isinstance(module, ESFTLayer)]
    if adapter_name is None:
        active = sorted({name for layer in layers for name in layer.active_adapters})
        if len(active) != 1:
            raise ValueError(f"the active ESFT adapters are {active}; say which one with adapter_name")
        (adapter_name,) = active
    layers = [layer for layer in layers if adapter_name in layer.expert_ids]
    if not layers:
        raise ValueError(f"the model has no ESFT adapter named {adapter_name!r}")
    if any(layer.merged for layer in layers):
        raise ValueError(
            "adapters are merged, so the base's weights are not there to compare with; unmerge them first"
        )
    return [use for layer in layers for use in _layer_usage(layer, adapter_name, scores)]


def _layer_usage(layer: ESFTLayer, adapter_name: str, scores: ExpertScores | None) -> list[ExpertUse]:
    ids = layer.expert_ids[adapter_name]
    deltas, bases = torch.zeros(len(ids), dtype=torch.float64), torch.zeros(len(ids), dtype=torch.float64)
    for name, weight in layer.weights.items():
        rows = weight.read(layer.get_base_layer(), ids)
        bases += rows.double().flatten(1).square().sum(1).cpu()
        delta = layer.get_delta_weight(adapter_name, name)
        if delta is not None:
            deltas += delta.double().flatten(1).square().sum(1).cpu()
    changes = (deltas / bases.clamp(min=1e-300)).sqrt().tolist()
    counts = None if scores is None or layer.path not in scores.containers else scores.containers[layer.path]
    pairs = None if counts is None else counts.selected_pairs
    return [
        ExpertUse(
            path=layer.path,
            expert=expert,
            pairs=None if pairs is None else pairs[expert],
            share=None if pairs is None else pairs[expert] / max(1, sum(pairs)),
            relative_change=change,
        )
        for expert, change in zip(ids, changes, strict=True)
    ]
