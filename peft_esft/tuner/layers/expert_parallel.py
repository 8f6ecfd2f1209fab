"""Trains fused experts under transformers' expert parallelism: each process has the deltas of its own experts.

transformers gives every process of a group an equal range of each container's experts and brings the tokens to them.
The container's parameters are then distributed tensors, of which a process holds its range.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from ...moe.architectures import READABLE_DTYPES
from ...moe.containers import ExpertsContainer
from ...moe.weights import StackedWeight
from ...ops.deltas import connected
from ..config import ESFTConfig
from .fused import FusedExperts
from .layer import PREFIX
from .records import ActiveAdapters, LayerAdapter


EP_DIM = "ep"
"""The name of the dimension of transformers' mesh over which experts are shared out."""


@dataclass(frozen=True)
class LocalWeight(StackedWeight):
    """The rows of a fused weight that this process holds: `num_experts` of them."""

    def parameters(self, module: nn.Module) -> list[Any]:
        """The part of the parameter that this process holds, sharing its memory."""
        return [parameter._local_tensor for _, parameter in self.named_parameters(module)]

    def named_parameters(self, module: nn.Module) -> list[tuple[str, Any]]:
        """The parameter of all processes, with its path below the module."""
        return [(self.parameter, super().parameters(module)[0])]


@dataclass(frozen=True)
class Exchange:
    """How tokens reach the experts' owners and come back.

    Attributes:
        implementation: one of transformers' `EPImplementation` classes.
        ep_mesh: the processes that share out the experts.
        tp_mesh: the processes that see the same batch.
        num_batches: batches that differ in a step; gradients are averaged over them.
    """

    implementation: Any
    ep_mesh: DeviceMesh
    tp_mesh: DeviceMesh
    num_batches: int

    @classmethod
    def of_model(cls, model: Any) -> Exchange:
        """That of a model loaded with `distributed_config=DistributedConfig(ep_size=...)`."""
        from transformers.distributed.expert_parallel import EPImplementationInterface

        config = model.config.distributed_config
        # The meshes have no public name; without them the tokens cannot be exchanged.
        meshes = model._mesh_manager
        return cls(
            implementation=EPImplementationInterface()[config.ep_implementation],
            ep_mesh=meshes.get_mesh("ep"),
            tp_mesh=meshes.get_mesh("tp"),
            num_batches=config.dp_size,
        )


def shares_out_experts(container: ExpertsContainer) -> bool:
    """True if transformers' expert parallelism has shared out a container's experts."""
    return bool(getattr(container.module, "_is_expert_parallel", False))


def check_expert_parallel(container: ExpertsContainer) -> None:
    """Refuses what expert parallelism may combine with, but deltas cannot.

    Raises:
        NotImplementedError: naming the container.
    """
    names = [weight.name for weight in container.weights]
    parameters = [parameter for weight in container.weights for parameter in weight.parameters(container.module)]
    if container.kind != "fused" or container.num_identity_experts:
        raise NotImplementedError(
            f"{container.path} is under expert parallelism, which only plain fused experts can be"
        )
    for name, parameter in zip(names, parameters, strict=True):
        sizes = _mesh_sizes(parameter)
        if parameter.dtype not in READABLE_DTYPES:
            raise NotImplementedError(f"{container.path}.{name} has dtype {parameter.dtype}, which cannot be read")
        if EP_DIM not in sizes:
            raise NotImplementedError(
                f"{container.path}.{name} is not shared out by expert, while other weights of the container are; name "
                "all of them in ep_plan"
            )
        others = {dim: size for dim, size in sizes.items() if dim != EP_DIM and size > 1}
        if others:
            raise NotImplementedError(
                f"{container.path}.{name} is also sharded over {others}. Deltas need whole experts: choose ep_size = "
                "fsdp_size * tp_size, and dp_replicate_size = 1"
            )


def _mesh_sizes(parameter: Tensor) -> dict[str, int]:
    if not isinstance(parameter, DTensor):
        return {}
    mesh = parameter.device_mesh
    return dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=False))


