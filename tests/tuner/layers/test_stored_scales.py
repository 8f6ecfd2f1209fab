"""Tests that the scales of an adapter that is stored as codes survive conversions of the model."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_esft.interchange import compact

from families import tiny_model
from oracle import config_for, deltas_of


@pytest.mark.parametrize("form", ["int8", "int4", "int1"])
def test_fp16_does_not_round_the_scales_of_small_deltas(form, tmp_path):
    model = get_peft_model(tiny_model("olmoe"), config_for(tiny_model("olmoe"), init_weights=False))
    for delta in deltas_of(model).values():
        delta.data.mul_(1e-6)
    model.save_pretrained(tmp_path / "delta")
    compact(tmp_path / "delta", tmp_path / form, form=form)
    model = PeftModel.from_pretrained(tiny_model("olmoe"), tmp_path / form)
    tuner = model.base_model
    before = [layer.get_delta_weight("default", name) for layer in tuner._layers() for name in layer.weights]
    model.half()
    after = [layer.get_delta_weight("default", name) for layer in tuner._layers() for name in layer.weights]
    assert all(torch.equal(old, new) and old.any() for old, new in zip(before, after, strict=True))
    model.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(tiny_model("olmoe"), tmp_path / "again").state_dict()
    saved = {name: tensor for name, tensor in model.state_dict().items() if "esft_" in name}
    assert saved and all(torch.equal(tensor, again[name]) for name, tensor in saved.items())
