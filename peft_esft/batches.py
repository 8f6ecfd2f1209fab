"""From text to the batches that a model takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .token_streams import IGNORED_LABEL


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def text_batches(
    data: Iterable[str | Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 8,
    max_length: int = 4096,
) -> Iterator[dict[str, Any]]:
    """Tokenizes texts or conversations into padded batches, lazily.

    Args:
        data: strings, or rows with a `text` or a `messages` entry, as a list or a `datasets.Dataset`. The tokenizer's
            chat template turns `messages` into text.
        tokenizer: the model's own.
        batch_size: samples in a batch.
        max_length: samples are cut to so many tokens.

    Yields:
        `input_ids` and `attention_mask`, int64 `[samples, length]`.

    Raises:
        ValueError: if a row is neither text nor messages, or there is nothing to pad with.

    Example:
        >>> scores = score_experts(model, text_batches(["some text", "some more"], tokenizer))
    """
    rows = iter(data)
    while texts := [_as_text(row, tokenizer) for row in islice(rows, batch_size)]:
        # A chat template writes the special tokens itself.
        encoded = [
            tokenizer(text, add_special_tokens=not templated, truncation=True, max_length=max_length)["input_ids"]
            for text, templated in texts
        ]
        if tokenizer.pad_token_id is None and len({len(ids) for ids in encoded}) > 1:
            raise ValueError(
                "the tokenizer has no pad token, so samples of different lengths cannot share a batch; set "
                "tokenizer.pad_token = tokenizer.eos_token (padding is masked), or use batch_size=1"
            )
        padded = tokenizer.pad({"input_ids": encoded}, return_tensors="pt", padding=tokenizer.pad_token_id is not None)
        yield dict(padded)


def batch_size_of(inputs: Mapping[str, Any]) -> int:
    """The number of samples in a batch."""
    for value in inputs.values():
        if isinstance(value, Tensor) and value.dim() > 0:
            return value.shape[0]
    raise ValueError(f"a batch holds no tensor, only {sorted(inputs)}")


def is_encoder_decoder(model: Any) -> bool:
    """True for models whose decoder is given tokens of its own."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def with_decoder_inputs(inputs: Mapping[str, Any], model: Any) -> Mapping[str, Any]:
    """Decoder inputs made from the labels where there are none, as the model itself does in training."""
    if any(inputs.get(name) is not None for name in ("decoder_input_ids", "decoder_inputs_embeds")):
        return inputs
    if inputs.get("labels") is None or not hasattr(model, "prepare_decoder_input_ids_from_labels"):
        raise ValueError(f"a batch for an encoder-decoder model needs decoder_input_ids; it has {sorted(inputs)}")
    labels = inputs["labels"]
    counts = (labels != IGNORED_LABEL).long()
    decoder_inputs = model.prepare_decoder_input_ids_from_labels(labels)
    return {"decoder_attention_mask": counts, **inputs, "decoder_input_ids": decoder_inputs}


def to_device(inputs: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """A batch without its labels, where the model's first parameters are."""
    device = next(model.parameters()).device
    return {
        name: value.to(device) if isinstance(value, Tensor) and device.type != "meta" else value
        for name, value in inputs.items()
        if name != "labels"
    }


def _as_text(row: str | Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[str, bool]:
    """The text of a row, and whether a chat template wrote it."""
    if isinstance(row, str):
        return row, False
    if isinstance(row, Mapping) and isinstance(row.get("messages"), list):
        return str(tokenizer.apply_chat_template(row["messages"], tokenize=False)), True
    if isinstance(row, Mapping) and isinstance(row.get("text"), str):
        return row["text"], False
    shown = sorted(row) if isinstance(row, Mapping) else type(row).__name__
    raise ValueError(f"a row is neither a string nor has a text or messages entry: {shown}")
