"""Matrix products of rows in groups, each group with a matrix of its own: kernels and their choice.

Axes are those of `functional.py`. The groups come in two parts, frozen ones and trained ones, whose matrices lie in
two tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .frozen_store import Frozen, FrozenStore


_GROUPED_MM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_GROUPED_MM_ALIGNMENT = 16  # bytes; what `torch.nn.functional.grouped_mm` asks of every stride
_FEW_ROWS = 256
"""Up to so many rows an accelerator computes what it will throw away rather than wait for the host."""
_LOOPED_DEVICES = ("cpu",)
"""Where torch's `grouped_mm` is itself a loop over all groups."""
_LOOPED_ROWS = (0.5, 32)
"""There, with fewer or more rows a group than these, a loop over those that have rows is as fast, and copies less."""


def ends_on_host(ends: Tensor, num_rows: int) -> list[int] | None:
    """The ends of the groups as a list; None where that is not worth a host synchronisation, or not possible."""
    # One host synchronisation on an accelerator. A compiled graph has none: there it is up to the kernels.
    is_known = not torch.compiler.is_compiling() and (ends.device.type in _LOOPED_DEVICES or num_rows > _FEW_ROWS)
    return ends.tolist() if is_known else None


def grouped_mm(
    inputs: Tensor,
    tokens: Tensor | None,
    frozen: Frozen,
    trained: Tensor,
    ends: Tensor,
    host_ends: list[int] | None,
    is_flipped: bool,
) -> Tensor:
    """Each row times the matrix of its group.

    Args:
        inputs: `[R, in]`, or `[T, in]` with `tokens`.
        tokens: int64 `[R]`, where in `inputs` each row comes from.
        frozen: `[E, in, out]`, or `[E, out, in]` if `is_flipped`.
        trained: `[n, in, out]`, or `[n, out, in]` if `is_flipped`.
        ends: int32 `[E + n]`.
        host_ends: the same as a list, or None.
        is_flipped: how the matrices are stored.

    Returns:
        `[R, out]`, zero for rows that are in no group.
    """
    if torch.compiler.is_compiling():
        return torch.ops.peft_esft.grouped_mm(inputs, tokens, frozen, trained, ends, is_flipped)
    if is_flipped:
        frozen, trained = frozen.transpose(1, 2), trained.transpose(1, 2)
    num_rows, num_groups = (inputs if tokens is None else tokens).shape[0], ends.shape[0]
    if isinstance(frozen, FrozenStore):
        # One matrix exists at a time, which no kernel can do.
        return _loop_mm(inputs, tokens, frozen, trained, ends.tolist() if host_ends is None else host_ends)
    if _has_kernel(inputs, frozen) and not _is_better_looped(inputs.device, num_rows, num_groups):
        rows = inputs if tokens is None else inputs.index_select(0, tokens)
        if host_ends is None and rows.shape[0] <= _FEW_ROWS:
            return _few_rows_mm(rows, frozen, trained, ends)
        return _many_rows_mm(rows, frozen, trained, ends, ends.tolist() if host_ends is None else host_ends)
    return _loop_mm(inputs, tokens, frozen, trained, ends.tolist() if host_ends is None else host_ends)


def _many_rows_mm(rows: Tensor, frozen: Tensor, trained: Tensor, ends: Tensor, host_ends: list[int]) -> Tensor:
    """Two kernels on disjoint rows; the shorter result is copied into the longer one."""
    start, end = [0, *host_ends][frozen.shape[0]], host_ends[-1]
    if start > 0:
        # The kernel leaves rows behind the last end alone.
        result = torch.nn.functional.grouped_mm(rows, frozen, offs=ends[: frozen.shape[0]])
    else:
        result = rows.new_empty(rows.shape[0], frozen.shape[2])
    if end > start:
        offsets = ends[frozen.shape[0] :] - start
        result[start:end] = torch.nn.functional.grouped_mm(rows[start:end], trained, offs=offsets)
    result[end:] = 0
    return result


def _few_rows_mm(rows: Tensor, frozen: Tensor, trained: Tensor, ends: Tensor) -> Tensor:
    """Two kernels on all rows, of which the right results are chosen: nothing waits for the host.

    The first trained group takes in all frozen rows before it, whose results are thrown away.
    """
    result = torch.nn.functional.grouped_mm(rows, trained, offs=ends[frozen.shape[0] :])
    row = torch.arange(rows.shape[0], device=rows.device)[:, None]
    if frozen.shape[0] > 0:
        of_frozen = torch.nn.functional.grouped_mm(rows, frozen, offs=ends[: frozen.shape[0]])
        result = torch.where(row < ends[frozen.shape[0] - 1], of_frozen, result)
    return result.masked_fill_(row >= ends[-1], 0)


def _loop_mm(inputs: Tensor, tokens: Tensor | None, frozen: Frozen, trained: Tensor, ends: list[int]) -> Tensor:
    """One group after the other, as torch's kernel for the CPU does. Of many rows each is gathered in its turn."""
    if tokens is not None and tokens.shape[0] <= _FEW_ROWS:
        inputs, tokens = inputs.index_select(0, tokens), None
    sources = inputs if tokens is None else tokens
    result = inputs.new_empty(sources.shape[0], frozen.shape[2])
    groups, sizes = _non_empty_groups(ends)
    sizes.append(sources.shape[0] - ends[-1])
    *targets, rest = result.split(sizes)
    with torch.autocast(inputs.device.type, enabled=False):
        for group, source, target in zip(groups, sources.split(sizes), targets, strict=False):
            rows = source if tokens is None else inputs.index_select(0, source)
            matrix = frozen[group] if group < frozen.shape[0] else trained[group - frozen.shape[0]]
            torch.mm(rows, matrix, out=target)
    rest.zero_()
    return result


