"""Warnings of deltas that training has not reached."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

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
        if any(len(layer.untrained_experts(name)) < len(layer.expert_ids.get(name, [])) for layer in layers)
    ]
    if trained:
        warnings.warn(
            f"adapter {new!r} has the config of {trained[0]!r}, but not its weights: its deltas are new. "
            "As the reference of a DPOTrainer it would be the base; see the page on training for a copy",
            stacklevel=3,
        )


def warn_of_unreached_experts(layers: Sequence[ESFTLayer], adapter_name: str) -> None:
    """Names the experts of an adapter whose deltas are zero, unless all are, as before training.

    Args:
        layers: the model's.
        adapter_name: of the adapter.
    """
    untrained = {layer.path: experts for layer in layers if (experts := layer.untrained_experts(adapter_name))}
    count = sum(map(len, untrained.values()))
    if 0 < count < sum(len(layer.expert_ids.get(adapter_name, [])) for layer in layers):
        warnings.warn(
            f"adapter {adapter_name!r}: {count} selected experts received no token in training and are unchanged: "
            f"{untrained}. Score on the data that you train on, or train longer.",
            stacklevel=3,
        )
