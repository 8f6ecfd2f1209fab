"""Splits scoring among processes: which batches each one counts, and when it has to wait for the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..moe.weights import is_spread


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


@dataclass(frozen=True)
class ProcessShare:
    """The part of the scoring that one process does.

    Attributes:
        index: number of its part of the data.
        parts: number of parts; 1 in a single process.
        counts: False where another process sees the same batches and counts them.
        in_step: True if all processes have to run the model equally often, since its weights are spread over them.
    """

    index: int = 0
    parts: int = 1
    counts: bool = True
    in_step: bool = False

    @classmethod
    def of(cls, model: nn.Module) -> ProcessShare:
        """Finds the part of this process, for a model that is prepared for all of them."""
        if not _is_distributed():
            return cls()
        # In transformers' mesh the processes of one batch follow one another.
        same_batch = getattr(model, "_tp_size", None) or 1
        rank = dist.get_rank()
        return cls(
            index=rank // same_batch,
            parts=dist.get_world_size() // same_batch,
            counts=rank % same_batch == 0,
            in_step=any(map(is_spread, model.parameters())),
        )

    def of_tokens(self, tokens: int) -> int:
        """The share of this process in a number of tokens."""
        return tokens // self.parts + (self.index < tokens % self.parts)

    def gather(self, result: Any) -> list[Any]:
        """The results of all processes that count."""
        if not _is_distributed():
            return [result]
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, result if self.counts else None)
        return [found for found in gathered if found is not None]


def batches_in_step(
    batches: Iterable[Any], wants_more: Callable[[], bool], share: ProcessShare, model: nn.Module
) -> Iterator[tuple[Any, bool]]:
    """Yields batches as long as this process wants some; in step, as long as any process does.

    With each batch comes whether to count it. A batch that is not counted is the last one again, run for the others.

    Raises:
        ValueError: if this process has no batch at all, but others do.
    """
    iterator = iter(batches)
    last = None
    while True:
        batch = next(iterator, None) if wants_more() else None
        goes_on = batch is not None
        if share.in_step:
            flag = torch.tensor(int(goes_on), device=next(model.parameters()).device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            goes_on = bool(flag)
        if not goes_on:
            return
        last = last if batch is None else batch
        if last is None:
            raise ValueError(
                "this process has no batch, but others do. A sharded model must run on all processes: give each "
                "process some data"
            )
        yield last, batch is not None
