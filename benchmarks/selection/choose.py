"""Compares criteria for choosing experts at equal trained bytes, by the protocol in protocol.md.

    python benchmarks/selection/choose.py [--base deepseek] [--limit N]

Runs the trials that have no result yet; each result is one line, written when its trial ends, so the command can be
stopped at any time and started again. Two processes may run at once, one for each base. At the end the page is written
anew, which `choosing_page.py` does at any time.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from transformers.utils import logging


HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE), str(HERE.parent / "paper"), str(HERE.parent), str(ROOT / "examples" / "tiny_moe")]

import choosing_page  # noqa: E402
from cells import BASES  # noqa: E402
from reporting import RESULTS  # noqa: E402
from schedule import Trial, schedule, without_repeats  # noqa: E402
from store import Record, Store  # noqa: E402
from trials import Workbench  # noqa: E402


FOLDER = RESULTS / "selection"


def carry_out(bases: Iterable[str], folder: Path = FOLDER, limit: int | None = None) -> int:
    """Runs what has no result yet.

    Args:
        bases: keys of `tasks.BASES`.
        folder: of the results, a file for each base.
        limit: stop after so many new trials; None means none.

    Returns:
        How many trials were carried out.
    """
    stores = {base: Store(folder / f"{base}.jsonl") for base in BASES}
    benches: dict[str, Workbench] = {}

    done = 0
    for trial in without_repeats(schedule(), bases):
        store = stores[trial.base]
        if store.select(**asdict(trial)):
            continue
        if done == limit:
            break
        if trial.base not in benches:
            benches[trial.base] = Workbench(trial.base)
        started = time.monotonic()
        record = benches[trial.base].execute(trial, store.records)
        store.append(record)
        done += 1
        print(f"{time.monotonic() - started:4.0f} s  {_describe(record)}", flush=True)
    return done


def _describe(record: Record) -> str:
    fields = (record[name] for name in Trial.__dataclass_fields__)
    return " ".join(map(str, fields)) + f": {record['loss']:.3f}, without the first token {record['rest']:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", choices=BASES, help="this one alone, and write no page")
    parser.add_argument("--limit", type=int, help="stop after so many new trials")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    carry_out([arguments.base] if arguments.base else BASES, limit=arguments.limit)
    if not arguments.base:
        choosing_page.main()


if __name__ == "__main__":
    main()
