"""Compares the experts that different tasks use (arXiv 2407.01906, section 2.3 and figure 3)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

import torch
from torch import Tensor

from ..scoring.scores import ExpertScores, Metric
from ..scoring.selection import DEFAULT_TOP_P, ranking, select_experts
from .shares import layer_shares


@dataclass(frozen=True)
class Overlap:
    """How many experts tasks share, layer by layer; `print` it.

    Attributes:
        tasks: names of the `N` tasks.
        paths: paths of the `L` containers that all tasks reach.
        top_k: how many of the most used experts were compared, for each container.
        num_experts: number of experts of each container.
        shared: float64 `[L, N, N]`, how many of two tasks' most used experts are the same; `top_k` on the diagonal.
        halves: float64 `[L, N]`, the same for two disjoint halves of one task's samples, by how often they chose each
            expert. Less agreement than this between two tasks may be noise. NaN where there are no halves.
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
        """`halves`, mean over the layers, `[N]`."""
        return self.halves.mean(0)

    def mean_jaccard(self) -> Tensor:
        """`jaccard`, mean over the layers, `[N, N]`."""
        return self.jaccard.mean(0)

    @property
    def chances(self) -> list[float]:
        """Experts that two independent choices would share, `top_k ** 2 / E`, for each container."""
        return [k * k / count for k, count in zip(self.top_k, self.num_experts, strict=True)]

    @property
    def chance(self) -> float:
        """`chances`, mean over the layers."""
        return fmean(self.chances)

    def __str__(self) -> str:
        width = max(map(len, self.tasks))
        top_k = "/".join(map(str, sorted(set(self.top_k))))
        lines = [f"shared top {top_k}, mean of {len(self.paths)} layers (in brackets: two halves of one task)"]
        shared, halves = self.mean_shared().tolist(), self.mean_halves().tolist()
        for row, name in enumerate(self.tasks):
            cells = [f"{value:.2f}" for value in shared[row]]
            cells[row] = f"({halves[row]:.2f})"
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
        raise ValueError("there are no tasks to compare; give the scores of at least one")
    check_same_model(tasks)
    shares = [layer_shares(scores, metric) for scores in tasks.values()]
    first = next(iter(tasks.values())).containers
    paths = tuple(path for path in first if all(path in table for table in shares))
    if not paths:
        raise ValueError("no experts module was reached by all tasks, so they cannot be compared")
    counts = [top_k or first[path].top_k for path in paths]
    top_p = DEFAULT_TOP_P[metric] if top_p is None else top_p
    selections = []
    for scores in tasks.values():
        table = scores.by_metric(metric)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the same warnings are given when a selection is made to be trained
            selections.append(select_experts({path: table[path] for path in paths}, metric=metric, top_p=top_p))
    shared, halves, jaccard = [], [], []
    for path, count in zip(paths, counts, strict=True):
        tops = [_top(table[path], count) for table in shares]
        shared.append([[len(one & other) for other in tops] for one in tops])
        halves.append([_shared_by_halves(scores, path, count) for scores in tasks.values()])
        chosen = [set(selection[path]) for selection in selections]
        jaccard.append([[len(one & other) / len(one | other) for other in chosen] for one in chosen])
    return Overlap(
        tasks=tuple(tasks),
        paths=paths,
        top_k=tuple(counts),
        num_experts=tuple(first[path].num_experts for path in paths),
        shared=torch.tensor(shared, dtype=torch.float64),
        halves=torch.tensor(halves, dtype=torch.float64),
        jaccard=torch.tensor(jaccard, dtype=torch.float64),
    )


def check_same_model(tasks: Mapping[str, ExpertScores]) -> None:
    """Checks that the scores of all tasks have the same containers.

    Raises:
        ValueError: if they differ. The message names two tasks.
    """
    sizes = {name: {p: c.num_experts for p, c in scores.containers.items()} for name, scores in tasks.items()}
    for (one, first), (other, second) in pairwise(sizes.items()):
        if first != second:
            raise ValueError(
                f"the scores of {one!r} and {other!r} are of different models: {len(first)} experts modules, for "
                f"example {next(iter(first.items()), None)}, and {len(second)}, for example "
                f"{next(iter(second.items()), None)}"
            )


def _top(scores: Tensor, count: int) -> set[int]:
    """The experts of the highest scores."""
    return set(ranking(scores)[:count].tolist())


def _shared_by_halves(scores: ExpertScores, path: str, count: int) -> float:
    pairs = scores.halves[-1].selected_pairs.get(path) if scores.halves else None
    if pairs is None or not all(map(any, pairs)):
        return torch.nan
    one, other = (_top(torch.tensor(half), count) for half in pairs)
    return len(one & other)
