"""Finds which sample of a batch each row of a module's tensor belongs to."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


TOKEN_INPUTS = ("decoder_inputs_embeds", "decoder_input_ids", "inputs_embeds", "input_ids", "inputs")
"""Arguments of `forward` and `generate` with a row for each sample and a column for each token; the first one that a
model is given is what most of its modules see."""


@dataclass(frozen=True)
class Tokens:
    """The input of a model's call.

    Attributes:
        samples: its rows, beams and returned sequences among them.
        length: tokens of each; None if the input is no text.
    """

    samples: int
    length: int | None

    def hold(self, tensor: Tensor, *, is_logits: bool) -> bool:
        """True if the first dimension of a module's tensor lists samples, or all of their tokens, in order.

        What a model has gathered (by a mask, by the experts that tokens chose) has other sizes, unless it is all.

        Args:
            tensor: a module's input or output.
            is_logits: of the module that makes the logits, which may see the last tokens only.
        """
        rows, *others = tensor.shape
        if self.length is None or (self.length == 1 and rows == self.samples):
            return rows == self.samples
        if rows == self.samples * self.length:
            return True
        has_length = self.length in others or is_logits
        return rows == self.samples and has_length and (len(others) > 1 or not tensor.is_floating_point())


class CallsUnderWay:
    """The calls of a model and of the models in it, the innermost last, as far as they have begun and not ended.

    A model in another one (a vision tower, an encoder) has an input of its own, whose rows need not be samples.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._calls: list[tuple[nn.Module, Tokens | None]] = []
        find_logits = getattr(model, "get_output_embeddings", None)
        self._logits = find_logits() if find_logits is not None else None

    def begin(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
        """Notes a call of a model.

        Returns:
            The samples of its input, if it shows them.
        """
        tokens = _tokens(module, args, kwargs, module is self._model)
        if tokens is None and self._calls:
            # In a model whose input is images, each image is a sample; in any other one it need not be.
            around = self._calls[-1][1]
            tokens = around if around is not None and around.length is None else None
        self._calls.append((module, tokens))
        return None if tokens is None else tokens.samples

    def end(self, module: nn.Module) -> None:
        """Notes that a call of a model ended, and with it those inside it, which may have ended by an error."""
        places = [place for place, (other, _) in enumerate(self._calls) if other is module]
        if places:
            del self._calls[places[-1] :]

    def rows_of_sample(self, tensor: Tensor, num_names: int, module: nn.Module) -> int | None:
        """Rows that each name has in a module's tensor, if they are known to lie name after name; None otherwise."""
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
