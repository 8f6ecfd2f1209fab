"""Makes the figures of a report from what the measures of this package return, and from adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import combinations
from math import isnan
from statistics import fmean
from typing import Any

import torch

from ..scoring.scores import ExpertScores, Metric
from .adapters import AdapterRecord
from .dispersion import SHARES, Dispersion, dispersion
from .drawing import Plot, Style, draw_experts, draw_layers, draw_matrix
from .granularity import Granularity
from .overlap import Overlap
from .shares import layer_labels, layer_shares
from .stability import StabilityReport


OF = {"token": "choices", "gate": "gate mass", "gate_share": "gate mass"}


def dispersion_plot(dispersions: Mapping[str, Dispersion], share: float) -> Plot:
    """Draws the share of a layer that its most used experts cover, and what uniform routing gives."""
    first = next(iter(dispersions.values()))
    needs = [f"{name} needs {result.experts_for(share):.1f}" for name, result in dispersions.items()]
    needs[0] += f" of {first.num_experts:.0f} experts"
    curves = {name: _curves(result) for name, result in dispersions.items()}

    def draw(axes: Any, style: Style) -> None:
        most = max(map(len, curves.values()))
        axes.plot([0, most], [0, 1], "--", color=style.muted, linewidth=1.2, label="uniform")
        axes.axhline(share, color=style.muted, linewidth=0.8, linestyle=":")
        for place, (name, curve) in enumerate(curves.items()):
            look = style.look(place)
            counts = range(len(curve) + 1)
            means, lows, highs = ([0.0, *column] for column in zip(*curve, strict=True))
            if len(curves) <= 3:
                axes.fill_between(counts, lows, highs, color=look["color"], alpha=0.16, linewidth=0)
            axes.plot(counts, means, color=look["color"], label=name)
            axes.plot([dispersions[name].experts_for(share)], [share], **look)
        axes.set(xlim=(0, most), ylim=(0, 1.01), xlabel="most used experts", ylabel="share covered")
        axes.yaxis.set_major_formatter("{x:.0%}")
        axes.legend(loc="lower right")

    return Plot(
        name=f"dispersion_{first.metric}",
        title=f"For {share:.0%} of a layer's {OF[first.metric]}, {_listed(needs)}; uniform routing needs "
        f"{first.uniform_experts_for(share):.1f}",
        caption=f"Share of a layer's {OF[first.metric]} that its most used experts cover, mean over the layers; the "
        f"band is from the least to the most concentrated layer. The marks are where {share:.0%} is reached, in whole "
        "experts.",
        header=("task", "experts", "mean", "least_concentrated_layer", "most_concentrated_layer", "uniform"),
        rows=[
            (name, count, *values, count / len(curve))
            for name, curve in curves.items()
            for count, values in enumerate(curve, start=1)
        ],
        draw=draw,
    )


def layers_plot(dispersions: Mapping[str, Dispersion], share: float) -> Plot:
    """Draws the number of experts that each layer needs to cover a share."""
    first = next(iter(dispersions.values()))
    needed = {
        name: [layer.experts_for(share) for layer in result.layers.values()] for name, result in dispersions.items()
    }
    uniform = [layer.uniform_experts_for(share) for layer in first.layers.values()]
    spans = [f"{name} {min(counts)} to {max(counts)}" for name, counts in needed.items()]
    return Plot(
        name=f"layers_{first.metric}",
        title=f"Experts that a layer needs for {share:.0%} of its {OF[first.metric]}: {_listed(spans)}",
        caption="By layer; the broken line is what uniform routing would need.",
        header=("task", "container", *(f"experts_for_{p:.0%}" for p in SHARES), "gini", "entropy_nats"),
        rows=[
            (name, path, *(layer.experts_for(p) for p in SHARES), layer.gini, layer.entropy)
            for name, result in dispersions.items()
            for path, layer in result.layers.items()
        ],
        draw=partial(
            draw_layers, paths=list(first.layers), lines=needed, reference=("uniform", uniform), ylabel="experts"
        ),
    )


def shares_plot(name: str, scores: ExpertScores, metric: Metric, share: float) -> Plot:
    """Draws a heat map of the experts' shares, a row for each layer and a column for each expert."""
    shares = layer_shares(scores, metric)
    result = dispersion(scores, metric=metric)
    marked = {path: layer.expert_ids[: layer.experts_for(share)] for path, layer in result.layers.items()}
    cells = {path: dict(enumerate(row.tolist())) for path, row in shares.items()}
    most = max(map(len, cells.values()))

    def draw(axes: Any, style: Style) -> None:
        top = float(torch.cat(list(shares.values())).quantile(0.995))
        draw_experts(axes, style, cells, most, label=f"share of a layer's {OF[metric]}", top=top)
        dots = [(expert, row) for row, ids in enumerate(marked.values()) for expert in ids]
        size = min(10.0, 500 / most)
        axes.scatter(*zip(*dots, strict=True), s=size, color="white", edgecolors="black", linewidths=0.4)

    mean = fmean(map(len, marked.values()))
    label, layer = max(
        zip(layer_labels(list(shares)), result.layers.values(), strict=True), key=lambda item: item[1].top_share(1)
    )
    return Plot(
        name=f"shares_{metric}_{_file_name(name)}",
        title=f"{name}: {mean:.1f} of {result.num_experts:.0f} experts per layer take {share:.0%} of the {OF[metric]};"
        f" expert {layer.expert_ids[0]} of layer {label} alone takes {layer.top_share(1):.0%}",
        caption=f"Each expert's share of its layer's {OF[metric]} (bright: large; the scale ends at the 99.5th "
        f"percentile). The dots mark the experts that together take {share:.0%}.",
        header=("container", "expert", "share", "marked"),
        rows=[
            (path, expert, value, int(expert in marked[path]))
            for path, row in cells.items()
            for expert, value in row.items()
        ],
        draw=draw,
        height=1.6 + min(3.0, 0.085 * len(shares)),
    )


