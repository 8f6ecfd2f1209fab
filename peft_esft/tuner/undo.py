"""What an operation has changed so far, put back if it ends in the middle: by an error or by the user's interrupt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .layers.layer import ESFTLayer


if TYPE_CHECKING:
    from .operations import AdapterOperations


@contextmanager
def undoing_merges(layers: Sequence[ESFTLayer]) -> Iterator[None]:
    """Merges and unmerges within the context are undone if it ends with an error."""
    states = [layer.merge_state() for layer in layers]
    try:
        yield
    except BaseException:
        for layer, state in zip(layers, states, strict=True):
            layer.restore_merge(state)
        raise


@contextmanager
def undoing_changes(layers: Sequence[ESFTLayer], adapter_name: str, *, in_place: bool = False) -> Iterator[None]:
    """What happens to an adapter within the context is undone if it ends with an error.

    Args:
        layers: the layers that may change.
        adapter_name: the adapter.
        in_place: its tensors may be written to, and not only replaced.
    """
    states = [layer.adapter_state(adapter_name, copy=in_place) for layer in layers]
    try:
        yield
    except BaseException:
        for layer, state in zip(layers, states, strict=True):
            layer.restore_adapter(adapter_name, state)
        raise


@contextmanager
def undoing_injection(tuner: AdapterOperations, adapter_name: str) -> Iterator[None]:
    """An adapter that is added within the context is gone again, its config too, if it ends with an error.

    So are wrappers that were put around modules for it; and what was merged before is merged again.
    """
    modules = list(tuner.model.modules())
    known = set(filter(_is_wrapper, modules))
    are_trained = [(parameter, parameter.requires_grad) for parameter in tuner.model.parameters()]
    targeted = list(tuner.targeted_module_names)
    config = tuner.peft_config.get(adapter_name)
    states = {
        module: module.adapter_state(adapter_name, copy=False)
        for module in known
        if isinstance(module, ESFTLayer) and adapter_name in module.expert_ids
    }
    try:
        with undoing_merges([module for module in modules if isinstance(module, ESFTLayer)]):
            yield
    except BaseException:
        _replace_wrappers(tuner.model, known)
        for module in known:
            if module in states:
                module.restore_adapter(adapter_name, states[module])
            elif isinstance(module, ESFTLayer):
                module.discard_adapter(adapter_name)
            elif isinstance(module, AuxiliaryTrainingWrapper) and not states:
                active = [name for name in module.active_adapters if name != adapter_name]
                module.delete_adapter(adapter_name, new_active_adapters=active)
        # A config that was put there for this addition goes with it.
        if config is None or not states:
            tuner.peft_config.pop(adapter_name, None)
        else:
            tuner.peft_config[adapter_name] = config
        tuner.forget_modules()
        tuner.targeted_module_names[:] = targeted
        for parameter, is_trained in are_trained:
            parameter.requires_grad_(is_trained)
        raise


@contextmanager
def undoing_unloading(model: nn.Module, layers: Sequence[ESFTLayer]) -> Iterator[None]:
    """Wrappers that are taken off within the context are put back, and merges undone, if it ends with an error."""
    wrapped = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if _is_wrapper(child)
    ]
    peft_config = getattr(model, "peft_config", None)
    try:
        with undoing_merges(layers):
            yield
    except BaseException:
        for parent, name, child in wrapped:
            setattr(parent, name, child)
        if peft_config is not None:
            model.peft_config = peft_config
        raise


def _is_wrapper(module: nn.Module) -> bool:
    """True for what PEFT and we put around modules of the base."""
    return isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)


def _replace_wrappers(model: nn.Module, known: set[nn.Module]) -> None:
    """Puts the modules of the base in the place of all wrappers but the known ones."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if _is_wrapper(child) and child not in known:
                own = child.original_module if isinstance(child, AuxiliaryTrainingWrapper) else child.base_layer
                setattr(parent, name, own)
