"""Multiplies groups of rows, each with a matrix of its own, and chooses the kernel for that.

Axes are those of `split_forward.py`. The groups come in two parts, frozen ones and trained ones, whose matrices lie in
two tensors.

torch's `grouped_mm` is one kernel on few accelerators and for few dtypes. Elsewhere each call copies the offsets to
the host and loops over all groups. There, the host looks at the ends once for all products of a layer, and a loop goes
over the groups that have rows; of few rows the matrices are gathered, and nothing waits for the host.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from .frozen_store import Frozen, FrozenStore


_GROUPED_MM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_GROUPED_MM_ALIGNMENT = 16  # bytes; what `torch.nn.functional.grouped_mm` asks of every stride
_KERNEL_GROUPS = 1023
"""The most groups that CUDA's kernel takes."""
_FEW_ROWS = 1024
"""Up to so many rows the kernel computes what will be thrown away rather than that the host waits."""
_GATHERED_ROWS = 256
"""Up to so many rows are gathered at once on the CPU."""
_DECODED_BYTES = 2**28
"""About so many bytes of decoded matrices exist at once on an accelerator."""
_LOOPED_DEVICES = ("cpu",)
"""Where torch's `grouped_mm` is itself a loop over all groups."""
_LOOPED_ROWS = (0.5, 32)
"""There, with fewer or more rows a group than these, a loop over those that have rows is as fast, and copies less."""


def ends_on_host(ends: Tensor, num_rows: int, dtype: torch.dtype) -> list[int] | None:
    """The ends of the groups as a list, for which the host waits once; None where the products do without it.

    Args:
        ends: int32 `[G]`.
        num_rows: number of rows.
        dtype: of the matrices.
    """
    if torch.compiler.is_compiling():
        return None  # it is up to the operators of the graph
    if ends.device.type in _LOOPED_DEVICES:
        return ends.tolist()
    is_fast = has_fast_kernel(ends.device, dtype)
    # The gradient of the matrices needs the host where there is no kernel: once for all products.
    needs_host = torch.is_grad_enabled() and not is_fast
    return ends.tolist() if needs_host or num_rows > _few_rows(is_fast, ends.shape[0]) else None


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
    if isinstance(frozen, FrozenStore):
        host_ends = ends.tolist() if host_ends is None else host_ends
        store, trained = (frozen.transpose(1, 2), trained.transpose(1, 2)) if is_flipped else (frozen, trained)
        multiply = _loop_mm if inputs.device.type in _LOOPED_DEVICES else _decoded_mm
        return multiply(inputs, tokens, store, trained, host_ends)
    num_rows, num_groups = (inputs if tokens is None else tokens).shape[0], ends.shape[0]
    has_kernel, is_looped = _has_kernel(inputs, frozen, trained), inputs.device.type in _LOOPED_DEVICES
    has_few_rows = host_ends is None and not is_looped and num_rows <= _few_rows(has_kernel, num_groups)
    if torch.compiler.is_compiling():
        if has_few_rows and num_rows <= num_groups // 2:
            return _fusible_mm(inputs, tokens, frozen, trained, ends, is_flipped)
        operator = torch.ops.peft_esft.few_rows_mm if has_few_rows else torch.ops.peft_esft.grouped_mm
        return operator(inputs, tokens, frozen, trained, ends, is_flipped)
    if is_flipped:
        frozen, trained = frozen.transpose(1, 2), trained.transpose(1, 2)
    if has_few_rows:
        return _few_rows_mm(inputs if tokens is None else inputs.index_select(0, tokens), frozen, trained, ends)
    host_ends = ends.tolist() if host_ends is None else host_ends
    low, high = _LOOPED_ROWS
    if has_kernel and (not is_looped or low * num_groups <= num_rows <= high * num_groups):
        rows = inputs if tokens is None else inputs.index_select(0, tokens)
        return _many_rows_mm(rows, frozen, trained, ends, host_ends)
    return _loop_mm(inputs, tokens, frozen, trained, host_ends)


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


