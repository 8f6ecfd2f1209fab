"""Finds experts that other packages keep in few bits, and takes them over as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import remove_parametrizations

from .architectures import ExpertsLayout
from .quantised_formats import BlockFP8, FourBit, Gguf, bitsandbytes
from .stored_experts import install
from .stored_rows import StoredRows


def is_parametrized(module: Any) -> bool:
    """True for fused experts that `bitsandbytes.nn.parametrize` has quantised."""
    parametrizations = module._modules.get("parametrizations", {})
    return "down_proj" in parametrizations and hasattr(parametrizations["down_proj"][0], "quant_state")


def is_foreign(module: Any) -> bool:
    """True for experts that `adopt` takes over."""
    return type(module).__name__ in ("FP8Experts", "GgufExperts") or is_parametrized(module)


def read_foreign(name: str, module: Any, dtype: torch.dtype) -> tuple[ExpertsLayout, dict[str, StoredRows]]:
    """Describes the codes and scales of an experts module as weights in few bits, without a copy or another value.

    Args:
        name: of the module, for errors.
        module: experts for which `is_foreign` is true.
        dtype: of the dequantised matrices; bitsandbytes' own records it.

    Returns:
        The layout of the experts, and each weight by name.

    Raises:
        NotImplementedError: if blocks have weights of two experts, or fp8 is not in blocks.
    """
    if is_parametrized(module):
        layout = ExpertsLayout(module.has_gate, module.has_bias, module.is_transposed, module.has_post_expert_norm)
        return layout, _of_bitsandbytes(name, module)
    if type(module).__name__ == "GgufExperts":
        return ExpertsLayout(), _of_gguf(module, dtype)
    return ExpertsLayout(has_gate=module.has_gate), _of_fp8(name, module, dtype)


def adopt(module: Any, layout: ExpertsLayout, stored: dict[str, StoredRows]) -> None:
    """Replaces the weights of an experts module by those that `read_foreign` made of them."""
    for weight in stored if is_parametrized(module) else ():
        remove_parametrizations(module, weight, leave_parametrized=False)
    for weight, rows in stored.items():
        module._parameters.pop(f"{weight}_scale_inv", None)
        install(module, layout, weight, rows)


def _of_bitsandbytes(name: str, module: Any) -> dict[str, StoredRows]:
    stored = {}
    for weight, parametrizations in module.parametrizations.items():
        state, codes = parametrizations[0].quant_state, parametrizations.original
        num_experts, *shape = state.shape
        if len(shape) != 2 or shape[0] * shape[1] % state.blocksize:
            raise NotImplementedError(
                f"{name}.{weight} has the shape {list(state.shape)}, so some of its blocks of {state.blocksize} "
                "weights belong to two experts. Load the model without this quantisation, and call "
                "peft_esft.quantize_experts(model)"
            )
        scales = state.absmax
        if state.nested:
            scales = bitsandbytes().functional.dequantize_blockwise(scales, state.state2) + state.offset
        tensors = {"codes": codes.data.view(num_experts, -1), "scales": scales.float().view(num_experts, -1)}
        stored[weight] = StoredRows(FourBit(state.quant_type, state.blocksize), state.shape, state.dtype, tensors)
    return stored


def _of_fp8(name: str, module: Any, dtype: torch.dtype) -> dict[str, StoredRows]:
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    if module.down_proj.dtype == torch.int8 or module.block_size is None:
        form = "fp4" if module.down_proj.dtype == torch.int8 else "fp8 with one scale per matrix"
        raise NotImplementedError(
            f"{name} has its experts in {form}. Only fp8 in blocks can be dequantised here. Load the model in "
            "bfloat16, and call peft_esft.quantize_experts(model)"
        )
    block = (module.block_size[0], module.block_size[1])
    return {
        weight: StoredRows(
            BlockFP8(block),
            getattr(module, weight).shape,
            dtype,
            {"codes": getattr(module, weight).data, "scales": getattr(module, f"{weight}_scale_inv").data},
        )
        for weight in names
    }


def _of_gguf(module: Any, dtype: torch.dtype) -> dict[str, StoredRows]:
    hidden, intermediate = module.hidden_dim, module.intermediate_dim
    own = {
        "gate_up_proj": (module.gate_up_type, (2 * intermediate, hidden)),
        "down_proj": (module.down_type, (hidden, intermediate)),
    }
    return {
        weight: StoredRows(
            Gguf(ggml_type), (module.num_experts, *shape), dtype, {"codes": getattr(module, weight).data}
        )
        for weight, (ggml_type, shape) in own.items()
    }


def quantised_weights(module: nn.Module) -> dict[str, tuple[str, int]]:
    """The parameters that hold a parametrised module's codes, and its number of experts, by weight name."""
    parametrizations: Any = module.parametrizations
    return {
        name: (f"parametrizations.{name}.original", own[0].quant_state.shape[0])
        for name, own in parametrizations.items()
    }
