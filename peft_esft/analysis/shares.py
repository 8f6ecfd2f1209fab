"""Turns scores into shares: how much of its layer's total each expert has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import get_args

from torch import Tensor

from ..moe.containers import layer_number
from ..scoring.scores import ExpertScores, Metric
from ..scoring.selection import score_row


ScoreTable = ExpertScores | Mapping[str, Tensor | Sequence[float]]
"""What `score_experts` returned, or `{path: scores [E]}`."""


def layer_shares(scores: ScoreTable, metric: Metric = "token") -> dict[str, Tensor]:
    """Divides each container's scores by their sum.

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
    rows = {path: score_row(path, values) for path, values in table.items()}
    shares = {path: row / row.sum() for path, row in rows.items() if row.any()}
    if not shares:
        raise ValueError("the scores are all 0: no token reached an experts module")
    return shares


def layer_labels(paths: Sequence[str]) -> list[str]:
    """Short names of containers: the layer numbers if they are unique, otherwise the whole paths."""
    labels = [path if layer_number(path) is None else str(layer_number(path)) for path in paths]
    return labels if len(set(labels)) == len(labels) else list(paths)
