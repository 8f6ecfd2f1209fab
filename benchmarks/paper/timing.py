"""Training time of the methods over full fine-tuning's: single steps in turns, in one process, in CPU time.

python benchmarks/paper/timing.py [--base deepseek]
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers.utils import logging


HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent / "examples" / "tiny_moe")]

import tasks  # noqa: E402
from comparisons import COMPARISONS, Comparison  # noqa: E402
from methods import METHODS, Choice  # noqa: E402
from reporting import set_clock, time_in_turns  # noqa: E402
from training import Sizes, Workbench  # noqa: E402


ROUNDS = 5


def measure(bench: Workbench, task: str, methods: Sequence[str], rounds: int) -> dict[str, float]:
    """The fastest step of each method over that of full fine-tuning."""
    batch = next(bench.batches(task, seed=0))
    calls = {}
    for method in methods:
        calls[method] = _step(METHODS[method](copy.deepcopy(bench.base), Choice(bench.scores(task, None))), batch)
    fastest = time_in_turns(calls, rounds).minima()
    return {method: round(seconds / fastest["full"], 3) for method, seconds in fastest.items()}


def _step(model: nn.Module, batch: tasks.Batch) -> Callable[[], None]:
    """Forward, backward and AdamW step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0)
    model.train()

    def call() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return call


def write(comparison: Comparison, sizes: Sizes | None = None) -> None:
    """Measures a comparison's tasks and writes the ratios into its folder."""
    set_clock(argparse.Namespace(busy=True))
    bench = Workbench(sizes or Sizes(), comparison.base)
    names = (*comparison.protocol.tasks, *comparison.protocol.continued)
    ratios = {task: measure(bench, task, comparison.methods, ROUNDS) for task in names}
    comparison.folder.mkdir(parents=True, exist_ok=True)
    (comparison.folder / "timing.json").write_text(json.dumps(ratios, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", choices=COMPARISONS, default="olmoe")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    write(COMPARISONS[parser.parse_args().base])
