"""Carries out one trial: a copy of the base is trained on the chosen experts and measured."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn

from peft_esft import ESFTConfig, find_experts

import tasks
from cells import BATCH, Example, general_text, load
from choice import ATTENTION, Selection, select
from criteria import Scores, score
from methods import ATTENTION as ATTENTION_MODULES
from schedule import Trial
from store import Record


UNTRAINED, ALL, FULL = "base", "all", "full"
IGNORED = -100


class Workbench:
    """One base, and what its trials share.

    Args:
        base: a key of `tasks.BASES`.
        steps: of each training, in place of the trial's; None means those of the trial.
        rows: examples of each task's splits that are used; None means all.
    """

    def __init__(self, base: str, *, steps: int | None = None, rows: int | None = None) -> None:
        self.steps, self.rows = steps, rows
        self.base, self.tokenizer = tasks.load_base(base)
        self.base.set_experts_implementation("grouped_mm")
        self.paths = list(find_experts(self.base))
        self.windows = {name: texts[:rows] for name, texts in tasks.load_general().items()}
        self.scores = lru_cache(maxsize=24)(self._scores)

    def split(self, task: str, split: str) -> list[Example]:
        """The examples of a task."""
        return load(task, split)[: self.rows]

    def execute(self, trial: Trial, earlier: Iterable[Record] = ()) -> Record:
        """Trains and measures.

        Args:
            trial: what to do.
            earlier: results of this base; one of the same experts, learning rate and seed is taken over.

        Returns:
            The trial's fields and what came of it.
        """
        selection, cost = self._select(trial)
        experts = None if selection is None else [sorted(selection.get(path, ())) for path in self.paths]
        same = {"task": trial.task, "lr": trial.lr, "seed": trial.seed, "steps": trial.steps, "experts": experts}
        has_more = experts is None or trial.criterion == ATTENTION
        for record in earlier:
            if record["criterion"] == ATTENTION or has_more:
                continue
            if all(record[name] == value for name, value in same.items()):
                return {**record, **asdict(trial), **cost}
        torch.manual_seed(trial.seed)
        model = self._prepare(trial, selection)
        seconds = self._train(model, trial)
        return {
            **asdict(trial),
            **self._measure(model, trial.task),
            "experts": experts,
            "trained_parameters": sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
            "cpu_seconds": round(seconds, 1),
            **cost,
        }

    def _select(self, trial: Trial) -> tuple[Selection | None, Record]:
        if trial.criterion in (UNTRAINED, ALL, FULL):
            return None, {"scoring_seconds": 0.0, "scored_tokens": 0}
        scores = self.scores(trial.task, trial.seed)
        chosen = select(scores, trial.criterion, top_p=trial.top_p, seed=trial.seed, where=trial.where)
        parts = {"contrast": ("token", "general"), "sink": ("token", "first"), "sink_last": ("token", "first"),
                 ATTENTION: ("token",)}  # fmt: skip
        used = parts.get(trial.criterion, (trial.criterion,) if trial.criterion in scores.tables else ())
        cost = {
            "scoring_seconds": round(sum(scores.seconds[name] for name in used), 2),
            "scored_tokens": sum(scores.tokens[name] for name in used),
        }
        return chosen, cost

    def _prepare(self, trial: Trial, selection: Selection | None) -> nn.Module:
        model = copy.deepcopy(self.base)
        if trial.criterion == ATTENTION:
            return self._with_attention(model, trial, selection)
        if selection is not None:
            return get_peft_model(model, ESFTConfig(target_experts=selection, task_type="CAUSAL_LM"))
        model.requires_grad_(trial.criterion == FULL)
        if trial.criterion == ALL:
            for path in self.paths:
                model.get_submodule(path).requires_grad_(True)
        return model

    def _with_attention(self, model: nn.Module, trial: Trial, selection: Selection) -> nn.Module:
        """LoRA on the attention beside the experts, with as many parameters as the other half of the experts has."""
        token = select(self.scores(trial.task, trial.seed), "token", top_p=trial.top_p, seed=trial.seed)
        given_up = sum(map(len, token.values())) - sum(map(len, selection.values()))
        wanted = given_up * _expert_size(model.get_submodule(self.paths[0]))
        one = inject_adapter_in_model(_attention_lora(1), copy.deepcopy(self.base))
        rank = round(wanted / sum(weight.numel() for name, weight in one.named_parameters() if "lora_" in name))
        model = inject_adapter_in_model(_attention_lora(rank), model)
        model = get_peft_model(model, ESFTConfig(target_experts=selection, task_type="CAUSAL_LM"))
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.requires_grad_(True)
        return model

    def _train(self, model: nn.Module, trial: Trial) -> float:
        """CPU seconds of the steps."""
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not parameters:
            return 0.0
        optimizer = torch.optim.AdamW(parameters, lr=trial.lr, weight_decay=0.0)
        model.train()
        examples = self.split(trial.task, "train")
        batches = tasks.endless_batches(examples, self.tokenizer, BATCH[trial.task], trial.seed)
        started = time.process_time()
        for _, batch in zip(range(self.steps or trial.steps), batches, strict=False):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return time.process_time() - started

    def _measure(self, model: nn.Module, task: str) -> Record:
        measured, _ = general_text(self.windows, task)
        general = {
            domain: self._evaluate(model, [("", text) for text in texts])["loss"] for domain, texts in measured.items()
        }
        validation = self._evaluate(model, self.split(task, "validation"))
        return {
            **self._evaluate(model, self.split(task, "eval")),
            "validation": validation["loss"],
            "general": general,
        }

    def _evaluate(self, model: nn.Module, examples: list[Example]) -> dict[str, float]:
        return {name: round(value, 5) for name, value in evaluate(model, self.tokenizer, examples).items()}

    def _scores(self, task: str, seed: int) -> Scores:
        _, subtracted = general_text(self.windows, task)
        texts = [text for own in subtracted.values() for text in own]
        return score(self.base, self.tokenizer, self.split(task, "train"), texts, seed)


def _attention_lora(rank: int) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=ATTENTION_MODULES)


def _expert_size(experts: nn.Module) -> int:
    """Parameters of one expert."""
    return sum(weight[0].numel() for weight in experts.parameters())


@torch.no_grad()
def evaluate(model: nn.Module, tokenizer: Any, examples: list[Example]) -> dict[str, float]:
    """Measures a model on examples.

    Returns:
        `loss`: nats per completion token. `first` and `rest`: the same of each row's first completion token and of the
        others. `exact`: share of rows whose completion greedy decoding gives. `tokens`: share of tokens it gives.
    """
    model.eval()
    losses, firsts, hits, rows = [], [], [], []
    for batch in tasks.batches(examples, tokenizer, batch_size=50):
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1]
        counted = labels != IGNORED
        loss = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        right = logits.argmax(-1) == labels
        losses.append(loss[counted])
        firsts.append((counted.cumsum(1) == 1)[counted])
        hits.append(right[counted])
        rows.append((right | ~counted).all(1))
    loss, first, hit, row = (torch.cat(parts) for parts in (losses, firsts, hits, rows))
    found = {"loss": loss, "first": loss[first], "rest": loss[~first], "exact": row, "tokens": hit}
    return {name: float(values.double().mean()) for name, values in found.items()}
