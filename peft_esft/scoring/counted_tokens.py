"""Finds which tokens of a batch count for scoring, and which sample each of them belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


IGNORED_LABEL = -100  # what the losses of transformers leave out


@dataclass
class TokenStream:
    """The tokens of one batch in the order in which the model's layers see them, sample after sample.

    Attributes:
        sample_of_token: int64 `[T]`, the sample of each token; -1 for a token that does not count.
        lengths: int64 `[samples]`, counted tokens of each sample.
        half_of_sample: int64 `[samples]`, 0 and 1 in turns.
        num_tokens: number of counted tokens.
        num_samples: number of samples with a counted token.
    """

    sample_of_token: Tensor
    lengths: Tensor
    half_of_sample: Tensor

    def __post_init__(self) -> None:
        self.num_tokens = int(self.lengths.sum())
        self.num_samples = int((self.lengths > 0).sum())
        self._by_device: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    @property
    def counts_all(self) -> bool:
        """True if no token is left out."""
        return self.num_tokens == self.sample_of_token.shape[0]

    def on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """`sample_of_token`, `lengths` and `half_of_sample` on a device, copied there once."""
        if device not in self._by_device:
            tensors = (self.sample_of_token, self.lengths, self.half_of_sample)
            self._by_device[device] = tuple(tensor.to(device) for tensor in tensors)  # type: ignore[assignment]
        return self._by_device[device]

    @classmethod
    def from_mask(cls, counts: Tensor, starts: Tensor | None, remaining: int, first_sample: int) -> TokenStream:
        """Makes the stream of a batch of rows, of which at most the first `remaining` tokens count.

        `counts` says which tokens count, and `starts` where samples start, both bool `[rows, length]`. None for
        `starts` means one sample for each row. `first_sample` is the number of the first sample, for the halves.
        """
        counts = counts & (counts.reshape(-1).cumsum(0).view_as(counts) <= remaining)
        if starts is None:
            starts = torch.zeros_like(counts)
            starts[:, :1] = True
        samples = (starts.reshape(-1).cumsum(0) - 1).view_as(counts)
        num_samples = int(starts.sum())
        sample_of_token = torch.where(counts, samples, -1).reshape(-1)
        lengths = torch.bincount(sample_of_token[sample_of_token >= 0], minlength=num_samples)
        return cls(sample_of_token, lengths, (first_sample + torch.arange(num_samples)) % 2)


def streams_of_batch(
    inputs: Mapping[str, Any], remaining: Mapping[str, int], first_sample: int, answers_only: bool
) -> dict[str, TokenStream]:
    """Makes the streams of a batch: "text", and "decoder" if the batch has tokens for the decoder.

    `remaining` says for each stream how many tokens may still be counted. With `answers_only`, a token counts if
    its output enters the loss: if the `labels` entry of the next token is not -100. In an encoder-decoder model the
    labels are those of the decoder's outputs, so each stands at its own token.

    Raises:
        ValueError: if a mask has another shape than the tokens, or `answers_only` finds no labels.
    """
    text = _first(inputs, "input_ids", "inputs_embeds")
    decoder = _first(inputs, "decoder_input_ids", "decoder_inputs_embeds")
    streams = {}
    for name, tokens, prefix in (("text", text, ""), ("decoder", decoder, "decoder_")):
        if tokens is None:
            continue
        mask = _on_cpu(inputs, f"{prefix}attention_mask", tokens.shape[:2])
        mask = counts = torch.ones(tokens.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
        if answers_only and (name == "decoder" or decoder is None):
            labels = _on_cpu(inputs, "labels", tokens.shape[:2])
            if labels is None:
                raise ValueError(f"answers_only needs labels in every batch; this one has {sorted(inputs)}")
            counts = mask & enters_loss(labels, is_decoder=name == "decoder")
        starts = _sample_starts(inputs, mask) if name == "text" else None
        streams[name] = TokenStream.from_mask(counts, starts, remaining[name], first_sample)
    return streams


def enters_loss(labels: Tensor, *, is_decoder: bool = False) -> Tensor:
    """Which tokens' outputs enter the loss, bool `[samples, length]`, see `streams_of_batch`.

    Args:
        labels: int64 `[samples, length]`.
        is_decoder: of an encoder-decoder model.
    """
    counted = labels != IGNORED_LABEL
    return counted if is_decoder else functional.pad(counted[:, 1:], (0, 1))


def _first(inputs: Mapping[str, Any], *names: str) -> Tensor | None:
    return next((inputs[name] for name in names if inputs.get(name) is not None), None)


def _on_cpu(inputs: Mapping[str, Any], name: str, shape: torch.Size) -> Tensor | None:
    tensor: Tensor | None = inputs.get(name)
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {tuple(shape)}")
    return None if tensor is None else tensor.cpu()


def _sample_starts(inputs: Mapping[str, Any], mask: Tensor) -> Tensor | None:
    """The first tokens of packed samples, bool: those at position 0, and the first of a row that is not padding."""
    positions = inputs.get("position_ids")
    if positions is None or positions.shape != mask.shape:
        return None
    starts: Tensor = mask & ((positions.cpu() == 0) | (mask.cumsum(1) == 1))
    return starts
