"""What all tools of the package start from: the share that each expert has of its layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import get_args

import torch
from torch import Tensor

from ..moe.containers import layer_number
from ..scoring.scores import ExpertScores, Metric


ScoreTable = ExpertScores | Mapping[str, Tensor | Sequence[float]]
"""What `score_experts` returned, or `{path: scores [E]}`."""


def layer_shares(scores: ScoreTable, metric: Metric = "token") -> dict[str, Tensor]:
    """Each container's scores over their sum.

    Args:
        scores: from `score_experts`, or `{path: scores [E]}`.
        metric: "token" for shares of a layer's choices, "gate" (or "gate_share") for shares of its gate mass. Ignored
            for a plain mapping.

    Returns:
        `{path: shares}`, float64 `[E]` with sum 1. Containers that no token reached are left out.

    Raises:
        ValueError: if the metric is unknown, a score is negative or not finite, or no container was reached.
    """
    if metric not in get_args(Metric):
        raise ValueError(f"metric is {metric!r}; it is one of {get_args(Metric)}")
    table = scores if isinstance(scores, Mapping) else scores.by_metric(metric)
    shares = {}
    for path, values in table.items():
        row = torch.as_tensor(values, dtype=torch.float64)
        if not bool(torch.isfinite(row).all()) or bool((row < 0).any()):
            raise ValueError(f"the scores of {path} are not all finite and at least 0")
        if bool(row.any()):
            shares[path] = row / row.sum()
    if not shares:
        raise ValueError("the scores are all 0: no container was reached")
    return shares


def layer_labels(paths: Sequence[str]) -> list[str]:
    """Short names of containers: the layer's number where that tells them apart, else the whole path."""
    labels = [path if layer_number(path) is None else str(layer_number(path)) for path in paths]
    return labels if len(set(labels)) == len(labels) else list(paths)
