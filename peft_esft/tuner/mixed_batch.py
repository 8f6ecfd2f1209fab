"""Runs a batch whose samples have different adapters (`adapter_names`): tells each layer the adapter of each row."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..moe.hooks import in_this_thread
from .samples import TOKEN_INPUTS, CallsUnderWay


BASE = "__base__"
"""PEFT's name for no adapter."""


class AdapterBatch:
    """The adapter of each sample of a batch.

    Attributes:
        names: the adapter of each sample; `"__base__"` for no adapter.
        adapters: the different names, in the order in which they first occur.
        rows: the rows of `adapters` in each layer (`layers.held.MixedRows`); None where no adapter changes the layer.
            They are collected before the call begins, so changes by other threads during the call have no effect. A
            layer of this model that is missing here was added after the call began.
        owner: the model that the batch is for (`layers.records.Owner`). Layers of other models ignore the batch.
        calls: the calls of the model that have begun and not ended.
        is_counted: True if the number of names was compared with the number of samples. The calls that `generate`
            makes can then have several rows for each sample.
    """

    def __init__(self, names: Sequence[str], rows: Mapping[Any, Any], model: nn.Module, is_counted: bool) -> None:
        self.names = list(names)
        self.adapters = list(dict.fromkeys(names))
        self.rows = rows
        self.owner = next((layer.owner for layer in rows), None)
        self.calls = CallsUnderWay(model)
        self.is_counted = is_counted
        self._indices: dict[tuple[int, torch.device], Tensor] = {}

    def begin(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Records the input of a model's call. For the first call, compares the numbers of samples and of names.

        Raises:
            ValueError: if the numbers differ.
        """
        samples = self.calls.begin(module, args, kwargs)
        if not self.is_counted and samples is not None:
            self.is_counted = True
            if samples != len(self.names):
                raise _wrong_number(len(self.names), samples)

    def adapter_of_row(self, tensor: Tensor, module: nn.Module, path: str) -> Tensor:
        """The place in `adapters` of each row's adapter, int64 `[rows]`.

        Rows lie sample after sample: tokens, and for each sample as many beams or returned sequences as there are.

        Args:
            tensor: `[rows, ...]`, an input or output of `module`.
            module: which one.
            path: where it stands in the model.

        Raises:
            ValueError: if it is not known whose the rows are.
        """
        repeats = self._rows_of_sample(tensor, module, path)
        key = (tensor.shape[0], tensor.device)
        if key not in self._indices:
            places = torch.tensor([self.adapters.index(name) for name in self.names])
            rows = places.new_zeros(key[0]) if repeats is None else places.repeat_interleave(repeats)
            with torch.inference_mode(False):
                self._indices[key] = rows.to(tensor.device, non_blocking=True)
        return self._indices[key]

    def names_of_rows(self, tensor: Tensor, module: nn.Module, known: Container[str], path: str) -> list[str]:
        """The name of each row's adapter, as PEFT's modules take them; `"__base__"` where the module does not have it.

        Raises:
            ValueError: if it is not known which rows belong to which sample.
        """
        repeats = self._rows_of_sample(tensor, module, path)
        if repeats is None:
            names = [self.names[0]] * tensor.shape[0]
        else:
            names = [name for name in self.names for _ in range(repeats)]
        return [name if name in known else BASE for name in names]

    def _rows_of_sample(self, tensor: Tensor, module: nn.Module, path: str) -> int | None:
        """The number of rows of each sample; None if all rows have the same adapter."""
        if len(self.adapters) == 1 or not len(tensor):
            return None
        repeats = self.calls.rows_of_sample(tensor, len(self.names), module)
        if repeats is None:
            raise ValueError(
                f"{path} sees a tensor of shape {list(tensor.shape)}, which does not tell the tokens of the "
                f"{len(self.names)} samples in adapter_names apart: a model may have gathered them, or they are parts "
                "of images. Call the model once for each adapter, after set_adapter(name)"
            )
        return repeats


_CURRENT: ContextVar[AdapterBatch | None] = ContextVar("adapter_batch", default=None)
"""The batch of the call that runs in this thread. Other threads have their own."""

_calls_under_way = 0
"""The number of calls with a batch in all threads. Compiled graphs can depend on it, not on a context variable."""

_counting = Lock()


def current_batch() -> AdapterBatch | None:
    """The adapters of the samples of this thread's call; None outside of a call with `adapter_names`."""
    return _CURRENT.get() if _calls_under_way else None


@contextmanager
def calling_with(
    model: nn.Module, adapter_names: Sequence[str], rows: Mapping[Any, Any], is_counted: bool = False
) -> Iterator[None]:
    """Calls of `model` within the context, in this thread, give each sample its own adapter."""
    batch = AdapterBatch(adapter_names, rows, model, is_counted)
    with ExitStack() as stack:
        _count_calls(1)
        stack.callback(_count_calls, -1)
        token = _CURRENT.set(batch)
        stack.callback(_CURRENT.reset, token)
        for path, module in model.named_modules():
            if module is model or isinstance(module, PreTrainedModel):
                # The same functions in every call: a compiled graph may keep them.
                stack.callback(module.register_forward_pre_hook(_begin, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(_end).remove)
            # PEFT's wrappers (modules_to_save, trainable_token_indices) take the names as an argument.
            if isinstance(module, AuxiliaryTrainingWrapper):
                stack.callback(module.register_forward_pre_hook(_naming(batch, path), with_kwargs=True).remove)
        yield


def check_adapter_names(
    adapter_names: Sequence[str],
    known: Sequence[str],
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> bool:
    """Refuses names of unknown adapters, and a list with more or fewer names than the call has samples.

    Returns:
        True if the call shows how many samples it has.

    Raises:
        ValueError: with the same messages as PEFT.
    """
    if not isinstance(adapter_names, list | tuple) or not adapter_names:
        raise ValueError(
            f"adapter_names is {adapter_names!r}; expected a list with a name for each sample of the batch"
        )
    unknown = sorted({name for name in adapter_names if name != BASE and name not in known})
    if unknown:
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
    main = getattr(model, "main_input_name", "input_ids")  # an image model has other inputs than text
    inputs = [*(kwargs.get(name) for name in (main, *TOKEN_INPUTS)), *args[:1]]
    numbers = [value.shape[0] for value in inputs if isinstance(value, Tensor)]
    for number in numbers:
        if number != len(adapter_names):
            raise _wrong_number(len(adapter_names), number)
    return bool(numbers)


def _wrong_number(names: int, samples: int) -> ValueError:
    return ValueError(
        "Length of `adapter_names` should be the same as the number of inputs, but got "
        f"{names} and {samples} respectively."
    )


def check_mixes_whole_modules(model: nn.Module, adapter_names: Sequence[str]) -> None:
    """Refuses adapters that also train another module which cannot be called once for each adapter.

    Raises:
        ValueError: naming the first module.
    """
    for path, module in model.named_modules():
        is_asked_for = isinstance(module, AuxiliaryTrainingWrapper) and _adapters_of(module) & set(adapter_names)
        if is_asked_for and not is_stateless(module.original_module, model):
            raise ValueError(
                f"adapter_names is not supported by {path}: {type(module.original_module).__name__} may keep a state "
                "or take rows that are not samples, so it cannot be called once for each adapter. Call the model once "
                "for each adapter, after set_adapter(name)"
            )


def _adapters_of(wrapper: Any) -> set[str]:
    names: set[str] = wrapper._get_available_adapters()  # PEFT's; it has no public name
    return names


def is_stateless(module: nn.Module, model: nn.Module) -> bool:
    """True for a module that can be called once for each adapter, and whose rows are samples or their tokens.

    These are linear layers, norms and token embeddings. Modules with a cache do not count, and neither do routers that
    extend `nn.Linear` and return a tuple. The rows of position embeddings are not samples, even if their number is
    the same.
    """
    if isinstance(module, nn.Embedding):
        models = (part for part in model.modules() if isinstance(part, PreTrainedModel))
        return any(module is getattr(own, "base_layer", own) for own in map(_token_embedding, models))
    is_plain = type(module).forward in (nn.Linear.forward, nn.LayerNorm.forward)
    return is_plain or type(module).__name__.endswith("Norm")


def _token_embedding(model: PreTrainedModel) -> nn.Module | None:
    try:
        embedding: nn.Module | None = model.get_input_embeddings()
    except NotImplementedError:  # a model of images
        return None
    # The module that PEFT's wrapper is around.
    return getattr(embedding, "original_module", embedding)


def refusing_adapter_names(model: nn.Module) -> RemovableHandle | None:
    """Makes a base model refuse `adapter_names`, which its own forward would accept as a keyword and ignore.

    PEFT's models do not pass the argument on to the base model.

    Returns:
        The handle that removes the check; None if the model has the check already.
    """
    if _refuse_adapter_names in model._forward_pre_hooks.values():
        return None
    return model.register_forward_pre_hook(_refuse_adapter_names, with_kwargs=True)


def _refuse_adapter_names(module: nn.Module, args: Any, kwargs: Any = None) -> None:
    if kwargs and kwargs.get("adapter_names") is not None:
        raise ValueError(
            f"adapter_names is not known to {type(module).__name__} itself, which would use its active adapter for "
            "all samples. Call the PeftModel around it (get_peft_model, PeftModel.from_pretrained), or call the model "
            "once for each adapter, after set_adapter(name)"
        )


def _count_calls(change: int) -> None:
    global _calls_under_way  # noqa: PLW0603
    with _counting:
        _calls_under_way += change


def _begin(module: nn.Module, args: Any, kwargs: Any = None) -> None:
    batch = current_batch()
    # A call without keywords is for the hook of another thread, see `hooks.in_this_thread`.
    if batch is not None and kwargs is not None:
        batch.begin(module, args, kwargs)


def _end(module: nn.Module, args: Any, output: Any) -> None:
    batch = current_batch()
    if batch is not None:
        batch.calls.end(module)


def _naming(batch: AdapterBatch, path: str) -> Any:
    @in_this_thread
    def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        names = batch.names_of_rows(args[0], module, _adapters_of(module), path)
        return args, {**kwargs, "adapter_names": names}

    return hook
