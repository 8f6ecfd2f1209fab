"""`ESFTModel`: config and containers to layers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, onload_layer, set_adapter
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .adapter_tensors import PREFIX
from .combination import CombinationType, MajoritySignMethod, check_combinable, check_combination, combined_config
from .config import ESFTConfig
from .containers import ContainerKind, find_experts
from .expert_parallel import Exchange, ExpertParallelExperts, rows_from_file, rows_to_file, shares_out_experts
from .fused import FusedExperts
from .layer import ESFTLayer
from .listed import ListedExperts
from .mixed_batch import calling_with, check_adapter_names
from .preparation import check_layers, prepare_config
from .resident import planning
from .substituted import SubstitutedExperts
from .targets import match_options, modules_trained_whole, resolve_target_experts
from .tied import TiedLayer
from .undo import undoing_changes, undoing_injection, undoing_merges, undoing_unloading
from .untrained import warn_of_shared_config, warn_of_unreached_experts


LAYER_CLASSES: dict[ContainerKind, type[ESFTLayer]] = {
    "fused": FusedExperts,
    "listed": ListedExperts,
    "stacked": SubstitutedExperts,
    "module": SubstitutedExperts,
}
"""The layer for each kind of container."""


class ESFTModel(BaseTuner):
    """Expert-Specialized Fine-Tuning (arXiv 2407.01906) of a mixture-of-experts model.

    PEFT makes it: `get_peft_model` and `PeftModel.from_pretrained` put it between the `PeftModel` and the base.

    Attributes:
        model (torch.nn.Module): the base, its experts containers wrapped.
        peft_config (dict[str, ESFTConfig]): the config of each adapter.

    Example:
        >>> import peft_esft
        >>> from peft import get_peft_model
        >>> from peft_esft import ESFTConfig

        >>> config = ESFTConfig(target_experts={0: [3, 7], 1: [12]}, task_type="CAUSAL_LM")
        >>> model = get_peft_model(model, config)
    """

    prefix: str = PREFIX
    _with_adapters: list[nn.Module] | None = None
    tuner_layer_cls = ESFTLayer
    target_module_mapping: dict[str, list[str]] = {}

    def _prepare_adapter_config(self, peft_config: ESFTConfig, model_config: dict[str, Any]) -> ESFTConfig:
        """Resolves and checks the config against the model, see `preparation.prepare_config`."""
        prepared = prepare_config(peft_config, self.model)
        self._containers = prepared.containers
        names = [name for name, config in self.peft_config.items() if config is peft_config]
        if len(names) > 1:
            warn_of_shared_config(self._layers(), names)
        peft_config.target_experts = prepared.target_experts
        # Read by `_check_target_module_exists`, which PEFT hands no model. Not a field, so it is not saved.
        peft_config.adapted_paths = prepared.selection
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: ESFTConfig, key: str) -> Any:
        return key in peft_config.adapted_paths and match_options(peft_config, key)

    def _create_and_replace(
        self,
        peft_config: ESFTConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        expert_ids = peft_config.adapted_paths.get(current_key)
        if expert_ids is None:
            raise ValueError(f"the state dict has weights for {current_key}, which target_experts does not name")
        if isinstance(target, ESFTLayer):
            target.update_layer(adapter_name, expert_ids, peft_config)
            return
        container = self._containers[current_key]
        layer_class = ExpertParallelExperts if shares_out_experts(container) else LAYER_CLASSES[container.kind]
        new_module = layer_class(target, adapter_name, container, expert_ids, peft_config)
        if isinstance(new_module, ExpertParallelExperts):
            new_module.exchange = Exchange.of_model(self.model)
        if adapter_name not in self.active_adapters:
            # adding an additional adapter: it is not automatically trainable
            new_module.requires_grad_(False)
        self._replace_module(parent, target_name, new_module, target)
        for place in container.places[1:]:
            setattr(place.parent, place.path.rpartition(".")[2], TiedLayer(place.module, new_module))

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # The deltas are created on the device of the rows they change; PEFT's own moves things to `child.weight`.
        setattr(parent, child_name, new_module)
        self.forget_modules()

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for layer in self._layers():
            layer.restore_stored_dtypes(adapter_name)
        if not autocast_adapter_dtype:
            for layer in self._layers():
                layer.cast_to_base_dtype(adapter_name)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT's hook for `model(..., adapter_names=[...])`: each sample of the batch has an adapter of its own.

        Raises:
            ValueError: in training, for unknown names or another number of them than of samples, for merged adapters,
                or if a layer cannot tell the samples apart.
        """
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        with planning:
            check_adapter_names(adapter_names, list(self.peft_config), [*args, *kwargs.values()])
            layers = self._layers()
            if any(layer.merged for layer in layers):
                raise ValueError(
                    "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
                )
            for layer in layers:
                layer.check_mixes()
            different = list(dict.fromkeys(adapter_names))
            plans = {layer: layer.plan_mixed(different) for layer in layers}
        with calling_with(self.model, adapter_names, kwargs, plans):
            yield

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
            weights (`list[float]`): A weight for each; negative ones take an adapter's change away.
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
        experts = {place.path for c in find_experts(self.model).values() for place in c.places[:1]}
        target_experts = {
            layer.path: layer.union_of_experts(layer.adapters_here(adapters))
            for layer in layers
            if layer.path in experts
        }
        by_name = dict(zip(adapters, weights, strict=True))
        config = combined_config(configs, by_name, target_experts, combination_type, density)
        with undoing_injection(self, adapter_name):
            self.peft_config[adapter_name] = config
            self.inject_adapter(self.model, adapter_name)
            for layer in layers:
                layer.combine(adapters, weights, adapter_name, combination_type, density, majority_sign_method)

    def freeze_adapter(self, adapter_name: str) -> None:
        """Turns an adapter into one for inference, which holds its effective rows in place of deltas.

        In the base's dtype these take half or a third of the memory, and the outputs stay the same bit for bit. The
        adapter cannot be trained any more; it is saved in the form `"rows"`.

        Args:
            adapter_name (`str`): Name of the adapter.

        Raises:
            ValueError: if there is no such adapter, or one is merged.
        """
        with undoing_changes(self._layers_of(adapter_name), adapter_name):
            self.freeze_layers(adapter_name)

    def freeze_layers(self, adapter_name: str) -> None:
        """`freeze_adapter`, letting go of each layer's deltas at once: for who deletes the adapter after an error."""
        layers = self._layers_of(adapter_name)
        if any(layer.merged for layer in layers):
            raise ValueError("an adapter is merged, so the base's rows are not known; call unmerge_adapter first")
        # The ranks are of no meaning to rows, and refused beside them when the config is read.
        fields = {"storage": "rows", "inference_mode": True, "rank": None, "alpha": None, "use_rslora": False}
        for layer in layers:
            layer.freeze_adapter(adapter_name)
        vars(self.peft_config[adapter_name]).update(fields)  # all at once

    def rows_nbytes(self, peft_config: ESFTConfig) -> int:
        """Bytes of the effective rows of an adapter over this model, which need not have it."""
        containers = find_experts(self.model)
        selection = resolve_target_experts(peft_config.target_experts or {}, containers)
        whole = modules_trained_whole(self.model, peft_config)
        of_experts = sum(len(ids) * containers[path].nbytes_per_expert for path, ids in selection.items())
        return of_experts + sum(container.nbytes_per_expert for container in whole.values())

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Multiplies an adapter's deltas by `scale` from now on; 1 is how it was trained.

        Args:
            adapter_name (`str`): Name of the adapter.
            scale (`float`): The factor. It is not saved.

        Raises:
            ValueError: if there is no such adapter, or it is merged.
        """
        layers = self._layers_of(adapter_name)
        with undoing_changes(layers, adapter_name):
            for layer in layers:
                layer.set_scale(adapter_name, scale)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Sets the active adapters, see `peft.tuners.tuners_utils.BaseTuner.set_adapter`."""
        merged = [layer for layer in self._layers() if layer.merged]
        if merged:
            warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=2)
        with undoing_merges(merged):
            for layer in merged:
                with onload_layer(layer):
                    layer.unmerge()
        # As PEFT's own does, but on the modules that have adapters: that walks through all modules, twice.
        for module in self._modules_with_adapters():
            if isinstance(module, ESFTLayer):
                module.set_adapter(adapter_name, inference_mode=inference_mode)
            else:
                set_adapter(module, adapter_name, inference_mode, layer_cls=ESFTLayer)
        self.active_adapter = adapter_name

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter, see `peft.tuners.tuners_utils.BaseTuner.delete_adapter`.

        If it was the only active one another takes its place, the same in all layers: PEFT has each layer choose among
        those that it has.
        """
        layers = self._layers()
        is_deletable = adapter_name in self.peft_config and not any(
            adapter_name in layer.merged_adapters for layer in layers
        )
        if is_deletable and adapter_name in self.active_adapters:
            active = [name for name in self.active_adapters if name != adapter_name]
            if not active:
                active = sorted(name for name in self.peft_config if name != adapter_name)[:1]
                warnings.warn(
                    f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to "
                    f"{', '.join(active) or 'none'}.",
                    stacklevel=2,
                )
            for_inference = all(self.peft_config[name].inference_mode for name in active)
            for layer in layers:
                layer.set_adapter(active, inference_mode=for_inference)
        super().delete_adapter(adapter_name)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Adds an adapter, see `peft.tuners.tuners_utils.BaseTuner.inject_adapter`.

        If that fails or is interrupted in the middle the model is what it was, without the adapter's config.
        """
        is_disabled = any(layer.disable_adapters for layer in self._layers())
        with undoing_injection(self, adapter_name):
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            if is_disabled:
                # Layers that are new are enabled otherwise.
                for module in self._modules_with_adapters():
                    module.enable_adapters(False)
        self._containers = {}
        self.forget_modules()  # PEFT puts its own wrappers around other modules next

    def forget_modules(self) -> None:
        """To be called when layers were put into the model or taken out."""
        self._with_adapters = None

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merges adapters into the base, see `peft.tuners.tuners_utils.BaseTuner.merge_adapter`.

        With `safe_merge`, all layers are checked before the first one is changed. If the merge fails or is interrupted
        in the middle, no layer is changed.

        Raises:
            ValueError: if there is no adapter of one of the names, or with `safe_merge` a merged row is not finite.
        """
        self._check_known(adapter_names or [], " to merge")
        if safe_merge:
            self._check_finite(adapter_names)
        with undoing_merges(self._layers()):
            super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def unmerge_adapter(self) -> None:
        """Unmerges all adapters, see `peft.tuners.tuners_utils.BaseTuner.unmerge_adapter`."""
        with undoing_merges(self._layers()):
            super().unmerge_adapter()

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._check_known(adapter_names or [], " to merge")
        if merge and safe_merge:
            self._check_finite(adapter_names)
        with undoing_unloading(self.model, self._layers()):
            model = super()._unload_and_optionally_merge(
                merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
            )
        self.forget_modules()
        return model

    def _get_tied_target_modules(self, model: nn.Module) -> list[str]:
        # PEFT warns that merging breaks ties. Tied modules have one delta here, see `TiedLayer`.
        return []

    def _check_known(self, adapter_names: list[str], purpose: str = "") -> None:
        unknown = [name for name in adapter_names if name not in self.peft_config]
        if unknown:
            raise ValueError(f"there are no adapters {unknown}{purpose}; there are {sorted(self.peft_config)}")

    def _check_finite(self, adapter_names: list[str] | None) -> None:
        for layer in self._layers():
            layer.check_finite(layer.active_adapters if adapter_names is None else adapter_names)

    def _layers_of(self, adapter_name: str) -> list[ESFTLayer]:
        """The layers of an adapter that may be changed.

        Raises:
            ValueError: if there is no such adapter, or it is merged.
        """
        layers = [layer for layer in self._layers() if adapter_name in layer.expert_ids]
        if not layers:
            raise ValueError(f"there is no adapter {adapter_name!r}; there are {sorted(self.peft_config)}")
        if any(adapter_name in layer.merged_adapters for layer in layers):
            raise ValueError(f"adapter {adapter_name!r} is merged; unmerge it before it is changed")
        return layers

    def _layers(self) -> list[ESFTLayer]:
        return [module for module in self._modules_with_adapters() if isinstance(module, ESFTLayer)]

    def _modules_with_adapters(self) -> list[Any]:
        """Found once, until an adapter is added."""
        if self._with_adapters is None:
            kinds = (ESFTLayer, AuxiliaryTrainingWrapper)
            self._with_adapters = [module for module in self.model.modules() if isinstance(module, kinds)]
        return self._with_adapters

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: ESFTConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        # Called when an adapter is saved: the place where a user can still act on what training did not do.
        warn_of_unreached_experts([m for m in model.modules() if isinstance(m, ESFTLayer)], adapter_name)
        weights = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        return rows_to_file(model, adapter_name, weights)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: ESFTConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        check_layers(model, adapter_name, state_dict)
        weights = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        return rows_from_file(model, adapter_name, weights)