class ExpertParallelExperts(FusedExperts):
    """Fused experts of which this process owns a range.

    `expert_ids` and all rows are those of this process, numbered from 0 in its range; `global_ids` are those of the
    model. A delta is a distributed tensor with the same number of rows on every process, those behind the
    last own one being zero and without gradient, so that optimizers, gradient clipping and distributed checkpoints
    work as on any other. In an adapter's file the rows are in the order of `target_experts`.
    """

    def __init__(self, base_layer: Any, adapter_name: str, container: ExpertsContainer) -> None:
        mesh: DeviceMesh = container.parameters()[0].device_mesh[EP_DIM]  # type: ignore[attr-defined]
        num_owned = container.num_experts // mesh.size()
        local = tuple(LocalWeight(weight.name, weight.parameter, num_owned) for weight in container.weights)  # type: ignore[union-attr]
        super().__init__(base_layer, adapter_name, replace(container, weights=local, num_experts=num_owned))
        # transformers marks pairs of other processes' experts with the id behind the last own one, and the weight 0.
        self.num_identity_experts = 1
        self.ep_mesh, self.num_owned = mesh, num_owned
        self.exchange: Exchange | None = None

    def _new_record(self, expert_ids: Sequence[int], config: ESFTConfig) -> LayerAdapter:
        if config.storage != "delta":
            raise NotImplementedError(
                f"{self.path} is under expert parallelism, which takes adapters stored as 'delta', not as "
                f"{config.storage!r}; load the one that it was made from"
            )
        first = self.ep_mesh.get_local_rank() * self.num_owned
        own = tuple(expert - first for expert in expert_ids if first <= expert < first + self.num_owned)
        return LayerAdapter(own, config.storage, config.scaling, global_ids=tuple(expert_ids))

    def places_of_rows(self, adapter_name: str) -> list[int]:
        """The row of the distributed delta for each row of the file."""
        counts = [0] * self.ep_mesh.size()
        places = []
        for expert in self.adapters[adapter_name].global_ids:
            owner = expert // self.num_owned
            places.append((owner, counts[owner]))
            counts[owner] += 1
        return [owner * max(counts) + place for owner, place in places]

    def to_file(self, adapter_name: str, tensor: Tensor) -> Tensor:
        """From the rows of all processes to those of the file."""
        return tensor[torch.tensor(self.places_of_rows(adapter_name), device=tensor.device)]

    def from_file(self, adapter_name: str, tensor: Tensor) -> Tensor:
        """From the rows of the file to those of all processes."""
        rows = tensor.new_zeros(self.ep_mesh.size() * self._rows_each(adapter_name), *tensor.shape[1:])
        rows[torch.tensor(self.places_of_rows(adapter_name), device=tensor.device)] = tensor
        return rows

    def get_delta_weight(self, adapter_name: str, weight_name: str) -> Tensor | None:
        """The change of a weight that an adapter makes to the own experts, `[n, ...]`; None if it makes none."""
        adapter = self.adapters[adapter_name]
        factors = [
            self._averaged(_to_local(factor))[: len(adapter.expert_ids)]
            for factor in self.delta_parameters(weight_name, adapter_name)
        ]
        if not factors:
            return None
        delta = factors[0] if len(factors) == 1 else factors[1] @ factors[0]
        return delta if adapter.factor == 1 else adapter.factor * delta

    def selected_weights(self, active: ActiveAdapters) -> tuple[dict[str, Tensor], bool]:
        """What the own selected experts' weights are in a forward pass, see `ESFTLayer.selected_weights`."""
        held = self.held_rows(active)
        if held is not None:
            return held, False
        if self._plain_deltas(active.names) is not None and active.expert_ids:
            deltas = {name: self.get_delta_weight(active.names[0], name) for name in self.weights}
            return {name: delta for name, delta in deltas.items() if delta is not None}, True
        rows = {name: self.effective_rows(name, active.names) for name in self.weights}
        # Without rows, no gradient of them.
        return {name: own if active.expert_ids else own.detach() for name, own in rows.items()}, False

    def freeze_adapter(self, adapter_name: str) -> None:
        """Refuses to hold rows in place of deltas.

        Raises:
            NotImplementedError: naming the container.
        """
        raise NotImplementedError(f"{self.path} is under expert parallelism, which takes adapters as deltas only")

    def check_mixes(self, model: nn.Module, adapters: Sequence[str]) -> None:
        """Refuses `adapter_names`.

        Raises:
            ValueError: naming the container.
        """
        raise ValueError(f"adapter_names is not supported by {self.path} under expert parallelism; call set_adapter")

    def _adapted_forward(
        self,
        base_layer: Any,
        active: ActiveAdapters,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
    ) -> Tensor:
        if self.exchange is None:
            raise RuntimeError(f"{self.path} is under expert parallelism, but does not know the model's meshes")

        def own_experts(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            output = super(ExpertParallelExperts, self)._adapted_forward(
                base_layer, active, hidden_states, top_k_index, top_k_weights
            )
            # Without own experts too, gradients of others pass through here.
            return connected(output, map(_to_local, self._deltas_of(active.names)))

        experts = SimpleNamespace(forward=own_experts, num_experts=self.num_owned, config=None)
        exchange = self.exchange.implementation(experts, self.exchange.ep_mesh, self.exchange.tp_mesh)
        hidden_states, top_k_weights = _to_local(hidden_states), _to_local(top_k_weights)
        output: Tensor = exchange(hidden_states, top_k_index, top_k_weights)
        return output.to(hidden_states.dtype)

    def _call(self, base_layer: Any, forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        # Without the module's hooks: FSDP2's wait for other processes, some of which have nothing to train here.
        return forward(*args, **kwargs)

    def _averaged(self, delta: Tensor) -> Tensor:
        """The gradient is the sum over the batches of all processes: divided by their number it is the mean's."""
        batches = 1 if self.exchange is None else self.exchange.num_batches
        if batches > 1 and delta.requires_grad:
            delta.register_hook(lambda gradient: gradient / batches)
        return delta

    def _add_delta(
        self, weight_name: str, suffix: str, adapter_name: str, shape: tuple[int, ...], *, zero: bool
    ) -> None:
        ids, each = self.adapters[adapter_name].global_ids, self._rows_each(adapter_name)
        if zero:
            # Only the own rows are ever made.
            super()._add_delta(weight_name, suffix, adapter_name, (each, *shape[1:]), zero=True)
            rows = getattr(self, f"{PREFIX}{weight_name}{suffix}").pop(adapter_name).data
        else:
            # Every process draws the rows of all, so that they are those of one process.
            super()._add_delta(weight_name, suffix, adapter_name, (len(ids), *shape[1:]), zero=False)
            drawn = getattr(self, f"{PREFIX}{weight_name}{suffix}").pop(adapter_name).data
            rows = self.from_file(adapter_name, drawn).chunk(self.ep_mesh.size())[self.ep_mesh.get_local_rank()]
        whole = DTensor.from_local(rows, self.ep_mesh, [Shard(0)], run_check=False)
        getattr(self, f"{PREFIX}{weight_name}{suffix}")[adapter_name] = nn.Parameter(whole)

    def _rows_each(self, adapter_name: str) -> int:
        """Rows of the delta on every process: as many as the process with the most experts has."""
        owners = [expert // self.num_owned for expert in self.adapters[adapter_name].global_ids]
        return max(owners.count(owner) for owner in range(self.ep_mesh.size()))


def _to_local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def rows_to_file(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Brings the deltas of an adapter into the order of its file; whole ones, distributed ones stay as they are."""
    return _reordered(model, adapter_name, state_dict, "to_file")


def rows_from_file(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Brings the deltas of an adapter from the order of its file to that of the processes."""
    return _reordered(model, adapter_name, state_dict, "from_file")


def _reordered(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    reordered = dict(state_dict)
    for path, layer in model.named_modules():
        if isinstance(layer, ExpertParallelExperts) and adapter_name in layer.adapters:
            for name in layer.adapter_layer_names:
                key = f"{path}.{name}.{adapter_name}"
                if key in state_dict and not isinstance(state_dict[key], DTensor):
                    reordered[key] = getattr(layer, how)(adapter_name, state_dict[key])
    return reordered
