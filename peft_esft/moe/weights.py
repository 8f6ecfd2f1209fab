"""Reads, writes and replaces the rows of experts' weights, in all the ways that containers store them.

A weight is seen as one tensor `[E, ...]`, where row `e` is the weight of expert `e`. It is stored in one parameter for
all experts (`StackedWeight`), in parameters of each expert's module (`ListedWeight`), or in few bits (`StoredWeight`).
All have the same methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..ops.frozen_store import Frozen
from .stored_rows import STORED, StoredRows


StackedForm = Literal["stacked", "flat", "single"]


def expert_index(expert_ids: Sequence[int], device: torch.device) -> Tensor:
    """Expert ids as an int64 tensor `[n]`."""
    return torch.tensor(list(expert_ids), dtype=torch.int64).to(device, non_blocking=True)


def is_spread(tensor: Tensor) -> bool:
    """True if each process holds a part of a tensor: under FSDP2, expert or tensor parallelism, or ZeRO-3."""
    return isinstance(tensor, DTensor) or hasattr(tensor, "ds_id")  # what DeepSpeed marks its parameters with


def whole_shape(tensor: Any) -> tuple[int, ...]:
    """The shape of a tensor with the parts of all processes."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


@dataclass(frozen=True)
class StackedWeight:
    """A weight of all experts in one parameter.

    Attributes:
        name: what the weight is called in adapter files.
        parameter: the parameter's path below the container's module.
        num_experts: number of experts, `E`.
        form: "stacked" for `[E, ...]`, where rows beyond `E` belong to no expert; "flat" for `[E * rows, ...]`, the
            blocks of the experts one after another; "single" for the weight of a module that is seen as one expert.
    """

    name: str
    parameter: str
    num_experts: int
    form: StackedForm = "stacked"

    def parameters(self, module: nn.Module) -> list[nn.Parameter]:
        """The parameters that hold the weight."""
        return [attrgetter(self.parameter)(module)]

    def named_parameters(self, module: nn.Module) -> list[tuple[str, nn.Parameter]]:
        """The parameters that hold the weight, with their paths below the module."""
        return [(self.parameter, parameter) for parameter in self.parameters(module)]

    def whole(self, module: nn.Module) -> Frozen:
        """The weight of all experts, `[E, ...]`, a view of the parameter."""
        return self._view(self.parameters(module)[0])

    def shape(self, module: nn.Module) -> tuple[int, ...]:
        """The shape of one expert's weight."""
        shape = whole_shape(self.parameters(module)[0])
        if self.form == "flat":
            return (shape[0] // self.num_experts, *shape[1:])
        return shape if self.form == "single" else shape[1:]

    def dtype(self, module: nn.Module) -> torch.dtype:
        """The dtype of the rows."""
        return self.parameters(module)[0].dtype

    def rows(self, module: nn.Module, expert_ids: Sequence[int]) -> list[Tensor]:
        """The rows `[...]` of some experts: views of the parameter, or copies if a row is in several parameters."""
        weight = self.whole(module)
        return [weight[expert] for expert in expert_ids]

    def read(self, module: nn.Module, expert_ids: Sequence[int], index: Tensor | None = None) -> Tensor:
        """A copy of the rows of some experts, `[n, ...]`.

        Args:
            module: the container's.
            expert_ids: which experts.
            index: the same as int64 `[n]`, where the caller has it; on the parameter's device nothing waits for it.
        """
        weight = self.whole(module)
        return weight.index_select(0, _index(expert_ids, index, weight.device))

    def write(self, module: nn.Module, expert_ids: Sequence[int], rows: Tensor) -> None:
        """Writes the rows `[n, ...]` of some experts, casting them to the parameter's dtype."""
        weight = self._view(self.parameters(module)[0].data)
        if weight.device.type != "cpu":
            weight.index_copy_(0, expert_index(expert_ids, weight.device), rows.to(weight.dtype))
            return
        # One by one: `index_copy_` takes several times as long on the CPU.
        for expert, row in zip(expert_ids, rows, strict=True):
            weight[expert].copy_(row)

    def substitutes(
        self, module: nn.Module, expert_ids: Sequence[int], rows: Tensor, index: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The tensors with new rows that `torch.func.functional_call` uses in place of the parameters, by path.

        The arguments are those of `read`.
        """
        if self.form == "single":
            return {self.parameter: rows[0]}
        parameter = self.parameters(module)[0]
        index = _index(expert_ids, index, parameter.device)
        if self.form == "flat":
            return {self.parameter: self._view(parameter).index_copy(0, index, rows).flatten(0, 1)}
        return {self.parameter: parameter.index_copy(0, index, rows)}

    def _view(self, parameter: Tensor) -> Tensor:
        if self.form == "flat":
            return parameter.unflatten(0, (self.num_experts, -1))
        return parameter[None] if self.form == "single" else parameter[: self.num_experts]


@dataclass(frozen=True)
class StoredWeight(StackedWeight):
    """A weight of all experts that is kept in few bits, in a `StoredRows`."""

    def stored(self, module: nn.Module) -> StoredRows:
        """The module that holds the weight."""
        return module.get_submodule(STORED[self.parameter])  # type: ignore[return-value]

    def named_parameters(self, module: nn.Module) -> list[tuple[str, nn.Parameter]]:
        own = self.stored(module).named_parameters()
        return [(f"{STORED[self.parameter]}.{name}", parameter) for name, parameter in own]

    def parameters(self, module: nn.Module) -> list[nn.Parameter]:
        return [parameter for _, parameter in self.named_parameters(module)]

    def whole(self, module: nn.Module) -> Frozen:
        store: Frozen = self.stored(module)()
        return store

    def shape(self, module: nn.Module) -> tuple[int, ...]:
        return tuple(self.stored(module).shape[1:])

    def dtype(self, module: nn.Module) -> torch.dtype:
        return self.stored(module).dtype

    def write(self, module: nn.Module, expert_ids: Sequence[int], rows: Tensor) -> None:
        self.stored(module).write(expert_ids, rows)

    def substitutes(
        self, module: nn.Module, expert_ids: Sequence[int], rows: Tensor, index: Tensor | None = None
    ) -> dict[str, Tensor]:
        raise NotImplementedError("a weight in few bits cannot be substituted, because it is not a parameter")


@dataclass(frozen=True)
class ListedWeight:
    """A weight of experts that are modules of their own. It has the methods of `StackedWeight`.

    Attributes:
        name: what the weight is called in adapter files, the same as in the fused form of the model.
        parts: paths of parameters below each expert; their rows are joined on the first dimension.
        experts: names of the experts' modules below the container, in the order of their ids.
    """

    name: str
    parts: tuple[str, ...]
    experts: tuple[str, ...]

    def expert_modules(self, module: Any) -> list[nn.Module]:
        """The experts, in the order of their ids."""
        return [module._modules[name] for name in self.experts]

    def parameters(self, module: nn.Module) -> list[nn.Parameter]:
        return [parameter for _, parameter in self.named_parameters(module)]

    def named_parameters(self, module: nn.Module) -> list[tuple[str, nn.Parameter]]:
        experts = zip(self.experts, self.expert_modules(module), strict=True)
        return [(f"{name}.{part}", attrgetter(part)(expert)) for name, expert in experts for part in self.parts]

    def shape(self, module: nn.Module) -> tuple[int, ...]:
        parts = self._parts(module, 0)
        return (sum(part.shape[0] for part in parts), *parts[0].shape[1:])

    def dtype(self, module: nn.Module) -> torch.dtype:
        return self._parts(module, 0)[0].dtype

    def rows(self, module: nn.Module, expert_ids: Sequence[int]) -> list[Tensor]:
        return [torch.cat(parts) if len(parts := self._parts(module, e)) > 1 else parts[0] for e in expert_ids]

    def read(self, module: nn.Module, expert_ids: Sequence[int], index: Tensor | None = None) -> Tensor:
        return torch.stack(self.rows(module, expert_ids))

    def write(self, module: nn.Module, expert_ids: Sequence[int], rows: Tensor) -> None:
        for expert, row in zip(expert_ids, rows, strict=True):
            parts = self._parts(module, expert)
            for part, values in zip(parts, row.split([part.shape[0] for part in parts]), strict=True):
                part.data.copy_(values)

    def substitutes(
        self, module: nn.Module, expert_ids: Sequence[int], rows: Tensor, index: Tensor | None = None
    ) -> dict[str, Tensor]:
        return {
            f"{self.experts[expert]}.{path}": values
            for expert, row in zip(expert_ids, rows, strict=True)
            for path, values in self.substitutes_of_expert(module, expert, row).items()
        }

    def substitutes_of_expert(self, module: nn.Module, expert_id: int, row: Tensor) -> dict[str, Tensor]:
        """The substitutes for one expert and its row `[...]`, by path below the expert."""
        sizes = [part.shape[0] for part in self._parts(module, expert_id)]
        return dict(zip(self.parts, row.split(sizes), strict=True))

    def _parts(self, module: Any, expert_id: int) -> list[Tensor]:
        expert = module._modules[self.experts[expert_id]]
        return [attrgetter(part)(expert) for part in self.parts]


ExpertWeight = StackedWeight | ListedWeight


def fused_weights(module: Any, has_gate: bool, has_bias: bool) -> tuple[StackedWeight, ...]:
    """The weights of fused experts: up projection, down projection and their biases."""
    up_proj = "gate_up_proj" if has_gate else "up_proj"
    names = [up_proj, "down_proj"]
    if has_bias:
        names += [f"{up_proj}_bias", "down_proj_bias"]
    stored = {name: module._modules[own] for name, own in STORED.items() if name in names and own in module._modules}
    num_experts = whole_shape(stored.get("down_proj") or module.down_proj)[0]
    return tuple((StoredWeight if name in stored else StackedWeight)(name, name, num_experts) for name in names)


def _index(expert_ids: Sequence[int], index: Tensor | None, device: torch.device) -> Tensor:
    return expert_index(expert_ids, device) if index is None else index.to(device, non_blocking=True)
