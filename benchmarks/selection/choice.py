"""Chooses experts by a criterion, as many as the token share takes at a threshold: equal trained bytes."""

from __future__ import annotations

import torch

from peft_esft import select_experts

from criteria import Scores, Table


Selection = dict[str, list[int]]
RANDOM, ATTENTION, SINKS = "random", "attention", ("sink", "sink_last")


def select(scores: Scores, criterion: str, *, top_p: float, seed: int, where: str = "layer") -> Selection:
    """Chooses experts.

    Args:
        scores: of the task.
        criterion: one of `scores.tables`; `contrast`, the token share minus that on general text; `random`; `sink`,
            the token share's experts where the last of each layer but the last layer gives way to the expert that
            serves the first position most; `sink_last`, the same in the last layer alone; `attention`, the first
            half of the token share's experts of each layer, as the rest of the budget goes to the attention.
        top_p: the token share's threshold, which sets the number of experts.
        seed: of the random choice.
        where: "layer" takes as many experts in each layer as the token share does, "global" the highest scores of all
            layers, as many in all.
    """
    token = select_experts(scores.tables["token"], top_p=top_p)
    if criterion in SINKS:
        layers = list(token)[-1:] if criterion == "sink_last" else list(token)[:-1]
        return {path: _with_sink(ids, scores, path) if path in layers else ids for path, ids in token.items()}
    if criterion == ATTENTION:
        return {path: ids[: (len(ids) + 1) // 2] for path, ids in token.items()}
    table = _table(scores, criterion, seed)
    if where == "layer":
        return {path: _ranked(table, path)[: len(ids)] for path, ids in token.items()}
    highest = sorted((-float(score), path, expert) for path, row in table.items() for expert, score in enumerate(row))[
        : sum(map(len, token.values()))
    ]
    chosen = {path: [expert for _, other, expert in highest if other == path] for path in table}
    return {path: ids for path, ids in chosen.items() if ids}


def _table(scores: Scores, criterion: str, seed: int) -> Table:
    token = scores.tables["token"]
    if criterion == "contrast":
        return {path: row - scores.tables["general"][path] for path, row in token.items()}
    if criterion == RANDOM:
        generator = torch.Generator().manual_seed(99 + seed)
        return {path: torch.rand(row.shape, generator=generator) for path, row in token.items()}
    return scores.tables[criterion]


def _with_sink(ids: list[int], scores: Scores, path: str) -> list[int]:
    """The lowest of a layer's experts gives way to the one that serves the first position most; a single one stays."""
    sink = int(scores.tables["first"][path].argmax())
    return ids if sink in ids or len(ids) == 1 else [*ids[:-1], sink]


def _ranked(table: Table, path: str) -> list[int]:
    return torch.sort(table[path], descending=True, stable=True).indices.tolist()
