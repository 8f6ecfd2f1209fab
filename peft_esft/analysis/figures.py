"""The figures of a report on scores: dispersion, layers, shares of experts, overlap, stability, granularity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import combinations
from statistics import fmean
from typing import Any

import torch

from ..scoring.scores import ExpertScores, Metric
from .dispersion import SHARES, Dispersion, dispersion
from .drawing import MARKERS, Plot, Style, heat_map, thinned_ticks, write_in_cells
from .granularity import Granularity
from .overlap import Overlap
from .shares import layer_labels, layer_shares
from .stability import StabilityReport


Dispersions = Mapping[str, Dispersion]
OF = {"token": "choices", "gate": "gate mass", "gate_share": "gate mass"}


def dispersion_plot(dispersions: Dispersions, share: float) -> Plot:
    """Share of a layer that the most used experts cover, against uniform routing."""
    metric = next(iter(dispersions.values())).metric
    needs = [
        f"{name} needs {result.experts_for(share):.1f}{f' of {result.num_experts:.0f} experts' if not place else ''}"
        for place, (name, result) in enumerate(dispersions.items())
    ]
    shown, more = needs[:4], f" ({len(needs) - 4} more tasks below)" if len(needs) > 4 else ""
    uniform = next(iter(dispersions.values())).uniform_experts_for(share)
    curves = {name: _mean_curve(result) for name, result in dispersions.items()}
    return Plot(
        name=f"dispersion_{metric}",
        title=f"For {share:.0%} of a layer's {OF[metric]}, {_listed(shown)}{more}; uniform routing needs "
        f"{uniform:.1f}",
        caption=f"Share of a layer's {OF[metric]} that its most used experts cover, mean over the layers; the band "
        f"is from the least to the most concentrated layer. The marks are where {share:.0%} is reached, in whole "
        "experts.",
        header=("task", "experts", "mean", "least_concentrated_layer", "most_concentrated_layer", "uniform"),
        rows=[
            (name, count + 1, mean, low, high, (count + 1) / len(curve))
            for name, curve in curves.items()
            for count, (mean, low, high) in enumerate(curve)
        ],
        draw=partial(_draw_dispersion, dispersions=dispersions, curves=curves, share=share),
    )


def layers_plot(dispersions: Dispersions, share: float) -> Plot:
    """Experts needed in each layer."""
    metric = next(iter(dispersions.values())).metric
    spans = []
    for name, result in dispersions.items():
        counts = [layer.experts_for(share) for layer in result.layers.values()]
        spans.append(f"{name} {min(counts)} to {max(counts)}")
    more = f" ({len(spans) - 4} more tasks below)" if len(spans) > 4 else ""
    return Plot(
        name=f"layers_{metric}",
        title=f"Experts that a layer needs for {share:.0%} of its {OF[metric]}: {_listed(spans[:4])}{more}",
        caption="By layer; the broken line is what uniform routing would need.",
        header=("task", "container", *(f"experts_for_{p:.0%}" for p in SHARES), "gini", "entropy_nats"),
        rows=[
            (name, path, *(layer.experts_for(p) for p in SHARES), layer.gini, layer.entropy)
            for name, result in dispersions.items()
            for path, layer in result.layers.items()
        ],
        draw=partial(_draw_layers, dispersions=dispersions, share=share),
    )


def shares_plot(name: str, scores: ExpertScores, metric: Metric, share: float) -> Plot:
    """Heat map of the experts' shares, layers down and experts across."""
    shares = layer_shares(scores, metric)
    result = dispersion(scores, metric=metric)
    chosen = {path: layer.expert_ids[: layer.experts_for(share)] for path, layer in result.layers.items()}
    mean = fmean(map(len, chosen.values()))
    top_path, top_layer = max(result.layers.items(), key=lambda item: item[1].top_share(1))
    label = dict(zip(shares, layer_labels(list(shares)), strict=True))[top_path]
    return Plot(
        name=f"shares_{metric}_{_file_name(name)}",
        title=f"{name}: {mean:.1f} of {result.num_experts:.0f} experts a layer take {share:.0%} of the {OF[metric]}; "
        f"expert {top_layer.expert_ids[0]} of layer {label} alone takes {top_layer.top_share(1):.0%}",
        caption=f"Each expert's share of its layer's {OF[metric]} (bright: large; the scale ends at the 99.5th "
        f"percentile). The dots mark the experts that together take {share:.0%}.",
        header=("container", "expert", "share", "marked"),
        rows=[
            (path, expert, value, int(expert in chosen[path]))
            for path, row in shares.items()
            for expert, value in enumerate(row.tolist())
        ],
        draw=partial(_draw_shares, shares=shares, chosen=chosen, metric=metric),
        height=1.6 + min(3.0, 0.085 * len(shares)),
    )


