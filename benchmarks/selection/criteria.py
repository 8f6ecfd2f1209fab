"""Scores of all experts for a task, by criterion; none of them enters the package without winning."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_esft import find_experts, score_experts

import tasks
from cells import Example


Table = dict[str, Tensor]  # scores [E] of each container, float64
Result = TypeVar("Result")
SCORED = 16_384  # tokens that are routed
ROWS = 64  # training rows that gradients are taken on
GRADIENT_BATCH = 8
IGNORED = -100


@dataclass(frozen=True)
class Scores:
    """What a selection may be made by.

    Attributes:
        tables: scores by criterion. `token`, `gate`: the paper's. `answers`: the token share of the positions whose
            output enters the loss. `general`: the token share on the text that `contrast` subtracts. `first`: the gate
            mass at the first position of the rows. `gradnorm`: the norm of the gradient of the loss with respect to an
            expert's weights. `gradnorm_rest`: the same of the loss without each row's first trained token.
            `saliency`: the sum of |gradient x weight|. `moved`: how far an expert's weights are moved by a step of
            AdamW on each of the batches that gradients are taken on, with all experts trained.
        seconds: CPU seconds that each took, those of one pass together.
        tokens: how many tokens went through the model for each.
    """

    tables: dict[str, Table]
    seconds: dict[str, float]
    tokens: dict[str, int]


def score(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    training: list[Example],
    general: list[str],
    seed: int,
) -> Scores:
    """Takes all scores on a sample of the training rows, another one for each seed."""
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(4242 + seed)).tolist()
    rows = [training[place] for place in order]
    scores = Scores({}, {}, {})

    def routed(batches: Iterable[tasks.Batch], **settings: object) -> tuple[Table, Table, int]:
        found = score_experts(base, batches, max_tokens=SCORED, progress=False, **settings)
        return found.token(), found.gate(), found.num_tokens

    def note(name: str, table: Table, seconds: float, tokens: int) -> None:
        scores.tables[name], scores.seconds[name], scores.tokens[name] = table, seconds, tokens

    (token, gate, count), seconds = _timed(lambda: routed(tasks.batches(rows, tokenizer)))
    note("token", token, seconds, count)
    note("gate", gate, seconds, count)
    texts = [("", text) for text in general]
    (share, _, count), seconds = _timed(lambda: routed(tasks.batches(texts, tokenizer)))
    note("general", share, seconds, count)
    predicting = rows[:512]
    through = sum(int(batch["attention_mask"].sum()) for batch in tasks.batches(predicting, tokenizer))
    (share, _, _), seconds = _timed(
        lambda: routed(map(_at_predicting_positions, tasks.batches(predicting, tokenizer)), answers_only=True)
    )
    note("answers", share, seconds, through)
    (_, gate, count), seconds = _timed(lambda: routed(_first_tokens(rows, tokenizer)))
    note("first", gate, seconds, count)
    batches = list(tasks.batches(rows[:ROWS], tokenizer, GRADIENT_BATCH))
    count = sum(int(batch["attention_mask"].sum()) for batch in batches)
    (norm, saliency), seconds = _timed(lambda: _gradients(base, batches))
    note("gradnorm", norm, seconds, count)
    note("saliency", saliency, seconds, count)
    (norm, _), seconds = _timed(lambda: _gradients(base, list(map(_without_first_label, batches))))
    note("gradnorm_rest", norm, seconds, count)
    moved, seconds = _timed(lambda: _movement(base, batches))
    note("moved", moved, seconds, count)
    return scores


def _timed(call: Callable[[], Result]) -> tuple[Result, float]:
    started = time.process_time()
    result = call()
    return result, round(time.process_time() - started, 2)


def _at_predicting_positions(batch: tasks.Batch) -> tasks.Batch:
    """Moves each label to the position whose output is compared with it."""
    labels = batch["labels"]
    moved = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], dim=1)
    return {**batch, "labels": moved}


def _first_tokens(rows: list[Example], tokenizer: PreTrainedTokenizerBase) -> Iterator[tasks.Batch]:
    """Each row's first token alone, which is routed as it is in its row: it sees no other."""
    for batch in tasks.batches(rows, tokenizer):
        at = batch["attention_mask"].argmax(dim=1, keepdim=True)
        tokens = batch["input_ids"].gather(1, at)
        yield {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def _without_first_label(batch: tasks.Batch) -> tasks.Batch:
    labels = batch["labels"].clone()
    counted = labels != IGNORED
    labels[counted & (counted.cumsum(dim=1) == 1)] = IGNORED
    return {**batch, "labels": labels}


def _gradients(base: PreTrainedModel, batches: list[tasks.Batch]) -> tuple[Table, Table]:
    """Norm of each expert's gradient of the mean loss, and the sum of |gradient x weight|."""
    model = copy.deepcopy(base).requires_grad_(False).train()
    weights = {path: list(model.get_submodule(path).requires_grad_(True).parameters()) for path in find_experts(model)}
    for batch in batches:
        (model(**batch).loss / len(batches)).backward()
    norm, saliency = {}, {}
    for path, own in weights.items():
        squares = sum(_sum_by_expert(weight.grad**2) for weight in own)
        norm[path] = squares.sqrt()
        saliency[path] = sum(_sum_by_expert((weight.grad * weight.detach()).abs()) for weight in own)
    return norm, saliency


def _movement(base: PreTrainedModel, batches: list[tasks.Batch]) -> Table:
    """Norm of the change of each expert's weights, by a step on each batch."""
    model = copy.deepcopy(base).requires_grad_(False).train()
    weights = {path: list(model.get_submodule(path).requires_grad_(True).parameters()) for path in find_experts(model)}
    optimizer = torch.optim.AdamW([weight for own in weights.values() for weight in own], lr=1e-3, weight_decay=0.0)
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {
        path: sum(
            _sum_by_expert((weight.detach() - before.detach()) ** 2)
            for weight, before in zip(own, base.get_submodule(path).parameters(), strict=True)
        ).sqrt()
        for path, own in weights.items()
    }


def _sum_by_expert(values: Tensor) -> Tensor:
    return values.flatten(1).double().sum(1)
