"""Converts `expert_cfg.json`, the original code's selection of experts, to `target_experts` and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..moe.containers import ExpertsContainer
from ..tuner.adapter_file import read_json
from ..tuner.config_checks import check_target_experts
from ..tuner.targets import resolve_container, resolve_target_experts


EXPERT_CONFIG_NAME = "expert_cfg.json"


def read_expert_cfg(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """Reads and checks an `expert_cfg.json`.

    Args:
        source: the file, the folder that holds it, or its content.

    Returns:
        `experts` (`{key: ids}`), `shared_experts` and `non_expert_modules`. The flags are False if they are missing.

    Raises:
        ValueError: if it is malformed.
        FileNotFoundError: if the folder has none.
    """
    content: Any = source
    where = EXPERT_CONFIG_NAME
    if isinstance(source, str | Path):
        content = read_json(Path(source) / EXPERT_CONFIG_NAME if Path(source).is_dir() else Path(source))
        where = f"{EXPERT_CONFIG_NAME} ({source})"
    if not isinstance(content, Mapping) or not isinstance(content.get("experts"), Mapping):
        raise ValueError(f'{where} has no object "experts" with layer indices and lists of expert ids')
    flags = {name: content.get(name, False) for name in ("shared_experts", "non_expert_modules")}
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f'{where}: "{name}" is {value!r}; it is true or false')
    experts = {key: ids for key, ids in content["experts"].items() if not (isinstance(ids, list) and not ids)}
    try:
        return {"experts": check_target_experts(experts), **flags}
    except ValueError as error:
        raise ValueError(f"{where}: {str(error).replace('target_experts', 'experts')}") from error


def selection_from_expert_cfg(
    source: str | Path | Mapping[str, Any], containers: dict[str, ExpertsContainer]
) -> dict[str, list[int]]:
    """Converts the original code's selection to `target_experts` of a model.

    Args:
        source: see `read_expert_cfg`.
        containers: `find_experts(model)`.

    Raises:
        ValueError: if a layer or an expert is not in the model.
    """
    experts = read_expert_cfg(source)["experts"]
    try:
        return resolve_target_experts(experts, containers)
    except ValueError as error:
        message = str(error).replace("target_experts", "experts")
        raise ValueError(f"{EXPERT_CONFIG_NAME} does not fit the model: {message}") from error


def expert_cfg_from_selection(
    target_experts: Mapping[str, list[int]],
    containers: dict[str, ExpertsContainer],
    *,
    shared_experts: bool = False,
    non_expert_modules: bool = False,
) -> dict[str, Any]:
    """Converts `target_experts` to the original code's `expert_cfg.json`, which counts decoder layers.

    Raises:
        ValueError: if two containers have the same layer number, or one has none.
    """
    experts: dict[str, list[int]] = {}
    for key, ids in target_experts.items():
        container = containers[resolve_container(key, containers)]
        same = [c.path for c in containers.values() if c.layer_index == container.layer_index]
        if container.layer_index is None or len(same) > 1:
            raise ValueError(
                f"{EXPERT_CONFIG_NAME} names experts modules by the index of their layer, but {same} have the same"
            )
        experts[str(container.layer_index)] = list(ids)
    return {"experts": experts, "shared_experts": shared_experts, "non_expert_modules": non_expert_modules}
