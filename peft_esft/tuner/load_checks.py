"""Checks an adapter's weights against the model before they are copied into it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..moe.weights import whole_shape
from ..registration import Source, source_of_weights
from .adapter_file import DELTA_KEY, KEY_PREFIX, Header, plain_key
from .config import ESFTConfig
from .file_checks import (
    Entries,
    check_finite,
    check_finite_header,
    check_same_experts,
    compare_entries,
    delta_entries,
)
from .layers.layer import ESFTLayer
from .layers.offload import is_offloaded
from .other_classes import Prefixes, find_prefixes, moved_keys, paths_of_deltas


def expected_entries(model: nn.Module, config: ESFTConfig, adapter_name: str) -> Entries:
    """The tensors that an adapter has in a model that it is attached to: all that a file of it may and must hold."""
    entries: Entries = {}
    for name, module in model.named_modules():
        path = plain_key(name).removeprefix(KEY_PREFIX)
        if isinstance(module, ESFTLayer) and adapter_name in module.adapters:
            adapter = module.adapters[adapter_name]
            rows = len(adapter.global_ids or adapter.expert_ids)
            entries |= delta_entries(
                path, module.weights.values(), module.get_base_layer(), rows, config.rank, adapter.storage
            )
        elif isinstance(module, AuxiliaryTrainingWrapper):  # PEFT's: modules saved whole, trained tokens
            own = module.state_dict(keep_vars=True)
            for key, stored in module.adapter_state_dict_load_map(adapter_name).items():
                entries[f"{path}.{key}"] = (own[stored].dtype, whole_shape(own[stored]))
    return entries


def header_of(config: ESFTConfig) -> Header | None:
    """The tensors of the file that a config was read with, or of the one that is being loaded; None if there is none.

    Raises:
        ValueError: if the file is malformed, or is not the config's.
    """
    header = config.pop_header()
    if header is None and (source := source_of_weights()) is not None:
        # transformers reads the config with PEFT's own `PeftConfig.from_pretrained`.
        header = _read_config(source.name, source.download).pop_header()
    return header


def check_loader(model: nn.Module) -> None:
    """Refuses transformers' `load_adapter` on an offloaded model: it would leave the deltas at zero without a word.

    Raises:
        NotImplementedError: naming the first module, with what works.
    """
    source = source_of_weights()
    if source is None or not source.by_transformers:
        return
    for module in model.modules():
        if isinstance(module, ESFTLayer) and is_offloaded(module.get_base_layer()):
            raise NotImplementedError(
                f"{module.path} is offloaded to the CPU or the disk, and transformers' load_adapter cannot load "
                "an adapter there. Use PEFT: get_peft_model(base, PeftConfig.from_pretrained(folder)), then "
                "set_peft_model_state_dict(model, load_peft_weights(folder))"
            )


def moved_weights(
    model: nn.Module, config: ESFTConfig, adapter_name: str, state_dict: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """An adapter's weights by the names that they have in a model, if it was trained over another class."""
    layers = [module for module in model.modules() if isinstance(module, ESFTLayer)]
    if {layer.path for layer in layers if adapter_name in layer.adapters}.issuperset(paths_of_deltas(state_dict)):
        return dict(state_dict)
    source = source_of_weights()
    # What is loaded over an adapter in the model has a config of its own.
    own = config if source is None else _config_here(source, _experts(layers, adapter_name))
    return moved_keys(state_dict, own.prefixes)


def _experts(layers: Iterable[nn.Module], adapter_name: str) -> dict[str, ESFTLayer]:
    """The layers that hold experts of an adapter, by path."""
    own = (layer for layer in layers if isinstance(layer, ESFTLayer) and adapter_name in layer.adapters)
    return {layer.path: layer for layer in own if layer.kind != "module"}


def _config_here(source: Source, experts: Mapping[str, ESFTLayer]) -> ESFTConfig:
    """The config beside the weights that are loaded, with the paths that the experts have in the model."""
    # The weights have been read already, pickled or not.
    config = _read_config(source.name, source.download, use_safetensors=False)
    config.move(find_prefixes(config.target_experts or {}, experts))
    return config


