"""What a report needs of adapters: which experts they train, and how far these moved. Folders and models alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import Tensor, nn

from ..interchange.adapter import AdapterFolder, read_config
from ..interchange.base import Base, empty_model
from ..interchange.diff import row_products
from ..moe.containers import find_experts
from ..scoring.selection import Selection
from ..tuner.config import ESFTConfig
from ..tuner.layers.layer import PREFIX, ESFTLayer
from ..tuner.model_card import num_experts_of
from .changes import esft_layers, expert_usage
from .drawing import Plot, Style, heat_map, thinned_ticks, write_in_cells
from .shares import layer_labels


ROOT_MEAN_SQUARE = "root mean square of the change of a weight"
NO_WEIGHTS = "how far they moved is not known without their weights"
NO_BASE = "how far they moved is not known: the file has the weights themselves, and the base's cannot be read here"


@dataclass(frozen=True)
class AdapterRecord:
    """One adapter.

    Attributes:
        base: name of its base model.
        selection: its experts by container path; empty if it trains none, but shared experts or other modules.
        num_experts: experts of each of these containers, as far as config or base say.
        change: how far each of these experts moved; None if that is not known.
        change_label: what `change` is, or why it is None.
        num_parameters: trained weights, those of `modules_to_save` apart; None if not known.
        megabytes: size of its weights' file; None if there is none.
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

    The base is looked at if it is a folder on this machine: for the number of its experts, where the config does not
    say it, and, if the adapter stores effective rows, for its weights.

    Raises:
        ValueError: if it is not an ESFT adapter, or is malformed.
        OSError: if there is no adapter, or its weights are pickled.
    """
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    adapter = AdapterFolder(folder) if weights.exists() or (folder / WEIGHTS_NAME).exists() else None
    config = read_config(folder) if adapter is None else adapter.config
    selection = config.adapted_experts
    squares = None if adapter is None else _mean_squares(adapter, selection)
    known = squares is not None and all(path in squares for path in selection)
    return AdapterRecord(
        base=config.base_model_name_or_path,
        selection=selection,
        num_experts=_num_experts(config, selection),
        change={path: squares[path].sqrt().tolist() for path in selection} if squares is not None and known else None,
        change_label=ROOT_MEAN_SQUARE if known else NO_BASE if adapter and config.storage == "rows" else NO_WEIGHTS,
        num_parameters=None if adapter is None else adapter.num_parameters,
        megabytes=None if adapter is None else weights.stat().st_size / 1e6,
    )


def adapters_of_model(model: nn.Module) -> dict[str, AdapterRecord]:
    """The ESFT adapters of a model, by name.

    Raises:
        ValueError: if there are none, or they are merged.
    """
    layers = esft_layers(model)
    names = dict.fromkeys(name for layer in layers for name in layer.expert_ids)
    if not names:
        raise ValueError(f"{type(model).__name__} has no ESFT adapter")
    sizes = {path: container.num_experts for path, container in find_experts(model).items()}
    config = getattr(model, "config", None)
    records = {}
    for name in names:
        own = {layer.path: layer for layer in layers if name in layer.expert_ids and layer.path in sizes}
        change: dict[str, list[float]] = {path: [] for path in own}
        for use in expert_usage(model, adapter_name=name):
            if use.path in change:
                change[use.path].append(use.relative_change)
        records[name] = AdapterRecord(
            base=getattr(config, "name_or_path", None) or None,
            selection={path: layer.expert_ids[name] for path, layer in own.items()},
            num_experts={path: sizes[path] for path in own},
            change=change,
            change_label="norm of the change over the norm of the expert's weights",
            num_parameters=sum(_trained_weights(layer, name) for layer in layers if name in layer.expert_ids),
        )
    return records


def selection_plot(name: str, record: AdapterRecord) -> Plot:
    """Heat map of the experts that an adapter trains, coloured by how far they moved."""
    counts = [len(ids) for ids in record.selection.values()]
    of = f" of {max(record.num_experts.values())}" if record.num_experts.keys() == record.selection.keys() else ""
    spread = f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else f"{counts[0]}"
    title = f"{name} trains {record.mean_experts:.1f}{of} experts a layer ({spread})"
    if record.change is not None:
        value, path, place = max((v, p, i) for p, row in record.change.items() for i, v in enumerate(row))
        label = dict(zip(record.selection, layer_labels(list(record.selection)), strict=True))[path]
        title += f"; expert {record.selection[path][place]} of layer {label} moved furthest ({value:.2g})"
    return Plot(
        name=f"selection_{''.join(c if c.isalnum() or c in '-_' else '_' for c in name)}",
        title=title,
        caption="Trained experts, layers down and experts across; "
        f"{'colour: ' if record.change is not None else ''}{record.change_label}.",
        header=("container", "expert", "change"),
        rows=[
            (path, expert, "" if record.change is None else record.change[path][place])
            for path, ids in record.selection.items()
            for place, expert in enumerate(ids)
        ],
        draw=partial(_draw_selection, record=record),
        height=1.6 + min(3.0, 0.085 * len(counts)),
    )


def adapter_overlap_plot(records: Mapping[str, AdapterRecord]) -> Plot:
    """Matrix of the experts that adapters have in common."""
    names = list(records)
    table = [[jaccard(records[one], records[other]) for other in names] for one in names]
    pairs = [table[x][y] for x, y in combinations(range(len(names)), 2)]
    who = f"{names[0]} and {names[1]}" if len(names) == 2 else "two adapters"
    low, high = f"{min(pairs):.0%}", f"{max(pairs):.0%}"
    return Plot(
        name="adapter_overlap",
        title=f"Of the experts that {who} train, both train {low if low == high else f'{low} to {high}'}",
        caption="Experts of all layers that both adapters train, over those that at least one trains.",
        header=("adapter", "other", "jaccard"),
        rows=[(one, other, table[y][x]) for y, one in enumerate(names) for x, other in enumerate(names)],
        draw=partial(_draw_matrix, names=names, table=table),
        height=2.0 + min(3.2, 0.42 * len(names)),
    )


def jaccard(one: AdapterRecord, other: AdapterRecord) -> float:
    """Experts of all layers that both adapters train over those that at least one does."""
    first, second = ({(p, e) for p, ids in r.selection.items() for e in ids} for r in (one, other))
    return len(first & second) / max(1, len(first | second))


def _trained_weights(layer: ESFTLayer, adapter_name: str) -> int:
    return sum(
        parameter.numel()
        for key, parameter in layer.named_parameters()
        if key.startswith(PREFIX) and key.rpartition(".")[2] == adapter_name
    )


def _mean_squares(adapter: AdapterFolder, selection: Selection) -> dict[str, Tensor] | None:
    """Mean square of the change of each expert's weights, by container path; None if that takes a base not at hand."""
    adapter.check_alone()
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    try:
        for path, delta in (_deltas_over_base if adapter.config.storage == "rows" else _deltas)(adapter, selection):
            square = row_products(delta, delta)
            sums[path] = sums[path] + square if path in sums else square
            counts[path] = counts.get(path, 0) + delta[0].numel()
    except (FileNotFoundError, NotImplementedError):  # the base's weights are not there, or quantised
        return None
    return {path: sums[path] / counts[path] for path in sums}


