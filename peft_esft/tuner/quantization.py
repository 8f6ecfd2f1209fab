"""Brings the experts of a model in memory to few bits, or takes over experts that another package has quantised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..moe.containers import find_experts
from ..moe.foreign_experts import adopt, is_foreign, read_foreign
from ..moe.quantised_formats import ENCODERS
from ..moe.stored_rows import StoredRows
from ..registration import QUANTIZATION
from .quantization_checks import check_quantizable, matrices
from .quantizer import ESFTQuantizationConfig, ESFTQuantizer, kept_experts, place_weight


def quantize_experts(
    model: nn.Module,
    bits: int = 4,
    keep: Mapping[str | int, list[int]] | None = None,
    quant_type: str = "nf4",
    double_quant: bool = False,
) -> nn.Module:
    """Brings the fused experts of a model to few bits, in place, one weight after the other.

    Args:
        model: without adapters. `ESFTQuantizationConfig` does the same while a model is loaded, in less memory.
        bits: see `ESFTQuantizationConfig`, as for the other arguments.
        keep: experts that stay in full precision.
        quant_type: of 4 bits.
        double_quant: of 4 bits.

    Returns:
        The model.

    Raises:
        ValueError: if the model has no experts, or has adapters, or `keep` names experts that it does not have.
        NotImplementedError: if its experts are not fused, or their weights cannot be read here.
        ImportError: for 4 bits without bitsandbytes.

    Example:
        >>> model = quantize_experts(model, bits=4, keep=config.target_experts)
    """
    config = ESFTQuantizationConfig(bits, keep, quant_type, double_quant=double_quant)
    if config.format.name not in ENCODERS:
        raise ValueError(f"experts cannot be quantised to {config.format.name}, only loaded in it; use 'nf4'")
    containers = find_experts(model)
    check_quantizable(model, containers)
    kept = kept_experts(config, containers)
    for path, container in containers.items():
        for weight in matrices(container):
            rows = cast(Tensor, weight.whole(container.module))
            stored = StoredRows.encoded(ENCODERS[config.format.name], rows, kept.get(path, ()))
            place_weight(container, weight, stored)
    if isinstance(model, PreTrainedModel):
        _note_quantizer(model, config)
    return model


def adopt_quantized_experts(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Takes over experts that another package has quantised, in place and as they are: adapters can then be attached.

    These are transformers' `FP8Experts` and `GgufExperts`, and fused experts that `bitsandbytes.nn.parametrize` has
    brought to 4 bits. Their matrices are what that package dequantises them to, bit for bit; activations are not
    quantised. The model cannot be saved afterwards: the checkpoint that it was loaded from holds the same weights.

    Args:
        model: without adapters.
        dtype: of the dequantised matrices; None means the model's.

    Returns:
        The model.

    Raises:
        ValueError: if no experts of the model are in such a form.
        NotImplementedError: if they cannot be taken over, naming the first module and why. Nothing changes then.

    Example:
        >>> model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-30B-A3B-FP8")
        >>> model = get_peft_model(adopt_quantized_experts(model), config)
    """
    foreign = {path: c for path, c in find_experts(model).items() if is_foreign(c.module)}
    if not foreign:
        raise ValueError(
            f"{type(model).__name__} has no experts that another package has quantised; "
            "quantize_experts(model) quantises plain ones"
        )
    declared = getattr(getattr(model, "config", None), "dtype", None)
    own = dtype or declared or torch.bfloat16
    found = [(c.module, *read_foreign(path, c.module, own)) for path, c in foreign.items()]
    for module, layout, stored in found:
        adopt(module, layout, stored)
    if isinstance(model, PreTrainedModel):
        _note_quantizer(model, ESFTQuantizationConfig())
        cast(ESFTQuantizer, model.hf_quantizer).is_adopted = True
    return model


def _note_quantizer(model: Any, config: ESFTQuantizationConfig) -> None:
    """Has `save_pretrained` know of the experts, and of the quantiser that the model was loaded with."""
    inner = getattr(model, "hf_quantizer", None)
    if inner is not None:
        config.linears = inner.quantization_config
    model.hf_quantizer = ESFTQuantizer(config, pre_quantized=False, inner=inner)
    model.config.quantization_config = config
    model.is_quantized = True
    if inner is None:
        model.quantization_method = QUANTIZATION
