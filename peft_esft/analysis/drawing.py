"""Draws a figure with matplotlib, in light or dark colours, and writes it as SVG, PNG and CSV."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isnan, nan
from typing import Any

from .shares import layer_labels


WIDTH = 5.4  # inches: on a phone, 380 pixels wide, text of 10 points is still 10 pixels high
PNG_DPI = 220
MARKERS = ("o", "s", "^", "D", "v", "P")
LABEL_WIDTH = 16
"""Letters in a line of a colour bar's label; figures of few layers are low."""


@dataclass(frozen=True)
class Style:
    """The colours of a figure.

    Attributes:
        ink: colour of text and axes.
        muted: colour of the grid and of lines of reference.
        ground: colour of the background; "none" is transparent.
        series: colours of the series. All common kinds of colour vision tell them apart (the set of Okabe and Ito,
            lightened in the dark style).
        titled: True draws the title too, for files that stand alone.
    """

    ink: str
    muted: str
    ground: str
    series: tuple[str, ...]
    titled: bool = False

    def look(self, place: int) -> dict[str, str]:
        """Colour and marker of a series, as arguments of `axes.plot`."""
        return {"color": self.series[place % len(self.series)], "marker": MARKERS[place % len(MARKERS)]}


LIGHT = Style("#1c1e21", "#767c85", "none", ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"))
DARK = Style("#e4e6ea", "#8d949e", "none", ("#56B4E9", "#FF8A3D", "#2BC79A", "#E59CC6", "#F0B429", "#9CD3F5"))
PRINT = replace(LIGHT, ground="white", titled=True)

COLOURS = "cividis"  # its steps in lightness are equal for all common kinds of colour vision


@dataclass(frozen=True)
class Plot:
    """A figure: its texts, its numbers, and a function that draws it.

    Attributes:
        name: name of its files, without an ending.
        title: a sentence that says what the figure shows.
        caption: how to read it.
        header: names of the columns of its numbers.
        rows: its numbers.
        draw: draws into a matplotlib `Axes`.
        height: height of the drawing in inches.
    """

    name: str
    title: str
    caption: str
    header: tuple[str, ...]
    rows: Sequence[Sequence[Any]]
    draw: Callable[[Any, Style], None]
    height: float = 3.4


def draw_files(plot: Plot) -> dict[str, bytes]:
    """Draws the PNG, SVG and CSV of a figure, by ending. Equal plots give equal bytes."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(plot.header)
    writer.writerows([[f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row] for row in plot.rows])
    return {**render(plot, PRINT, ("png", "svg")), "csv": text.getvalue().encode()}


def render(plot: Plot, style: Style, forms: Sequence[str] = ("svg",)) -> dict[str, bytes]:
    """Draws a figure in one style, as "svg", "png" or both; returns the files' contents by form."""
    matplotlib = import_matplotlib()
    files = {}
    # Text becomes outlines, because an embedded image has no fonts of its own.
    with matplotlib.rc_context({**_settings(style), "svg.fonttype": "path", "svg.hashsalt": plot.name}):
        figure = _figure(plot, style)
        for form in forms:
            file = io.BytesIO()
            figure.savefig(file, format=form, dpi=PNG_DPI, metadata={"Date": None} if form == "svg" else None)
            files[form] = file.getvalue()
    return files


def _figure(plot: Plot, style: Style) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = textwrap.wrap(plot.title, 62) if style.titled else []
    figure = Figure(figsize=(WIDTH, plot.height + 0.22 * len(lines)), layout="constrained")
    FigureCanvasAgg(figure)
    plot.draw(figure.add_subplot(), style)
    if lines:
        figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure


def import_matplotlib() -> Any:
    """Imports matplotlib.

    Raises:
        ImportError: if it is not installed. The message names the extra that installs it.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install matplotlib") from error
    return matplotlib


def heat_map(
    axes: Any,
    style: Style,
    values: Sequence[Sequence[float]],
    *,
    label: str,
    top: float,
    colours: str = COLOURS,
    texts: Sequence[Sequence[str]] | None = None,
) -> None:
    """Draws a matrix in colours, with a colour bar. Cells with NaN stay empty.

    Args:
        axes: the matplotlib `Axes` to draw into.
        style: its colours.
        values: list of rows.
        label: label of the colour bar.
        top: value of the brightest colour, which larger values get too. The darkest colour is 0.
        colours: name of the colour map.
        texts: texts to write into the cells, dark on bright and bright on dark.
    """
    import numpy as np

    image = axes.imshow(np.array(values, dtype=float), cmap=colours, vmin=0, vmax=top, aspect="auto")
    image.set_interpolation("nearest")
    bar = axes.figure.colorbar(image, ax=axes, pad=0.02, fraction=0.05)
    bar.set_label(textwrap.fill(label, LABEL_WIDTH))
    bar.outline.set_visible(False)
    axes.set_frame_on(False)
    axes.grid(False)
    size = max(5.0, min(11.0, 44 / max(1, len(values))))
    for y, row in enumerate(texts or ()):
        for x, text in enumerate(row):
            red, green, blue, _ = image.cmap(image.norm(values[y][x]))
            bright = 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.45
            colour = style.ink if isnan(values[y][x]) else "#111" if bright else "#fff"
            axes.text(x, y, text, ha="center", va="center", fontsize=size, color=colour)


def draw_experts(
    axes: Any, style: Style, cells: Mapping[str, Mapping[int, float]], num_experts: int, **settings: Any
) -> None:
    """Draws `{path: {expert: value}}` as a heat map of layers and experts; `settings` are those of `heat_map`."""
    values = [[row.get(expert, nan) for expert in range(num_experts)] for row in cells.values()]
    heat_map(axes, style, values, **settings)
    axes.set(xlabel="expert", ylabel="layer")
    axes.set_yticks(*_layer_ticks(list(cells), most=9))


def draw_matrix(
    axes: Any, style: Style, names: Sequence[str], values: list[list[float]], form: str, **settings: Any
) -> None:
    """Draws a square matrix as a heat map, with names on both sides and its values, in a format, in the cells."""
    texts = [["–" if isnan(value) else format(value, form) for value in row] for row in values]
    heat_map(axes, style, values, texts=texts, **settings)
    short = max(map(len, names)) * len(names) < 40
    axes.set_xticks(range(len(names)), names, rotation=0 if short else 40, ha="center" if short else "right")
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(length=0)


def draw_layers(
    axes: Any,
    style: Style,
    paths: Sequence[str],
    lines: Mapping[str, Sequence[float]],
    reference: tuple[str, Sequence[float]],
    ylabel: str,
) -> None:
    """Draws lines over the layers, by name, and a broken line of reference."""
    for place, (name, values) in enumerate(lines.items()):
        axes.plot(range(len(values)), values, markersize=3.5, label=name, **style.look(place))
    axes.plot(range(len(paths)), reference[1], "--", color=style.muted, linewidth=1.2, label=reference[0])
    axes.set(ylim=(0, None), xlabel="layer", ylabel=ylabel)
    axes.set_xticks(*_layer_ticks(paths, most=14))
    axes.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0)


def _layer_ticks(paths: Sequence[str], most: int) -> tuple[list[int], list[str]]:
    """Places and labels of at most so many ticks on an axis of layers."""
    step = -(-len(paths) // most)
    return list(range(0, len(paths), step)), layer_labels(paths)[::step]


def _settings(style: Style) -> dict[str, Any]:
    return {
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "text.color": style.ink,
        "axes.labelcolor": style.ink,
        "axes.edgecolor": style.muted,
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "grid.color": style.muted,
        "grid.alpha": 0.22,
        "xtick.color": style.ink,
        "ytick.color": style.ink,
        "figure.facecolor": style.ground,
        "savefig.facecolor": style.ground,
        "legend.frameon": False,
        "lines.linewidth": 1.8,
        "lines.markersize": 5,
    }
