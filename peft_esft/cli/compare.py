"""Defines `peft-esft compare`, which trains a model in several ways on the same rows and compares them."""

from __future__ import annotations

import argparse
import sys
from contextlib import redirect_stdout
from typing import Any

from .train import OWN, add_training_options, check_libraries


COMPARED = {
    "--general": ("DATA", "other text, to see what is forgotten"),
    "--ways": ("WAY", "of esft, lora and full, those to train (default: all three)"),
    "--top-ps": ("P", "ESFT is trained with the experts of each share (default: 0.1 0.2 0.4)"),
    "--lora-rank": ("R", "rank of LoRA on attention (default: 8)"),
    "--lora-learning-rate": ("X", "(default: 1e-4, the paper's)"),
    "--full-learning-rate": ("X", "(default: 3e-5, the paper's)"),
    "--max-rows": ("N", "held-out rows, and rows of each general text, to measure on (default: 1000)"),
}
NOT_COMPARED = ("--top-p", "--budget")
USAGE = "peft-esft compare MODEL DATA --out FOLDER [options]"


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "compare",
        help="train in several ways on the same rows, and compare cost and result",
        usage=USAGE,
        description="Trains ESFT at several shares, LoRA on attention and, if its memory fits, the full model: on "
        "the same rows, in the same order, for as many steps. Says what each took and gave. The same command goes on "
        "after an interruption.",
        epilog="All other options of `peft-esft train` are options too. --learning-rate is that of ESFT.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    parser.add_argument("model", nargs="?", metavar="MODEL", help="folder or Hub name of the model")
    parser.add_argument("data", nargs="?", metavar="DATA", help="as for `train`")
    parser.add_argument("--out", metavar="FOLDER", help="new folder for adapters, results and a page")
    add_training_options(parser, {name: text for name, text in OWN.items() if name not in NOT_COMPARED} | COMPARED)


def run(options: argparse.Namespace) -> tuple[Any, str]:
    """Trains and measures what has no result yet, and shows all results as a table."""
    check_libraries("compare")
    from .comparing import Comparison
    from .train_options import CompareOptions, parse

    own, settings = parse(CompareOptions, options.arguments)
    try:
        with redirect_stdout(sys.stderr):  # the libraries' logs
            comparison = Comparison.prepare(own, settings)
            comparison.run()
    except KeyboardInterrupt as stopped:
        if stopped.args:
            print(f"peft-esft: {stopped}; go on with the same command", file=sys.stderr)
        raise
    return comparison.record(), comparison.describe()
