"""Over experts in few bits, two processes compute what one does on the joint batch, and save what one saves."""

from __future__ import annotations

import pytest
import quantised_engines
import torch
from peft import PeftModel
from quantised_engines import FORMS, adapted
from test_engines import largest_difference, report

from peft_esft import quantize_experts

import engines
from engines import base_model, joint_batches, train, whole_deltas
from families import tiny_model


pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def test_ddp_and_fsdp2(tmp_path, record_property):
    results = engines.run(quantised_engines.by_hand, tmp_path)
    for form in FORMS:
        model = adapted(form)
        before = model.state_dict()
        train(model, joint_batches())
        expected = whole_deltas(model)
        assert min(float(delta.abs().max()) for delta in expected.values()) > 1e-3
        for found in results:
            for engine in ("DDP", "FSDP2, checkpointing False", "FSDP2, checkpointing True"):
                difference = largest_difference(found[form, engine], expected)
                report(record_property, f"{engine}, {form}", training=difference)
                assert difference < 1e-6
            assert all(".esft_" in name for name in found[form, "trained"]) and found[form, "trained"]
        full = results[0][form, "full checkpoint"]
        assert full.keys() == before.keys()
        assert all(torch.equal(full[name], tensor) for name, tensor in before.items() if ".esft_" not in name)
        again = adapted(form)
        again.load_state_dict(full)
        sharded = results[0][form, "FSDP2, checkpointing True"]
        assert largest_difference(whole_deltas(again), sharded) == 0
        loaded = PeftModel.from_pretrained(quantize_experts(base_model(), **FORMS[form]), tmp_path / form)
        assert largest_difference(whole_deltas(loaded), sharded) == 0


def test_trainer_with_fsdp2(tmp_path, record_property):
    expected = {}
    for form in ("nf4, kept", "int8"):
        single = engines.make_trainer(tmp_path / f"single {form}", 4, adapted(form))
        single.train()
        expected[form] = whole_deltas(single.model)
    for results in engines.run(quantised_engines.trainer_fsdp2, tmp_path):
        for (form, *settings), (deltas, resumed) in results.items():
            difference = largest_difference(deltas, expected[form])
            report(record_property, f"Trainer, FSDP2, {form}, {settings}", training=difference)
            assert difference < 1e-6 < max(float(delta.abs().max()) for delta in deltas.values())
            assert largest_difference(resumed, deltas) == 0


def test_what_would_change_the_weights_is_refused(tmp_path):
    torch.manual_seed(0)
    tiny_model(engines.EP_FAMILY).save_pretrained(tmp_path / "base")
    quantize_experts(tiny_model(engines.EP_FAMILY), bits=8).save_pretrained(tmp_path / "quantised")
    for found in engines.run(quantised_engines.refused, tmp_path):
        for form in ("nf4", "int8"):
            assert f"scales of experts in {form} were cast from torch.float32 to torch.bfloat16" in found[form]
            assert "bf16=False" in found[form]
        for name in engines.LAYOUTS:
            for source in ("base", "quantised"):
                assert "distributed_config" in found[f"{name}, {source}"]
                assert "FSDP2" in found[f"{name}, {source}"]
