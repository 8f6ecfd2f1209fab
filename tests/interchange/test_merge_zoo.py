"""Merging into a checkpoint, on every architecture of transformers that has experts."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from peft_esft import ESFTConfig, find_experts
from peft_esft.interchange import merge_checkpoint

from checkpoints import tensors_of


zoo = pytest.importorskip("zoo")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
MIXED = {"ernie4_5_vl_moe"}


@pytest.mark.parametrize("model_type", zoo.model_types())
def test_it_equals_merging_in_memory_bit_for_bit(model_type, tmp_path):
    model = zoo.build(model_type)
    model.save_pretrained(tmp_path / "base", max_shard_size="100KB")
    selection = {path: [c.num_experts - 1, 0] for path, c in find_experts(model).items() if c.refusal is None}
    wrapped = get_peft_model(model, ESFTConfig(target_experts=selection, init_weights=False))
    wrapped.save_pretrained(tmp_path / "adapter")
    wrapped.merge_and_unload().save_pretrained(tmp_path / "expected")
    if model_type in MIXED:
        with pytest.raises(NotImplementedError, match="in the same tensors as another parameter"):
            merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
        return
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    base, merged, expected = (tensors_of(tmp_path / name) for name in ("base", "merged", "expected"))
    assert merged.keys() == base.keys() == expected.keys()
    assert all(torch.equal(merged[key], expected[key]) for key in merged)
