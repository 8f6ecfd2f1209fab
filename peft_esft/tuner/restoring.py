"""Puts the model back as it was if an operation ends with an error or an interrupt."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .layers.layer import ESFTLayer
from .layers.merging import restore_merge


_HOOKS = ("_hooks", "_hooks_with_kwargs", "_hooks_always_called")
"""The ends of the names under which a module keeps its hooks."""


class _Attributes:
    """The attributes of a module, its dicts and lists as they are now."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._values = dict(vars(module))
        # Hooks come and go with calls, also with those of other threads.
        self._contents = {
            name: copy.copy(value)
            for name, value in self._values.items()
            if isinstance(value, dict | list | set) and not name.endswith(_HOOKS)
        }

    def restore(self) -> None:
        """Gives the module back what it had; dicts, lists and sets are the same objects.

        What is as it was is not written to: other threads may be in a call.
        """
        for name, content in self._contents.items():
            value: Any = self._values[name]
            if _are_same(value, content):
                continue
            value.clear()
            if isinstance(value, list):
                value.extend(content)
            else:
                value.update(content)
        own = vars(self._module)
        if not _are_same(own, self._values):
            own.clear()
            own.update(self._values)


def _are_same(now: Any, before: Any) -> bool:
    """True if two dicts, lists or sets have the same objects, in the same order."""
    pairs = zip(*(each.items() if isinstance(each, dict) else enumerate(each) for each in (now, before)), strict=False)
    return len(now) == len(before) and all(key == old_key and value is old for (key, value), (old_key, old) in pairs)


@contextmanager
def restoring(
    tuner: Any, *, modules: Iterable[nn.Module] | None = None, written: Iterable[Tensor] = ()
) -> Iterator[None]:
    """What happens to a tuner within the context is undone if it ends with an error or an interrupt.

    Adapters, wrappers, configs, what is active and what is trained are put back as they were. Only merging writes to
    the base, and its record brings the rows back.

    Args:
        tuner: the `ESFTModel`.
        modules: those that may change; None means all.
        written: tensors that may be written to and not only replaced.
    """
    saved = [
        _Attributes(module) for module in dict.fromkeys([tuner, *(tuner.modules() if modules is None else modules)])
    ]
    peft_config = copy.copy(tuner.peft_config)
    layers = [module for module in tuner.modules() if isinstance(module, ESFTLayer)]
    records = [layer.merge_record for layer in layers]
    flags = [(parameter, parameter.requires_grad) for parameter in tuner.parameters()]
    values = [(tensor, tensor.detach().clone()) for tensor in written]
    try:
        yield
    except BaseException:
        merges = [layer.merge_record for layer in layers]
        for attributes in saved:
            attributes.restore()
        tuner.peft_config.clear()
        tuner.peft_config.update(peft_config)
        for parameter, is_trained in flags:
            parameter.requires_grad_(is_trained)
        for tensor, value in values:
            tensor.data.copy_(value)
        for layer, record, merged in zip(layers, records, merges, strict=True):
            layer.merge_record = merged  # what may have been written since
            if record is not None or merged is not None:
                restore_merge(layer, record)
            layer.refresh_active()  # without rows that were held: the hold may have ended
        raise