def grouped_outer(
    left: Tensor, right: Tensor, bounds: Tensor, host_bounds: list[int] | None, dtype: torch.dtype
) -> Tensor:
    """`left[group].T @ right[group]` for each group: `left [S, a]` and `right [S, b]` to `[n, a, b]`.

    Args:
        left: rows.
        right: rows.
        bounds: int32 `[n + 1]`, where the first group begins, and the end of each.
        host_bounds: the same as a list, or None.
        dtype: of the result.
    """
    if torch.compiler.is_compiling():
        return torch.ops.peft_esft.grouped_outer(left, right, bounds).to(dtype)
    has_kernel = _has_kernel(left, right) and left.device.type not in _LOOPED_DEVICES and left.shape[0] > 0
    if has_kernel and host_bounds is None and left.shape[0] <= _FEW_ROWS:
        # The rows before the first group make one group more, which is thrown away.
        return torch.nn.functional.grouped_mm(left.transpose(0, 1), right, offs=bounds)[1:].to(dtype)
    start, *ends = bounds.tolist() if host_bounds is None else host_bounds
    left, right = left[start : ends[-1]], right[start : ends[-1]]
    if has_kernel and left.shape[0] > 0:
        return torch.nn.functional.grouped_mm(left.transpose(0, 1), right, offs=bounds[1:] - start).to(dtype)
    groups, sizes = _non_empty_groups([end - start for end in ends])
    result = left.new_empty(len(ends), left.shape[1], right.shape[1], dtype=dtype)
    with torch.autocast(left.device.type, enabled=False):
        for group, own_left, own_right in zip(groups, left.split(sizes), right.split(sizes), strict=True):
            if dtype == left.dtype:
                torch.mm(own_left.T, own_right, out=result[group])
            else:
                # One expert at a time, so that the product is still in the cache when it is cast.
                result[group] = own_left.T @ own_right
    for group in set(range(len(ends))).difference(groups):
        result[group] = 0
    return result


def _has_kernel(left: Tensor, right: Tensor) -> bool:
    """True if `torch.nn.functional.grouped_mm` has a kernel for these operands."""
    if left.dtype not in _GROUPED_MM_DTYPES:
        return False
    if left.is_cuda and torch.cuda.get_device_capability(left.device) < (8, 0):
        return False
    sizes = (left.shape[-1], *right.shape[-2:]) if right.dim() == 3 else (left.shape[-1], right.shape[-1])
    if any(size * left.element_size() % _GROUPED_MM_ALIGNMENT for size in sizes):
        return False
    return all(operand.data_ptr() % _GROUPED_MM_ALIGNMENT == 0 for operand in (left, right))


def _is_better_looped(device: torch.device, num_rows: int, num_groups: int) -> bool:
    low, high = _LOOPED_ROWS
    return device.type in _LOOPED_DEVICES and not low * num_groups <= num_rows <= high * num_groups


def _non_empty_groups(ends: list[int]) -> tuple[list[int], list[int]]:
    """The groups that have rows, and how many each has."""
    sizes = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    groups = [group for group, size in enumerate(sizes) if size]
    return groups, [sizes[group] for group in groups]


def _grouped_mm_op(
    inputs: Tensor, tokens: Tensor | None, frozen: Tensor, trained: Tensor, ends: Tensor, is_flipped: bool
) -> Tensor:
    return grouped_mm(inputs, tokens, frozen, trained, ends, None, is_flipped)


def _grouped_mm_meta(
    inputs: Tensor, tokens: Tensor | None, frozen: Tensor, trained: Tensor, ends: Tensor, is_flipped: bool
) -> Tensor:
    return inputs.new_empty((inputs if tokens is None else tokens).shape[0], frozen.shape[1 if is_flipped else 2])


def _grouped_outer_op(left: Tensor, right: Tensor, bounds: Tensor) -> Tensor:
    return grouped_outer(left, right, bounds, None, left.dtype)


def _grouped_outer_meta(left: Tensor, right: Tensor, bounds: Tensor) -> Tensor:
    return left.new_empty(bounds.shape[0] - 1, left.shape[1], right.shape[1])


# `torch.library.custom_op` says the same in fewer lines, but looks for the caller's source in every module that is
# imported: as long as half of this package's import.
_LIBRARY = torch.library.Library("peft_esft", "DEF")
_LIBRARY.define(
    "grouped_mm(Tensor inputs, Tensor? tokens, Tensor frozen, Tensor trained, Tensor ends, bool is_flipped) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "grouped_outer(Tensor left, Tensor right, Tensor bounds) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)
_LIBRARY.impl("grouped_mm", _grouped_mm_op, "CompositeExplicitAutograd")
_LIBRARY.impl("grouped_mm", _grouped_mm_meta, "Meta")
_LIBRARY.impl("grouped_outer", _grouped_outer_op, "CompositeExplicitAutograd")
_LIBRARY.impl("grouped_outer", _grouped_outer_meta, "Meta")
