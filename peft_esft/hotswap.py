"""Replaces an adapter's weights by those of another file, while the model stays as it is wrapped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel

from .config import ESFTConfig
from .layer import ESFTLayer


def hotswap_adapter(model: PeftModel, path: str | Path, adapter_name: str = "default", **kwargs: Any) -> None:
    """Puts the adapter in `path` in the place of a resident one, also if it has other experts or layers.

    Where shapes are equal the new weights are copied into the old parameters, so whatever refers to them (an
    optimizer, for example) sees the new values. Whether the adapter is active, and whether it is trained, does not
    change.

    Args:
        model: a `PeftModel` with the adapter.
        path: folder or Hub name of the new adapter.
        adapter_name: the adapter whose weights are replaced; it keeps its name.
        **kwargs: passed to `PeftModel.load_adapter`, for example `torch_device`.

    Raises:
        ValueError: if there is no such adapter, it is merged, or the new one is not ESFT's or does not fit the model.
            The model is then unchanged.

    Example:
        >>> hotswap_adapter(model, "intent", adapter_name="task")
    """
    if adapter_name not in model.peft_config:
        raise ValueError(f"there is no adapter {adapter_name!r} to replace; there are {sorted(model.peft_config)}")
    layers = [module for module in model.modules() if isinstance(module, ESFTLayer)]
    if any(adapter_name in layer.merged_adapters for layer in layers):
        raise ValueError(f"adapter {adapter_name!r} is merged; call unmerge_adapter before it is replaced")
    incoming = f"{adapter_name}_incoming"
    try:
        model.load_adapter(str(path), incoming, **kwargs)
        config = model.peft_config[incoming]
        if not isinstance(config, ESFTConfig):
            raise ValueError(f"{path} holds an adapter of type {config.peft_type}, not ESFT")
    except BaseException:
        if incoming in model.peft_config:
            model.delete_adapter(incoming)
        raise
    config.inference_mode = model.peft_config[adapter_name].inference_mode
    is_trained = any(layer.is_trained(adapter_name) for layer in layers)
    for layer in [module for module in model.modules() if isinstance(module, ESFTLayer)]:
        layer.replace_adapter(adapter_name, incoming, is_trained)
    model.peft_config[adapter_name] = model.peft_config.pop(incoming)
