"""From scores to experts: how many experts of each layer a task needs."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor


if TYPE_CHECKING:
    from .scoring import ExpertScores

Metric = Literal["token", "gate"]
DEFAULT_TOP_P: dict[str, float] = {"token": 0.2, "gate": 0.1}
"""The paper's thresholds (arXiv 2407.01906, section 4.3)."""

_ROUNDING = 1e-9
"""Slack for the running sum, so that scores that add up to top_p on paper also do so in binary."""


def select_experts(
    scores: ExpertScores | Mapping[str, Tensor | Sequence[float]],
    *,
    top_p: float | None = None,
    metric: Metric = "token",
) -> dict[str, list[int]]:
    """Takes, in each container, the experts of the highest scores until their sum reaches `top_p`.

    Equal scores are resolved by expert id (arXiv 2407.01906, section 3.2; the order of the released selections).

    Args:
        scores: what `score_experts` returned, or `{path: scores [E]}`.
        top_p: the share of a layer's choices (metric "token") or gate mass (metric "gate") to cover; None means the
            paper's: 0.2 for "token", 0.1 for "gate".
        metric: which of the scores to use. Ignored if `scores` is a plain mapping, apart from the default of top_p.

    Returns:
        `{path: expert ids}`, the ids in falling order of score; at least one expert for each container.

    Raises:
        ValueError: if `metric` or `top_p` is out of range, or a score is negative or not finite.
    """
    if metric not in get_args(Metric):
        raise ValueError(f"metric is {metric!r}; it is one of {get_args(Metric)}")
    top_p = DEFAULT_TOP_P[metric] if top_p is None else top_p
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it is a share above 0 and at most 1")
    table = scores if isinstance(scores, Mapping) else scores.by_metric(metric)

    selection: dict[str, list[int]] = {}
    too_little = {}
    for path, values in table.items():
        row = torch.as_tensor(values, dtype=torch.float64)
        if row.dim() != 1 or row.numel() == 0 or not bool(torch.isfinite(row).all()) or bool((row < 0).any()):
            raise ValueError(f"scores of {path} are not a row of finite numbers of at least 0: {row}")
        order = torch.sort(row, descending=True, stable=True).indices
        reached = torch.cumsum(row[order], 0) >= top_p - _ROUNDING
        if not bool(reached.any()):
            too_little[path] = float(row.sum())
        count = int(reached.to(torch.int8).argmax()) + 1 if bool(reached.any()) else row.numel()
        selection[path] = order[:count].tolist()
    if too_little:
        path, mass = next(iter(too_little.items()))
        warnings.warn(
            f"the scores of {len(too_little)} of {len(table)} containers sum to less than top_p={top_p} (for example "
            f"{mass:.3f} in {path}), so all experts of these are selected. Choose a smaller top_p, or metric='token', "
            "whose scores always sum to 1.",
            stacklevel=2,
        )
    return selection
