"""Compares ESFT with other ways to train, on an embedded model, in the form of the paper's experiments.

    python benchmarks/paper/run.py [--base deepseek] [--task NAME ...] [--limit N]

Runs what has no result yet; each run's result is written when it ends, so the command can be stopped at any time and
started again. Several may run at once on different tasks. At the end the tables and figures are written anew, which
`publish.py` does at any time.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path

from transformers.utils import logging


HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent / "examples" / "tiny_moe")]

import continued  # noqa: E402
import publish  # noqa: E402
import timing  # noqa: E402
from comparisons import COMPARISONS, Comparison  # noqa: E402
from plan import Run  # noqa: E402
from store import Store  # noqa: E402
from training import Sizes, Workbench  # noqa: E402


def carry_out(comparison: Comparison, sizes: Sizes, limit: int | None = None) -> int:
    """Runs what has no result yet.

    Args:
        comparison: which runs there are, and the folder that results are appended in.
        sizes: of the data.
        limit: stop after so many new runs; None means none.

    Returns:
        How many runs were carried out.
    """
    store = Store(comparison.folder / "runs.jsonl")
    bench: Workbench | None = None
    done = 0
    for run in comparison.plan(comparison.protocol, store):
        if store.select(**asdict(run)):
            continue
        if limit is not None and done == limit:
            break
        bench = bench or Workbench(sizes, comparison.base)
        started = time.monotonic()
        record = bench.execute(run)
        store.append(record)
        done += 1
        own = record["tasks"][run.task]
        print(f"{time.monotonic() - started:5.0f} s  {describe(run)}  {own}", flush=True)
    return done


def describe(run: Run) -> str:
    """The fields that are set, in one line."""
    return ", ".join(f"{name} {value}" for name, value in asdict(run).items() if value is not None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", choices=COMPARISONS, default="olmoe")
    parser.add_argument("--task", nargs="+", choices=continued.ALL, help="run these alone, and publish nothing")
    parser.add_argument("--limit", type=int, help="stop after so many new runs")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    comparison = COMPARISONS[arguments.base]
    if arguments.task:
        part = replace(comparison, protocol=comparison.protocol.only(arguments.task))
        carry_out(part, Sizes(), arguments.limit)
        return
    carry_out(comparison, Sizes(), arguments.limit)
    if not (comparison.folder / "timing.json").exists():
        timing.write(comparison)
    publish.main()


if __name__ == "__main__":
    main()
