"""Draws a plot in light and dark and writes it as SVG, PNG and CSV. The only file that imports matplotlib."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any


WIDTH = 5.4  # inches: on a phone, 380 pixels wide, text of 10 points is still 10 pixels high
PNG_DPI = 220


@dataclass(frozen=True)
class Style:
    """Colours of a drawing.

    Attributes:
        ink: text and axes.
        muted: lines of reference, grid.
        ground: background; "none" lets the page's show.
        series: colours of the series, told apart by all common kinds of colour vision (Okabe and Ito's set, in the
            dark form lightened).
        titled: the title is drawn too, for files that stand alone.
    """

    ink: str
    muted: str
    ground: str
    series: tuple[str, ...]
    titled: bool = False


LIGHT = Style("#1c1e21", "#767c85", "none", ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"))
DARK = Style("#e4e6ea", "#8d949e", "none", ("#56B4E9", "#FF8A3D", "#2BC79A", "#E59CC6", "#F0B429", "#9CD3F5"))
PRINT = replace(LIGHT, ground="white", titled=True)

MARKERS = ("o", "s", "^", "D", "v", "P")
COLOURS = "cividis"  # of equal steps in lightness for all common kinds of colour vision


@dataclass(frozen=True)
class Plot:
    """One figure: what it shows, in words, in numbers and as a drawing.

    Attributes:
        name: of its files.
        title: what is to be seen.
        caption: how to read it.
        header: names of the columns of its numbers.
        rows: its numbers.
        draw: draws into a matplotlib `Axes`.
        height: of the drawing, inches.
    """

    name: str
    title: str
    caption: str
    header: tuple[str, ...]
    rows: Sequence[Sequence[Any]]
    draw: Callable[[Any, Style], None]
    height: float = 3.4

    def csv(self) -> str:
        """The numbers as CSV."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.header)
        writer.writerows([[_number(cell) for cell in row] for row in self.rows])
        return text.getvalue()


@dataclass(frozen=True)
class Drawn:
    """A figure in all its forms.

    Attributes:
        plot: what was drawn.
        light, dark: SVG for a page, without title and ground.
        files: by ending, the SVG and PNG that stand alone, and the CSV.
    """

    plot: Plot
    light: bytes
    dark: bytes
    files: dict[str, bytes]


def draw(plot: Plot) -> Drawn:
    """Draws a figure in all its forms; equal plots give equal bytes."""
    files = {**render(plot, PRINT, ("png", "svg")), "csv": plot.csv().encode()}
    return Drawn(plot, render(plot, LIGHT)["svg"], render(plot, DARK)["svg"], files)


def render(plot: Plot, style: Style, forms: Sequence[str] = ("svg",)) -> dict[str, bytes]:
    """Draws a figure in one style.

    Args:
        plot: what to draw.
        style: its colours.
        forms: "svg" or "png".

    Returns:
        The files' contents by form.
    """
    matplotlib = import_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    files = {}
    # Text as outlines: an embedded image has no fonts of its own.
    with matplotlib.rc_context({**_settings(style), "svg.fonttype": "path", "svg.hashsalt": plot.name}):
        lines = textwrap.wrap(plot.title, 62) if style.titled else []
        figure = Figure(figsize=(WIDTH, plot.height + 0.22 * len(lines)), layout="constrained")
        FigureCanvasAgg(figure)
        plot.draw(figure.add_subplot(), style)
        if lines:
            figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=11, fontweight="bold")
        for form in forms:
            file = io.BytesIO()
            figure.savefig(file, format=form, dpi=PNG_DPI, metadata={"Date": None} if form == "svg" else None)
            files[form] = file.getvalue()
    return files


def import_matplotlib() -> Any:
    """matplotlib.

    Raises:
        ImportError: naming the extra that installs it.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'peft-esft[plot]'") from error
    return matplotlib


def heat_map(axes: Any, style: Style, values: Any, *, label: str, top: float, colours: str = COLOURS) -> Any:
    """Draws a matrix from 0 to `top`, NaN left empty, with its scale.

    Args:
        axes: where.
        style: its colours.
        values: list of rows.
        label: of the scale.
        top: value of the brightest colour; larger ones get it too.
        colours: name of the colour map.
    """
    import numpy as np

    image = axes.imshow(np.array(values, dtype=float), cmap=colours, vmin=0, vmax=top, aspect="auto")
    image.set_interpolation("nearest")
    bar = axes.figure.colorbar(image, ax=axes, pad=0.02, fraction=0.05)
    bar.set_label(label)
    bar.outline.set_visible(False)
    axes.set_frame_on(False)
    axes.grid(False)
    return image


def write_in_cells(axes: Any, image: Any, values: Sequence[Sequence[float]], texts: Sequence[Sequence[str]]) -> None:
    """Writes into the cells of a heat map, dark on bright and bright on dark."""
    size = max(5.0, min(11.0, 44 / max(1, len(values))))
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            red, green, blue, _ = image.cmap(image.norm(value))
            dark = 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.45
            axes.text(x, y, texts[y][x], ha="center", va="center", fontsize=size, color="#111" if dark else "#fff")


def thinned_ticks(labels: Sequence[str], most: int = 14) -> tuple[list[int], list[str]]:
    """Places and labels of at most so many ticks."""
    step = -(-len(labels) // most)
    places = list(range(0, len(labels), step))
    return places, [labels[place] for place in places]


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


def _number(cell: Any) -> Any:
    return f"{cell:.6g}" if isinstance(cell, float) else cell
