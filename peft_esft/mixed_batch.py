"""Batches whose samples have adapters of their own: which adapter each token has, and how layers learn of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .hooks import in_this_thread


BASE = "__base__"
"""PEFT's name for no adapter."""


class AdapterBatch:
    """The adapter of each sample of a batch.

    Attributes:
        names: of each sample, `"__base__"` for no adapter.
        adapters: the different ones among them.
        plans: by layer, where the rows of `adapters` lie. Made before the call begins: what other threads do to the
            adapters in the meantime does not change its result. A layer that has none is younger than the call.
    """

    def __init__(
        self,
        names: Sequence[str],
        repeats: int = 1,
        unrepeated: frozenset[nn.Module] = frozenset(),
        plans: Mapping[Any, Any] | None = None,
    ) -> None:
        """Takes a name for each given sample, which most layers see `repeats` times and `unrepeated` ones once."""
        self.plans = plans or {}
        self.names = [name for name in names for _ in range(repeats)]
        self.adapters = list(dict.fromkeys(names))
        self._unrepeated = unrepeated
        self._single = AdapterBatch(names, plans=plans) if repeats > 1 else None
        self._indices: dict[tuple[int, torch.device], Tensor] = {}

    def of_layer(self, layer: nn.Module) -> AdapterBatch:
        """The batch that a layer sees."""
        return self if self._single is None or layer not in self._unrepeated else self._single

    def adapter_of_row(self, num_rows: int, device: torch.device) -> Tensor:
        """The place in `adapters` of each row's adapter, int64 `[num_rows]`; rows lie sample after sample.

        Raises:
            ValueError: if the rows cannot be those of so many samples.
        """
        if num_rows % len(self.names):
            raise ValueError(
                f"adapter_names has {len(self.names)} names, but a layer sees {num_rows} tokens, which are not those "
                "of so many samples one after another; call the model once for each adapter, after set_adapter(name)"
            )
        key = (num_rows, device)
        if key not in self._indices:
            places = torch.tensor([self.adapters.index(name) for name in self.names])
            with torch.inference_mode(False):
                self._indices[key] = places.repeat_interleave(num_rows // len(places)).to(device)
        return self._indices[key]


_CURRENT: ContextVar[AdapterBatch | None] = ContextVar("adapter_batch", default=None)
"""The batch of the call under way in this thread, so that calls of several threads do not mix."""

_calls_under_way = 0
"""In all threads. Compiled graphs can depend on this number, but not on a context variable."""

_counting = Lock()


def current_batch(layer: nn.Module) -> AdapterBatch | None:
    """The adapters of the samples that a layer sees; None outside of a call with `adapter_names`."""
    batch = _CURRENT.get() if _calls_under_way else None
    return None if batch is None else batch.of_layer(layer)


@contextmanager
def calling_with(
    model: nn.Module, adapter_names: Sequence[str], inputs: Mapping[str, Any], plans: Mapping[Any, Any]
) -> Iterator[None]:
    """Calls of `model` within the context, in this thread, give each sample its own adapter.

    Args:
        model: the base model.
        adapter_names: an adapter for each sample.
        inputs: of the model's call; in a beam search each sample becomes `num_beams` ones, but not in an encoder.
        plans: see `AdapterBatch`.
    """
    beams = inputs.get("num_beams")
    repeats = beams if isinstance(beams, int) else 1
    encoder = _encoder(model) if repeats > 1 else None
    unrepeated = frozenset() if encoder is None else frozenset(encoder.modules())
    batch = AdapterBatch(adapter_names, repeats, unrepeated, plans)
    with ExitStack() as stack:
        _count_calls(1)
        stack.callback(_count_calls, -1)
        token = _CURRENT.set(batch)
        stack.callback(_CURRENT.reset, token)
        for module in model.modules():
            # PEFT's wrappers of `modules_to_save` take the names as an argument.
            if isinstance(module, AuxiliaryTrainingWrapper):
                hook = _adding("adapter_names", (batch.of_layer(module) or batch).names)
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def check_adapter_names(adapter_names: Sequence[str], known: Sequence[str], inputs: Sequence[Any]) -> None:
    """Refuses names that no adapter has, and another number of them than of samples.

    Raises:
        ValueError: with PEFT's own words.
    """
    if not isinstance(adapter_names, list | tuple) or not adapter_names:
        raise ValueError(f"adapter_names is {adapter_names!r}; it is a list with a name for each sample of the batch")
    unknown = sorted({name for name in adapter_names if name != BASE and name not in known})
    if unknown:
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
    sizes = [value.shape[0] for value in inputs if isinstance(value, Tensor) and value.dim() > 0]
    if sizes and sizes[0] != len(adapter_names):
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(adapter_names)} and {sizes[0]} respectively."
        )


def _count_calls(change: int) -> None:
    global _calls_under_way  # noqa: PLW0603
    with _counting:
        _calls_under_way += change


def _adding(name: str, value: Any) -> Any:
    @in_this_thread
    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, name: value}

    return hook


def _encoder(model: Any) -> nn.Module | None:
    """The encoder, which transformers says is the model itself where there is none."""
    encoder: nn.Module | None = model.get_encoder() if hasattr(model, "get_encoder") else None
    return None if encoder is model else encoder
