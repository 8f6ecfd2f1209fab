"""Makes batches of texts, and prepares batches and model for a forward pass."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice, takewhile
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .counted_tokens import IGNORED_LABEL


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class RowError(ValueError):
    """Raised for a row of data that is not a sample."""


def text_batches(
    data: Iterable[str | Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 8,
    max_length: int = 4096,
    answers_only: bool = False,
) -> Iterator[dict[str, Any]]:
    """Tokenizes texts or conversations into padded batches, lazily.

    Args:
        data: strings, or rows as TRL takes them, as a list or a `datasets.Dataset`: with `text`, with `messages`, or
            with `prompt` and `completion`, which are both texts or both lists of messages. The tokenizer's chat
            template turns messages into text. A completion that is a text ends with the end-of-text token.
        tokenizer: the tokenizer of the model.
        batch_size: number of samples in a batch.
        max_length: samples are cut to this many tokens.
        answers_only: add `labels`, which are -100 but for the tokens of completions, or of the messages that the chat
            template marks with `{% generation %}`.

    Returns:
        Batches of `input_ids` and `attention_mask`, and of `labels` with `answers_only`, int64 `[samples, length]`,
        made as they are asked for.

    Raises:
        ValueError: if `data` is a single text or a dict of splits, or a size is below 1; while batches are made, if a
            row is none of these or has no answer although `answers_only` is set, its messages do not go through the
            chat template, or there is nothing to pad with.

    Example:
        >>> scores = score_experts(model, text_batches(["some text", "some more"], tokenizer))
    """
    if isinstance(data, str):
        raise ValueError("data is a single string; give a list of texts")
    if isinstance(data, Mapping):
        what = f"data is a {type(data).__name__} of {list(data)} and not a sequence of samples"
        raise ValueError(f"{what}; give one of its splits, or a list of rows")
    for name, value in (("batch_size", batch_size), ("max_length", max_length)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it is at least 1")
    return _batches(iter(data), tokenizer, batch_size, max_length, answers_only)


def _batches(
    rows: Iterator[str | Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    max_length: int,
    answers_only: bool,
) -> Iterator[dict[str, Any]]:
    while pairs := [_encode(row, tokenizer, max_length, answers_only) for row in islice(rows, batch_size)]:
        encoded = [ids for ids, _ in pairs]
        if tokenizer.pad_token_id is None and len({len(ids) for ids in encoded}) > 1:
            raise ValueError(
                "the tokenizer has no pad token, so samples of different lengths cannot share a batch; set "
                "tokenizer.pad_token = tokenizer.eos_token (padding is masked), or use batch_size=1"
            )
        padded = tokenizer.pad({"input_ids": encoded}, return_tensors="pt", padding=tokenizer.pad_token_id is not None)
        batch = dict(padded)
        if answers_only:
            labels = torch.full_like(batch["input_ids"], IGNORED_LABEL)
            labels[batch["attention_mask"].bool()] = torch.tensor([label for _, own in pairs for label in own])
            batch["labels"] = labels
        yield batch


def check_batch(batch: Any) -> Mapping[str, Any]:
    """Returns the batch itself.

    Raises:
        ValueError: if the batch is not a dict.
    """
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"a batch is a {type(batch).__name__}; expected a dict of tensors, as the model's forward takes them. "
            "Give a single batch as [batch], and texts as text_batches(texts, tokenizer)"
        )
    return batch


def batch_size_of(inputs: Mapping[str, Any]) -> int:
    """The number of samples in a batch."""
    for value in inputs.values():
        if isinstance(value, Tensor) and value.dim() > 0:
            return value.shape[0]
    raise ValueError(
        f"a batch holds no tensor, only {sorted(inputs)}; expected tensors, as the model's forward takes them"
    )


def is_encoder_decoder(model: Any) -> bool:
    """True for a model whose decoder has tokens of its own."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def with_decoder_inputs(inputs: Mapping[str, Any], model: Any) -> Mapping[str, Any]:
    """Makes the decoder's inputs from the labels if the batch has none, as the model itself does in training."""
    if any(inputs.get(name) is not None for name in ("decoder_input_ids", "decoder_inputs_embeds")):
        return inputs
    shift = _label_shift(model)
    if inputs.get("labels") is None or shift is None:
        raise ValueError(f"a batch for an encoder-decoder model needs decoder_input_ids; it has {sorted(inputs)}")
    labels = inputs["labels"]
    counts = (labels != IGNORED_LABEL).long()
    return {"decoder_attention_mask": counts, **inputs, "decoder_input_ids": shift(labels)}


def _label_shift(model: Any) -> Callable[[Tensor], Tensor] | None:
    """The function with which a model makes its decoder's inputs of labels; None if it has none."""
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        shift: Callable[[Tensor], Tensor] = model.prepare_decoder_input_ids_from_labels
        return shift
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    # NLLB-MoE shifts labels in its forward pass, by a function of its file.
    function = getattr(sys.modules[type(base).__module__], "shift_tokens_right", None)
    if function is None:
        return None
    return lambda labels: function(labels, base.config.pad_token_id, base.config.decoder_start_token_id)


