"""Reads what a report shows of adapters, from a folder or from a model: their experts, and how far these moved."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import Tensor, nn

from ..interchange.adapter import AdapterFolder, read_config
from ..interchange.base import Base, empty_model
from ..interchange.diff import row_products
from ..moe.containers import find_experts
from ..scoring.selection import Selection
from ..tuner.config import ESFTConfig
from ..tuner.layers.layer import PREFIX
from ..tuner.model_card import num_experts_of
from .changes import esft_layers, expert_usage


RELATIVE = "norm of the change over the norm of the expert's weights"
ROOT_MEAN_SQUARE = "root mean square of the change of a weight"
NO_WEIGHTS = "how far they moved is not known without their weights"
NO_BASE = (
    "how far they moved is not known: the file stores the trained weights themselves, and the base's "
    "weights cannot be read here"
)


@dataclass(frozen=True)
class AdapterRecord:
    """What a report shows of one adapter.

    Attributes:
        base: name of its base model.
        selection: its experts by container path. It is empty for an adapter of shared experts or other modules only.
        num_experts: number of experts of each of these containers, as far as the config or the base says it.
        change: how far each of these experts moved, or None if that is not known.
        change_label: what `change` measures, or why it is None.
        num_parameters: number of trained weights without those of `modules_to_save`, or None if not known.
        megabytes: size of the file of weights, or None if there is no such file.
    """

    base: str | None
    selection: Selection
    num_experts: dict[str, int]
    change: dict[str, list[float]] | None
    change_label: str
    num_parameters: int | None = None
    megabytes: float | None = None

    @property
    def mean_experts(self) -> float:
        """Trained experts, mean over the containers that have any; 0 if there are none."""
        return fmean(map(len, self.selection.values())) if self.selection else 0.0


def read_adapter(folder: Path) -> AdapterRecord:
    """Reads an adapter's folder, with or without weights.

    If the base is a folder on this machine, it is read for the number of its experts, if the config does not have
    it, and for its weights, if the adapter stores effective rows.

    Raises:
        ValueError: if the folder holds another kind of adapter, or a file is malformed.
        OSError: if there is no adapter, or its weights are pickled.
    """
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    if not weights.exists() and not (folder / WEIGHTS_NAME).exists():
        config = read_config(folder)
        selection = config.adapted_experts
        return AdapterRecord(
            config.base_model_name_or_path, selection, _num_experts(config, selection), None, NO_WEIGHTS
        )
    adapter = AdapterFolder(folder)
    config, selection = adapter.config, adapter.config.adapted_experts
    change = _root_mean_squares(adapter, selection)
    return AdapterRecord(
        base=config.base_model_name_or_path,
        selection=selection,
        num_experts=_num_experts(config, selection),
        change=change,
        change_label=ROOT_MEAN_SQUARE if change is not None else NO_BASE if config.storage == "rows" else NO_WEIGHTS,
        num_parameters=adapter.num_parameters,
        megabytes=weights.stat().st_size / 1e6,
    )


def adapters_of_model(model: nn.Module) -> dict[str, AdapterRecord]:
    """Reads the ESFT adapters of a model, by name.

    Raises:
        ValueError: if there are none, or they are merged.
    """
    layers = esft_layers(model)
    names = dict.fromkeys(name for layer in layers for name in layer.expert_ids)
    if not names:
        raise ValueError(f"{type(model).__name__} has no ESFT adapter")
    sizes = {path: container.num_experts for path, container in find_experts(model).items()}
    records = {}
    for name in names:
        selection: Selection = {}
        change: dict[str, list[float]] = {}
        for use in expert_usage(model, adapter_name=name):
            if use.path in sizes:
                selection.setdefault(use.path, []).append(use.expert)
                change.setdefault(use.path, []).append(use.relative_change)
        records[name] = AdapterRecord(
            base=getattr(getattr(model, "config", None), "name_or_path", None) or None,
            selection=selection,
            num_experts={path: sizes[path] for path in selection},
            change=change,
            change_label=RELATIVE,
            num_parameters=sum(
                parameter.numel()
                for layer in layers
                for key, parameter in layer.named_parameters()
                if key.startswith(PREFIX) and key.rpartition(".")[2] == name
            ),
        )
    return records


def _root_mean_squares(adapter: AdapterFolder, selection: Selection) -> dict[str, list[float]] | None:
    """Root mean square of the change of each expert's weights; None if it needs a base that cannot be read here."""
    adapter.check_alone()
    sums = {path: torch.zeros(len(ids), dtype=torch.float64) for path, ids in selection.items()}
    counts = dict.fromkeys(selection, 0)
    try:
        for path, delta in _deltas(adapter, selection):
            sums[path] += row_products(delta, delta)
            counts[path] += delta[0].numel()
    except (FileNotFoundError, NotImplementedError):  # the base's weights are not there, or quantised
        return None
    if not all(counts.values()):
        return None
    return {path: (sums[path] / counts[path]).sqrt().tolist() for path in selection}


def _deltas(adapter: AdapterFolder, selection: Selection) -> Iterator[tuple[str, Tensor]]:
    """Yields the deltas `[n, ...]` of a selection's experts weight by weight, each with its container's path."""
    if adapter.config.storage != "rows":
        for path, names in adapter.weights().items():
            for name in names if path in selection else ():
                delta = adapter.delta(path, name)
                if delta is None:
                    raise ValueError(f"{adapter.folder} has only some of the tensors of {path}.{name}")
                yield path, delta
        return
    folder = _folder_of_base(adapter.config)
    if folder is None:
        raise FileNotFoundError(f"the base of {adapter.folder} is not a folder of a model on this machine")
    base = Base(folder)
    for change in adapter.changes(base):
        if change.container.path in selection:
            yield change.container.path, change.delta(base.rows(change.container, change.weight, change.expert_ids))


def _folder_of_base(config: ESFTConfig) -> Path | None:
    folder = Path(config.base_model_name_or_path or "")
    return folder if config.base_model_name_or_path and (folder / "config.json").is_file() else None


def _num_experts(config: ESFTConfig, selection: Selection) -> dict[str, int]:
    """How many experts the containers of a selection have, as far as the config or the base says it."""
    known, base = num_experts_of(config.to_dict()), _folder_of_base(config)
    if base is not None and not selection.keys() <= known.keys():
        try:
            containers = find_experts(empty_model(base))
        except (OSError, ValueError):  # a model that cannot be built here, for example one with code of its own
            containers = {}
        known = {path: container.num_experts for path, container in containers.items()} | known
    return {path: known[path] for path in selection if path in known}
