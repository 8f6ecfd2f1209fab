"""Models whose experts are quantised while they are loaded, saved and loaded again."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from peft_esft import ESFTQuantizationConfig, find_experts, quantize_experts
from peft_esft.moe.quantised_formats import FourBit

from families import tiny_model
from stored_bases import FUSED, TYPICAL, dense, same_bits
from zoo import build, family


SAVED = [name for name in FUSED if name != "diffusion_gemma"]  # it shares experts, see test_stored_refusals.py


@pytest.mark.parametrize(
    "model_type", [name if name in TYPICAL else pytest.param(name, marks=pytest.mark.slow) for name in SAVED]
)
def test_quantising_while_loading_saving_and_loading_again_change_no_bit(model_type: str, tmp_path: object) -> None:
    model_class = family(model_type).model_class
    build(model_type, torch.bfloat16).save_pretrained(tmp_path / "plain")
    expected = quantize_experts(model_class.from_pretrained(tmp_path / "plain", dtype=torch.bfloat16), bits=8)
    loaded = model_class.from_pretrained(
        tmp_path / "plain", dtype=torch.bfloat16, quantization_config=ESFTQuantizationConfig(bits=8)
    )
    loaded.save_pretrained(tmp_path / "stored_bases")
    again = model_class.from_pretrained(tmp_path / "stored_bases", dtype=torch.bfloat16)
    wanted = expected.state_dict()
    assert any("stored_" in name for name in wanted)
    for model in (loaded, again):
        state = model.state_dict()
        assert state.keys() == wanted.keys()
        assert not [name for name in state if not same_bits(state[name], wanted[name])]


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_quantised_scales_are_bitsandbytes_own_and_are_saved(quant_type: str, tmp_path: Path) -> None:
    plain = tiny_model("olmoe", torch.bfloat16)
    plain.save_pretrained(tmp_path / "plain")
    settings = {"bits": 4, "quant_type": quant_type, "double_quant": True}
    load = type(plain).from_pretrained
    loaded = load(tmp_path / "plain", dtype=torch.bfloat16, quantization_config=ESFTQuantizationConfig(**settings))
    loaded.save_pretrained(tmp_path / "stored_bases")
    again = load(tmp_path / "stored_bases", dtype=torch.bfloat16)
    in_memory = quantize_experts(load(tmp_path / "plain", dtype=torch.bfloat16), **settings)
    for model in (loaded, again, in_memory):
        assert model.config.quantization_config.double_quant
        for path, container in find_experts(model).items():
            matrices = dense(container, "down_proj")
            for expert, matrix in enumerate(plain.get_submodule(path).down_proj.data):
                # As one row: bitsandbytes' kernel for the CPU is wrong where rows are no multiple of a block.
                row = matrix.reshape(1, -1)
                codes, state = quantize_4bit(row, blocksize=64, quant_type=quant_type, compress_statistics=True)
                assert same_bits(matrices[expert].reshape(1, -1), dequantize_4bit(codes, state))


def test_quantised_scales_take_a_twelfth_less() -> None:
    layouts = [FourBit(double=double).layout((8, 2816, 2048), torch.bfloat16) for double in (False, True)]
    plain, double = (sum(dtype.itemsize * math.prod(shape) for dtype, shape in own.values()) for own in layouts)
    weights = 8 * 2816 * 2048
    assert 8 * plain == 4.5 * weights and 8 * double == pytest.approx(4.127 * weights, rel=1e-3)
