"""Writes a page that compares a base with its adapters: what they gained on a task and what they forgot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .drawing import Plot, Style, import_matplotlib
from .evaluation import Evaluation
from .page import Section, write_page


BASE = "base"


def write_evaluation_page(
    out: Path,
    task: str,
    measured: Mapping[str, Evaluation],
    general: Mapping[str, Mapping[str, tuple[float, float]]],
    table: Sequence[Sequence[str]],
    *,
    has_answers: bool,
) -> None:
    """Writes the page.

    Args:
        out: its file.
        task: name of the data.
        measured: the measurement of the task by name of the model; the first one is the base's.
        general: by name of the adapter, the losses on general text before and after, by name of the text.
        table: the rows of the table, the first one with the names of the columns.
        has_answers: True draws the exact matches.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    import_matplotlib()
    losses = {name: own.loss for name, own in measured.items()}
    best = min(losses, key=losses.__getitem__)
    title = f"{best} has the lowest loss on {task}: {losses[best]:.3f}"
    caption = "Cross entropy in nats, mean over the predicted tokens; lower is better."
    figures = [_bars("loss", title, caption, losses, "{:.3f}")]
    if has_answers:
        exact = {name: own.exact_match for name, own in measured.items()}
        best = max(exact, key=exact.__getitem__)
        title = f"{best} gives the most answers of {task} exactly: {exact[best]:.1%}"
        caption = "Share of the answers that greedy decoding gives exactly; higher is better."
        figures.append(_bars("exact_match", title, caption, exact, "{:.1%}"))
    for text in dict.fromkeys(name for points in general.values() for name in points):
        figures.append(_trade_plot(task, text, measured, {name: points[text] for name, points in general.items()}))
    first = next(iter(measured.values()))
    lead = f"{first.num_samples:,} samples of {task}, {first.num_tokens:,} predicted tokens."
    section = Section("Base and adapters side by side", table=table, figures=figures)
    write_page(out, f"{task}: what the adapters give", lead, [section])


def _bars(name: str, title: str, caption: str, values: Mapping[str, float], form: str) -> Plot:
    def draw(axes: Any, style: Style) -> None:
        names = list(values)
        bars = axes.barh(names, list(values.values()), color=[style.muted, *[style.series[0]] * (len(names) - 1)])
        axes.bar_label(bars, [form.format(value) for value in values.values()], padding=3, color=style.ink)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.set(xlabel=name.replace("_", " "))
        axes.grid(axis="y", visible=False)

    return Plot(name, title, caption, ("model", name), list(values.items()), draw, height=1.2 + 0.4 * len(values))


def _trade_plot(
    task: str, text: str, measured: Mapping[str, Evaluation], losses: Mapping[str, tuple[float, float]]
) -> Plot:
    """Draws the loss on the task against that on general text."""
    before, _ = next(iter(losses.values()))
    places = {BASE: (measured[BASE].loss, before)}
    places |= {name: (measured[name].loss, after) for name, (_, after) in losses.items()}
    most = max(losses, key=lambda name: losses[name][1])

    def draw(axes: Any, style: Style) -> None:
        axes.axhline(before, color=style.muted, linewidth=1.2, linestyle="--")
        for place, (name, (own, other)) in enumerate(places.items()):
            axes.plot([own], [other], linestyle="none", label=name, **style.look(place))
        axes.margins(0.15)
        axes.set(xlabel=f"loss on {task}", ylabel=f"loss on {text}")
        axes.legend()

    return Plot(
        f"forgetting_{''.join(c if c.isalnum() else '_' for c in text)}",
        f"{most} changes the loss on {text} most: {losses[most][1] - before:+.3f}",
        f"Loss on {task} (further left: learnt more) and on {text} (above the broken line: forgot).",
        ("model", "task_loss", "general_loss"),
        [(name, *values) for name, values in places.items()],
        draw,
    )