def overlap_plot(result: Overlap) -> Plot:
    """Draws a matrix of how many of their most used experts tasks share."""
    shared, halves = result.mean_shared(), result.mean_halves()
    shown = shared.clone()
    shown.diagonal().copy_(halves)
    top_k = fmean(result.top_k)

    pairs = [float(shared[one, other]) for one, other in combinations(range(len(result.tasks)), 2)]
    known = [value for value in halves.tolist() if not isnan(value)]
    noise = f"two halves of one task {_span(known, '.2f')}, " if known else ""
    return Plot(
        name="overlap",
        title=f"Of their {top_k:g} most used experts per layer, {_two(result.tasks, 'tasks')} share "
        f"{_span(pairs, '.2f')}; {noise}chance {result.chance:.2f}",
        caption=f"Shared experts among the {top_k:g} most used, mean over the layers. The diagonal compares two "
        "disjoint halves of a task's own samples: less than that from another task may be noise."
        + ("" if known else " The scores hold no halves, so the diagonal is empty."),
        header=("task", "other", "shared_top_k", "jaccard_of_selections", "halves_of_task", "chance"),
        rows=[
            (one, other, float(shared[y, x]), float(result.mean_jaccard()[y, x]), float(halves[y]), result.chance)
            for y, one in enumerate(result.tasks)
            for x, other in enumerate(result.tasks)
        ],
        draw=partial(
            draw_matrix,
            names=result.tasks,
            values=shown.tolist(),
            form=".2f",
            label=f"shared of {top_k:g} experts",
            top=top_k,
        ),
        height=2.0 + min(3.2, 0.42 * len(result.tasks)),
    )


