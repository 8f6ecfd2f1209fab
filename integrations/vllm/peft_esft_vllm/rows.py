"""An adapter's effective rows, in the layout of the kernels in use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .adapter_file import ExpertChange, read_adapter
from .internals import RoutedExperts, plain_shapes, to_kernel
from .settings import layer_number


WEIGHTS = ("w13_weight", "w2_weight")


@dataclass(frozen=True)
class KernelRows:
    """The effective rows of one layer's changed experts, ready to be copied into its weights.

    Attributes:
        expert_ids: `[n]`, int64.
        weights: rows of `w13_weight` and of `w2_weight`, `[n, ...]`, on the CPU.
    """

    expert_ids: Tensor
    weights: tuple[Tensor, Tensor]


class Layout:
    """Where a kernel keeps each weight of an expert.

    All layouts of unquantised weights are permutations, with zeros as padding. This class learns the permutation by
    converting the digits of each weight's number. So the base's rows are read from the weights in use, under tensor
    parallelism too, whatever the checkpoint calls them.
    """

    def __init__(self, layer: RoutedExperts) -> None:
        self.shapes = plain_shapes(layer)
        numbers = [torch.arange(1, rows * columns + 1).reshape(1, rows, columns) for rows, columns in self.shapes]
        dtype = layer.w13_weight.dtype  # half-precision numbers are exact up to 255
        digits = [to_kernel(layer, *((n >> 8 * d & 255).to(dtype) for n in numbers)) for d in range(4)]
        self._places = []
        for which, number in enumerate(numbers):
            kept = sum(digits[d][which].flatten().long() << 8 * d for d in range(4))
            place = torch.empty(number.numel() + 1, dtype=torch.int64).scatter_(0, kept, torch.arange(kept.numel()))
            self._places.append(place[1:])  # place 0 was padding's

    def read(self, layer: RoutedExperts, expert_ids: Tensor) -> list[Tensor]:
        """Plain rows of some experts: `[n, 2I, H]` (gate before up) and `[n, H, I]`, this rank's part."""
        kept = [getattr(layer, name).data[expert_ids].flatten(1).cpu() for name in WEIGHTS]
        return [kept[k][:, place].reshape(-1, *self.shapes[k]) for k, place in enumerate(self._places)]


_layouts: dict[object, Layout] = {}
"""By what the weights look like: the layers of a model share one."""


def kernel_rows(layers: dict[str, RoutedExperts], folder: Path) -> dict[str, KernelRows]:
    """Reads an adapter and gives its effective rows by layer name.

    Args:
        layers: the model's routed experts by layer name, with the base's weights in them.
        folder: the adapter.

    Raises:
        ValueError: if the adapter does not fit the model, and what `read_adapter` raises.
    """
    by_number = {layer_number(name): name for name in layers}
    found = {}
    for path, change in read_adapter(folder):
        name = path if path in layers else by_number.get(layer_number(path), "")
        if name not in layers or len(by_number) != len(layers):
            raise ValueError(
                f"{folder} changes {path}, but vLLM's model has experts in {', '.join(list(layers)[:3])}, …"
            )
        found[name] = _kernel_rows(layers[name], change, f"{folder}: {path}")
    return found


def _kernel_rows(layer: RoutedExperts, change: ExpertChange, where: str) -> KernelRows:
    """Adds deltas to the base's rows in fp32 and rounds once, as the library does."""
    parallel, (_, (hidden, inner)) = layer.moe_config.moe_parallel_config, plain_shapes(layer)
    expected, last = (hidden, inner * parallel.tp_size), layer.global_num_experts - 1
    if tuple(change.down.shape[1:]) != expected or not all(0 <= i <= last for i in change.expert_ids):
        raise ValueError(
            f"{where} has experts {change.expert_ids} of shape {tuple(change.down.shape[1:])}; the model has ids 0 to "
            f"{last} and shape {expected}. Is it an adapter of another base?"
        )
    key = (plain_shapes(layer), layer.w13_weight.dtype, *(getattr(layer, name).shape[1:] for name in WEIGHTS))
    if key not in _layouts:
        _layouts[key] = Layout(layer)
    ids = torch.tensor(change.expert_ids)
    begin = parallel.tp_rank * inner
    gate_up = torch.cat([half.narrow(1, begin, inner) for half in change.gate_up.chunk(2, 1)], 1)
    changes, base = [gate_up, change.down.narrow(2, begin, inner)], _layouts[key].read(layer, ids)
    if not change.is_effective:
        changes = [old.float() + new.float() for old, new in zip(base, changes, strict=True)]
    return KernelRows(ids, to_kernel(layer, *(rows.to(layer.w13_weight.dtype) for rows in changes)))