def check_file(model: nn.Module, config: ESFTConfig, adapter_name: str, header: Header) -> None:
    """Refuses a file that does not hold exactly what its config calls for in a model.

    Raises:
        ValueError: naming the first few misfits, or the first tensor that is not finite.
        NotImplementedError: if the loader does not find the tensors under the names that they have in the file.
    """
    moved_header = moved_keys(header, config.prefixes)
    compare_entries(moved_header, expected_entries(model, config, adapter_name))
    check_finite_header(header)
    source = source_of_weights()
    if config.prefixes and source is not None:
        _check_loader_moves(source, config.prefixes, [key for key in header if key not in moved_header])


def _check_loader_moves(source: Source, prefixes: Prefixes, keys: Sequence[str]) -> None:
    """Refuses what a loader cannot move: transformers' moves nothing, PEFT's hands the tuner the experts alone."""
    problem = "the adapter was trained with another class of the base's checkpoint"
    if source.by_transformers:
        raise NotImplementedError(
            f"{problem}, so transformers' load_adapter would not find the adapter's weights. Load it with PEFT's "
            "PeftModel.from_pretrained, or load the base with the class that the adapter was trained with"
        )
    others = [key for key in keys if DELTA_KEY not in key]
    if others and not source.key_mapping:
        mapping = {f"^{re.escape(before)}": now for before, now in prefixes.items()}
        raise NotImplementedError(
            f"{problem}, which has another name for {others[0]}. Load it with PEFT and the argument "
            f"key_mapping={mapping}"
        )


def check_incoming(model: nn.Module, config: ESFTConfig, adapter_name: str, state_dict: Mapping[str, Tensor]) -> None:
    """Refuses weights that are not those of an adapter in the model, before the first of them is copied.

    Args:
        model: with adapters.
        config: of the adapter that the weights are for.
        adapter_name: its name.
        state_dict: the weights, by their names in a file. Those of PEFT's wrappers have the names that they have in
            the model already.

    Raises:
        ValueError: naming the first few misfits, or the first tensor that is not finite.
    """
    weights = dict(state_dict)
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            path = name.removeprefix("_fsdp_wrapped_module.")  # as PEFT does
            for key, stored in module.adapter_state_dict_load_map(adapter_name).items():
                if f"{path}.{stored}" in weights:
                    weights[f"{path}.{key}"] = weights.pop(f"{path}.{stored}")
    try:
        compare_entries(weights, expected_entries(model, config, adapter_name))
        _check_source(model, adapter_name)
    except ValueError as error:
        raise ValueError(
            f"{error}. Load the other adapter under its own name, or replace {adapter_name!r} with hotswap_adapter"
        ) from error
    check_finite(weights)


def _check_source(model: nn.Module, adapter_name: str) -> None:
    """Compares the config beside the weights with the adapter: `PeftModel.load_adapter` does not for a known name."""
    source = source_of_weights()
    if source is None:
        return
    layers = _experts(model.modules(), adapter_name)
    config = _config_here(source, layers)
    named = config.adapted_experts
    if any(path.isdigit() for path in named):
        return  # a config made by hand: the number of a layer says no path
    adapters = {path: layer.adapters[adapter_name] for path, layer in layers.items()}
    experts = {path: adapter.global_ids or adapter.expert_ids for path, adapter in adapters.items()}
    check_same_experts(named, experts, "the weights", f"adapter {adapter_name!r}")
    scalings = {adapter.scaling for adapter in adapters.values()} - {config.scaling}
    if scalings and config.storage == "delta":
        raise ValueError(
            f"the weights are scaled by {config.scaling}, but those of {adapter_name!r} by {scalings.pop()}"
        )


def _read_config(source: str, download: dict[str, Any], **kwargs: Any) -> ESFTConfig:
    known = {name: download[name] for name in ("subfolder", "revision", "cache_dir", "token") if download.get(name)}
    return ESFTConfig.from_pretrained(source, **known, **kwargs)
