"""Measures what an adapter forgets: loss on other text before and after, and the distance to the base."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional

from ..scoring.batches import check_batch, eval_mode, is_encoder_decoder, to_device, with_decoder_inputs
from ..scoring.counted_tokens import IGNORED_LABEL


Batch = Mapping[str, Any]


@dataclass(frozen=True)
class ForgettingPoint:
    """Base and adapted model on one kind of text. All values are means over its predicted tokens.

    Attributes:
        num_tokens: predicted tokens.
        loss_before, loss_after: cross entropy of the base and of the adapted model, in nats.
        kl: Kullback-Leibler divergence KL(base || adapted) of the predictions, in nats.
        same_top: share of tokens for which both models find the same token most probable.
    """

    num_tokens: int
    loss_before: float
    loss_after: float
    kl: float
    same_top: float

    @property
    def loss_change(self) -> float:
        """`loss_after - loss_before`: above 0 where the model has forgotten."""
        return self.loss_after - self.loss_before


@dataclass(frozen=True)
class Forgetting:
    """Base and adapted model on each kind of text; `print` it.

    Attributes:
        points: the measurements, by name of the text.
    """

    points: dict[str, ForgettingPoint]

    def __str__(self) -> str:
        width = max([len("text"), *map(len, self.points)])
        lines = [f"{'text':<{width}}  loss before  after   change  KL to the base  same top token"]
        lines += [
            f"{name:<{width}}  {point.loss_before:<11.3f}  {point.loss_after:<6.3f}  {point.loss_change:<+6.3f}  "
            f"{point.kl:<14.4f}  {point.same_top:.1%}"
            for name, point in self.points.items()
        ]
        return "\n".join(lines)


def forgetting(
    model: nn.Module,
    texts: Mapping[str, Iterable[Batch]] | Iterable[Batch],
    *,
    base: nn.Module | None = None,
) -> Forgetting:
    """Compares an adapted model with its base on text that it was not trained on.

    Args:
        model: a `PeftModel` with any kind of adapter; the active one is measured.
        texts: batches as the model's forward takes them, or `{name: batches}`. If a batch has `labels`, the tokens
            whose label is not -100 are predicted, otherwise those that `attention_mask` keeps. Encoder-decoder models
            need `labels`, which are what their decoder predicts.
        base: the model before training, of the same vocabulary; None means `model` with its adapters disabled.

    Returns:
        Loss before and after, and distance to the base, for each kind of text.

    Raises:
        ValueError: if there is neither an adapter to disable nor `base`, adapters are merged into what would be the
            base, a text has no token to predict, or a batch is not a mapping that the model takes.

    Example:
        >>> print(forgetting(model, {"general": general_batches, "code": code_batches}))
    """
    if base is None and not hasattr(model, "disable_adapter"):
        raise ValueError(f"{type(model).__name__} has no adapters to disable; give the model before training as base")
    if base is None and any(module.merged for module in model.modules() if isinstance(module, BaseTunerLayer)):
        raise ValueError(
            "adapters are merged into the base; call unmerge_adapter first, or give the model before training as base"
        )
    named = texts if isinstance(texts, Mapping) else {"text": texts}
    with eval_mode(*(module for module in (model, base) if module is not None)):
        return Forgetting({name: _measure(model, base, name, batches) for name, batches in named.items()})


@torch.inference_mode()
def _measure(model: Any, base: Any, name: str, batches: Iterable[Batch]) -> ForgettingPoint:
    total = torch.zeros(4, dtype=torch.float64)
    num_tokens = 0
    of_decoder = is_encoder_decoder(model)
    for batch in batches:
        check_batch(batch)
        inputs = to_device(with_decoder_inputs(batch, model) if of_decoder else batch, model)
        targets = targets_of(batch, of_decoder)
        after = model(**inputs).logits
        with model.disable_adapter() if base is None else nullcontext():
            before = (model if base is None else base)(**inputs).logits.to(after.device)
        # One sample at a time saves memory, because the vocabulary is large.
        for row_before, row_after, row_targets in zip(before, after, targets.to(after.device), strict=True):
            counted = (row_targets != IGNORED_LABEL).nonzero()[:, 0]
            total += _sums(row_before[counted], row_after[counted], row_targets[counted]).cpu()
            num_tokens += len(counted)
    if num_tokens == 0:
        raise ValueError(
            f"{name!r} has no token to predict; check that there are batches, and their labels and attention_mask"
        )
    loss_before, loss_after, kl, same_top = (total / num_tokens).tolist()
    return ForgettingPoint(num_tokens, loss_before, loss_after, kl, same_top)


def targets_of(inputs: Mapping[str, Any], of_decoder: bool) -> Tensor:
    """The tokens to predict, int64 `[samples, length]`, or `length - 1` for the next token; -100 does not count."""
    labels: Tensor | None = inputs.get("labels")
    if of_decoder:
        # The decoder's input is the labels moved by one, so they are in place already.
        if labels is None:
            raise ValueError(f"a batch for an encoder-decoder model needs labels to predict; it has {sorted(inputs)}")
        return labels
    if labels is None:
        labels = inputs["input_ids"]
        if inputs.get("attention_mask") is not None:
            # The first token of a sample has nothing before it, though padding may stand there.
            mask = inputs["attention_mask"].bool()
            counted = mask & functional.pad(mask[:, :-1], (1, 0))
            labels = torch.where(counted, labels, IGNORED_LABEL)
    return labels[:, 1:]


def _sums(before: Tensor, after: Tensor, targets: Tensor) -> Tensor:
    """Sums the losses before and after, the divergence, and equal top tokens, of logits `[T, V]`; float64 `[4]`."""
    log_before, log_after = before.float().log_softmax(-1), after.float().log_softmax(-1)
    values = [
        functional.nll_loss(log_before, targets, reduction="none"),
        functional.nll_loss(log_after, targets, reduction="none"),
        functional.kl_div(log_after, log_before, log_target=True, reduction="none").sum(-1),
        log_before.argmax(-1) == log_after.argmax(-1),
    ]
    return torch.stack([value.double().sum() for value in values])