def overlap_plot(result: Overlap) -> Plot:
    """Matrix of the most used experts that tasks share."""
    shared, halves = result.mean_shared(), result.mean_halves()
    top_k = f"{fmean(result.top_k):g}"
    pairs = [float(shared[one, other]) for one, other in combinations(range(len(result.tasks)), 2)]
    known = [value for value in halves.tolist() if not math.isnan(value)]
    noise = f"two halves of one task {_span(known)}, " if known else ""
    who = f"{result.tasks[0]} and {result.tasks[1]}" if len(result.tasks) == 2 else "two tasks"
    return Plot(
        name="overlap",
        title=f"Of their {top_k} most used experts a layer, {who} share {_span(pairs)}; {noise}chance "
        f"{result.chance:.2f}",
        caption=f"Shared experts among the {top_k} most used, mean over the layers. The diagonal compares two "
        "disjoint halves of a task's own samples: less than that from another task may be noise."
        + ("" if known else " The scores hold no halves, so the diagonal is empty."),
        header=("task", "other", "shared_top_k", "jaccard_of_selections", "halves_of_task", "chance"),
        rows=[
            (one, other, float(shared[y, x]), float(result.mean_jaccard()[y, x]), float(halves[y]), result.chance)
            for y, one in enumerate(result.tasks)
            for x, other in enumerate(result.tasks)
        ],
        draw=partial(_draw_overlap, result=result),
        height=2.0 + min(3.2, 0.42 * len(result.tasks)),
    )


def overlap_profile_plot(result: Overlap) -> Plot:
    """Shared experts layer by layer: between tasks, within a task, by chance."""
    pairs = list(combinations(range(len(result.tasks)), 2))
    between = torch.stack([result.shared[:, one, other] for one, other in pairs]).mean(0).tolist()
    within = result.halves.nanmean(1).tolist()
    chance = [k * k / count for k, count in zip(result.top_k, result.num_experts, strict=True)]
    labels = layer_labels(result.paths)
    most = max(range(len(between)), key=lambda layer: between[layer])
    above = sum(value > by_chance for value, by_chance in zip(between, chance, strict=True))
    return Plot(
        name="overlap_layers",
        title=f"Two tasks share most in layer {labels[most]} ({between[most]:.1f} of {result.top_k[most]}), and more "
        f"than by chance in {above} of {len(between)} layers",
        caption="Shared experts among the most used, by layer: mean over the pairs of tasks, and over the tasks for "
        "two halves of one.",
        header=("container", "between_tasks", "halves_of_one_task", "chance"),
        rows=list(zip(result.paths, between, within, chance, strict=True)),
        draw=partial(_draw_profile, labels=labels, between=between, within=within, chance=chance),
        height=2.9,
    )


def stability_plot(reports: Mapping[str, StabilityReport]) -> Plot:
    """Agreement of two halves as tokens grow."""
    last = {name: report.points[-1] for name, report in reports.items()}
    weakest = min(last, key=lambda name: last[name].agreement)
    top_p = next(iter(reports.values())).top_p
    return Plot(
        name="stability",
        title=f"Two halves of the samples agree on {last[weakest].agreement:.0%} of the selected experts or more "
        f"(least: {weakest}, {last[weakest].num_tokens:,} tokens)",
        caption=f"Selections with top_p {top_p:g} of two disjoint halves, each with half of the tokens: the whole "
        "sample is at least as reliable.",
        header=("task", "tokens", "agreement"),
        rows=[(name, point.num_tokens, point.agreement) for name, r in reports.items() for point in r.points],
        draw=partial(_draw_stability, reports=reports),
        height=2.9,
    )