def overlap_profile_plot(result: Overlap) -> Plot:
    """Draws the shared experts layer by layer: of two tasks, of two halves of one task, and by chance."""
    pairs = list(combinations(range(len(result.tasks)), 2))
    between = torch.stack([result.shared[:, one, other] for one, other in pairs]).mean(0).tolist()
    within = result.halves.nanmean(1).tolist()

    lines = {"two tasks": between}
    if not all(map(isnan, within)):
        lines["halves of one task"] = within
    most = between.index(max(between))
    above = sum(value > by_chance for value, by_chance in zip(between, result.chances, strict=True))
    return Plot(
        name="overlap_layers",
        title=f"Two tasks share most in layer {layer_labels(result.paths)[most]} ({between[most]:.1f} of "
        f"{result.top_k[most]}), and more than by chance in {above} of {len(between)} layers",
        caption="Shared experts among the most used, by layer: mean over the pairs of tasks, and over the tasks for "
        "two halves of one.",
        header=("container", "between_tasks", "halves_of_one_task", "chance"),
        rows=list(zip(result.paths, between, within, result.chances, strict=True)),
        draw=partial(
            draw_layers, paths=result.paths, lines=lines, reference=("chance", result.chances), ylabel="shared experts"
        ),
        height=2.9,
    )


def stability_plot(reports: Mapping[str, StabilityReport]) -> Plot:
    """Draws how the agreement of two halves of the samples grows with the number of tokens."""

    def draw(axes: Any, style: Style) -> None:
        for place, (name, report) in enumerate(reports.items()):
            tokens = [point.num_tokens for point in report.points]
            axes.plot(tokens, [point.agreement for point in report.points], label=name, **style.look(place))
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:.0f}k" if value >= 10_000 else f"{value:,.0f}")
        axes.set(ylim=(0, 1.03), xlabel="tokens scored", ylabel="agreement of two halves")
        axes.yaxis.set_major_formatter("{x:.0%}")
        axes.legend(loc="lower right")

    weakest, report = min(reports.items(), key=lambda item: item[1].points[-1].agreement)
    last = report.points[-1]
    return Plot(
        name="stability",
        title=f"Two halves of the samples agree on {last.agreement:.0%} of the selected experts or more "
        f"(least: {weakest}, {last.num_tokens:,} tokens)",
        caption=f"Selections with top_p {report.top_p:g} of two disjoint halves, each with half of the tokens: the "
        "whole sample is at least as reliable.",
        header=("task", "tokens", "agreement"),
        rows=[(name, point.num_tokens, point.agreement) for name, r in reports.items() for point in r.points],
        draw=draw,
        height=2.9,
    )


def granularity_plot(result: Granularity) -> Plot:
    """Draws the number of experts to train for the same share, by the size of the groups that experts come in."""
    means = [point.mean_experts for point in result.points]
    random = [point.mean_random_experts for point in result.points]

    def draw(axes: Any, style: Style) -> None:
        places = range(len(result.points))
        for place, name in enumerate(result.points[0].experts, start=1):
            counts = [point.experts[name] for point in result.points]
            axes.plot(places, counts, linewidth=1, color=style.look(place)["color"], label=name)
        axes.plot(places, means, linewidth=2.4, label="mean", **style.look(0))
        axes.plot(places, random, "--", marker="s", color=style.muted, label="random groups")
        for place, mean in zip(places, means, strict=True):
            axes.annotate(f"{mean:.1f}", (place, mean), xytext=(4, -12), textcoords="offset points", fontsize=9)
        axes.set(ylim=(0, None), xlabel="experts in a group", ylabel="experts to train")
        axes.set_xticks(places, [str(point.size) for point in result.points])
        axes.legend(loc="upper left")

    return Plot(
        name="granularity",
        title=f"Experts in groups of {result.points[-1].size} must train {means[-1]:.1f} experts per layer for what "
        f"{means[0]:.1f} do in groups of {result.points[0].size}; random groups {random[-1]:.1f}",
        caption=f"Experts to train for {result.top_p:.0%} of a layer's {OF[result.metric]}, mean over the layers. "
        "Thick line: groups of experts that are chosen together, mean over the tasks (thin lines). Broken line: "
        "random groups.",
        header=("group_size", "task", "experts", "share_of_parameters", "experts_in_random_groups"),
        rows=[
            (point.size, name, point.experts[name], point.share[name], point.random_experts[name])
            for point in result.points
            for name in point.experts
        ],
        draw=draw,
        height=3.0,
    )