def _deltas(adapter: AdapterFolder, selection: Selection) -> Iterator[tuple[str, Tensor]]:
    """The deltas of a selection's experts, weight by weight, each with its container's path."""
    weights = adapter.weights()
    for path in selection:
        for name in weights.get(path, []):
            delta = adapter.delta(path, name)
            if delta is None:
                raise ValueError(f"{adapter.folder} has only some of the tensors of {path}.{name}")
            yield path, delta


def _deltas_over_base(adapter: AdapterFolder, selection: Selection) -> Iterator[tuple[str, Tensor]]:
    """The same of an adapter that stores effective rows.

    Raises:
        FileNotFoundError: if the base is not at hand.
        NotImplementedError: if it is quantised.
    """
    folder = _folder_of_base(adapter.config)
    if folder is None:
        raise FileNotFoundError(f"the base of {adapter.folder} is no folder of a model on this machine")
    base = Base(folder)
    for change in adapter.changes(base):
        if change.container.path in selection:
            rows = base.rows(change.container, change.weight, change.expert_ids)
            yield change.container.path, change.delta(rows)


def _folder_of_base(config: ESFTConfig) -> Path | None:
    folder = Path(config.base_model_name_or_path or "")
    return folder if config.base_model_name_or_path and (folder / "config.json").is_file() else None


def _num_experts(config: ESFTConfig, selection: Selection) -> dict[str, int]:
    """How many experts the containers of a selection have, as far as config or base say."""
    known, base = num_experts_of(config.to_dict()), _folder_of_base(config)
    if base is not None and not selection.keys() <= known.keys():
        try:
            containers = find_experts(empty_model(base))
        except (OSError, ValueError):  # a model that cannot be built here, for example of code of its own
            containers = {}
        known = {path: container.num_experts for path, container in containers.items()} | known
    return {path: known[path] for path in selection if path in known}


def _draw_selection(axes: Any, style: Style, record: AdapterRecord) -> None:
    most = max(*record.num_experts.values(), *(max(ids) + 1 for ids in record.selection.values()), 1)
    values = torch.full((len(record.selection), most), torch.nan, dtype=torch.float64)
    for line, (path, ids) in zip(values, record.selection.items(), strict=True):
        line[ids] = 1.0 if record.change is None else torch.tensor(record.change[path], dtype=torch.float64)
    top = float(values.nan_to_num(0).max()) or 1.0
    heat_map(axes, style, values.tolist(), label="change" if record.change else "trained", top=top, colours="viridis")
    axes.set_xlim(-0.5, most - 0.5)
    axes.set(xlabel="expert", ylabel="layer")
    axes.set_yticks(*thinned_ticks(layer_labels(list(record.selection)), 9))
    from matplotlib.patches import Rectangle

    for line, ids in enumerate(record.selection.values()):
        axes.axhline(line, color=style.muted, linewidth=0.4, alpha=0.4, zorder=-1)
        for expert in ids:
            # An expert that did not move has the darkest colour, which a dark page swallows.
            cell = Rectangle((expert - 0.5, line - 0.5), 1, 1, fill=False, edgecolor=style.muted, linewidth=0.5)
            axes.add_patch(cell)


def _draw_matrix(axes: Any, style: Style, names: Sequence[str], table: list[list[float]]) -> None:
    image = heat_map(axes, style, table, label="experts in common", top=1.0)
    write_in_cells(axes, image, table, [[f"{value:.0%}" for value in row] for row in table])
    short = max(map(len, names)) * len(names) < 40
    axes.set_xticks(range(len(names)), names, rotation=0 if short else 40, ha="center" if short else "right")
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(length=0)
