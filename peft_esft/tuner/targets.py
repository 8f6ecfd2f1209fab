"""Resolves `target_experts` and PEFT's options about modules to the modules of a model."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from ..moe.containers import ExpertsContainer, find_other_modules, find_shared_experts
from .messages import shortened
from .other_classes import matching_paths


def resolve_container(key: str | int, containers: dict[str, ExpertsContainer]) -> str:
    """The path that a key of `target_experts` means.

    Args:
        key: a module path, in this model or in another class of the same checkpoint; or the index of a decoder layer.
        containers: of the model.

    Raises:
        ValueError: if no experts module, or more than one, fits the key.
    """
    for path, container in containers.items():
        if any(place.path == key for place in container.places):
            return path
    if re.fullmatch(r"\d+", str(key)):
        paths = [path for path, container in containers.items() if container.layer_index == int(key)]
        if len(paths) == 1:
            return paths[0]
        if paths:
            raise ValueError(f"layer {key} has several experts modules; name one of them by its path: {paths}")
        indices = sorted({c.layer_index for c in containers.values() if c.layer_index is not None})
        raise ValueError(f"layer {key} has no experts module; the layers that have one are {indices}")
    matches = matching_paths(str(key), containers)
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise ValueError(
            f"{key!r} is not a path of this model. In another class of the same checkpoint, it may mean each of "
            f"{matches}. Load the class that the adapter was trained with, or that was scored"
        )
    raise ValueError(
        f"{key!r} is not the path of an experts module of this model. Its experts modules are "
        f"{shortened(containers)}. `find_experts(model)` lists them"
    )


def resolve_target_experts(
    target_experts: dict[str, list[int]], containers: dict[str, ExpertsContainer]
) -> dict[str, list[int]]:
    """Brings the keys of a selection to module paths and checks its ids against a model.

    Raises:
        ValueError: if a key fits no experts module, two keys mean the same one, or an id is out of range.
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
                f"{path} has {num_experts} experts, with ids 0 to {num_experts - 1}; it has no expert {outside}"
            )
        resolved[path] = ids
    return resolved


def full_modules(
    model: nn.Module, train_shared_experts: bool, train_non_expert_modules: bool
) -> dict[str, ExpertsContainer]:
    """The modules beside experts that are trained whole, each seen as one expert.

    Raises:
        ValueError: if there are no shared experts, but they are asked for.
    """
    whole: dict[str, ExpertsContainer] = {}
    if train_shared_experts:
        whole |= find_shared_experts(model)
        if not whole:
            raise ValueError(
                f"train_shared_experts is set, but {type(model).__name__} has no shared experts; leave it out"
            )
    if train_non_expert_modules:
        others, left_out = find_other_modules(model)
        whole |= others
        if left_out:
            warnings.warn(
                "train_non_expert_modules cannot train these parameters, because they belong to modules that "
                f"also hold experts; they stay frozen: {left_out}",
                stacklevel=2,
            )
    return whole


@dataclass(frozen=True)
class ModuleOptions:
    """PEFT's options that say which of the selected modules are adapted, see `ESFTConfig`."""

    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None


def match_options(options: ModuleOptions, path: str) -> Any:
    """What PEFT's matcher says of a module."""
    # The matcher looks at its options only for targets that are named by their ending.
    view = SimpleNamespace(
        target_modules=[path.rpartition(".")[2]],
        exclude_modules=options.exclude_modules,
        modules_to_save=options.modules_to_save,
        layers_to_transform=options.layers_to_transform,
        # Like PEFT's default, which overlooks a list of layers at the top of the model, as in one without a head.
        layers_pattern=options.layers_pattern or r"[^.]+",
    )
    return check_target_module_exists(view, path)


def adapted_selection(options: ModuleOptions, selection: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """The experts of a selection that the options leave.

    A key that is the index of a layer has no path to match: only `layers_to_transform` says something of it, unless
    `layers_pattern` says to count something else.
    """
    return {
        key: ids for key, ids in selection.items() if (_leaves_layer if key.isdigit() else _leaves_path)(options, key)
    }


def _leaves_path(options: ModuleOptions, path: str) -> bool:
    # PEFT marks an excluded module by an object, which is true as a bool.
    return match_options(options, path) is True


def _leaves_layer(options: ModuleOptions, index: str) -> bool:
    layers = options.layers_to_transform
    if layers is None or options.layers_pattern:
        return True
    return int(index) in ([layers] if isinstance(layers, int) else layers)


def not_excluded(options: ModuleOptions, selection: Mapping[str, list[int]]) -> list[str]:
    """The modules of a selection that the options leave.

    Raises:
        ValueError: if they leave none.
    """
    chosen = [path for path in selection if _leaves_path(options, path)]
    if not chosen:
        raise ValueError(
            f"exclude_modules={options.exclude_modules}, modules_to_save={options.modules_to_save} and "
            f"layers_to_transform={options.layers_to_transform} exclude all {len(selection)} selected modules; "
            "change one of them"
        )
    return chosen
