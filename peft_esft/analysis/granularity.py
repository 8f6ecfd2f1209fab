"""Joins experts into groups, and measures what coarser experts would cost (arXiv 2407.01906, section 5.4)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from ..moe.containers import find_experts
from ..moe.routing import Routing
from ..scoring.scores import ExpertScores, Metric
from ..scoring.selection import DEFAULT_TOP_P, Selection, select_experts
from ..scoring.watching import run_batches
from .shares import ScoreTable, layer_shares


Groups = dict[str, list[list[int]]]
"""The groups of each container: lists of expert ids, with every expert in one of them."""

SIZES = (1, 2, 4, 8)


@dataclass(frozen=True)
class GranularityPoint:
    """What must be trained if experts come in groups of one size.

    Attributes:
        size: experts of a group.
        experts: by task, experts (not groups) to train, mean over the layers.
        share: by task, their share of the parameters of all experts.
        random_experts: by task, the same as `experts` for random groups, mean over the seeds.
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
    """What must be trained for the same share with each size of groups; `print` it.

    Attributes:
        top_p: the share of each layer's choices, or of its gate mass, that is covered.
        metric: which score.
        points: one point for each size.
    """

    top_p: float
    metric: Metric
    points: list[GranularityPoint]

    def __str__(self) -> str:
        lines = [f"experts to train per layer for {self.top_p:.0%} ({self.metric}), mean of tasks and layers"]
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
        counts: from `co_occurrence`; the groups are bound by them.
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
        point = GranularityPoint(size, {}, {}, {})
        for name, scores in tasks.items():
            point.experts[name], point.share[name] = _cost(scores, similar, top_p, metric)
            costs = [_cost(scores, groups, top_p, metric) for groups in controls]
            point.random_experts[name] = fmean(experts for experts, _ in costs)
        points.append(point)
    return Granularity(top_p, metric, points)


def co_occurrence(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], *, max_tokens: int = 131_072
) -> dict[str, Tensor]:
    """Counts how often two experts are chosen for the same token.

    It holds `[E, E]` for each container on the model's device, whatever the number of tokens.

    Args:
        model: a transformers model, with or without adapters.
        batches: as `score_experts` takes them; the paper uses general text.
        max_tokens: stop after so many tokens.

    Returns:
        `{path: counts}`, int64 `[E, E]` on the CPU, symmetric. The diagonal says how often each expert was chosen.

    Raises:
        ValueError: if the model has no containers, or the choices of a container's tokens cannot be seen.
    """
    sizes = {path: container.num_experts for path, container in find_experts(model).items()}
    counts: dict[str, Tensor] = {}

    def see(path: str, routing: Routing, counted: Tensor) -> None:
        chosen = torch.where(counted[:, None] & (routing.top_k_weights > 0), routing.top_k_index, sizes[path])
        new = count_pairs(chosen, sizes[path])
        counts[path] = counts[path] + new if path in counts else new

    run_batches(model, batches, max_tokens, see)
    return {path: counts[path].cpu() for path in sizes if path in counts}


def count_pairs(top_k_index: Tensor, num_experts: int) -> Tensor:
    """Counts how often two experts are chosen for the same token.

    Args:
        top_k_index: int64 `[T, K]`; ids from `num_experts` on do not count.
        num_experts: `E`.

    Returns:
        int64 `[E, E]`.
    """
    total = torch.zeros(num_experts, num_experts, dtype=torch.int64, device=top_k_index.device)
    # Sums of ones are exact in fp32 up to 2^24 of them.
    for part in top_k_index.split(1 << 16):
        chosen = torch.zeros(part.shape[0], num_experts + 1, device=part.device)
        chosen.scatter_(1, part.clamp(max=num_experts), 1.0)
        total += (chosen[:, :-1].T @ chosen[:, :-1]).to(torch.int64)
    return total


def similarity(counts: Tensor) -> Tensor:
    """Computes the cosine similarity of the rows of `counts [E, E]`, float64 `[E, E]`; 0 for experts never chosen."""
    rows = counts.to(torch.float64)
    rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return rows @ rows.T


