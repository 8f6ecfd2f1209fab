"""Measures a model on samples of a task: loss, tokens and whole answers that it gets right."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ..scoring.batches import check_batch, eval_mode, is_encoder_decoder, to_device, with_decoder_inputs
from ..scoring.counted_tokens import IGNORED_LABEL
from .forgetting import Batch, targets_of


@dataclass(frozen=True)
class Evaluation:
    """A model on samples of a task.

    Attributes:
        num_samples: samples with a token to predict.
        num_tokens: predicted tokens.
        loss: cross entropy, mean over the predicted tokens, in nats.
        token_accuracy: share of the predicted tokens that the model finds most probable.
        exact_match: share of the samples of which all predicted tokens are the most probable ones: greedy decoding,
            begun before the first of them, gives the whole answer.
    """

    num_samples: int
    num_tokens: int
    loss: float
    token_accuracy: float
    exact_match: float


@torch.inference_mode()
def evaluate(model: nn.Module, batches: Iterable[Batch]) -> Evaluation:
    """Measures a model on samples.

    Args:
        model: a model, or a `PeftModel`, of which the active adapters are measured.
        batches: batches as the model's forward takes them. If a batch has `labels`, the tokens whose label is not -100
            are predicted, otherwise those that `attention_mask` keeps.

    Returns:
        The measurement. Each token is predicted from the true tokens before it.

    Raises:
        ValueError: if there is no token to predict, or a batch is not a mapping that the model takes.

    Example:
        >>> evaluate(model, text_batches(rows, tokenizer, answers_only=True)).exact_match
    """
    samples = tokens = right_tokens = right_samples = 0
    loss = 0.0
    of_decoder = is_encoder_decoder(model)
    with eval_mode(model):
        for batch in batches:
            check_batch(batch)
            logits = _call(model, with_decoder_inputs(batch, model) if of_decoder else batch)
            # One sample at a time saves memory, because the vocabulary is large.
            for row, targets in zip(logits, targets_of(batch, of_decoder).to(logits.device), strict=True):
                counted = (targets != IGNORED_LABEL).nonzero()[:, 0]
                if not len(counted):
                    continue
                predicted, wanted = row[counted].float(), targets[counted]
                is_right = predicted.argmax(-1) == wanted
                loss += float(functional.cross_entropy(predicted, wanted, reduction="sum"))
                samples, tokens = samples + 1, tokens + len(counted)
                right_tokens, right_samples = right_tokens + int(is_right.sum()), right_samples + int(is_right.all())
    if not tokens:
        raise ValueError(
            "the batches have no token to predict; check that there are batches, and their labels and attention_mask"
        )
    return Evaluation(samples, tokens, loss / tokens, right_tokens / tokens, right_samples / samples)


def _call(model: Any, batch: Batch) -> Any:
    return model(**to_device(batch, model)).logits
