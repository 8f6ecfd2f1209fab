"""One adapter at a time, written over the base's rows: no `--enable-lora`, no slots, the speed of the base.

llm = LLM(model, worker_extension_cls="peft_esft_vllm.swap.ESFTSwap")
swap(llm, "adapters/law")
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from .internals import RoutedExperts, experts_of
from .rows import WEIGHTS, KernelRows, kernel_rows


def swap(llm: Any, folder: str | None) -> None:
    """Has an engine serve an adapter, or the base again.

    Args:
        llm: a vLLM `LLM` with `worker_extension_cls="peft_esft_vllm.swap.ESFTSwap"`.
        folder: the adapter; None for the base, whose weights are put back bit for bit.

    Raises:
        RuntimeError: if requests are running: their cached keys and values are the old weights'.
    """
    if not llm.reset_prefix_cache():
        raise RuntimeError("requests are running. Wait until they end, and swap then")
    llm.collective_rpc("esft_swap", args=(folder,))


class ESFTSwap:
    """The methods that `worker_extension_cls` adds to vLLM's workers."""

    def esft_swap(self, folder: str | None) -> None:
        """Writes an adapter's rows over the base's, in place. The caller resets the prefix cache.

        Raises:
            ValueError: if the adapter is wrong; what was served before is then served on.
        """
        layers = experts_of(self.get_model())  # type: ignore[attr-defined]
        if any(getattr(layer, "esft_table", None) is not None for layer in layers.values()):
            raise ValueError("this engine has slots for adapters (additional_config has 'esft'): use LoRA requests")
        served: dict[str, KernelRows] = self.__dict__.setdefault("_esft_served", {})
        base: dict[str, KernelRows] = self.__dict__.setdefault("_esft_base", {})
        _write(layers, base)
        try:
            new = {} if folder is None else kernel_rows(layers, Path(folder))
        except BaseException:
            _write(layers, served)
            raise
        self._esft_base = {name: _rows(layers[name], rows.expert_ids) for name, rows in new.items()}
        self._esft_served = new
        _write(layers, new)


def _rows(layer: RoutedExperts, expert_ids: Tensor) -> KernelRows:
    """Copies of the rows that a layer has now."""
    w13, w2 = (getattr(layer, name).data[expert_ids] for name in WEIGHTS)
    return KernelRows(expert_ids, (w13, w2))


def _write(layers: dict[str, RoutedExperts], rows: dict[str, KernelRows]) -> None:
    for name, own in rows.items():
        for weight, new in zip(WEIGHTS, own.weights, strict=True):
            weights = getattr(layers[name], weight).data
            weights[own.expert_ids] = new.to(weights.device)
