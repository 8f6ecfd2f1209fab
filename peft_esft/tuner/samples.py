"""Finds which sample of a batch each row of a module's tensor belongs to."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


TOKEN_INPUTS = ("decoder_inputs_embeds", "decoder_input_ids", "inputs_embeds", "input_ids", "inputs")
"""Arguments of `forward` and `generate` that have a row for each sample and a column for each token. If a call has
several, most modules see the first of them."""


@dataclass(frozen=True)
class Tokens:
    """The input of a model's call.

    Attributes:
        samples: the number of its rows. Beams and returned sequences count.
        length: the number of tokens of each; None if the input is not text.
    """

    samples: int
    length: int | None

    def hold(self, tensor: Tensor, *, is_logits: bool) -> bool:
        """True if the first dimension of a module's tensor lists samples, or all of their tokens, in order.

        Tensors that were gathered from it (by a mask, or by expert) have other sizes, unless everything was gathered.

        Args:
            tensor: a module's input or output.
            is_logits: True for the module that makes the logits, which may see only the last tokens.
        """
        rows, *others = tensor.shape
        if self.length is None or (self.length == 1 and rows == self.samples):
            return rows == self.samples
        if rows == self.samples * self.length:
            return True
        has_length = self.length in others or is_logits
        return rows == self.samples and has_length and (len(others) > 1 or not tensor.is_floating_point())


class CallsUnderWay:
    """The calls of a model and of the models in it that have begun and not ended, the innermost last.

    A model within another one (a vision tower, an encoder) has an input of its own, and its rows need not be samples.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._calls: list[tuple[nn.Module, Tokens | None]] = []
        find_logits = getattr(model, "get_output_embeddings", None)
        self._logits = find_logits() if find_logits is not None else None

    def begin(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
        """Records a call of a model.

        Returns:
            The number of samples of its input; None if the input does not show it.
        """
        tokens = _tokens(module, args, kwargs, module is self._model)
        if tokens is None and self._calls:
            # If the input of the whole model is images, each image is a sample. Otherwise it need not be.
            around = self._calls[-1][1]
            tokens = around if around is not None and around.length is None else None
        self._calls.append((module, tokens))
        return None if tokens is None else tokens.samples

    def end(self, module: nn.Module) -> None:
        """Records that a call of a model ended, and all calls within it, which may have ended with an error."""
        places = [place for place, (other, _) in enumerate(self._calls) if other is module]
        if places:
            del self._calls[places[-1] :]

    def rows_of_sample(self, tensor: Tensor, num_names: int, module: nn.Module) -> int | None:
        """The number of rows of each name in a module's tensor; None if the rows may be in another order."""
        tokens = self._calls[-1][1] if self._calls else None
        if tokens is None or tokens.samples % num_names:
            return None
        return tensor.shape[0] // num_names if tokens.hold(tensor, is_logits=module is self._logits) else None


def _tokens(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], is_outermost: bool) -> Tokens | None:
    names = inspect.signature(module.forward).parameters if args else {}
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    for name in TOKEN_INPUTS:
        value = given.get(name)
        if (
            isinstance(value, Tensor)
            and value.dim() >= 2
            and (name.endswith("embeds") or not value.is_floating_point())
        ):
            return Tokens(value.shape[0], value.shape[1])
    main = given.get(getattr(module, "main_input_name", ""), args[0] if args else None)
    return Tokens(main.shape[0], None) if is_outermost and isinstance(main, Tensor) else None
