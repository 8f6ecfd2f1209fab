"""Training over experts in few bits equals, bit for bit, training over a dense base that holds the same numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model

from peft_esft import quantize_experts

from oracle import config_for, deltas_of, task_loss
from stored_bases import FUSED, TYPICAL, dense_twin, same_bits
from zoo import build, family, inputs_for, output_of


OWN_ROUNDING = ["openai_privacy_filter"]
"""Their experts add up in fp32, as those of group B do in their own way."""
EXPERTS = [3, 1, 2]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "model_type", [name if name in TYPICAL else pytest.param(name, marks=pytest.mark.slow) for name in FUSED]
)
def test_equals_the_dense_base_bit_for_bit(model_type: str, bits: int) -> None:
    plain = build(model_type, torch.bfloat16)
    inputs = inputs_for(plain)
    quantised = quantize_experts(copy.deepcopy(plain), bits=bits)
    dense = dense_twin(plain, quantised)
    with torch.no_grad():
        base = output_of(quantised(**inputs))
        if family(model_type).group == "A" and model_type not in OWN_ROUNDING:
            assert same_bits(base, output_of(dense(**inputs)))
        assert not torch.equal(base, output_of(plain(**inputs)))
    torch.manual_seed(1)
    own = get_peft_model(quantised, config_for(quantised, EXPERTS, init_weights=False))
    torch.manual_seed(1)
    twin = get_peft_model(dense, config_for(dense, EXPERTS, init_weights=False))
    outputs = []
    for model in (own, twin):
        outputs.append(output_of(model(**inputs)))
        task_loss(outputs[-1]).backward()
    assert same_bits(*outputs)
    expected = deltas_of(twin)
    assert expected
    for key, delta in deltas_of(own).items():
        assert same_bits(delta, expected[key]), key
        if delta.grad is None:  # experts for images, which no text reaches
            assert expected[key].grad is None and "vision" in key[0], key
        else:
            assert same_bits(delta.grad, expected[key].grad), key
    own.merge_adapter()
    with torch.no_grad():
        assert same_bits(output_of(own(**inputs)), outputs[0])
        own.unmerge_adapter()
        with own.disable_adapter():
            assert same_bits(output_of(own(**inputs)), base)
