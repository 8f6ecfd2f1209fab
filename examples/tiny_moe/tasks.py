"""The embedded models and their tasks: loading, batching, measuring. What the demo, examples and benchmarks share."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


FOLDER = Path(__file__).parent
BASES = {"olmoe": FOLDER / "model", "deepseek": FOLDER / "deepseek"}
TASKS = ("signatures", "sections", "verses", "french")
MAX_LENGTH = 192
IGNORED = -100

Batch = dict[str, Tensor]


def load_base(name: str = "olmoe") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """An embedded model in fp32, and its tokenizer; both have the same vocabulary.

    Args:
        name: a key of `BASES`: the embedded model, or the one with the paper's architecture and shared experts.
    """
    model = AutoModelForCausalLM.from_pretrained(BASES[name], dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(BASES[name])


def load_task(name: str, split: str) -> list[tuple[str, str]]:
    """The (prompt, completion) pairs of a task; split is "train" or "eval"."""
    records = _read(f"{name}.jsonl")
    return [(record["prompt"], record["completion"]) for record in records if record["split"] == split]


def load_general() -> dict[str, list[str]]:
    """Held-out text of the pretraining's domains, by domain, to measure forgetting on."""
    windows: dict[str, list[str]] = {}
    for record in _read("general.jsonl"):
        windows.setdefault(record["domain"], []).append(record["text"])
    return windows


def make_batch(examples: list[tuple[str, str]], tokenizer: PreTrainedTokenizerBase) -> Batch:
    """Tokens `[samples, length]`, padded on the left; labels are the completion and the end of the text."""
    rows = []
    for prompt, completion in examples:
        prompt_ids = tokenizer(prompt)["input_ids"] if prompt else [tokenizer.eos_token_id]
        ids = (prompt_ids + tokenizer(completion)["input_ids"] + [tokenizer.eos_token_id])[:MAX_LENGTH]
        rows.append((ids, [IGNORED] * len(prompt_ids) + ids[len(prompt_ids) :]))
    length = max(len(ids) for ids, _ in rows)
    return {
        "input_ids": torch.tensor([[tokenizer.pad_token_id] * (length - len(ids)) + ids for ids, _ in rows]),
        "attention_mask": torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids, _ in rows]),
        "labels": torch.tensor([[IGNORED] * (length - len(ids)) + labels for ids, labels in rows]),
    }


def batches(
    examples: list[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, batch_size: int = 16, seed: int | None = None
) -> Iterator[Batch]:
    """One pass over the examples; shuffled if a seed is given."""
    order = list(range(len(examples)))
    if seed is not None:
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    for start in range(0, len(order), batch_size):
        yield make_batch([examples[index] for index in order[start : start + batch_size]], tokenizer)


def endless_batches(
    examples: list[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, batch_size: int = 16, seed: int = 0
) -> Iterator[Batch]:
    """Pass after pass over the examples, each in another order: that of the seeds from `1000 * seed` on."""
    for order in count(1000 * seed):
        yield from batches(examples, tokenizer, batch_size, seed=order)


def train(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[tuple[str, str]],
    steps: int = 200,
    learning_rate: float = 1e-3,
) -> None:
    """Trains what is trainable of a model, by a plain loop with AdamW and a constant learning rate."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    model.train()
    for batch in islice(endless_batches(examples, tokenizer), steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def evaluate(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, examples: list[tuple[str, str]]
) -> dict[str, float]:
    """Measures a model on a task.

    Returns:
        `loss`: nats per completion token. `exact`: share of examples that greedy decoding answers exactly, which is
        that every token is the most probable one after the true ones before it. `tokens`: share of such tokens.
    """
    was_training = model.training
    model.eval()
    loss = correct = total = exact = 0.0
    for batch in batches(examples, tokenizer, batch_size=50):
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1]
        loss += float(nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
        right = logits.argmax(-1) == labels
        counted = labels != IGNORED
        correct += int((right & counted).sum())
        total += int(counted.sum())
        exact += int((right | ~counted).all(1).sum())
    model.train(was_training)
    return {"loss": loss / total, "exact": exact / len(examples), "tokens": correct / total}


def general_loss(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """Nats per token on the held-out general text, by domain."""
    return {
        domain: evaluate(model, tokenizer, [("", window) for window in windows])["loss"]
        for domain, windows in load_general().items()
    }


def _read(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (FOLDER / "tasks" / name).read_text().splitlines()]
