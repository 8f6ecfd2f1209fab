"""Defines `peft-esft eval`, which measures a base and its adapters side by side."""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .base_options import add_base_options
from .kinds import Kind, check_kind, kind_of


ADAPTERS: tuple[Kind, ...] = ("adapter", "other adapter")
USAGE = "peft-esft eval MODEL [ADAPTER ...] DATA [options]"


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "eval",
        help="measure a model and its adapters on held-out rows",
        usage=USAGE,
        description="Measures loss and exact answers of the base and of each adapter (ESFT, or any other of PEFT), "
        "what each one changed on general text, and, with --tasks, lm-eval's benchmarks. Rows that `train` held out "
        "of DATA, or a split of it that is named like a held-out one, are taken where there are such, else all rows.",
    )
    parser.set_defaults(run=run, kinds={"model": ("model",)})
    add, shown = parser.add_argument, "(default: %(default)s)"
    add("model", metavar="MODEL", help="folder or Hub name of the base model")
    add("paths", metavar="ADAPTER ... DATA", nargs="*", help="adapters, each FOLDER or NAME=FOLDER; then the rows")
    add("--general", metavar="DATA", action="append", default=[], help="other text, to see what is forgotten; repeats")
    add("--columns", metavar="KIND=COLUMN", action="append", default=[], help="what a column of DATA holds; repeats")
    add("--split", help="the split of DATA to measure on")
    add("--max-rows", type=int, default=1000, help=f"of DATA and of each general text, the first ones {shown}")
    add("--max-length", type=int, default=1024, help=f"cut rows to so many tokens {shown}")
    add("--batch-size", type=int, default=8, help=f"rows in a batch {shown}")
    add("--report", metavar="FILE", type=Path, help="write a page with the table and figures")
    add("--tasks", metavar="NAME,NAME", help="tasks of lm-eval to measure, too")
    add("--limit", type=int, help="samples of each lm-eval task (default: all)")
    add("--include-path", metavar="FOLDER", help="tasks of your own for lm-eval")
    add_base_options(parser)


def run(options: argparse.Namespace) -> tuple[Any, str]:
    """Measures, and shows the results as a table."""
    for name in ("max_rows", "max_length", "batch_size"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(options, name)}; it is at least 1")
    adapters, data = adapters_and_data(options)
    if data is None and (options.general or options.report):
        raise ValueError("--general and --report need DATA, the rows to measure on, after the adapters")
    if data is None and (options.columns or options.split):
        raise ValueError("--columns and --split are of DATA, the rows to measure on; give it after the adapters")
    if not options.tasks and (options.limit is not None or options.include_path):
        raise ValueError("--limit and --include-path are for lm-eval's tasks; name some with --tasks")
    if find_spec("datasets") is None:
        raise ImportError("peft-esft eval reads rows with datasets: pip install datasets")
    if options.tasks and find_spec("lm_eval") is None:
        raise ImportError("--tasks needs lm-eval: pip install lm-eval")
    if options.report is not None and not options.report.resolve().parent.is_dir():
        raise ValueError(f"--report is {options.report}; its folder does not exist")
    from .measuring import Measuring

    measuring = Measuring.prepare(options, adapters, data)
    record = measuring.run()
    if options.report is not None:
        measuring.write_page(options.report)
        record["report"] = str(options.report)
    text = measuring.describe()
    if options.report is not None:
        text += f"\nwritten to {options.report}"
    if data is not None and adapters and not options.general:
        print("peft-esft: give --general DATA to see what the adapters forget", file=sys.stderr)
    return record, text


def adapters_and_data(options: argparse.Namespace) -> tuple[list[str], str | None]:
    """Tells the adapters and the data in what was given after the model.

    Raises:
        ValueError: if there are no data and no tasks, or an adapter is none.
    """
    paths = list(options.paths)
    has_data = bool(paths) and not _is_adapter(paths[-1])
    if not has_data and not options.tasks:
        raise ValueError(f"DATA is missing, the rows to measure on: {USAGE}")
    data = paths.pop() if has_data else None
    for path in paths:
        check_kind(path, ADAPTERS)
    return paths, data


def _is_adapter(text: str) -> bool:
    path = Path(text if Path(text).exists() else text.rpartition("=")[2])
    return path.exists() and kind_of(path)[0] in ADAPTERS
