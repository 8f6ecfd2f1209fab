"""Finds what a config selects in a model, and checks it before anything is changed."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any

from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..moe.containers import ExpertsContainer, find_experts, no_experts
from .config import ESFTConfig
from .file_checks import check_rank
from .fingerprint import check_num_experts
from .layers.expert_parallel import check_expert_parallel, shares_out_experts
from .layers.layer import PREFIX
from .mixed_batch import BASE
from .other_classes import Prefixes, find_prefixes
from .targets import full_modules, not_excluded, resolve_target_experts
from .trainable import (
    check_trainable,
    warn_of_replaced_kernels,
    warn_of_slow_layouts,
    warn_of_unquantised_experts,
)


_CONTAINERS_BY_NAME = (nn.ParameterDict, BufferDict)
"""What keeps adapters' tensors by name; its own attributes cannot be names."""


@dataclass(frozen=True)
class ResolvedConfig:
    """What a config selects in a model.

    Attributes:
        target_experts: the config's, by module path.
        selection: the same, and modules that are trained whole, each as its only expert.
        containers: those of the selection that no option of the config excludes.
        experts: all experts modules of the model.
        prefixes: how the config's paths change, if it was made over another class of the same checkpoint.
    """

    target_experts: dict[str, list[int]]
    selection: dict[str, list[int]]
    containers: dict[str, ExpertsContainer]
    experts: dict[str, ExpertsContainer]
    prefixes: Prefixes

    @property
    def nbytes(self) -> int:
        """Bytes of the selected rows in the base's dtypes."""
        return sum(len(self.selection[path]) * c.nbytes_per_expert for path, c in self.containers.items())


def prepare_config(peft_config: ESFTConfig, model: nn.Module) -> ResolvedConfig:
    """Resolves a config against a model and checks whether it can be trained or loaded there.

    Raises:
        ValueError: if the config selects nothing, or something that this model does not have.
        NotImplementedError: if weights that are to be trained cannot be read.
    """
    if peft_config.storage != "delta" and not peft_config.inference_mode:
        raise ValueError(
            f"an adapter stored as {peft_config.storage!r} is for inference only and cannot be trained; train the "
            "adapter that it was made from"
        )
    resolved = resolve_config(peft_config, model)
    for container in resolved.containers.values():
        if shares_out_experts(container):
            check_expert_parallel(container)
        else:
            check_trainable(container)
    if not peft_config.inference_mode:
        _warn_of_balancing(model)
    check_rank(peft_config.rank, resolved.containers.values())
    warn_of_slow_layouts(resolved.containers.values())
    warn_of_replaced_kernels(resolved.containers.values())
    warn_of_unquantised_experts(model, resolved.experts.values())
    return resolved


def _warn_of_balancing(model: nn.Module) -> None:
    """Says what the router's balancing loss costs if the model adds it to its loss."""
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    coefficient = getattr(text_config, "router_aux_loss_coef", 0)
    if getattr(text_config, "output_router_logits", False) and coefficient:
        warnings.warn(
            f"output_router_logits is on, so the model adds {coefficient:g} times the router's balancing loss to "
            "the loss. The routers are frozen, and the balancing loss moves the task to other experts than the "
            "trained ones. Turn it off: model.config.output_router_logits = False, or with TRL "
            "SFTConfig(router_aux_loss_coef=0.0)",
            stacklevel=2,
        )


def resolve_config(peft_config: ESFTConfig, model: nn.Module) -> ResolvedConfig:
    """Finds what a config selects in a model.

    Raises:
        ValueError: if the config selects nothing, or something that this model does not have.
    """
    experts = find_experts(model)
    if not experts:
        raise ValueError(
            f"{no_experts(model)}. ESFT needs a mixture-of-experts model. Its experts must be fused parameters, "
            "or a list of modules beside a router."
        )
    whole = full_modules(model, peft_config.train_shared_experts, peft_config.train_non_expert_modules)
    if not peft_config.target_experts and not whole:
        raise ValueError(
            "target_experts is empty, so no expert would be trained. Choose experts with "
            "ESFTConfig.from_scores(score_experts(model, batches)), or name them: {layer index: expert ids}"
        )
    target_experts = resolve_target_experts(peft_config.target_experts or {}, experts)
    prefixes = find_prefixes(peft_config.target_experts or {}, experts)
    peft_config = copy.copy(peft_config)
    peft_config.move(prefixes)
    check_num_experts((peft_config.selection, peft_config.base_fingerprint), target_experts, experts)
    selection = {**target_experts, **{path: [0] for path in whole}}
    containers = {path: (experts | whole)[path] for path in not_excluded(peft_config.module_options, selection)}
    return ResolvedConfig(target_experts, selection, containers, experts, prefixes)


def check_adapter_name(adapter_name: str, model: nn.Module) -> None:
    """Refuses names under which torch cannot keep parameters, or PEFT cannot save them: a name is also a folder's.

    Raises:
        ValueError: with a name that works.
    """
    is_name = isinstance(adapter_name, str) and adapter_name and not set(".\n\0/\\") & set(adapter_name)
    if not is_name or adapter_name == BASE or any(hasattr(kind(), adapter_name) for kind in _CONTAINERS_BY_NAME):
        raise ValueError(
            f"{adapter_name!r} cannot be an adapter's name. A name must not have dots, slashes or line breaks, "
            f"and must not be {BASE!r} or a name that torch uses itself, such as 'train' or 'keys'. 'law-v1_0' "
            "works"
        )
    if adapter_name.startswith(PREFIX) or adapter_name in _reserved_names(model):
        raise ValueError(
            f"{adapter_name!r} cannot be an adapter's name: a module or weight of the model has the same name, "
            f"and PEFT could not tell their weights apart when it saves them. '{adapter_name}_adapter' works"
        )


def _reserved_names(model: nn.Module) -> set[str]:
    """The parts of names of weights: PEFT leaves out of a file what has another adapter's name among them."""
    names = {name.partition(f".{PREFIX}")[0].partition(".modules_to_save.")[0] for name, _ in model.named_parameters()}
    parts = {"base_model", "model", "modules_to_save", *(part for name in names for part in name.split("."))}
    layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))  # another method's too
    return parts.difference(*(layer._all_available_adapter_names() for layer in layers))
