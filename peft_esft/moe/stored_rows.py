"""Reads and writes the rows of an experts' weight that is kept in few bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..ops.encodings import differs
from ..ops.frozen_store import FrozenStore
from .quantised_formats import Encoder, Format, is_dtype_of


STORED = {"gate_up_proj": "stored_in", "up_proj": "stored_in", "down_proj": "stored_out"}
"""The name of the `StoredRows` of each weight. transformers' conversions of checkpoints go by parts of names, and
would take any name with "up_proj" in it for the dense weight's."""

KEPT = ("kept_experts", "kept_rows")
"""The parameters of the experts in full precision, which are there only if there are such experts."""


class StoredRows(nn.Module):
    """A weight `[E, out, in]` of experts in few bits.

    Rows that are written to, by merging, lie over the codes in full precision: nothing is ever encoded again, and a
    row that is written back is bit for bit what it was.

    Attributes:
        format: how the weight is kept.
        shape: `[E, out, in]`.
        dtype: of the matrices.
        dtypes: of the tensors by name, which never change.
        kept_ids: the experts that are in full precision.
        kept_experts: the same as int64 `[k]`, for files and state dicts: from rows alone no one can tell the expert.
        kept_rows: their matrices `[k, out, in]`. Both are None if there are none.
    """

    kept_experts: nn.Parameter | None
    kept_rows: nn.Parameter | None

    def __init__(
        self, format: Format, shape: Sequence[int], dtype: torch.dtype, tensors: Mapping[str, Tensor]
    ) -> None:
        super().__init__()
        self.format, self.shape, self.dtype = format, torch.Size(shape), dtype
        for name, tensor in tensors.items():
            # Parameters, which DDP does not send around in every step as it does buffers.
            self.register_parameter(name, _constant(tensor))
        self.dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
        # torch puts it in the metadata of state dicts. NF4 and FP4 have tensors of the same names, shapes and dtypes.
        self._version = format.name  # type: ignore[assignment]
        self.keep({})

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
        """The weight as it is now. A call, so that accelerate loads a weight that is offloaded.

        Raises:
            RuntimeError: if something has cast a tensor, and the matrices would be others than the model's.
            NotImplementedError: if ZeRO-3 has sharded the tensors, and would take them away before the backward pass.
        """
        tensors = {}
        for name, dtype in self.dtypes.items():
            parameter: Any = self._parameters[name]
            if parameter.dtype != dtype or hasattr(parameter, "ds_id"):
                self._refuse(name, parameter)
            tensors[name] = parameter.data
        decode = partial(self.format.decode, tensors, shape=tuple(self.shape[1:]), dtype=self.dtype)
        rows = () if self.kept_rows is None else self.kept_rows.data.to(self.dtype).unbind()
        kept = dict(zip(self.kept_ids, rows, strict=True))
        return FrozenStore(self.shape, self.dtype, next(iter(tensors.values())).device, decode, kept)

    def _refuse(self, name: str, parameter: Tensor) -> NoReturn:
        if hasattr(parameter, "ds_id"):
            raise NotImplementedError(
                f"ZeRO-3 has sharded experts in {self.format.name}, which it cannot train. Use FSDP2 or ZeRO-2"
            )
        raise RuntimeError(
            f"the {name} of experts in {self.format.name} were cast from {self.dtypes[name]} to {parameter.dtype}, "
            "which would change the experts. If the model is sharded by FSDP2, load it in bfloat16 and train without "
            "mixed precision: bf16=False in TrainingArguments, and no MixedPrecisionPolicy"
        )

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
        self._set_kept(ids, torch.stack([rows[e] for e in ids]) if ids else None)

    def _set_kept(self, ids: tuple[int, ...], rows: Tensor | None) -> None:
        # Both are made before either is set: an error, as for want of memory, must not leave ids without rows.
        own = (None, None) if rows is None else (torch.tensor(ids, dtype=torch.int64, device=rows.device), rows)
        experts, rows = (None if tensor is None else _constant(tensor) for tensor in own)
        self.kept_ids, self.kept_experts, self.kept_rows = ids, experts, rows

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(parameter.nbytes for parameter in self.parameters())

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: dict[str, Any], *others: Any
    ) -> None:
        names = (*self.dtypes, *KEPT)
        own = {name: state_dict[f"{prefix}{name}"] for name in names if f"{prefix}{name}" in state_dict}
        self._check_incoming(prefix[:-1], own, local_metadata.get("version"))
        if own.keys() & {next(iter(self.dtypes)), KEPT[0]}:
            # Whatever was in full precision when it was saved is so now, merged or not.
            ids = _whole_ids(own.get(KEPT[0]))
            if ids != tuple(sorted(set(ids) & set(range(self.shape[0])))):
                raise ValueError(
                    f"{prefix}{KEPT[0]} is {list(ids)}; expected ids of {self.shape[0]} experts, ascending"
                )
            if ids != self.kept_ids:
                if isinstance(getattr(self, next(iter(self.dtypes))), DTensor):
                    raise ValueError(
                        f"{prefix[:-1]} has experts {list(self.kept_ids)} in full precision, and the state dict "
                        f"{list(ids)}: this cannot change once a model is sharded. Load before it is sharded"
                    )
                self._set_kept(ids, self._room(len(ids)) if ids else None)
        cast = {f"{prefix}{name}": own[name].to(dtype) for name, dtype in self.dtypes.items() if name in own}
        super()._load_from_state_dict({**state_dict, **cast}, prefix, local_metadata, *others)

    def _check_incoming(self, path: str, own: Mapping[str, Tensor], form: Any) -> None:
        """Refuses tensors of a state dict that would make other experts than those it was taken from."""
        if isinstance(form, str) and form != self.format.name:
            raise ValueError(f"{path} of the state dict is in {form}, and this model's is in {self.format.name}")
        for name in own.keys() & self.dtypes.keys():
            found, wanted = own[name].dtype, self.dtypes[name]
            if not is_dtype_of(self.format.name, name, found, wanted):
                raise ValueError(
                    f"{path}.{name} has dtype {found} in the state dict, and not {wanted}: something has cast it"
                )
        if len(own.keys() & set(KEPT)) == 1:
            raise ValueError(f"the state dict has only one of {path}.{KEPT[0]} and {path}.{KEPT[1]}: add the other")

    def _room(self, number: int) -> Tensor:
        codes = getattr(self, next(iter(self.dtypes)))
        return torch.empty(number, *self.shape[1:], dtype=self.dtype, device=codes.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StoredRows:
        """Moves all tensors; a change of dtype is one of the matrices' only. Scales would not survive it."""
        self.dtype = fn(self._room(0)).dtype
        super()._apply(lambda tensor: _moved(fn, tensor, is_rows=self.kept_rows is tensor), recurse)
        return self

    def extra_repr(self) -> str:
        kept = f", {len(self.kept_ids)} experts in {self.dtype}" if self.kept_ids else ""
        return f"{self.format.name}, {tuple(self.shape)}{kept}"


def _moved(fn: Callable[[Tensor], Tensor], tensor: Tensor, is_rows: bool) -> Tensor:
    """What `fn` makes of a tensor; in the dtype that it had, unless it has rows."""
    if is_rows or not tensor.is_floating_point():
        return fn(tensor)
    return fn(tensor.view(torch.uint8)).view(tensor.dtype)


def _constant(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _whole_ids(ids: Any) -> tuple[int, ...]:
    """The ids in a state dict, of which FSDP2 gives each process a part."""
    if ids is None:
        return ()
    return tuple((ids.full_tensor() if isinstance(ids, DTensor) else ids).flatten().tolist())
