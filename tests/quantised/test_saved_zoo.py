"""Models whose experts are quantised while they are loaded, saved and loaded again."""

from __future__ import annotations

import pytest
import torch

from peft_esft import ESFTQuantizationConfig, quantize_experts

from stored_bases import FUSED, TYPICAL, same_bits
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
