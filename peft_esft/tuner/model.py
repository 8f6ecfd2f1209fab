"""Defines `ESFTModel`, the tuner that PEFT calls: it attaches, switches, merges and saves adapters."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any, cast

from peft.tuners.tuners_utils import onload_layer, set_adapter
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..moe.containers import ContainerKind
from ..moe.gguf_linears import give_gradients
from .adapter_file import DELTA_KEY, plain_key
from .config import ESFTConfig
from .fingerprint import compare_base
from .layers.expert_parallel import Exchange, ExpertParallelExperts, rows_from_file, rows_to_file, shares_out_experts
from .layers.fused import FusedExperts
from .layers.held import holding, is_holding, mixed_rows
from .layers.layer import PREFIX, ESFTLayer
from .layers.listed import ListedExperts
from .layers.merging import check_finite, check_writes_last
from .layers.records import Owner
from .layers.substituted import SubstitutedExperts
from .layers.tied import TiedLayer, update_tied_keys
from .load_checks import check_file, check_incoming, check_loader, header_of, moved_weights
from .messages import shortened
from .mixed_batch import (
    calling_with,
    check_adapter_names,
    check_mixes_whole_modules,
    refusing_adapter_names,
)
from .operations import AdapterOperations
from .precision import restore_before_training, restore_delta_dtype
from .preparation import ResolvedConfig, check_adapter_name, prepare_config
from .restoring import restoring
from .targets import match_options
from .untrained import warn_of_shared_config, warn_of_unreached_experts


adapters_lock = RLock()
"""Held while a call puts together its rows, and while an `AdapterPool` adds or drops adapters in another thread."""

LAYER_CLASSES: dict[ContainerKind, type[ESFTLayer]] = {
    "fused": FusedExperts,
    "listed": ListedExperts,
    "stacked": SubstitutedExperts,
    "module": SubstitutedExperts,
}
"""The layer for each kind of experts module."""


class ESFTModel(AdapterOperations):
    """Expert-Specialized Fine-Tuning (arXiv 2407.01906) of a mixture-of-experts model.

    PEFT makes it: `get_peft_model` and `PeftModel.from_pretrained` put it between the `PeftModel` and the base.

    Attributes:
        model (torch.nn.Module): the base, its experts modules wrapped.
        peft_config (dict[str, ESFTConfig]): the config of each adapter.

    Example:
        >>> import peft_esft
        >>> from peft import get_peft_model
        >>> from peft_esft import ESFTConfig

        >>> config = ESFTConfig(target_experts={0: [3, 7], 1: [12]}, task_type="CAUSAL_LM")
        >>> model = get_peft_model(model, config)
    """

    prefix: str = PREFIX
    tuner_layer_cls = ESFTLayer
    target_module_mapping: dict[str, list[str]] = {}
    _refusing: RemovableHandle | None = None
    _resolved: ResolvedConfig | None = None

    def _prepare_adapter_config(self, peft_config: ESFTConfig, model_config: dict[str, Any]) -> ESFTConfig:
        """Resolves and checks the config against the model, see `preparation.prepare_config`."""
        prepared = prepare_config(peft_config, self.model)
        self._resolved = prepared
        peft_config.move(prepared.prefixes)
        peft_config.target_experts = prepared.target_experts
        # Read by `_check_target_module_exists`, which PEFT hands no model. Not a field, so it is not saved.
        peft_config.adapted_paths = prepared.selection
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: ESFTConfig, key: str) -> Any:
        path = plain_key(key)
        return path in peft_config.adapted_paths and match_options(peft_config.module_options, path)

    def _create_and_replace(
        self,
        peft_config: ESFTConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        current_key = plain_key(current_key)
        expert_ids = peft_config.adapted_paths.get(current_key)
        if expert_ids is None:
            raise ValueError(f"the state dict has weights for {current_key}, which is not in target_experts")
        if isinstance(target, ESFTLayer):
            target.update_layer(adapter_name, expert_ids, peft_config)
            return
        assert self._resolved is not None
        container = self._resolved.containers[current_key]
        layer_class = ExpertParallelExperts if shares_out_experts(container) else LAYER_CLASSES[container.kind]
        new_module = layer_class(target, adapter_name, container)
        if isinstance(new_module, ExpertParallelExperts):
            new_module.exchange = Exchange.of_model(self.model)
        new_module.update_layer(adapter_name, expert_ids, peft_config)
        if adapter_name not in self.active_adapters:
            # adding an additional adapter: it is not automatically trainable
            new_module.requires_grad_(False)
        self._replace_module(parent, target_name, new_module, target)
        for place in container.places[1:]:
            setattr(place.parent, place.path.rpartition(".")[2], TiedLayer(place.module, new_module))

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # The deltas are created on the device of the rows they change; PEFT's own moves things to `child.weight`.
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for layer in self._layers():
            layer.cast_adapter(adapter_name, to_base_dtype=not autocast_adapter_dtype)

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
        with adapters_lock:
            is_counted = check_adapter_names(adapter_names, list(self.peft_config), self.model, args, kwargs)
            layers = self._layers()
            if any(layer.merged for layer in layers):
                raise ValueError(
                    "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
                )
            different = list(dict.fromkeys(adapter_names))
            if len(different) > 1:
                check_mixes_whole_modules(self.model, different)
            for layer in layers:
                layer.check_mixes(self.model, different)
            rows = {layer: mixed_rows(layer, different) for layer in layers}
        with calling_with(self.model, adapter_names, rows, is_counted):
            yield

    def train(self, mode: bool = True) -> ESFTModel:
        """Sets the mode. Before training, deltas that TRL has cast to bf16 get their dtype back.

        Raises:
            ValueError: if they have to and cannot, see `restore_delta_dtype`.
        """
        if mode:
            restore_before_training(self.model, self._layers())
        super().train(mode)
        return self

    def restore_delta_dtype(self) -> None:
        """Gives trained deltas the dtype back that they were created in, fp32 or wider.

        TRL's trainers cast them to bf16 if the base is loaded in 4 or 8 bits by bitsandbytes. In one process this is
        undone when training begins. With several, call it on each after the trainer is made, before `trainer.train()`.
        """
        restore_delta_dtype(self._layers())

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """The base model's forward, with the active adapters or with one for each sample."""
        if adapter_names is None:
            return super().forward(*args, **kwargs)
        with self._enable_peft_forward_hooks(*args, adapter_names=adapter_names, **kwargs):
            return super().forward(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's `generate`, for which the active adapters' effective weights are computed once."""
        with self.hold():
            return self.model.generate(*args, **kwargs)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Computes the active adapters' effective weights once, for all forward passes within the context.

        For decoding loops of one's own; `generate` does so by itself. Do not change weights within it: calls that ask
        for a gradient of them compute them anew, others would go on with the old ones. A switch of adapters is fine.

        Example:
            >>> with model.hold():
            ...     for _ in range(100):
            ...         logits = model(input_ids=tokens, past_key_values=cache).logits
        """
        owner = self._owner()
        with adapters_lock:
            owner.holds += 1
        try:
            if not is_holding(owner):
                # Also those that another thread holds: weights may have changed since it began.
                self._compute_held_rows()
            with holding(owner):
                yield
        finally:
            with adapters_lock:
                owner.holds -= 1
                for layer in self._layers() if not owner.holds else ():
                    layer.refresh_active()

    def _owner(self) -> Owner:
        return next((layer.owner for layer in self._layers()), Owner())

    def _compute_held_rows(self) -> None:
        with adapters_lock:
            for layer in self._layers():
                if layer.owner.holds and layer.batch() is None:
                    layer.hold()

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Sets the active adapters, see `peft.tuners.tuners_utils.BaseTuner.set_adapter`.

        Raises:
            ValueError: if there is no adapter of one of the names, or several of them have the same whole module.
        """
        self._check_known([adapter_name] if isinstance(adapter_name, str) else adapter_name)
        for module in self._modules_with_adapters():
            if isinstance(module, AuxiliaryTrainingWrapper):
                module.check_set_adapter(adapter_name)
        merged = [layer for layer in self._layers() if layer.merged]
        if merged:
            warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=2)
            with restoring(self, modules=merged):
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
        self._compute_held_rows()

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
        owner = self._owner()
        config = self.peft_config[adapter_name]
        if not any(adapter_name in layer.adapters for layer in self._layers()):
            del self.peft_config[adapter_name]  # put there for this adapter, it goes with it after an error
        with restoring(self):
            check_adapter_name(adapter_name, model)
            sharing = [name for name, other in self.peft_config.items() if other is config and name != adapter_name]
            # What is done to one adapter is noted in no other's config. One that is not shared stays the caller's.
            self.peft_config[adapter_name] = copy.deepcopy(config) if sharing else config
            self._clear_name(adapter_name)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            check_loader(model)
            for layer in self._layers():
                layer.owner = owner
            own = cast(ESFTConfig, self.peft_config[adapter_name])
            header = header_of(own)
            if header is not None:
                check_file(model, own, adapter_name, header)
            if self._resolved is not None:
                compare_base(own, model, self._resolved.experts, self._resolved.target_experts)
            if sharing:
                warn_of_shared_config(self._layers(), [*sharing, adapter_name])
            if is_disabled:
                # Layers that are new are enabled otherwise.
                for module in self._modules_with_adapters():
                    module.enable_adapters(False)
            update_tied_keys(self.model)
            give_gradients(self.model)
        self._refusing = self._refusing or refusing_adapter_names(model)
        self._resolved = None

    def _clear_name(self, adapter_name: str) -> None:
        """Removes what the modules have under a name that is used again, also by an earlier tuner around the base."""
        for module in self._modules_with_adapters():
            if isinstance(module, ESFTLayer):
                module.discard_adapter(adapter_name)
            elif adapter_name in module._adapters:
                active = [name for name in module.active_adapters if name != adapter_name]
                module.delete_adapter(adapter_name, new_active_adapters=active)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merges adapters into the base, see `peft.tuners.tuners_utils.BaseTuner.merge_adapter`.

        With `safe_merge`, all layers are checked before the first one is changed. If the merge fails or is interrupted
        in the middle, no layer is changed.

        Raises:
            ValueError: if there is no adapter of one of the names, or with `safe_merge` a merged row is not finite.
        """
        self._check_merge(adapter_names, safe_merge)
        with restoring(self, modules=self._layers()):
            super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def unmerge_adapter(self) -> None:
        """Unmerges all adapters, see `peft.tuners.tuners_utils.BaseTuner.unmerge_adapter`."""
        with restoring(self, modules=self._layers()):
            super().unmerge_adapter()

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._check_merge(adapter_names, safe_merge)
        with restoring(self):
            if not merge:
                # Without their names PEFT's wrappers give back what they are around, and not the adapter's copy of it.
                for module in self.modules():
                    if isinstance(module, AuxiliaryTrainingWrapper):
                        module._active_adapter = []
            model = super()._unload_and_optionally_merge(
                merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
            )
            update_tied_keys(self.model)
        if self._refusing is not None:
            self._refusing.remove()
        return model

    def _get_tied_target_modules(self, model: nn.Module) -> list[str]:
        # PEFT warns that merging breaks ties. Tied modules have one delta here, see `TiedLayer`.
        return []

    def _check_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        """Refuses a merge before PEFT loads offloaded layers, which an error in it would leave loaded."""
        self._check_known(adapter_names or [], " to merge")
        for layer in self._layers():
            check_writes_last(layer)
        for layer in self._layers() if safe_merge else ():
            new_names = layer.active_adapters if adapter_names is None else adapter_names
            check_finite(layer, [*layer.merged_adapters, *new_names])

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: ESFTConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        layers = {path: module for path, module in model.named_modules() if isinstance(module, ESFTLayer)}
        # Called when an adapter is saved: the place where a user can still act on what training did not do.
        warn_of_unreached_experts(list(layers.values()), adapter_name)
        # The layers say what is the adapter's. Names of adapters tell too little: a module may be called the same.
        known = {plain_key(key): tensor for key, tensor in state_dict.items()}
        own: dict[str, Tensor] = {}
        missing: list[str] = []
        for path, layer in layers.items():
            with layer.onloaded([adapter_name]):
                for name, tensor in layer.tensors_of(adapter_name).items():
                    key = plain_key(f"{path}.{name}.{adapter_name}")
                    found = known.get(key)
                    # Where accelerate keeps an adapter on the CPU or the disk, the state dict has no data of it.
                    own[key] = tensor.detach().cpu().clone() if found is None or found.is_meta else found
                    missing += [key] if found is None else []
        if missing:
            raise ValueError(f"the state dict has no weights of adapter {adapter_name!r} for {shortened(missing)}")
        weights = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        weights = {key: tensor for key, tensor in weights.items() if DELTA_KEY not in key}
        return rows_to_file(model, adapter_name, weights | own)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: ESFTConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        state_dict = moved_weights(model, config, adapter_name, state_dict)
        check_incoming(model, config, adapter_name, state_dict)
        weights = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        return rows_from_file(model, adapter_name, weights)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return plain_key(super()._remove_adapter_name_from_key(key, adapter_name))