def granularity_plot(result: Granularity) -> Plot:
    """Experts to train for the same share, by size of the groups that they come in."""
    first, last = result.points[0], result.points[-1]
    return Plot(
        name="granularity",
        title=f"Experts in groups of {last.size} must train {last.mean_experts:.1f} experts a layer for what "
        f"{first.mean_experts:.1f} do in groups of {first.size}; random groups {last.mean_random_experts:.1f}",
        caption=f"Experts to train for {result.top_p:.0%} of a layer's {OF[result.metric]}, mean over the layers. "
        "Thick line: groups of experts that are chosen together, mean over the tasks (thin lines). Broken line: "
        "random groups.",
        header=("group_size", "task", "experts", "share_of_parameters", "experts_in_random_groups"),
        rows=[
            (point.size, name, point.experts[name], point.share[name], point.random_experts[name])
            for point in result.points
            for name in point.experts
        ],
        draw=partial(_draw_granularity, result=result),
        height=3.0,
    )


def _mean_curve(result: Dispersion) -> list[tuple[float, float, float]]:
    """Mean, least and largest covered share by number of experts; smaller layers are complete from their last on."""
    most = max(layer.num_experts for layer in result.layers.values())
    curves = torch.ones(len(result.layers), most, dtype=torch.float64)
    for row, layer in zip(curves, result.layers.values(), strict=True):
        row[: layer.num_experts] = layer.curve()
    return list(zip(curves.mean(0).tolist(), curves.amin(0).tolist(), curves.amax(0).tolist(), strict=True))


def _draw_dispersion(
    axes: Any, style: Style, dispersions: Dispersions, curves: Mapping[str, Any], share: float
) -> None:
    most = max(map(len, curves.values()))
    axes.plot([0, most], [0, 1], "--", color=style.muted, linewidth=1.2, label="uniform")
    axes.axhline(share, color=style.muted, linewidth=0.8, linestyle=":")
    for place, (name, curve) in enumerate(curves.items()):
        colour = _colour(style, place)
        counts = range(len(curve) + 1)
        means, lows, highs = ([0.0, *column] for column in zip(*curve, strict=True))
        if len(curves) <= 3:
            axes.fill_between(counts, lows, highs, color=colour, alpha=0.16, linewidth=0)
        axes.plot(counts, means, color=colour, label=name)
        axes.plot([dispersions[name].experts_for(share)], [share], MARKERS[place % len(MARKERS)], color=colour)
    axes.set(xlim=(0, most), ylim=(0, 1.01), xlabel="most used experts", ylabel="share covered")
    axes.yaxis.set_major_formatter(_percent)
    axes.legend(loc="lower right")


def _draw_layers(axes: Any, style: Style, dispersions: Dispersions, share: float) -> None:
    for place, (name, result) in enumerate(dispersions.items()):
        counts = [layer.experts_for(share) for layer in result.layers.values()]
        marker = MARKERS[place % len(MARKERS)]
        axes.plot(range(len(counts)), counts, marker=marker, markersize=3.5, color=_colour(style, place), label=name)
    uniform = next(iter(dispersions.values())).uniform_experts_for(share)
    axes.axhline(uniform, color=style.muted, linestyle="--", linewidth=1.2, label="uniform")
    axes.set(ylim=(0, None), xlabel="layer", ylabel="experts")
    _layer_ticks(axes.set_xticks, list(next(iter(dispersions.values())).layers))
    axes.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0)


