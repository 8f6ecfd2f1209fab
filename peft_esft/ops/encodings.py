"""Converts an adapter's weights to and from the forms in which they are stored: deltas, effective rows, few bits.

The functions take and return tensors. A form stores a weight `[n, ..., length]` of an adapter as one or two tensors.
Each has a suffix, which its name in a file ends with. With `rows = n * ...`, the forms are

- "delta": one tensor without a suffix, fp32;
- "rows": `_rows`, the effective weights in the base's dtype: nothing is added, so they are exact;
- "int8", "int4", "int1": `_codes`, signed integers of that many bits, packed along the last dimension, and `_scales`,
  one bf16 for each of the `rows`. The delta is `code * scale`; of one bit, `+scale` or `-scale`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from .deltas import add_deltas


Form = Literal["delta", "rows", "int8", "int4", "int1"]
FORMS: tuple[str, ...] = get_args(Form)
BITS = {"int8": 8, "int4": 4, "int1": 1}
SUFFIXES = {"delta": ("",), "rows": ("_rows",), "int8": ("_codes", "_scales")}
SUFFIXES |= {"int4": SUFFIXES["int8"], "int1": SUFFIXES["int8"]}
FROZEN_SUFFIXES = ("_rows", "_codes", "_scales")


def stored_layout(
    form: str, shape: tuple[int, ...], dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of each tensor of a form, by suffix.

    Args:
        form: one of `FORMS`.
        shape: of the weight, `[n, ..., length]`.
        dtype: of the base.
    """
    if form == "delta":
        return {"": (torch.promote_types(dtype, torch.float32), shape)}
    if form == "rows":
        return {"_rows": (dtype, shape)}
    bits = BITS[form]
    packed = (*shape[:-1], -(-shape[-1] * bits // 8))
    codes = torch.int8 if bits == 8 else torch.uint8
    return {"_codes": (codes, packed), "_scales": (torch.bfloat16, (*shape[:-1], 1))}


def encode(form: str, delta: Tensor) -> dict[str, Tensor]:
    """A delta `[..., length]` in few bits, as the tensors of a form by suffix.

    The scale of a row is the one of a few candidates that gives the smallest sum of squared errors; of one bit it is
    the mean of the absolute values, which is the best there is.
    """
    delta = delta.float()
    if form == "int1":
        scales = delta.abs().mean(-1, keepdim=True).to(torch.bfloat16)
        return {"_codes": _pack((delta >= 0).to(torch.uint8), 1), "_scales": scales}
    limit = 2 ** (BITS[form] - 1) - 1
    largest = delta.abs().amax(-1, keepdim=True) / limit
    best_error: Tensor | None = None
    for share in (1.0, 0.92, 0.84, 0.76, 0.68, 0.6) if form == "int4" else (1.0,):
        candidate = (share * largest).to(torch.bfloat16)
        codes = _rounded(delta, candidate, limit)
        error = (codes * candidate.float() - delta).square().sum(-1, keepdim=True)
        if best_error is None:
            best_error, scales, best = error, candidate, codes
            continue
        better = error < best_error
        best_error, scales = torch.minimum(error, best_error), torch.where(better, candidate, scales)
        best = torch.where(better, codes, best)
    if form == "int8":
        return {"_codes": best.to(torch.int8), "_scales": scales}
    return {"_codes": _pack((best + 8).to(torch.uint8), 4), "_scales": scales}


def decode(form: str, codes: Tensor, scales: Tensor, length: int) -> Tensor:
    """The fp32 delta `[..., length]` from its codes and scales."""
    if form == "int8":
        values = codes.float()
    elif form == "int4":
        values = _unpack(codes, 4, length).float() - 8
    else:
        values = _unpack(codes, 1, length).float() * 2 - 1
    return values * scales.float()


def delta_from(
    form: str,
    stored: Mapping[str, Tensor],
    factor: float = 1.0,
    length: int | None = None,
    base_rows: Tensor | None = None,
) -> Tensor:
    """The delta `[n, ...]` that the stored tensors of a weight stand for, in at least fp32.

    Args:
        form: one of `FORMS`.
        stored: the tensors by suffix: those of `SUFFIXES[form]`, or `_A` and `_B` for a delta of low rank.
        factor: what the delta is multiplied with.
        length: the size of the last dimension. None means as many values as the codes can hold.
        base_rows: the base's rows `[n, ...]`, which only "rows" needs.

    Raises:
        ValueError: if the form is "rows" and `base_rows` is None.
    """
    if form == "rows":
        if base_rows is None:
            raise ValueError("the adapter stores effective rows, and their deltas need the base; give base_rows")
        wide = torch.promote_types(base_rows.dtype, torch.float32)
        delta = stored["_rows"].to(wide) - base_rows.to(wide)
    elif form == "delta":
        delta = stored["_B"] @ stored["_A"] if "_A" in stored else stored[""]
    else:
        codes = stored["_codes"]
        most = codes.shape[-1] * 8 // BITS[form]
        delta = decode(form, codes, stored["_scales"], most if length is None else length)
    return delta if factor == 1 else factor * delta


def exact_delta(rows: Tensor, trained: Tensor) -> tuple[Tensor, int]:
    """A delta that `deltas.add_deltas` turns into `trained`, bit for bit.

    The difference of two half-precision numbers may need more bits than fp32 has. Where the nearest fp32 number does
    not give the trained weight, its two neighbours are tried.

    Args:
        rows: the base's, `[n, ...]`.
        trained: `[n, ...]`, in the same dtype.

    Returns:
        The delta in at least fp32, and the number of weights that it does not give exactly.
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    delta = (trained.double() - rows.double()).to(wide)
    wrong = differs(add_deltas(rows, [(None, delta)]), trained)
    if not bool(wrong.any()):
        return delta, 0
    nearest = delta[wrong]
    best, left = nearest.clone(), torch.ones_like(nearest, dtype=torch.bool)
    for direction in (-torch.inf, torch.inf):
        other = torch.nextafter(nearest, torch.full_like(nearest, direction))
        right = ~differs(add_deltas(rows[wrong], [(None, other)]), trained[wrong])
        best, left = torch.where(right, other, best), left & ~right
    delta[wrong] = best
    return delta, int(left.sum())


def differs(left: Tensor, right: Tensor) -> Tensor:
    """Where two tensors differ in their bits; zeros of either sign count as different."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[left.dtype.itemsize]
    return left.contiguous().view(integers) != right.contiguous().view(integers)


def _rounded(delta: Tensor, scales: Tensor, limit: int) -> Tensor:
    wide = scales.float()
    return torch.where(wide > 0, delta / wide, 0.0).round().clamp(-limit, limit)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Codes of a few bits, `[..., length]`, the first in the lowest bits of each byte; filled up with zeros."""
    per_byte = 8 // bits
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % per_byte))
    grouped = codes.unflatten(-1, (-1, per_byte))
    packed = torch.zeros(grouped.shape[:-1], dtype=torch.uint8, device=codes.device)
    for place in range(per_byte):
        packed |= grouped[..., place] << (bits * place)
    return packed


def _unpack(packed: Tensor, bits: int, length: int) -> Tensor:
    per_byte = 8 // bits
    shifts = torch.arange(per_byte, dtype=torch.uint8, device=packed.device) * bits
    codes = (packed[..., None] >> shifts) & (2**bits - 1)
    return codes.flatten(-2)[..., :length]
