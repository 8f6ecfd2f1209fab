"""Replaces an adapter's weights by those of another file, without wrapping the model again."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel

from .config import ESFTConfig
from .model import ESFTModel
from .restoring import restoring


def hotswap_adapter(model: PeftModel, path: str | Path, adapter_name: str = "default", **kwargs: Any) -> None:
    """Puts the adapter in `path` in place of a resident one, also if it has other experts or layers.

    Deltas in half precision stay in half precision. Where shapes are equal, the new weights are copied into the old
    parameters, so an optimizer that has these parameters sees the new values. An active adapter stays
    active, and a trained one stays trained. Its scale is 1 again.

    Args:
        model: a `PeftModel` with the adapter.
        path: folder or Hub name of the new adapter.
        adapter_name: the adapter whose weights are replaced; it keeps its name.
        **kwargs: passed to `PeftModel.load_adapter`, for example `torch_device`.

    Raises:
        ValueError: if there is no such adapter, it is merged, either trains whole modules too (`modules_to_save`), the
            new one is not ESFT's or does not fit the model, or it is for inference only and the old one is trained.

    After any error, and after an interrupt, the model is unchanged.

    Example:
        >>> hotswap_adapter(model, "intent", adapter_name="task")
    """
    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, ESFTModel):
        raise ValueError(f"{type(model).__name__} has no ESFT adapter; give a PeftModel that has one")
    if adapter_name not in model.peft_config:
        raise ValueError(f"there is no adapter {adapter_name!r} to replace; there are {sorted(model.peft_config)}")
    _check_experts_only(model.peft_config[adapter_name])
    layers = tuner._layers()
    if any(adapter_name in layer.merged_adapters for layer in layers):
        raise ValueError(f"adapter {adapter_name!r} is merged; call unmerge_adapter before you replace it")
    incoming = next(name for n in count() if (name := f"{adapter_name}_incoming_{n}") not in model.peft_config)
    deltas = [delta for layer in layers for delta in layer.tensors_of(adapter_name).values()]
    is_wide = all(delta.dtype.itemsize >= 4 for delta in deltas if isinstance(delta, torch.nn.Parameter))
    kwargs.setdefault("autocast_adapter_dtype", is_wide)
    with restoring(tuner, written=deltas):
        model.load_adapter(str(path), incoming, **kwargs)
        config = model.peft_config[incoming]
        _check_experts_only(config)
        is_trained = any(layer.is_trained(adapter_name) for layer in layers)
        storage = cast(ESFTConfig, config).storage
        if is_trained and storage != "delta":
            raise ValueError(
                f"adapter {adapter_name!r} is being trained, but the one in {path} is stored as {storage!r}, "
                "which is for inference only; load that one under its own name"
            )
        for layer in tuner._layers():  # the incoming adapter may have brought new ones
            layer.replace_adapter(adapter_name, incoming, is_trained)
        config.inference_mode = model.peft_config[adapter_name].inference_mode
        model.peft_config[adapter_name] = model.peft_config.pop(incoming)


def _check_experts_only(config: Any) -> None:
    others = [name for name in ("modules_to_save", "trainable_token_indices") if getattr(config, name)]
    if others:
        raise ValueError(
            f"an adapter with {others[0]}={getattr(config, others[0])} cannot be hot swapped. Load the new "
            "adapter under its own name with load_adapter, and remove the old one with delete_adapter"
        )
