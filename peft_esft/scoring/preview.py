"""Previews the cost of selections: how many experts, parameters and megabytes each threshold would give."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from .scores import ExpertScores, Metric
from .selection import select_experts


BYTES_PER_DELTA = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class SelectionPreview:
    """The cost of one `top_p`.

    Attributes:
        top_p: the threshold.
        fewest, mean, most: number of chosen experts in an experts module.
        num_parameters: number of weights of all chosen experts.
        share: `num_parameters` over the number of weights of all experts.
        megabytes: size of the adapter's file (10^6 bytes), by dtype of the deltas. The default is fp32.
    """

    top_p: float
    fewest: int
    mean: float
    most: int
    num_parameters: int
    share: float
    megabytes: dict[str, float]


def preview_selections(
    scores: ExpertScores,
    top_ps: Sequence[float] = (0.05, 0.1, 0.2, 0.3, 0.5),
    *,
    metric: Metric = "token",
) -> list[SelectionPreview]:
    """Computes how many experts, parameters and megabytes each `top_p` would give.

    Args:
        scores: from `score_experts`.
        top_ps: thresholds to try.
        metric: as in `select_experts`.

    Returns:
        One preview for each threshold, in the order given.
    """
    sizes = scores.parameters_per_expert()
    total = sum(c.num_experts * c.parameters_per_expert for c in scores.containers.values())
    previews = []
    for top_p in top_ps:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # these thresholds are only tried; the choice itself warns
            selection = select_experts(scores, top_p=top_p, metric=metric)
        counts = [len(ids) for ids in selection.values()]
        parameters = sum(len(ids) * sizes[path] for path, ids in selection.items())
        previews.append(
            SelectionPreview(
                top_p=top_p,
                fewest=min(counts, default=0),
                mean=sum(counts) / max(1, len(counts)),
                most=max(counts, default=0),
                num_parameters=parameters,
                share=parameters / max(1, total),
                megabytes={dtype: parameters * size / 1e6 for dtype, size in BYTES_PER_DELTA.items()},
            )
        )
    return previews


def format_previews(previews: Sequence[SelectionPreview]) -> str:
    """Writes previews as a table in plain text."""
    lines = ["top_p   experts per layer     parameters      share   adapter fp32 / bf16"]
    for preview in previews:
        spread = f"{preview.mean:.1f} ({preview.fewest} to {preview.most})"
        sizes = " / ".join(f"{size:.1f} MB" for size in preview.megabytes.values())
        cost = f"{preview.num_parameters:>13,}   {preview.share:>6.1%}   {sizes}"
        lines.append(f"{preview.top_p:<7g} {spread:<21} {cost}")
    return "\n".join(lines)