def _draw_shares(axes: Any, style: Style, shares: Mapping[str, Any], chosen: Mapping[str, Any], metric: str) -> None:
    most = max(row.numel() for row in shares.values())
    values = torch.full((len(shares), most), math.nan, dtype=torch.float64)
    for line, row in zip(values, shares.values(), strict=True):
        line[: row.numel()] = row
    top = float(values[~values.isnan()].quantile(0.995))
    heat_map(axes, style, values.tolist(), label=f"share of a layer's {OF[metric]}", top=top)
    places = [(x, y) for y, ids in enumerate(chosen.values()) for x in ids]
    size = min(10.0, 500 / most)
    axes.scatter(*zip(*places, strict=True), s=size, color="white", edgecolors="black", linewidths=0.4)
    axes.set(xlabel="expert", ylabel="layer")
    _layer_ticks(axes.set_yticks, list(shares), most=9)


def _draw_overlap(axes: Any, style: Style, result: Overlap) -> None:
    values = result.mean_shared()
    values.diagonal().copy_(result.mean_halves())
    texts = [["–" if math.isnan(value) else f"{value:.2f}" for value in row] for row in values.tolist()]
    top = fmean(result.top_k)
    image = heat_map(axes, style, values.tolist(), label=f"shared of {top:g} experts", top=top)
    write_in_cells(axes, image, values.nan_to_num(0).tolist(), texts)
    places = range(len(result.tasks))
    short = max(map(len, result.tasks)) * len(result.tasks) < 40
    axes.set_xticks(places, result.tasks, rotation=0 if short else 40, ha="center" if short else "right")
    axes.set_yticks(places, result.tasks)
    axes.tick_params(length=0)


def _draw_profile(
    axes: Any, style: Style, labels: list[str], between: list[float], within: list[float], chance: list[float]
) -> None:
    places = range(len(labels))
    if not all(map(math.isnan, within)):
        axes.plot(places, within, marker="s", markersize=3.5, color=style.series[1], label="halves of one task")
    axes.plot(places, between, marker="o", markersize=3.5, color=style.series[0], label="two tasks")
    axes.plot(places, chance, "--", color=style.muted, linewidth=1.2, label="chance")
    axes.set(ylim=(0, None), xlabel="layer", ylabel="shared experts")
    axes.set_xticks(*thinned_ticks(labels))
    axes.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0)


def _draw_stability(axes: Any, style: Style, reports: Mapping[str, StabilityReport]) -> None:
    for place, (name, report) in enumerate(reports.items()):
        tokens = [point.num_tokens for point in report.points]
        agreements = [point.agreement for point in report.points]
        marker = MARKERS[place % len(MARKERS)]
        axes.plot(tokens, agreements, marker=marker, color=_colour(style, place), label=name)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:.0f}k" if value >= 10_000 else f"{value:,.0f}")
    axes.set(ylim=(0, 1.03), xlabel="tokens scored", ylabel="agreement of two halves")
    axes.yaxis.set_major_formatter(_percent)
    axes.legend(loc="lower right")


def _draw_granularity(axes: Any, style: Style, result: Granularity) -> None:
    places = range(len(result.points))
    for place, name in enumerate(result.points[0].experts):
        counts = [point.experts[name] for point in result.points]
        axes.plot(places, counts, linewidth=1, color=_colour(style, place + 1), label=name)
    means = [point.mean_experts for point in result.points]
    axes.plot(places, means, marker="o", linewidth=2.4, color=style.series[0], label="mean")
    random = [point.mean_random_experts for point in result.points]
    axes.plot(places, random, "--", marker="s", color=style.muted, label="random groups")
    for place, mean in zip(places, means, strict=True):
        axes.annotate(f"{mean:.1f}", (place, mean), xytext=(4, -12), textcoords="offset points", fontsize=9)
    axes.set(ylim=(0, None), xlabel="experts in a group", ylabel="experts to train")
    axes.set_xticks(places, [str(point.size) for point in result.points])
    axes.legend(loc="upper left")


def _layer_ticks(set_ticks: Any, paths: Sequence[str], most: int = 14) -> None:
    set_ticks(*thinned_ticks(layer_labels(paths), most))


def _colour(style: Style, place: int) -> str:
    return style.series[place % len(style.series)]


def _percent(value: float, _: Any) -> str:
    return f"{value:.0%}"


def _listed(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _span(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def _file_name(text: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in text)
