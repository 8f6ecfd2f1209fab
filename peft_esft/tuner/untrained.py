"""Warns of experts that training did not reach."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from ..moe.weights import is_spread
from .layers.layer import ESFTLayer


def warn_of_shared_config(layers: Sequence[ESFTLayer], adapter_names: Sequence[str]) -> None:
    """Says that a new adapter has not the weights of another one with its config, as TRL takes for granted.

    Args:
        layers: the model's.
        adapter_names: of adapters with one config, the new one last.
    """
    *others, new = adapter_names
    trained = [
        name
        for name in others
        if any(len(untrained_experts(layer, name)) < len(layer.expert_ids.get(name, [])) for layer in layers)
    ]
    if trained:
        warnings.warn(
            f"adapter {new!r} has the config of {trained[0]!r} but not its weights: its deltas are new. As the "
            "reference of a DPOTrainer it would be the base. The page on training shows how to copy the weights",
            stacklevel=3,
        )


def warn_of_unreached_experts(layers: Sequence[ESFTLayer], adapter_name: str) -> None:
    """Names the experts of an adapter whose deltas are zero, unless all are, as before training."""
    untrained = {layer.path: experts for layer in layers if (experts := untrained_experts(layer, adapter_name))}
    count = sum(map(len, untrained.values()))
    if 0 < count < sum(len(layer.expert_ids.get(adapter_name, [])) for layer in layers):
        warnings.warn(
            f"adapter {adapter_name!r}: {count} selected experts received no token in training and are unchanged: "
            f"{untrained}. Score the data that you train on, or train longer.",
            stacklevel=3,
        )


@torch.no_grad()
def untrained_experts(layer: ESFTLayer, adapter_name: str) -> list[int]:
    """Experts whose deltas are all zero: no token reached them in training; all of them before training.

    No expert is named where a process sees parts of the deltas only.
    """
    adapter = layer.adapters.get(adapter_name)
    tensors = [] if adapter is None else list(layer.tensors_of(adapter_name).values())
    if adapter is None or adapter.storage != "delta" or any(map(is_spread, tensors)):
        return []
    moved = torch.zeros(len(adapter.expert_ids), dtype=torch.bool)
    with layer.onloaded([adapter_name]):
        for name in layer.weights:
            factors = layer.delta_parameters(name, adapter_name)
            if factors:
                moved |= (factors[-1] != 0).flatten(1).any(1).cpu()
    return [expert for expert, has_moved in zip(adapter.expert_ids, moved.tolist(), strict=True) if not has_moved]
