"""Binds experts into groups: a coarser model, as the paper simulates it (arXiv 2407.01906, section 5.4)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..moe.containers import find_experts
from ..moe.routing import Routing
from ..scoring.scores import Metric
from ..scoring.selection import DEFAULT_TOP_P, Selection, select_experts
from ..scoring.watching import run_batches
from .shares import ScoreTable, layer_shares


Groups = dict[str, list[list[int]]]
"""Of each container, the groups: lists of expert ids, every expert in one of them."""


def co_occurrence(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], *, max_tokens: int = 131_072
) -> dict[str, Tensor]:
    """Counts how often two experts are chosen for the same token.

    Memory is `[E, E]` for each container, whatever the number of tokens; nothing is copied to the host before the end.

    Args:
        model: a transformers model, with or without adapters.
        batches: as `score_experts` takes them; the paper uses general text.
        max_tokens: stop after so many tokens.

    Returns:
        `{path: counts}`, int64 `[E, E]` on the CPU, symmetric; the diagonal says how often each expert was chosen.

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
    """Cosine similarity of the rows of a co-occurrence matrix, float64 `[E, E]`; 0 for experts never chosen."""
    rows = counts.to(torch.float64)
    rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return rows @ rows.T


def group_experts(counts: Mapping[str, Tensor], size: int) -> Groups:
    """Binds the experts of each container into groups of those that work together.

    The protocol of arXiv 2407.01906, section 5.4: similarity is the cosine of the rows of the co-occurrence matrix,
    and groups are bound greedily by mean pairwise similarity. A group grows from the most similar pair of free experts
    by the free expert with the highest mean similarity to it; to compare all groups of 4 instead (of 64 experts,
    635,376) gives the same cost to within 0.1 experts a layer on DeepSeek-V2-Lite's routing, and for groups of 8 there
    are too many. The rows keep the diagonal: on the embedded model, groups bound so simulate the model better than
    groups bound without it (docs/analysis.md).

    Args:
        counts: from `co_occurrence`, `{path: [E, E]}`.
        size: experts of a group; 1 leaves them alone.

    Returns:
        The groups of each container, in the order in which they were bound.

    Raises:
        ValueError: if `size` does not divide the number of experts of every container.
    """
    _check_size(size, {path: matrix.shape[0] for path, matrix in counts.items()})
    return {path: _bind(similarity(matrix), size) for path, matrix in counts.items()}


def random_groups(num_experts: Mapping[str, int], size: int, *, seed: int) -> Groups:
    """Groups of experts at random: the control.

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
    """The share that each group has of its layer: the sum of its experts' shares.

    Returns:
        `{path: shares}`, float64 `[groups]` with sum 1, in the order of the groups.

    Raises:
        ValueError: if groups and scores do not fit.
    """
    shares = layer_shares(scores, metric)
    table = {}
    for path, row in shares.items():
        if path not in groups or sorted(chain.from_iterable(groups[path])) != list(range(row.numel())):
            raise ValueError(f"the groups of {path} do not hold each of its {row.numel()} experts once")
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
    # -inf marks pairs of which an expert is taken, and an expert with itself.
    pairs = similar.clone().fill_diagonal_(-torch.inf)
    groups = []
    for _ in range(count // size):
        best = int(pairs.argmax())
        group = [best // count, best % count]
        while len(group) < size:
            sums = pairs[group].sum(0)  # -inf for the group's own
            group.append(int(sums.argmax()))
        pairs[group, :] = -torch.inf
        pairs[:, group] = -torch.inf
        groups.append(group)
    return groups


def _check_size(size: int, num_experts: Mapping[str, int]) -> None:
    for path, count in num_experts.items():
        if size < 1 or count % size:
            raise ValueError(f"groups of {size} do not divide the {count} experts of {path}")
