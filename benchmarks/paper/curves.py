"""Draws the figures of docs/protocol.md from the records."""

from __future__ import annotations

from functools import partial
from typing import Any

from peft_esft.analysis.drawing import MARKERS, Plot, Style, heat_map

from plan import GROUP_SIZES, LASTING, LONGER, MORE
from results import METRIC, Results, Value, domain_loss, general_loss, metric, value
from tables import MEASURE, ORDER, SHORT


Point = tuple[float, float]
Marked = tuple[float, float, float, bool]  # general loss, metric, learning rate, whether that is the chosen one
WIDEST = 2.2  # general loss above the base that is drawn


def all_plots(results: Results) -> list[Plot]:
    """Every figure that there are results for."""
    plots = []
    for task in results.tasks():
        plots += [trade_off(results, task), forgotten(results, task)]
        plots += [plot for plot in (longer(results, task), granularity(results, task)) if plot]
    return plots


def trade_off(results: Results, task: str) -> Plot:
    """Task metric against general loss, along the grid of learning rates."""
    curves = {SHORT[method]: _curve(results, task, method) for method in ORDER}
    return _trade_off(results, task, curves, "findings_trade_off", "what is learnt and what it costs elsewhere")


def longer(results: Results, task: str) -> Plot | None:
    """The same for full fine-tuning and ESFT-Token, and with more steps and experts."""
    more = Results(results.store, LONGER * results.steps)
    curves = {
        f"{SHORT[method]}, {some.steps} steps": _curve(some, task, method)
        for method in LASTING
        for some in (results, more)
    }
    curves[f"{SHORT['esft_token']}, p {MORE:g}, {more.steps} steps"] = _curve(more, task, "esft_token", MORE)
    if not all(curves.values()):
        return None
    return _trade_off(results, task, curves, "findings_longer", "with more steps and more experts")


def _curve(results: Results, task: str, method: str, top_p: float | None = None) -> list[Marked]:
    chosen = results.lr(task, method, top_p)
    return [
        (general_loss(run), metric(run), run["lr"], run["lr"] == chosen)
        for run in results.grid(task, method, top_p)
        if run["validation"]["loss"] is not None
    ]


def _trade_off(results: Results, task: str, curves: dict[str, list[Marked]], name: str, title: str) -> Plot:
    base = results.base(task)
    curves = {label: runs for label, runs in curves.items() if runs}
    return Plot(
        name=f"{name}_{task}",
        title=f"{task}: {title}",
        caption="Each line is a method, each mark a learning rate of the grid (seed 0), the filled one that of the "
        "least validation loss. Better is up and left. The cross is the base.",
        header=("method", "lr", "general_loss", MEASURE[METRIC[task]], "chosen"),
        rows=[(label, lr, x, y, int(mark)) for label, runs in curves.items() for x, y, lr, mark in runs],
        draw=partial(
            _draw_trade_off, curves=curves, base=(general_loss(base), metric(base)), label=MEASURE[METRIC[task]]
        ),
        height=4.6,
    )


def forgotten(results: Results, task: str) -> Plot:
    """General loss added, by domain and method."""
    methods = [method for method in ORDER if results.finals(task, method)]
    base = results.base(task)
    names = list(base["general"])
    added = [
        [
            value(results.finals(task, method), partial(domain_loss, domain=domain)).mean - domain_loss(base, domain)
            for domain in names
        ]
        for method in methods
    ]
    return Plot(
        name=f"findings_forgotten_{task}",
        title=f"{task}: loss added on held-out text of the six domains",
        caption="Nats per token, mean over the seeds, at each method's chosen learning rate.",
        header=("method", "domain", "loss_added"),
        rows=[
            (method, domain, cell)
            for method, row in zip(methods, added, strict=True)
            for domain, cell in zip(names, row, strict=True)
        ],
        draw=partial(_draw_forgotten, added=added, methods=[SHORT[name] for name in methods], domains=names),
        height=3.2,
    )


def granularity(results: Results, task: str) -> Plot | None:
    """What ESFT and full fine-tuning gain on coarser models."""
    gains: dict[str, list[tuple[int, Value]]] = {"full": [], "esft_token": []}
    for method, points in gains.items():
        for size in GROUP_SIZES:
            runs = results.finals(task, method, group_size=size)
            if runs:
                before = metric(results.base(task, size))
                points.append((size, value(runs, lambda run, before=before: metric(run) - before)))
    if len(gains["esft_token"]) < 2:
        return None
    return Plot(
        name=f"findings_granularity_{task}",
        title=f"{task}: gains when experts come in groups",
        caption=f"Gain in {MEASURE[METRIC[task]]} over the same coarse model before training; bars are the standard "
        "deviation over the seeds, where there are several.",
        header=("method", "group_size", "gain", "spread"),
        rows=[(name, size, gain.mean, gain.spread) for name, points in gains.items() for size, gain in points],
        draw=partial(_draw_points, curves=gains, x="experts of a group", y=f"gain, {MEASURE[METRIC[task]]}"),
    )


def _draw_trade_off(axes: Any, style: Style, curves: Any, base: Point, label: str) -> None:
    axes.plot(*base, "x", color=style.ink, markersize=8, label="base")
    looks = zip((*style.series, style.muted), (*MARKERS, "X"), curves.items(), strict=False)
    for colour, marker, (name, runs) in looks:
        axes.plot(
            [x for x, *_ in runs], [y for _, y, *_ in runs], marker=marker, color=colour,
            markerfacecolor=style.ground if style.ground != "none" else "white", linewidth=1.2, label=name,
        )  # fmt: skip
        for x, y, _, mark in runs:
            if mark:
                axes.plot([x], [y], marker=marker, color=colour, markersize=8)
    axes.set(xlabel="general loss, nats per token", ylabel=label)
    axes.set_xlim(base[0] - 0.1, min(axes.get_xlim()[1], base[0] + WIDEST))
    axes.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))


def _draw_forgotten(axes: Any, style: Style, added: Any, methods: list[str], domains: list[str]) -> None:
    top = max(max(row) for row in added)
    texts = [[f"{cell:.1f}" for cell in row] for row in added]
    heat_map(axes, style, added, label="nats per token", top=top, texts=texts)
    axes.set_xticks(range(len(domains)), domains, rotation=30, ha="right")
    axes.set_yticks(range(len(methods)), methods, fontsize=8)


def _draw_points(axes: Any, style: Style, curves: dict[str, list[tuple[int, Value]]], x: str, y: str) -> None:
    for place, (method, points) in enumerate(curves.items()):
        axes.errorbar(
            [size for size, _ in points], [gain.mean for _, gain in points],
            yerr=[gain.spread or 0 for _, gain in points], marker=MARKERS[place], color=style.series[place],
            capsize=3, label=SHORT[method].removesuffix(", p 0.2"),
        )  # fmt: skip
    sizes = sorted({size for points in curves.values() for size, _ in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set(xlabel=x, ylabel=y, ylim=(0, None))
    axes.legend()
