"""Defines `peft-esft report`, which writes a page on scores or adapters."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser("report", help="a page on what tasks use, or on what adapters train")
    parser.set_defaults(run=run, kinds={"paths": ("scores", "adapter")})
    add = parser.add_argument
    add("paths", nargs="+", type=Path, help="files of scores of one model, folders of adapters")
    add("--out", type=Path, default=Path("report.html"), help="the page (default: %(default)s)")
    add("--share", type=float, default=0.2, help="share that titles speak of (default: %(default)s)")
    add("--title", help="of the page")


def run(options: argparse.Namespace) -> tuple[Any, str]:
    """Writes the page, and its figures with their numbers."""
    from ..analysis import report

    out = report(options.paths, options.out, share=options.share, title=options.title)
    files = out.with_name(f"{out.stem}_files")
    record = {"out": str(out), "files": sorted(str(path) for path in files.iterdir())}
    return record, f"written to {out}, its figures and their numbers to {files}"
