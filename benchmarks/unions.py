"""What two adapters keep of their gains when both are active, on the embedded model.

    python benchmarks/unions.py [--steps 200] [--seeds 3]

Adapters of four tasks are trained, at two learning rates; those of an earlier call are taken
from `--adapters`. Of each pair the union is made in several ways.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Iterator, Sequence
from itertools import combinations, islice
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers.utils import logging


sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "tiny_moe"))

from peft_esft import ESFTConfig, score_experts
from peft_esft.analysis import adapter_conflicts

from reporting import versions, write_results
from tasks import TASKS, batches, endless_batches, evaluate, load_base, load_task


LEARNING_RATES = (3e-4, 1e-3)
BATCH_SIZES = {"french": 8}  # windows; of the other tasks 16 examples are about as many tokens
EXAMPLES = {"french": 60}  # of the eval split; of the others 200
METRICS = {"french": "tokens"}  # the others: exact answers
COMBINATIONS: dict[str, dict[str, Any]] = {
    "sum": {"combination_type": "linear"},
    "ties": {"combination_type": "ties", "density": 0.5},
    "pruned": {"combination_type": "magnitude_prune", "density": 0.5},
}
SETTING = (
    "Embedded model, adapters of ESFT-Token with p 0.2. kept: what an adapter keeps of its gain over the base "
    "in the union, first task / second task, mean over the seeds (exact answers; French: right next tokens). sum: "
    "both active. ties, pruned: add_weighted_adapter with half of the changes. shared: experts per layer that both "
    "train. on the other's: share of a task's choices that fall on the experts of the other's adapter, in per cent."
)


class Bench:
    """Base, tasks and selections."""

    def __init__(self, tasks: Sequence[str]) -> None:
        self.base, self.tokenizer = load_base()
        self.training = {task: load_task(task, "train") for task in tasks}
        self.held_out = {task: load_task(task, "eval")[: EXAMPLES.get(task, 200)] for task in tasks}
        self.scores = {
            task: score_experts(self.base, batches(examples, self.tokenizer), max_tokens=32_768, progress=False)
            for task, examples in self.training.items()
        }
        self.configs = {
            task: ESFTConfig.from_scores(scores, metric="token", top_p=0.2, task_type="CAUSAL_LM")
            for task, scores in self.scores.items()
        }
        self.untrained = {task: self.measure(self.base, task) for task in tasks}

    def train(self, task: str, lr: float, seed: int, steps: int, out: Path) -> None:
        """Trains an adapter on a copy of the base, and saves it."""
        torch.manual_seed(seed)
        model = get_peft_model(copy.deepcopy(self.base), self.configs[task]).train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
        data = endless_batches(self.training[task], self.tokenizer, BATCH_SIZES.get(task, 16), seed)
        for batch in islice(data, steps):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(out)

    def with_adapters(self, folders: dict[str, Path]) -> PeftModel:
        """The base with trained adapters, by task."""
        (first, folder), *others = folders.items()
        model = PeftModel.from_pretrained(copy.deepcopy(self.base), folder, adapter_name=first)
        for task, folder in others:
            model.load_adapter(folder, adapter_name=task)
        return model

    def measure(self, model: nn.Module, task: str) -> float:
        return evaluate(model, self.tokenizer, self.held_out[task])[METRICS.get(task, "exact")]

    def gain(self, model: PeftModel, task: str, adapter: str) -> float:
        model.set_adapter(adapter)
        return self.measure(model, task) - self.untrained[task]

    def choices_on(self, task: str, other: str) -> float:
        """Share of a task's choices that fall on the experts of another task's adapter, mean over the layers."""
        chosen = self.configs[other].target_experts
        return mean(float(share[chosen[path]].sum()) for path, share in self.scores[task].token().items())


def rows_at(bench: Bench, models: list[PeftModel], lr: float) -> Iterator[dict[str, object]]:
    """A row for each pair of tasks; one model for each seed, its adapters named after their tasks."""
    alone = [{task: bench.gain(model, task, task) for task in bench.configs} for model in models]
    for pair in combinations(bench.configs, 2):
        shared = adapter_conflicts(models[0], *pair).shared_per_layer
        on_other = [100 * bench.choices_on(task, other) for task, other in (pair, pair[::-1])]
        row: dict[str, object] = {"lr": str(lr), "tasks": " / ".join(pair), "shared": shared}
        row["on the other's"] = _both(on_other, ".0f")
        row["gain alone (%)"] = _both([100 * mean(gains[task] for gains in alone) for task in pair], ".1f")
        for combination, settings in COMBINATIONS.items():
            kept = [_kept(bench, model, pair, gains, settings) for model, gains in zip(models, alone, strict=True)]
            row[f"kept, {combination} (%)"] = _both([100 * mean(own) for own in zip(*kept, strict=True)], ".0f")
        yield row
        print(row, flush=True)


def _kept(
    bench: Bench, model: PeftModel, pair: tuple[str, ...], alone: dict[str, float], settings: dict[str, Any]
) -> list[float]:
    model.base_model.add_weighted_adapter(list(pair), [1.0, 1.0], "union", **settings)
    kept = [bench.gain(model, task, "union") / alone[task] if alone[task] > 0 else math.nan for task in pair]
    model.delete_adapter("union")
    return kept


def _both(values: list[float], form: str) -> str:
    return " / ".join(format(value, form) for value in values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--adapters", type=Path, default=Path("demo_output/unions"))
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    bench = Bench(arguments.tasks)
    rows = []
    for lr in LEARNING_RATES:
        models = []
        for seed in range(arguments.seeds):
            folders = {
                task: arguments.adapters / f"{task}, {arguments.steps} steps, lr {lr}, seed {seed}"
                for task in bench.configs
            }
            for task, folder in folders.items():
                if not folder.exists():
                    bench.train(task, lr, seed, arguments.steps, folder)
            models.append(bench.with_adapters(folders))
        rows += rows_at(bench, models, lr)
    setting = f"{SETTING} {arguments.steps} steps, {arguments.seeds} seeds."
    write_results("unions", "What two adapters keep when both are active", setting, rows, versions())


if __name__ == "__main__":
    main()
