"""How an adapter's weights are stored: as deltas, as the effective rows themselves, or as deltas of few bits.

Tensors only. A form is a set of tensors beside each other, each with the suffix that its name has in a file; a weight
`[n, ..., length]` of an adapter is stored, for `rows = n * ...`, as

- "delta": one tensor without a suffix, fp32;
- "rows": `_rows`, the effective weights in the base's dtype: nothing is added, so they are exact;
- "int8", "int4", "int1": `_codes`, signed integers of that many bits, packed along the last dimension, and `_scales`,
  one bf16 for each of the `rows`. The delta is `code * scale`; of one bit, `+scale` or `-scale`.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor


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