def group_experts(counts: Mapping[str, Tensor], size: int) -> Groups:
    """Joins the experts of each container into groups of those that are chosen together.

    Similarity is the cosine of the rows of the co-occurrence matrix, with its diagonal: on the embedded model, groups
    bound without it make a worse coarse model (docs/analysis.md). Groups are joined greedily by mean pairwise
    similarity, as in arXiv 2407.01906, section 5.4. A group grows from the most similar pair of free experts by the
    free expert with the highest mean similarity to it. Comparing all groups of 4 instead costs the same to within 0.1
    experts per layer on DeepSeek-V2-Lite's routing.

    Args:
        counts: from `co_occurrence`, `{path: [E, E]}`.
        size: experts of a group; groups of 1 leave every expert alone.

    Returns:
        The groups of each container, in the order in which they were bound.

    Raises:
        ValueError: if `size` does not divide the number of experts of every container.
    """
    _check_size(size, {path: matrix.shape[0] for path, matrix in counts.items()})
    return {path: _bind(similarity(matrix), size) for path, matrix in counts.items()}


def random_groups(num_experts: Mapping[str, int], size: int, *, seed: int) -> Groups:
    """Joins experts into groups at random, to compare with.

    Args:
        num_experts: number of experts of each container.
        size: experts of a group.
        seed: equal seeds give equal groups.

    Raises:
        ValueError: if `size` does not divide the number of experts of every container.
    """
    _check_size(size, num_experts)
    generator = torch.Generator().manual_seed(seed)
    return {
        path: torch.randperm(count, generator=generator).view(-1, size).tolist() for path, count in num_experts.items()
    }


def group_shares(scores: ScoreTable, groups: Groups, metric: Metric = "token") -> dict[str, Tensor]:
    """Computes the share that each group has of its layer: the sum of its experts' shares.

    Returns:
        `{path: shares}`, float64 `[groups]` with sum 1, in the order of the groups.

    Raises:
        ValueError: if groups and scores do not fit.
    """
    table = {}
    for path, row in layer_shares(scores, metric).items():
        if path not in groups or sorted(chain.from_iterable(groups[path])) != list(range(row.numel())):
            raise ValueError(f"the groups of {path} do not hold each of its {row.numel()} experts exactly once")
        table[path] = torch.stack([row[members].sum() for members in groups[path]])
    return table


def select_groups(
    scores: ScoreTable, groups: Groups, *, top_p: float = DEFAULT_TOP_P["token"], metric: Metric = "token"
) -> Selection:
    """Chooses whole groups of experts, as `select_experts` chooses experts.

    Args:
        scores: from `score_experts`, or `{path: scores [E]}`.
        groups: from `group_experts` or `random_groups`.
        top_p: share of a layer's choices, or of its gate mass, to cover.
        metric: which score.

    Returns:
        `{path: expert ids}`, group after group in falling order of the groups' shares.
    """
    chosen = select_experts(group_shares(scores, groups, metric), top_p=top_p)
    return {path: [expert for number in ids for expert in groups[path][number]] for path, ids in chosen.items()}


def _bind(similar: Tensor, size: int) -> list[list[int]]:
    count = similar.shape[0]
    if size == 1:
        return [[expert] for expert in range(count)]
    # -inf marks an expert with itself, and pairs with an expert that is in a group.
    pairs = similar.clone().fill_diagonal_(-torch.inf)
    groups = []
    for _ in range(count // size):
        best = int(pairs.argmax())
        group = [best // count, best % count]
        while len(group) < size:
            group.append(int(pairs[group].sum(0).argmax()))
        pairs[group, :] = -torch.inf
        pairs[:, group] = -torch.inf
        groups.append(group)
    return groups


def _check_size(size: int, num_experts: Mapping[str, int]) -> None:
    for path, count in num_experts.items():
        if size < 1 or count % size:
            raise ValueError(
                f"{path} has {count} experts, which cannot be divided into groups of {size}; choose "
                f"a divisor of {count}"
            )


def _cost(scores: ExpertScores, groups: Groups, top_p: float, metric: Metric) -> tuple[float, float]:
    """Experts that a selection of groups trains, mean over the layers, and their share of the parameters."""
    selection = select_groups(scores, groups, top_p=top_p, metric=metric)
    sizes = scores.parameters_per_expert()
    trained = sum(len(ids) * sizes[path] for path, ids in selection.items())
    total = sum(scores.containers[path].num_experts * sizes[path] for path in selection)
    return fmean(map(len, selection.values())), trained / total
