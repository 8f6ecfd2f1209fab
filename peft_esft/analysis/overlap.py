"""Do two tasks use the same experts? (arXiv 2407.01906, section 2.3 and figure 3)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

import torch
from torch import Tensor

from ..scoring.scores import ExpertScores, Metric
from ..scoring.selection import DEFAULT_TOP_P, Selection, ranking, select_experts
from .shares import layer_shares


@dataclass(frozen=True)
class Overlap:
    """How many experts tasks share, layer by layer.

    Attributes:
        tasks: their names; `N` of them.
        paths: the containers that all tasks reach; `L` of them.
        top_k: the number of most used experts that were compared at each container, `L` of them.
        num_experts: experts of each container.
        shared: float64 `[L, N, N]`, how many of two tasks' most used experts are the same; `top_k` on the diagonal.
        halves: float64 `[L, N]`, the same for two disjoint halves of one task's samples, by how often they chose each
            expert: what is less than this from another task may be noise. NaN where there are no halves.
        jaccard: float64 `[L, N, N]`, experts that both tasks select over those that at least one does.
    """

    tasks: tuple[str, ...]
    paths: tuple[str, ...]
    top_k: tuple[int, ...]
    num_experts: tuple[int, ...]
    shared: Tensor
    halves: Tensor
    jaccard: Tensor

    def mean_shared(self) -> Tensor:
        """`shared`, mean over the layers, `[N, N]`."""
        return self.shared.mean(0)

    def mean_halves(self) -> Tensor:
        """`halves`, mean over the layers, `[N]`: the agreement that noise leaves to one task."""
        return self.halves.mean(0)

    def mean_jaccard(self) -> Tensor:
        """`jaccard`, mean over the layers, `[N, N]`."""
        return self.jaccard.mean(0)

    @property
    def chance(self) -> float:
        """Experts that two independent choices would share: `top_k ** 2 / E`, mean over the layers."""
        return fmean(self.chances)

    @property
    def chances(self) -> list[float]:
        """`top_k ** 2 / E` of each layer."""
        return [k * k / count for k, count in zip(self.top_k, self.num_experts, strict=True)]

    def __str__(self) -> str:
        width = max(map(len, self.tasks))
        top_k = "/".join(map(str, sorted(set(self.top_k))))
        lines = [f"shared top {top_k}, mean of {len(self.paths)} layers (in brackets: two halves of one task)"]
        for row, name in enumerate(self.tasks):
            cells = [
                f"({self.mean_halves()[row]:.2f})" if row == column else f"{self.mean_shared()[row, column]:.2f}"
                for column in range(len(self.tasks))
            ]
            lines.append(f"{name:<{width}}  " + "  ".join(f"{cell:>6}" for cell in cells))
        lines.append(f"by chance: {self.chance:.2f}")
        return "\n".join(lines)


def overlap(
    tasks: Mapping[str, ExpertScores],
    *,
    metric: Metric = "token",
    top_k: int | None = None,
    top_p: float | None = None,
) -> Overlap:
    """Compares the experts that tasks use.

    Args:
        tasks: scores of each task, of one model, by the task's name.
        metric: which score ranks and selects the experts. The halves of a task are always compared by counts.
        top_k: how many of the most used experts to compare; None means as many as the router gives a token.
        top_p: threshold of the selections that the Jaccard index compares; None means the paper's, by metric.

    Returns:
        The comparison over the containers that every task reaches.

    Raises:
        ValueError: if there is no task, the scores are of different models, or no container is reached by all.

    Example:
        >>> print(overlap({"law": law_scores, "intent": intent_scores}))
    """
    if not tasks:
        raise ValueError("there are no tasks to compare")
    check_same_model(tasks)
    shares = {name: layer_shares(scores, metric) for name, scores in tasks.items()}
    first = next(iter(tasks.values()))
    paths = tuple(path for path in first.containers if all(path in table for table in shares.values()))
    if not paths:
        raise ValueError("no container is reached by all tasks")
    counts = tuple(top_k or first.containers[path].top_k for path in paths)
    top_p = DEFAULT_TOP_P[metric] if top_p is None else top_p
    return Overlap(
        tasks=tuple(tasks),
        paths=paths,
        top_k=counts,
        num_experts=tuple(first.containers[path].num_experts for path in paths),
        shared=torch.stack(
            [
                _shared(torch.stack([top_mask(shares[name][path], k) for name in tasks]))
                for path, k in zip(paths, counts, strict=True)
            ]
        ),
        halves=torch.tensor(
            [
                [_shared_by_halves(scores, path, k) for scores in tasks.values()]
                for path, k in zip(paths, counts, strict=True)
            ],
            dtype=torch.float64,
        ),
        jaccard=_jaccard([_select(scores, paths, metric, top_p) for scores in tasks.values()], paths),
    )


def top_mask(scores: Tensor, count: int) -> Tensor:
    """Marks the `count` experts of the highest scores, equal ones in order of id; bool `[E]`."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[ranking(scores)[:count]] = True
    return mask


def check_same_model(tasks: Mapping[str, ExpertScores]) -> None:
    """Refuses scores whose containers differ.

    Raises:
        ValueError: naming the two tasks.
    """
    signatures = {name: {p: c.num_experts for p, c in scores.containers.items()} for name, scores in tasks.items()}
    for (one, first), (other, second) in pairwise(signatures.items()):
        if first != second:
            raise ValueError(
                f"the scores of {one!r} and {other!r} are of different models: {len(first)} containers, for example "
                f"{next(iter(first.items()), None)}, and {len(second)}, for example {next(iter(second.items()), None)}"
            )


def _shared(masks: Tensor) -> Tensor:
    """How many experts each two rows of `masks [N, E]` have in common, float64 `[N, N]`."""
    rows = masks.to(torch.float64)
    return rows @ rows.T


def _shared_by_halves(scores: ExpertScores, path: str, top_k: int) -> float:
    pairs = scores.halves[-1].selected_pairs.get(path) if scores.halves else None
    if pairs is None or not all(map(any, pairs)):
        return float("nan")
    masks = torch.stack([top_mask(torch.tensor(half, dtype=torch.float64), top_k) for half in pairs])
    return float(_shared(masks)[0, 1])


def _select(scores: ExpertScores, paths: tuple[str, ...], metric: Metric, top_p: float) -> Selection:
    table = scores.by_metric(metric)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whoever trains this selection is warned by select_experts
        return select_experts({path: table[path] for path in paths}, metric=metric, top_p=top_p)


def _jaccard(selections: Sequence[Selection], paths: tuple[str, ...]) -> Tensor:
    layers = []
    for path in paths:
        chosen = [set(selection[path]) for selection in selections]
        layers.append([[len(one & other) / len(one | other) for other in chosen] for one in chosen])
    return torch.tensor(layers, dtype=torch.float64)
