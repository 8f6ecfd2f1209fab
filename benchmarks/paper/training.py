"""Carries out one run: a copy of the base is trained by a method and measured."""

from __future__ import annotations

import copy
import math
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peft_esft import ExpertScores, score_experts
from peft_esft.analysis import co_occurrence, group_experts

import tasks
from coarse_routing import coarse_routing
from continued import load
from methods import METHODS, Choice, trained_experts
from plan import Run
from store import Record


ACTIVE_EXPERTS = 8  # for each token of the coarse models: an eighth of 64, which all group sizes divide


@dataclass(frozen=True)
class Sizes:
    """How many examples are trained on and measured with.

    Attributes:
        batch: examples of a batch, by task: about as many tokens each.
        validation: examples at the beginning of the training split, which are kept out of training and scoring.
        own: examples of the eval split that measure the trained task.
        other: the same for a task that was not trained.
        windows: of general text for each domain.
        scored: tokens that experts are chosen by.
    """

    batch: dict[str, int] = field(
        default_factory=lambda: {
            "verses": 16,
            "french": 8,
            "signatures": 16,
            "sections": 8,
            "scripture": 16,
            "russian": 8,
        }
    )
    validation: dict[str, int] = field(
        default_factory=lambda: {
            "verses": 200,
            "french": 60,
            "signatures": 100,
            "sections": 100,
            "scripture": 200,
            "russian": 100,
        }
    )
    own: dict[str, int] = field(
        default_factory=lambda: {
            "verses": 200,
            "french": 100,
            "signatures": 200,
            "sections": 200,
            "scripture": 200,
            "russian": 200,
        }
    )
    other: dict[str, int] = field(
        default_factory=lambda: {"verses": 100, "french": 30, "signatures": 60, "sections": 60}
    )
    windows: int = 24
    scored: int = 32_768


class Workbench:
    """The base, the data, and what all runs share.

    Args:
        sizes: see there.
        base: a key of `tasks.BASES`.
    """

    def __init__(self, sizes: Sizes, base: str = "olmoe") -> None:
        self.sizes = sizes
        self.base, self.tokenizer = tasks.load_base(base)
        self.base.set_experts_implementation("grouped_mm")
        general = tasks.load_general()
        self.general = {domain: [("", text) for text in texts[: sizes.windows]] for domain, texts in general.items()}
        self.scores = lru_cache(self._scores)
        self.groups = lru_cache(self._groups)

    def split(self, task: str) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
        """Examples to train on and to choose the learning rate by, both of the training split."""
        examples = load(task, "train")
        return examples[self.sizes.validation[task] :], examples[: self.sizes.validation[task]]

    def coarse(self, model: nn.Module, size: int | None) -> AbstractContextManager[None]:
        """Makes a model's routers choose groups, for the time of the context."""
        if size is None:
            return nullcontext()
        return coarse_routing(model, self.groups(size), groups_per_token=ACTIVE_EXPERTS // size)

    def execute(self, run: Run) -> Record:
        """Trains and measures.

        Returns:
            The run's fields and what came of it; a loss that is not finite is None.
        """
        torch.manual_seed(run.seed)
        model = copy.deepcopy(self.base)
        with self.coarse(model, run.group_size):
            groups = None if run.group_size is None else self.groups(run.group_size)
            scores = self.scores(run.task, run.group_size)
            model = METHODS[run.method](model, Choice(scores, run.seed, run.top_p, groups))
            seconds = self._train(model, run)
            record = {**asdict(run), **self._measure(model, run), "cpu_seconds": round(seconds, 2)}
            return {**record, **_cost(model, run)}

    def batches(self, task: str, seed: int) -> Any:
        """Batches without end; each pass over the examples is in another order."""
        examples, _ = self.split(task)
        return tasks.endless_batches(examples, self.tokenizer, self.sizes.batch[task], seed)

    def _train(self, model: nn.Module, run: Run) -> float:
        """CPU seconds of the steps."""
        if not run.steps:
            return 0.0
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=run.lr, weight_decay=0.0)
        model.train()
        seconds = 0.0
        for _, batch in zip(range(run.steps), self.batches(run.task, run.seed), strict=False):
            started = time.process_time()
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds += time.process_time() - started
        return seconds

    def _measure(self, model: nn.Module, run: Run) -> Record:
        _, validation = self.split(run.task)
        measured = {}
        for task in dict.fromkeys((*tasks.TASKS, run.task)):
            count = (self.sizes.own if task == run.task else self.sizes.other)[task]
            measured[task] = self._evaluate(model, load(task, "eval")[:count])
        return {
            "validation": self._evaluate(model, validation),
            "tasks": measured,
            "general": {domain: self._evaluate(model, windows) for domain, windows in self.general.items()},
        }

    def _evaluate(self, model: nn.Module, examples: list[tuple[str, str]]) -> dict[str, float | None]:
        found = tasks.evaluate(model, self.tokenizer, examples)
        return {name: round(value, 5) if math.isfinite(value) else None for name, value in found.items()}

    def _scores(self, task: str, group_size: int | None) -> ExpertScores:
        examples, _ = self.split(task)
        with self.coarse(self.base, group_size):
            return score_experts(
                self.base, tasks.batches(examples, self.tokenizer), max_tokens=self.sizes.scored, progress=False
            )

    def _groups(self, size: int) -> dict[str, list[list[int]]]:
        windows = [window for texts in self.general.values() for window in texts]
        return group_experts(co_occurrence(self.base, tasks.batches(windows, self.tokenizer)), size)


def _cost(model: nn.Module, run: Run) -> Record:
    """What is trained, and the bytes of weights that are saved."""
    if not run.steps:
        return {"trained_parameters": 0, "saved_bytes": 0, "experts": None}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        saved = sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors"))
    experts = trained_experts(model)
    return {
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "saved_bytes": saved,
        "experts": None if experts is None else {path: len(ids) for path, ids in experts.items()},
    }
