"""What a report needs of adapters: which experts they train, and how far these moved. Folders and models alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn

from ..adapter_tensors import PREFIX
from ..config import ESFTConfig
from ..containers import find_experts
from ..layer import ESFTLayer
from ..selection import Selection
from .drawing import Plot, Style, heat_map, thinned_ticks, write_in_cells
from .shares import layer_labels
from .usage import expert_usage


@dataclass(frozen=True)
class AdapterRecord:
    """One adapter.

    Attributes:
        base: name of its base model.
        selection: its experts by container path.
        num_experts: experts of each container, or, where the base is not at hand, one more than the highest id.
        change: how far each of these experts moved; None if that is not known.
        change_label: what `change` is.
        num_parameters: trained weights of experts; None if not known.
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
        """Trained experts, mean over the containers that have any."""
        return fmean(map(len, self.selection.values()))


def read_adapter(folder: Path) -> AdapterRecord:
    """Reads an adapter's folder. The base is looked at, without its weights, if it is a folder on this machine.

    Raises:
        ValueError: if it is not an ESFT adapter that trains experts.
        OSError: if there is no adapter.
    """
    config = ESFTConfig.from_pretrained(str(folder))
    if not isinstance(config, ESFTConfig) or not config.target_experts:
        raise ValueError(f"{folder} is no ESFT adapter with experts: its peft_type is {config.peft_type}")
    selection = {str(path): list(ids) for path, ids in config.target_experts.items()}
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    squares, num_parameters = _read_squares(weights, config) if weights.exists() else ({}, None)
    known = all(path in squares for path in selection)
    return AdapterRecord(
        base=config.base_model_name_or_path,
        selection=selection,
        num_experts=_experts_of_base(config.base_model_name_or_path, selection),
        change={path: squares[path].sqrt().tolist() for path in selection} if known else None,
        change_label="root mean square of the change of a weight",
        num_parameters=num_parameters,
        megabytes=weights.stat().st_size / 1e6 if weights.exists() else None,
    )


def adapters_of_model(model: nn.Module) -> dict[str, AdapterRecord]:
    """The ESFT adapters of a model, by name.

    Raises:
        ValueError: if there are none, or they are merged.
    """
    layers = [module for module in model.modules() if isinstance(module, ESFTLayer)]
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
            num_parameters=sum(_trained_weights(layer, name) for layer in own.values()),
        )
    return records


def selection_plot(name: str, record: AdapterRecord) -> Plot:
    """Heat map of the experts that an adapter trains, coloured by how far they moved."""
    counts = [len(ids) for ids in record.selection.values()]
    most = max(record.num_experts.values())
    spread = f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else f"{counts[0]}"
    title = f"{name} trains {record.mean_experts:.1f} of {most} experts a layer ({spread})"
    if record.change is not None:
        value, path, place = max((v, p, i) for p, row in record.change.items() for i, v in enumerate(row))
        label = dict(zip(record.selection, layer_labels(list(record.selection)), strict=True))[path]
        title += f"; expert {record.selection[path][place]} of layer {label} moved furthest ({value:.2g})"
    return Plot(
        name=f"selection_{''.join(c if c.isalnum() or c in '-_' else '_' for c in name)}",
        title=title,
        caption=f"Trained experts, layers down and experts across; colour: {record.change_label}."
        if record.change is not None
        else "Trained experts, layers down and experts across.",
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


def _read_squares(weights: Path, config: ESFTConfig) -> tuple[dict[str, Tensor], int]:
    """Mean square of each trained expert's change, by container path, and the number of trained weights."""
    from safetensors import safe_open

    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    with safe_open(weights, "pt") as file:
        keys = [key for key in file.keys() if f".{PREFIX}" in key]  # noqa: SIM118 (not a dict)
        for key in keys:
            path, _, name = key.removeprefix("base_model.model.").rpartition(f".{PREFIX}")
            if name.endswith("_A"):
                continue
            delta = file.get_tensor(key).double()
            if f"{key.removesuffix('_B')}_A" in keys:
                delta = config.scaling * (delta @ file.get_tensor(f"{key.removesuffix('_B')}_A").double())
            square = delta.flatten(1).square().sum(1)
            sums[path] = sums[path] + square if path in sums else square
            counts[path] = counts.get(path, 0) + delta[0].numel()
        trained = sum(torch.Size(file.get_slice(key).get_shape()).numel() for key in keys)
    return {path: sums[path] / counts[path] for path in sums}, trained


def _experts_of_base(base: str | None, selection: Selection) -> dict[str, int]:
    highest = {path: max(ids) + 1 for path, ids in selection.items()}
    if base is None or not Path(base).is_dir():
        return dict.fromkeys(highest, max(highest.values()))
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        containers = find_experts(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base)))
    return {path: containers[path].num_experts if path in containers else high for path, high in highest.items()}


def _draw_selection(axes: Any, style: Style, record: AdapterRecord) -> None:
    most = max(record.num_experts.values())
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