def selection_plot(name: str, record: AdapterRecord) -> Plot:
    """Draws a heat map of the experts that an adapter trains, coloured by how far they moved."""
    moved = record.change is not None
    changes = record.change or {path: [1.0] * len(ids) for path, ids in record.selection.items()}
    cells = {path: dict(zip(ids, changes[path], strict=True)) for path, ids in record.selection.items()}
    value, furthest, expert = max(
        (value, path, expert) for path, row in cells.items() for expert, value in row.items()
    )

    def draw(axes: Any, style: Style) -> None:
        from matplotlib.patches import Rectangle

        most = max(*record.num_experts.values(), *(max(row) + 1 for row in cells.values()), 1)
        label = "change" if moved else "trained"
        draw_experts(axes, style, cells, most, label=label, top=value or 1.0, colours="viridis")
        for y, ids in enumerate(cells.values()):
            axes.axhline(y, color=style.muted, linewidth=0.4, alpha=0.4, zorder=-1)
            for x in ids:
                # The darkest colour, of an expert that did not move, is hard to see on a dark page without an outline.
                cell = Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor=style.muted, linewidth=0.5)
                axes.add_patch(cell)

    counts = [len(ids) for ids in record.selection.values()]
    of = f" of {max(record.num_experts.values())}" if record.num_experts.keys() == record.selection.keys() else ""
    title = f"{name} trains {record.mean_experts:.1f}{of} experts per layer ({_span(counts, 'd')})"
    if moved:
        label = layer_labels(list(cells))[list(cells).index(furthest)]
        title += f"; expert {expert} of layer {label} moved furthest ({value:.2g})"
    return Plot(
        name=f"selection_{_file_name(name)}",
        title=title,
        caption="Trained experts, layers down and experts across; "
        f"{'colour: ' if moved else ''}{record.change_label}.",
        header=("container", "expert", "change"),
        rows=[(path, x, change if moved else "") for path, row in cells.items() for x, change in row.items()],
        draw=draw,
        height=1.6 + min(3.0, 0.085 * len(counts)),
    )


def adapter_overlap_plot(records: Mapping[str, AdapterRecord]) -> Plot:
    """Draws a matrix of the experts that adapters have in common."""
    names = list(records)
    trained = [{(path, x) for path, ids in record.selection.items() for x in ids} for record in records.values()]
    table = [[len(one & other) / max(1, len(one | other)) for other in trained] for one in trained]

    pairs = [table[x][y] for x, y in combinations(range(len(names)), 2)]
    return Plot(
        name="adapter_overlap",
        title=f"Of the experts that {_two(names, 'adapters')} train, both train {_span(pairs, '.0%')}",
        caption="Experts of all layers that both adapters train, over those that at least one trains.",
        header=("adapter", "other", "jaccard"),
        rows=[(one, other, table[y][x]) for y, one in enumerate(names) for x, other in enumerate(names)],
        draw=partial(draw_matrix, names=names, values=table, form=".0%", label="experts in common", top=1.0),
        height=2.0 + min(3.2, 0.42 * len(names)),
    )


def _curves(result: Dispersion) -> list[list[float]]:
    """Mean, least and largest share of a layer that its n most used experts cover, for each n."""
    most = max(layer.num_experts for layer in result.layers.values())
    curves = torch.ones(len(result.layers), most, dtype=torch.float64)
    for row, layer in zip(curves, result.layers.values(), strict=True):
        row[: layer.num_experts] = layer.curve()
    return torch.stack([curves.mean(0), curves.amin(0), curves.amax(0)], dim=1).tolist()


def _listed(parts: Sequence[str], most: int = 4) -> str:
    """Joins the first parts of a title, and says how many more there are."""
    *firsts, last = parts[:most]
    text = f"{', '.join(firsts)} and {last}" if firsts else last
    return text + (f" ({len(parts) - most} more tasks below)" if len(parts) > most else "")


def _two(names: Sequence[str], kind: str) -> str:
    return f"{names[0]} and {names[1]}" if len(names) == 2 else f"two {kind}"


def _span(values: Sequence[float], form: str) -> str:
    """The least and the largest value, or one of them if they look the same."""
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"


def _file_name(text: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in text)