def _decoded_mm(inputs: Tensor, tokens: Tensor | None, store: FrozenStore, trained: Tensor, ends: list[int]) -> Tensor:
    """On an accelerator: the experts that have rows are decoded some at a time, since each call of a kernel costs."""
    rows = inputs if tokens is None else inputs.index_select(0, tokens)
    result = rows.new_empty(rows.shape[0], store.shape[2])
    groups = _non_empty_groups(ends)[0]
    at_once = max(1, _DECODED_BYTES // (store.shape[1] * store.shape[2] * store.dtype.itemsize))
    start = 0
    for first in range(0, store.shape[0], at_once):
        own: Sequence[int] = [group for group in groups if first <= group < min(first + at_once, store.shape[0])]
        if own:
            if 2 * len(own) > own[-1] - own[0]:
                own = range(own[0], own[-1] + 1)  # their codes need no copy, which is worth some decoding in vain
            stop, own_ends = ends[own[-1]], [ends[group] - start for group in own]
            result[start:stop] = _part_mm(rows[start:stop], store.matrices(own), own_ends)
            start = stop
    stop = ends[-1]
    if stop > start:
        own_ends = [end - start for end in ends[store.shape[0] :]]
        result[start:stop] = _part_mm(rows[start:stop], trained, own_ends)
    result[stop:] = 0
    return result


def _part_mm(rows: Tensor, matrices: Tensor, ends: list[int]) -> Tensor:
    """The products of rows in groups that follow one another, each with its matrix."""
    if not _has_kernel(rows, matrices):
        return _loop_mm(rows, None, matrices, matrices[:0], ends)
    offsets = torch.tensor(ends, dtype=torch.int32).to(rows.device, non_blocking=True)
    return torch.nn.functional.grouped_mm(rows, matrices, offs=offsets)


def _few_rows_mm(rows: Tensor, frozen: Tensor, trained: Tensor, ends: Tensor) -> Tensor:
    """The products of all rows with both parts, of which the right ones are chosen: nothing waits for the host."""
    num_frozen, row = frozen.shape[0], torch.arange(rows.shape[0], dtype=ends.dtype, device=rows.device)
    if trained.shape[0] > 0 and _has_kernel(rows, frozen, trained):
        result = torch.nn.functional.grouped_mm(rows, frozen, offs=ends[:num_frozen])
        # The first trained group takes in all frozen rows before it, whose results are thrown away.
        of_trained = torch.nn.functional.grouped_mm(rows, trained, offs=ends[num_frozen:])
    else:
        slots = torch.searchsorted(ends, row, right=True)
        result = _gathered_mm(rows, frozen, slots)
        of_trained = _gathered_mm(rows, trained, slots - num_frozen) if trained.shape[0] else result
    result = torch.where((row < ends[num_frozen - 1])[:, None], result, of_trained)
    return result.masked_fill_((row >= ends[-1])[:, None], 0)


def _fusible_mm(
    inputs: Tensor, tokens: Tensor | None, frozen: Tensor, trained: Tensor, ends: Tensor, is_flipped: bool
) -> Tensor:
    """The products as a multiplication and a sum, of which inductor makes one kernel that reads each matrix once."""
    num_frozen, num_trained = frozen.shape[0], trained.shape[0]
    row = torch.arange((inputs if tokens is None else tokens).shape[0], dtype=ends.dtype, device=ends.device)
    slots = torch.searchsorted(ends, row, right=True)
    matrices = frozen[slots.clamp(max=num_frozen - 1)]
    if num_trained > 0:
        of_trained = trained[(slots - num_frozen).clamp(0, num_trained - 1)]
        matrices = torch.where((slots < num_frozen)[:, None, None], matrices, of_trained)
    wide = torch.promote_types(inputs.dtype, torch.float32)
    rows = (inputs if tokens is None else inputs[tokens]).to(wide)
    factors = rows[:, None, :] if is_flipped else rows[:, :, None]
    products = (factors * matrices.to(wide)).sum(2 if is_flipped else 1)
    return products.masked_fill((row >= ends[-1])[:, None], 0).to(inputs.dtype)


def _gathered_mm(rows: Tensor, matrices: Tensor, places: Tensor) -> Tensor:
    """`rows[i] @ matrices[places[i]]`; anything where there is no such matrix."""
    num_rows, num_matrices = rows.shape[0], matrices.shape[0]
    places = places.clamp(0, num_matrices - 1)
    with torch.autocast(rows.device.type, enabled=False):
        if num_matrices <= 3 * num_rows:
            # A gathered matrix is read, written and read again: that would be more than all of them once.
            products = torch.bmm(rows.expand(num_matrices, -1, -1), matrices)
            return products[places, torch.arange(num_rows, device=rows.device)]
        return torch.bmm(rows[:, None], matrices.index_select(0, places))[:, 0]


def _loop_mm(inputs: Tensor, tokens: Tensor | None, frozen: Frozen, trained: Tensor, ends: list[int]) -> Tensor:
    """One group after the other. On the CPU, as torch's kernel there; each of many rows is gathered in its turn."""
    if tokens is not None and (inputs.device.type not in _LOOPED_DEVICES or tokens.shape[0] <= _GATHERED_ROWS):
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
    is_looped = left.device.type in _LOOPED_DEVICES
    has_kernel = not is_looped and left.shape[0] > 0 and _has_kernel(left, right)
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


def _few_rows(has_kernel: bool, num_groups: int) -> int:
    """Up to how many rows an accelerator does more than it has to rather than have the host wait."""
    # Without a kernel their matrices are gathered, which are not to take more than half of what the groups' take.
    return _FEW_ROWS if has_kernel else num_groups // 2


def _has_kernel(left: Tensor, *rights: Tensor) -> bool:
    """True if `torch.nn.functional.grouped_mm` has a kernel for these operands."""
    device = left.device
    if device.type in _LOOPED_DEVICES:
        if left.dtype not in _GROUPED_MM_DTYPES:
            return False
    elif not has_fast_kernel(device, left.dtype) or any(
        own.dim() == 3 and own.shape[0] > _KERNEL_GROUPS for own in rights
    ):
        return False
    sizes = (left.shape[-1], *(size for right in rights for size in right.shape[-2 if right.dim() == 3 else -1 :]))
    if any(size * left.element_size() % _GROUPED_MM_ALIGNMENT for size in sizes):
        return False
    # In a graph that is being compiled, tensors have no addresses.
    return torch.compiler.is_compiling() or all(own.data_ptr() % _GROUPED_MM_ALIGNMENT == 0 for own in (left, *rights))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def has_fast_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """True if `torch.nn.functional.grouped_mm` is one kernel on a device; elsewhere it is a loop of the host.

    It is tried, once for each device and dtype, and torch says whether the host had to wait.
    """
    return device.type == "cuda" and _runs_without_waiting(device, dtype)


@cache
def _runs_without_waiting(device: torch.device, dtype: torch.dtype) -> bool:
    # Twice: the first time, another thread may have waited for something else.
    return any(_try_kernel(device, dtype) for _ in range(2))


def _try_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    try:
        mode = torch.cuda.get_sync_debug_mode()
    except (AssertionError, AttributeError):
        return False  # a build without CUDA, whose tensors are there in name only
    try:
        rows, matrix = (
            torch.zeros(16, 16, dtype=dtype, device=device),
            torch.zeros(1, 16, 16, dtype=dtype, device=device),
        )
        ends = torch.full((1,), 16, dtype=torch.int32, device=device)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            torch.nn.functional.grouped_mm(rows, matrix, offs=ends)
    except RuntimeError:
        return False
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return not any("called a synchronizing" in str(warning.message) for warning in found)


def _non_empty_groups(ends: list[int]) -> tuple[list[int], list[int]]:
    """The groups that have rows, and how many each has."""
    sizes = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    groups = [group for group, size in enumerate(sizes) if size]
    return groups, [sizes[group] for group in groups]


def _grouped_mm_op(
    inputs: Tensor, tokens: Tensor | None, frozen: Tensor, trained: Tensor, ends: Tensor, is_flipped: bool
) -> Tensor:
    return grouped_mm(inputs, tokens, frozen, trained, ends, ends.tolist(), is_flipped)


def _few_rows_mm_op(
    inputs: Tensor, tokens: Tensor | None, frozen: Tensor, trained: Tensor, ends: Tensor, is_flipped: bool
) -> Tensor:
    if is_flipped:
        frozen, trained = frozen.transpose(1, 2), trained.transpose(1, 2)
    return _few_rows_mm(inputs if tokens is None else inputs.index_select(0, tokens), frozen, trained, ends)


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
_PRODUCT = "(Tensor inputs, Tensor? tokens, Tensor frozen, Tensor trained, Tensor ends, bool is_flipped) -> Tensor"
# What may wait for the host cannot be captured in a CUDA graph: inductor leaves what has the tag outside.
_WAITING = (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)
_LIBRARY.define(f"few_rows_mm{_PRODUCT}", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.define(f"grouped_mm{_PRODUCT}", tags=_WAITING)
_LIBRARY.define("grouped_outer(Tensor left, Tensor right, Tensor bounds) -> Tensor", tags=_WAITING)
for _name, _operator, _meta in (
    ("few_rows_mm", _few_rows_mm_op, _grouped_mm_meta),
    ("grouped_mm", _grouped_mm_op, _grouped_mm_meta),
    ("grouped_outer", _grouped_outer_op, _grouped_outer_meta),
):
    _LIBRARY.impl(_name, _operator, "CompositeExplicitAutograd")
    _LIBRARY.impl(_name, _meta, "Meta")
