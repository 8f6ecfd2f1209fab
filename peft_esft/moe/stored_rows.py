"""Reads and writes the rows of an experts' weight that is kept in few bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.encodings import differs
from ..ops.frozen_store import FrozenStore
from .quantised_formats import Encoder, Format


STORED = {"gate_up_proj": "stored_in", "up_proj": "stored_in", "down_proj": "stored_out"}
"""The name of the `StoredRows` of each weight. transformers' conversions of checkpoints go by parts of names, and
would take any name with "up_proj" in it for the dense weight's."""

KEPT = ("kept_experts", "kept_rows")
"""The parameters of the experts in full precision, which files and state dicts have only if there are such."""


class StoredRows(nn.Module):
    """A weight `[E, out, in]` of experts in few bits.

    Rows that are written to, by merging, lie over the codes in full precision: nothing is ever encoded again, and a
    row that is written back is bit for bit what it was.

    Attributes:
        format: how the weight is kept.
        shape: `[E, out, in]`.
        kept_ids: the experts that are in full precision.
        kept_experts: the same as int64 `[k]`, for files and state dicts: from rows alone no one can tell the expert.
        kept_rows: their matrices `[k, out, in]`, whose dtype and device are those of all matrices.
    """

    def __init__(
        self, format: Format, shape: Sequence[int], dtype: torch.dtype, tensors: Mapping[str, Tensor]
    ) -> None:
        super().__init__()
        self.format, self.shape = format, torch.Size(shape)
        for name, tensor in tensors.items():
            # Parameters, which DDP does not send around in every step as it does buffers.
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.tensor_names = tuple(tensors)
        device = next(iter(tensors.values())).device
        self._set_kept((), torch.empty(0, *self.shape[1:], dtype=dtype, device=device))

    @classmethod
    @torch.no_grad()
    def encoded(cls, format: Encoder, rows: Tensor, kept: Sequence[int] = ()) -> StoredRows:
        """Brings a weight `[E, out, in]` to a form, one expert after the other.

        Args:
            format: the form.
            rows: the weight.
            kept: experts that stay in full precision.
        """
        layout = format.layout(tuple(rows.shape), rows.dtype).items()
        tensors = {name: torch.empty(shape, dtype=dtype, device=rows.device) for name, (dtype, shape) in layout}
        for expert, matrix in enumerate(rows):
            for name, tensor in format.encode(matrix.detach()).items():
                tensors[name][expert] = tensor
        stored = cls(format, rows.shape, rows.dtype, tensors)
        stored.write(kept, rows[list(kept)])
        return stored

    def forward(self) -> FrozenStore:
        """The weight as it is now. A call, so that accelerate loads a weight that is offloaded."""
        tensors = {name: self._parameters[name].data for name in self.tensor_names}  # type: ignore[union-attr]
        rows = self.kept_rows.data
        decode = partial(self.format.decode, tensors, shape=tuple(self.shape[1:]), dtype=rows.dtype)
        kept = dict(zip(self.kept_ids, rows.unbind(), strict=True))
        return FrozenStore(self.shape, rows.dtype, rows.device, decode, kept)

    def decoded(self, expert: int) -> Tensor:
        """The matrix `[out, in]` that the codes of an expert stand for, whether it is in full precision or not."""
        return self().decode(slice(expert, expert + 1))[0]

    @torch.no_grad()
    def write(self, expert_ids: Sequence[int], rows: Tensor) -> None:
        """Puts rows `[n, out, in]` of some experts over the codes; one that the codes stand for is left to them."""
        store = self()
        kept = dict(store.kept)
        for expert, row in zip(expert_ids, rows, strict=True):
            own = row.to(store.dtype)
            kept.pop(expert, None)
            if bool(differs(self.decoded(expert), own).any()):
                kept[expert] = own
        self.keep(kept)

    def keep(self, rows: Mapping[int, Tensor]) -> None:
        """Has the rows of these experts, and of no others, in full precision."""
        ids = tuple(sorted(rows))
        self._set_kept(ids, torch.stack([rows[e] for e in ids]) if ids else self.kept_rows.data[:0].clone())

    def to_empty_kept(self, device: torch.device) -> None:
        """Has no experts in full precision, and the empty tensors of them on a device."""
        self._set_kept((), torch.empty_like(self.kept_rows.data[:0], device=device))

    def _set_kept(self, ids: tuple[int, ...], rows: Tensor) -> None:
        self.kept_ids, self.kept_rows = ids, nn.Parameter(rows, requires_grad=False)
        self.kept_experts = nn.Parameter(torch.tensor(ids, dtype=torch.int64, device=rows.device), requires_grad=False)

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(parameter.nbytes for parameter in self.parameters())

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.kept_ids:
            for name in KEPT:
                del destination[f"{prefix}{name}"]  # empty

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *others: Any) -> None:
        if f"{prefix}{self.tensor_names[0]}" in state_dict:
            # Whatever was in full precision when it was saved is so now, merged or not.
            ids = tuple(state_dict.get(f"{prefix}{KEPT[0]}", self.kept_experts[:0]).flatten().tolist())
            if ids != tuple(sorted(set(ids) & set(range(self.shape[0])))):
                raise ValueError(
                    f"{prefix}{KEPT[0]} is {list(ids)}; expected ids of {self.shape[0]} experts, ascending"
                )
            if ids != self.kept_ids:
                self._set_kept(ids, self.kept_rows.data.new_empty(len(ids), *self.shape[1:]))
            if not ids:
                state_dict = {f"{prefix}{name}": self._parameters[name] for name in KEPT} | dict(state_dict)
        super()._load_from_state_dict(state_dict, prefix, *others)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StoredRows:
        """Moves all tensors; a change of dtype is one of the matrices' only. Scales would not survive it."""
        super()._apply(lambda tensor: fn(tensor) if tensor is self.kept_rows else _moved(fn, tensor), recurse)
        return self

    def extra_repr(self) -> str:
        kept = f", {len(self.kept_ids)} experts in {self.kept_rows.dtype}" if self.kept_ids else ""
        return f"{self.format.name}, {tuple(self.shape)}{kept}"


def _moved(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """What `fn` makes of a tensor, in the dtype that it had."""
    integers = tensor.view(torch.uint8) if tensor.is_floating_point() else tensor
    return fn(integers).view(tensor.dtype)
