"""Combines, freezes and scales adapters of a model: operations that PEFT does not require of a tuner."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..moe.containers import find_experts
from ..moe.weights import expert_index
from .combination import (
    CombinationType,
    MajoritySignMethod,
    check_combinable,
    check_combination,
    check_factors,
    combine_deltas,
    combined_config,
)
from .config import ESFTConfig
from .layers.expert_parallel import ExpertParallelExperts
from .layers.layer import ESFTLayer
from .layers.modes import plain_modes
from .preparation import resolve_config
from .restoring import restoring


class AdapterOperations(BaseTuner):
    """Combining, freezing and scaling. `model.ESFTModel` adds what PEFT calls."""

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: CombinationType = "linear",
        density: float | None = None,
        majority_sign_method: MajoritySignMethod = "total",
    ) -> None:
        """Adds an adapter that combines others, over the union of their experts; it is neither active nor trained.

        Deltas add, so "linear" is exact, whatever the ranks: with weights 1 it equals several active adapters. The new
        adapter's deltas are of full rank.

        Args:
            adapters (`list[str]`): Names of the adapters to combine.
            weights (`list[float]`): A weight for each adapter; a negative weight subtracts its change.
            adapter_name (`str`): Name of the new adapter.
            combination_type (`str`): `"linear"`, `"ties"`, `"dare_linear"`, `"dare_ties"` or `"magnitude_prune"`, see
                `combination.combine_deltas`.
            density (`float`, *optional*): Share of the entries that pruning keeps; for all types but `"linear"`.
            majority_sign_method (`str`): `"total"` or `"frequency"`; for `"ties"` and `"dare_ties"`.

        Raises:
            ValueError: if an adapter does not exist or has `modules_to_save`, or the settings do not fit, or the name
                is taken.
        """
        check_combination(adapters, weights, combination_type, density, majority_sign_method)
        self._check_known(adapters)
        configs: list[Any] = [self.peft_config[name] for name in adapters]
        check_combinable(dict(zip(adapters, configs, strict=True)))
        if adapter_name in self.peft_config:
            raise ValueError(f"there already is an adapter {adapter_name!r}; choose another name")
        layers = [layer for layer in self._layers() if layer.adapters_here(adapters)]
        if any(isinstance(layer, ExpertParallelExperts) for layer in layers):
            raise NotImplementedError(
                "adapters cannot be combined under expert parallelism; combine them in a single process"
            )
        experts = {place.path for c in find_experts(self.model).values() for place in c.places[:1]}
        target_experts = {
            layer.path: layer.union_of_experts(layer.adapters_here(adapters))
            for layer in layers
            if layer.path in experts
        }
        by_name = dict(zip(adapters, weights, strict=True))
        config = combined_config(configs, by_name, target_experts, combination_type, density)
        with restoring(self):
            self.peft_config[adapter_name] = config
            self.inject_adapter(self.model, adapter_name)
            for layer in layers:
                _combine(layer, adapter_name, by_name, combination_type, density, majority_sign_method)

    def freeze_adapter(self, adapter_name: str) -> None:
        """Turns an adapter into one for inference, which holds its effective rows instead of deltas.

        In the base's dtype these take half or a third of the memory, and the outputs stay the same bit for bit. The
        adapter cannot be trained any more; it is saved in the form `"rows"`.

        Args:
            adapter_name (`str`): Name of the adapter.

        Raises:
            ValueError: if there is no such adapter, or one is merged.
        """
        layers = self._layers_of(adapter_name)
        if any(layer.merged for layer in layers):
            raise ValueError(
                "an adapter is merged, so the base's own rows are not available; call unmerge_adapter first"
            )
        with restoring(self, modules=_own_modules(layers)):
            self.freeze_layers(adapter_name)

    def freeze_layers(self, adapter_name: str) -> None:
        """`freeze_adapter` that cannot be undone: each layer's deltas are freed at once."""
        for layer in self._layers_of(adapter_name):
            layer.freeze_adapter(adapter_name)
        # The ranks are of no meaning to rows, and refused beside them when the config is read.
        fields = {"storage": "rows", "inference_mode": True, "rank": None, "alpha": None, "use_rslora": False}
        vars(self.peft_config[adapter_name]).update(fields)  # all at once

    def rows_nbytes(self, peft_config: ESFTConfig) -> int:
        """Bytes of the effective rows that an adapter would have in this model."""
        return resolve_config(peft_config, self.model).nbytes

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Multiplies an adapter's deltas by `scale` from now on; 1 is how it was trained.

        Args:
            adapter_name (`str`): Name of the adapter.
            scale (`float`): The factor. It is not saved.

        Raises:
            ValueError: if there is no such adapter, it is merged, or the factor is not a finite number.
        """
        check_factors([scale])
        layers = self._layers_of(adapter_name)
        with restoring(self, modules=_own_modules(layers)):
            for layer in layers:
                layer.set_scale(adapter_name, scale)

    def _layers_of(self, adapter_name: str) -> list[ESFTLayer]:
        """The layers of an adapter that may be changed.

        Raises:
            ValueError: if there is no such adapter, or it is merged.
        """
        layers = [layer for layer in self._layers() if adapter_name in layer.adapters]
        if not layers:
            raise ValueError(f"there is no adapter {adapter_name!r}; there are {sorted(self.peft_config)}")
        if any(adapter_name in layer.merged_adapters for layer in layers):
            raise ValueError(f"adapter {adapter_name!r} is merged; call unmerge_adapter before you change it")
        return layers

    def _check_known(self, adapter_names: list[str], purpose: str = "") -> None:
        unknown = [name for name in adapter_names if name not in self.peft_config]
        if unknown:
            raise ValueError(f"there are no adapters {unknown}{purpose}; there are {sorted(self.peft_config)}")

    def _layers(self) -> list[ESFTLayer]:
        return [module for module in self._modules_with_adapters() if isinstance(module, ESFTLayer)]

    def _modules_with_adapters(self) -> list[Any]:
        return list(_outermost(self.model))


def _outermost(module: nn.Module) -> Iterator[nn.Module]:
    """The layers and PEFT's wrappers in a module, without a look into them."""
    for child in module.children():
        if isinstance(child, ESFTLayer | AuxiliaryTrainingWrapper):
            yield child
        else:
            yield from _outermost(child)


def _own_modules(layers: Sequence[ESFTLayer]) -> list[nn.Module]:
    """The layers and what is in them, but for the base's modules."""
    children = (child for layer in layers for name, child in layer.named_children() if name != "base_layer")
    return [*layers, *children]


@plain_modes()
def _combine(
    layer: ESFTLayer,
    adapter_name: str,
    weights: Mapping[str, float],
    combination_type: CombinationType,
    density: float | None,
    majority_sign_method: MajoritySignMethod,
) -> None:
    """Sets the deltas of an adapter of full rank to a combination of others, see `combination.combine_deltas`."""
    ids = layer.adapters[adapter_name].expert_ids
    names = layer.adapters_here(list(weights))
    for weight_name in layer.weights:
        (target,) = layer.delta_parameters(weight_name, adapter_name)
        deltas, factors = [], []
        for name in names:
            with layer.onloaded([name]):
                delta = layer.get_delta_weight(name, weight_name)
            if delta is not None:
                places = expert_index([ids.index(e) for e in layer.adapters[name].expert_ids], delta.device)
                deltas.append((places, delta.to(target.dtype)))
                factors.append(weights[name])
        if deltas:
            target.copy_(combine_deltas(deltas, factors, len(ids), combination_type, density, majority_sign_method))
