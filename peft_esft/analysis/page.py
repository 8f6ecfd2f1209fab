"""Writes a page of HTML that needs no other file, for light and dark screens of any width."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from .drawing import DARK, LIGHT, Plot, draw_files, render


MEDIA_TYPES = {"png": "image/png", "svg": "image/svg+xml", "csv": "text/csv"}

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --muted: #5b626c; --ground: #fafaf8; --card: #fff; --line: #e2e2de;
  --link: #005a8f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6ea; --muted: #a2a9b3; --ground: #131518; --card: #1b1e22;
  --line: #33383f; --link: #7cc4f2; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1rem; line-height: 1.35; margin: 0 0 .5rem; text-wrap: balance; }
p { margin: .3rem 0; max-width: 46rem; }
a { color: var(--link); }
.muted, figcaption, footer { color: var(--muted); font-size: .875rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
figure { margin: 0; padding: 1rem; min-width: 0; background: var(--card); border: 1px solid var(--line);
  border-radius: .5rem; display: flex; flex-direction: column; }
figure img { width: 100%; height: auto; display: block; margin-bottom: .5rem; }
figcaption { flex: 1; display: flex; flex-direction: column; }
.downloads { margin-top: auto; padding-top: .4rem; white-space: nowrap; }
.scroll { overflow-x: auto; margin: .8rem 0 1rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .5rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .45rem .8rem; text-align: right; border-top: 1px solid var(--line); white-space: nowrap; }
thead th { border-top: 0; color: var(--muted); font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; font-weight: 600; position: sticky; left: 0;
  background: var(--card); }
footer { margin-top: 2.5rem; }
@media (max-width: 30rem) { figure { padding: .7rem; } th, td { padding: .4rem .5rem; } }
"""


@dataclass(frozen=True)
class Section:
    """A part of a page. The first row of its table has the names of the columns."""

    title: str
    text: str = ""
    table: Sequence[Sequence[str]] = ()
    figures: Sequence[Plot] = ()


def write_page(file: Path, title: str, lead: str, sections: Sequence[Section]) -> None:
    """Writes a page, and the files of its figures to the folder `<name>_files` beside it. All texts are escaped."""
    from .. import __version__

    folder = file.with_name(f"{file.stem}_files")
    folder.mkdir(parents=True, exist_ok=True)
    body = "".join(_section(section, folder) for section in sections)
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{escape(title)}</h1>\n<p class="muted">{escape(lead)}</p>\n{body}'
        f"<footer>Made by peft_esft {__version__}.</footer>\n</main>\n</body>\n</html>\n"
    )
    file.write_text(page, encoding="utf-8")


def _section(section: Section, folder: Path) -> str:
    text = f"<p>{escape(section.text)}</p>\n" if section.text else ""
    table = _table(section.table) if section.table else ""
    figures = "".join(_figure(plot, folder) for plot in section.figures)
    if figures:
        figures = f'<div class="figures">\n{figures}</div>\n'
    return f"<section>\n<h2>{escape(section.title)}</h2>\n{text}{table}{figures}</section>\n"


def _table(table: Sequence[Sequence[str]]) -> str:
    header = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table[0])
    rows = "".join(
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in rest)}</tr>\n'
        for first, *rest in table[1:]
    )
    # The tabindex makes the table scroll by keyboard too.
    return (
        f'<div class="scroll" tabindex="0"><table>\n<thead><tr>{header}</tr></thead>\n<tbody>\n{rows}</tbody>\n'
        "</table></div>\n"
    )


def _figure(plot: Plot, folder: Path) -> str:
    """The HTML of a figure, whose files are written to the folder."""
    name, title = escape(plot.name), escape(plot.title)
    light, dark = (_data_uri("svg", render(plot, style)["svg"]) for style in (LIGHT, DARK))
    links = []
    for ending, content in draw_files(plot).items():
        (folder / f"{plot.name}.{ending}").write_bytes(content)
        links.append(f'<a download="{name}.{ending}" href="{_data_uri(ending, content)}">{ending.upper()}</a>')
    return (
        f'<figure id="{name}">\n<h3>{title}</h3>\n'
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img alt="{title}" src="{light}"></picture>\n'
        f'<figcaption>{escape(plot.caption)}<div class="downloads">{" · ".join(links)}</div></figcaption>\n</figure>\n'
    )


def _data_uri(ending: str, content: bytes) -> str:
    return f"data:{MEDIA_TYPES[ending]};base64,{b64encode(content).decode()}"