def to_device(inputs: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Returns a batch without its labels, on the device of the model's first parameter."""
    device = next(model.parameters()).device
    return {
        name: value.to(device) if isinstance(value, Tensor) and device.type != "meta" else value
        for name, value in inputs.items()
        if name != "labels"
    }


@contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Puts models in eval mode for the time of the context, then each module back in the mode it was in.

    A model may be in training while some of its modules are not, for example frozen layers whose dropout is off.
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _encode(
    row: str | Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int, answers_only: bool
) -> tuple[list[int], list[int]]:
    """The tokens of a row, and its labels: -100 for tokens that are not of an answer."""
    prompt, special = "", True
    if isinstance(row, Mapping) and isinstance(row.get("messages"), list):
        _check_messages(row["messages"])
        if answers_only:
            return _encode_answers(row["messages"], tokenizer, max_length)
        # A chat template writes the special tokens itself.
        text, special = _apply_chat_template(row["messages"], tokenizer), False
    elif isinstance(row, Mapping) and "prompt" in row and "completion" in row:
        prompt, text, special = _prompt_and_whole(row["prompt"], row["completion"], tokenizer)
    elif answers_only:
        _text_of(row)
        raise RowError("a text has no answer; answers_only needs rows with messages, or prompt and completion")
    else:
        text = _text_of(row)

    def tokens(text: str) -> list[int]:
        try:
            encoded = tokenizer(text, add_special_tokens=special, truncation=True, max_length=max_length)
        except TypeError as error:  # which names neither the row nor the character
            raise RowError(f"its text cannot be made into tokens; has it half of a surrogate pair? {error}") from error
        return list(encoded["input_ids"])

    ids = tokens(text)
    # The answer begins where the tokens differ from the prompt's own, as in TRL: some may join both.
    pairs = zip(tokens(prompt) if prompt else [], ids, strict=False)
    start = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
    return ids, [IGNORED_LABEL] * start + ids[start:]


def _prompt_and_whole(prompt: Any, completion: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, bool]:
    """A prompt, the prompt with its completion as TRL trains on them, and whether special tokens are to be added."""
    if isinstance(prompt, list) and isinstance(completion, list):
        _check_messages(prompt)
        _check_messages(completion)
        before = _apply_chat_template(prompt, tokenizer, add_generation_prompt=True)
        return before, _apply_chat_template([*prompt, *completion], tokenizer), False
    if not isinstance(prompt, str) or not isinstance(completion, str):
        kinds = f"{type(prompt).__name__} and {type(completion).__name__}"
        raise RowError(f"its prompt and completion are {kinds}; give two texts, or two lists of messages")
    end = tokenizer.eos_token or ""
    return prompt, prompt + completion + ("" if end and completion.endswith(end) else str(end)), True


def _encode_answers(
    messages: list[Any], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[int], list[int]]:
    """The tokens of a conversation, and as labels those that the chat template marks as generated."""
    encoded: Any = _apply_chat_template(
        messages, tokenizer, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, marks = encoded["input_ids"][:max_length], encoded["assistant_masks"][:max_length]
    if not any(encoded["assistant_masks"]):
        raise RowError(
            "no token of its messages is marked as an answer: it has no assistant message, or the chat template has "
            "no {% generation %} marks. Give rows with prompt and completion"
        )
    return ids, [token if mark else IGNORED_LABEL for token, mark in zip(ids, marks, strict=True)]


def _text_of(row: str | Mapping[str, Any]) -> str:
    if isinstance(row, str):
        return row
    if isinstance(row, Mapping) and isinstance(row.get("text"), str):
        return str(row["text"])
    shown = f"has {', '.join(map(str, sorted(row)))}" if isinstance(row, Mapping) else f"is a {type(row).__name__}"
    raise RowError(f"it {shown}; needed: text, messages, or prompt and completion")


def _check_messages(messages: list[Any]) -> None:
    if not messages:
        raise RowError("its messages are an empty list")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            shown = f"has {list(message)}" if isinstance(message, Mapping) else f"is a {type(message).__name__}"
            raise RowError(f"message {number} {shown}; expected a dict of role and content")


def _apply_chat_template(messages: list[Any], tokenizer: PreTrainedTokenizerBase, **settings: Any) -> Any:
    if getattr(tokenizer, "chat_template", None) is None:
        name = tokenizer.name_or_path or "the model"
        raise RowError(
            f"the chat template cannot format its messages: the tokenizer of {name} has no chat_template, as is "
            "usual for a base model. Use the model's chat version, or rows with text, or with prompt and "
            "completion as texts"
        )
    try:
        return tokenizer.apply_chat_template(messages, **{"tokenize": False, **settings})
    except ImportError:
        raise
    except Exception as error:  # a template is a program: it may raise anything
        raise RowError(f"the chat template cannot format its messages: {error}") from error
