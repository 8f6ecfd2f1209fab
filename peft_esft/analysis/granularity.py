"""What coarser experts would cost: experts to train for the same share (arXiv 2407.01906, section 5.4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from torch import Tensor

from ..scoring.scores import ExpertScores, Metric
from ..scoring.selection import DEFAULT_TOP_P
from .grouping import Groups, group_experts, random_groups, select_groups


SIZES = (1, 2, 4, 8)


@dataclass(frozen=True)
class GranularityPoint:
    """What one size of groups must train.

    Attributes:
        size: experts of a group.
        experts: by task, experts (not groups) to train, mean over the layers.
        share: by task, their share of the parameters of all experts.
        random_experts: by task, the same as `experts` for groups bound at random, mean over the seeds.
    """

    size: int
    experts: dict[str, float]
    share: dict[str, float]
    random_experts: dict[str, float]

    @property
    def mean_experts(self) -> float:
        """`experts`, mean over the tasks."""
        return fmean(self.experts.values())

    @property
    def mean_random_experts(self) -> float:
        """`random_experts`, mean over the tasks."""
        return fmean(self.random_experts.values())


@dataclass(frozen=True)
class Granularity:
    """What each size of groups must train to cover the same share; `print` it.

    Attributes:
        top_p: the share of each layer's choices, or of its gate mass, that is covered.
        metric: which score.
        points: in the order of the sizes.
    """

    top_p: float
    metric: Metric
    points: list[GranularityPoint]

    def __str__(self) -> str:
        lines = [f"experts to train a layer for {self.top_p:.0%} ({self.metric}), mean of tasks and layers"]
        lines += ["group size   similar   random   share of parameters"]
        lines += [
            f"{point.size:<12} {point.mean_experts:<9.1f} {point.mean_random_experts:<8.1f} "
            f"{fmean(point.share.values()):.1%}"
            for point in self.points
        ]
        return "\n".join(lines)


def granularity(
    tasks: Mapping[str, ExpertScores],
    counts: Mapping[str, Tensor],
    *,
    sizes: Sequence[int] = SIZES,
    top_p: float = DEFAULT_TOP_P["token"],
    metric: Metric = "token",
    seeds: int = 5,
) -> Granularity:
    """Measures how many experts must be trained when they come in groups.

    A group's score is the sum of its experts' scores, so nothing is routed again.

    Args:
        tasks: scores of each task, by its name.
        counts: from `co_occurrence`; binds the groups.
        sizes: experts of a group.
        top_p: share of a layer to cover.
        metric: which score.
        seeds: number of random bindings to compare with.

    Returns:
        The cost of each size.

    Raises:
        ValueError: if a size does not divide the number of experts, or scores and counts are of different models.
    """
    num_experts = {path: matrix.shape[0] for path, matrix in counts.items()}
    points = []
    for size in sizes:
        similar = group_experts(counts, size)
        controls = [random_groups(num_experts, size, seed=seed) for seed in range(seeds)]
        costs = {name: _cost(scores, similar, top_p, metric) for name, scores in tasks.items()}
        points.append(
            GranularityPoint(
                size=size,
                experts={name: experts for name, (experts, _) in costs.items()},
                share={name: share for name, (_, share) in costs.items()},
                random_experts={
                    name: fmean(_cost(scores, groups, top_p, metric)[0] for groups in controls)
                    for name, scores in tasks.items()
                },
            )
        )
    return Granularity(top_p, metric, points)


def _cost(scores: ExpertScores, groups: Groups, top_p: float, metric: Metric) -> tuple[float, float]:
    """Experts that a selection of groups trains, mean over the layers, and their share of the parameters."""
    selection = select_groups(scores, groups, top_p=top_p, metric=metric)
    sizes = scores.parameters_per_expert()
    trained = sum(len(ids) * sizes[path] for path, ids in selection.items())
    total = sum(scores.containers[path].num_experts * sizes[path] for path in selection)
    return fmean(len(ids) for ids in selection.values()), trained / total
