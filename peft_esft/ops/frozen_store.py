"""Stands in for a frozen weight tensor kept in another form, and computes a few experts' matrices at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class FrozenStore:
    """What takes the place of a frozen tensor `[E, out, in]` in the split forward.

    It has the part of a tensor's interface that the products use. Matrices are computed when they are asked for and
    are not kept: the backward pass computes them again.

    Attributes:
        shape: of the dense tensor.
        dtype: of the matrices.
        device: of the matrices.
        decode: computes the matrices `[n, out, in]` of some experts, given as a slice or as int64 `[n]`, in a tensor
            that nothing else refers to.
        kept: experts whose matrix is in full precision, and is read in place of the decoded one.
        is_flipped: matrices are handed out transposed.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    decode: Callable[[slice | Tensor], Tensor] = field(repr=False)
    kept: Mapping[int, Tensor] = field(default_factory=dict, repr=False)
    is_flipped: bool = False

    def __getitem__(self, expert: int) -> Tensor:
        """The matrix of one expert, not to be written to."""
        matrix = self.kept[expert] if expert in self.kept else self.decode(slice(expert, expert + 1))[0]
        return matrix.T if self.is_flipped else matrix

    def matrices(self, experts: Sequence[int]) -> Tensor:
        """The matrices of some experts, `[n, out, in]`, decoded in one go."""
        if isinstance(experts, range):
            matrices = self.decode(slice(experts.start, experts.stop))
        else:
            matrices = self.decode(torch.tensor(experts).to(self.device, non_blocking=True))
        for place, expert in enumerate(experts):
            if expert in self.kept:
                matrices[place] = self.kept[expert]
        return matrices.transpose(1, 2) if self.is_flipped else matrices

    def index_select(self, dim: int, ids: Tensor) -> Tensor:
        """A copy of the matrices of some experts, `[n, out, in]`; as for a tensor, with `dim` 0."""
        if len(ids) and not self.kept and not self.is_flipped and self.device.type != "cpu":
            return self.decode(ids)  # without a wait for the host
        rows = torch.empty(len(ids), *self.shape[1:], dtype=self.dtype, device=self.device)
        for place, expert in enumerate(ids.tolist()):
            rows[place] = self[expert]
        return rows

    def transpose(self, first: int, second: int) -> FrozenStore:
        """The store with each matrix transposed; as for a tensor, with the dimensions 1 and 2."""
        experts, rows, columns = self.shape
        return replace(self, shape=torch.Size((experts, columns, rows)), is_flipped=not self.is_flipped)


Frozen = Tensor | FrozenStore
"""The frozen weights of all experts."""


def keep_for_backward(ctx: Any, frozen: Frozen) -> Tensor | None:
    """Notes frozen weights in an autograd context.

    Returns:
        What is to be given to `ctx.save_for_backward`, which takes tensors alone.
    """
    ctx.store = None if isinstance(frozen, Tensor) else frozen
    return frozen if isinstance(frozen, Tensor) else None
