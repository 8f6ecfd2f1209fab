"""What `target_experts` and PEFT's options about modules mean in a model."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from ..moe.containers import ExpertsContainer, find_other_modules, find_shared_experts
from .messages import shortened


if TYPE_CHECKING:
    from .config import ESFTConfig


def resolve_container(key: str | int, containers: dict[str, ExpertsContainer]) -> str:
    """The path that a key of `target_experts` means: a module path, or the index of a decoder layer.

    Raises:
        ValueError: if no container, or more than one, fits the key.
    """
    for path, container in containers.items():
        if any(place.path == key for place in container.places):
            return path
    if re.fullmatch(r"\d+", str(key)):
        paths = [path for path, container in containers.items() if container.layer_index == int(key)]
        if len(paths) == 1:
            return paths[0]
        if paths:
            raise ValueError(f"layer {key} has several experts containers, name one of them by its path: {paths}")
        indices = sorted({c.layer_index for c in containers.values() if c.layer_index is not None})
        raise ValueError(f"layer {key} has no experts container; the layers that have one are {indices}")
    raise ValueError(
        f"{key!r} is not the path of an experts container of this model. Its containers are {shortened(containers)}. "
        "`find_experts(model)` lists them"
    )


def resolve_target_experts(
    target_experts: dict[str, list[int]], containers: dict[str, ExpertsContainer]
) -> dict[str, list[int]]:
    """Brings the keys of a selection to module paths and checks its ids against a model.

    Raises:
        ValueError: if a key fits no container, two keys mean the same one, or an id is out of range.
    """
    resolved: dict[str, list[int]] = {}
    for key, ids in target_experts.items():
        path = resolve_container(key, containers)
        if path in resolved:
            raise ValueError(f"target_experts names {path} twice, once as {key!r}")
        num_experts = containers[path].num_experts
        outside = [expert for expert in ids if expert >= num_experts]
        if outside:
            raise ValueError(
                f"{path} has {num_experts} experts (0 to {num_experts - 1}); there are none of id {outside}"
            )
        resolved[path] = ids
    return resolved


def modules_trained_whole(model: nn.Module, peft_config: ESFTConfig) -> dict[str, ExpertsContainer]:
    """The modules beside experts that a config asks for, each seen as one expert.

    Raises:
        ValueError: if there are no shared experts, but they are asked for.
    """
    whole: dict[str, ExpertsContainer] = {}
    if peft_config.train_shared_experts:
        whole |= find_shared_experts(model)
        if not whole:
            raise ValueError(
                f"train_shared_experts is set, but {type(model).__name__} has no shared experts; leave it out"
            )
    if peft_config.train_non_expert_modules:
        others, left_out = find_other_modules(model)
        whole |= others
        if left_out:
            warnings.warn(
                "train_non_expert_modules leaves these parameters frozen, since they belong to modules that hold "
                f"experts too: {left_out}",
                stacklevel=2,
            )
    return whole


def match_options(peft_config: ESFTConfig, path: str) -> Any:
    """What PEFT's matcher says of a container, by `exclude_modules`, `layers_to_transform` and the like."""
    # The matcher looks at its options only for targets that are named by their ending.
    view = SimpleNamespace(
        target_modules=[path.rpartition(".")[2]],
        exclude_modules=peft_config.exclude_modules,
        modules_to_save=peft_config.modules_to_save,
        layers_to_transform=peft_config.layers_to_transform,
        # Like PEFT's default, which overlooks a list of layers at the top of the model, as in one without a head.
        layers_pattern=peft_config.layers_pattern or r"[^.]+",
    )
    return check_target_module_exists(view, path)


def adapted_selection(
    peft_config: ESFTConfig, selection: Mapping[str, list[int]] | None = None
) -> dict[str, list[int]]:
    """The experts that an adapter trains: those of `target_experts` that the config's other options leave.

    A key that is the index of a layer has no path to match: only `layers_to_transform` can be told of it, and that not
    if `layers_pattern` says to count something else.

    Args:
        peft_config: of the adapter.
        selection: to use instead of the config's, for example one whose keys are resolved.

    Returns:
        `{path or index of a layer: expert ids}`; empty if there are none.
    """
    selection = (peft_config.target_experts or {}) if selection is None else selection
    return {
        key: ids
        for key, ids in selection.items()
        if (_leaves_layer if key.isdigit() else _leaves_path)(peft_config, key)
    }


def _leaves_path(peft_config: ESFTConfig, path: str) -> bool:
    # PEFT marks an excluded module by an object, which is true as a bool.
    return match_options(peft_config, path) is True


def _leaves_layer(peft_config: ESFTConfig, index: str) -> bool:
    layers = peft_config.layers_to_transform
    if layers is None or peft_config.layers_pattern:
        return True
    return int(index) in ([layers] if isinstance(layers, int) else layers)


def not_excluded(peft_config: ESFTConfig, selection: Mapping[str, list[int]]) -> list[str]:
    """The containers of a selection that the config's other options leave.

    Raises:
        ValueError: if they leave none.
    """
    chosen = [path for path in selection if _leaves_path(peft_config, path)]
    if not chosen:
        raise ValueError(
            f"exclude_modules={peft_config.exclude_modules}, modules_to_save={peft_config.modules_to_save} and "
            f"layers_to_transform={peft_config.layers_to_transform} leave none of the {len(selection)} "
            "containers of target_experts"
        )
    return chosen
