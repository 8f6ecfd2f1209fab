"""Adapters that were trained over experts in few bits, merged into plain and quantised checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from peft_esft import ESFTQuantizationConfig, find_experts, quantize_experts
from peft_esft.interchange import merge_checkpoint
from peft_esft.interchange.base import Base

from families import tiny_model
from oracle import config_for, random_tokens
from stored_bases import same_bits


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=random_tokens())[0]


@pytest.fixture(params=["olmoe", "gpt_oss"])
def folders(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with a plain checkpoint, a quantised one with a file beside it, and an adapter of the latter."""
    tiny_model(request.param, torch.bfloat16).save_pretrained(tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=ESFTQuantizationConfig())
    model.save_pretrained(tmp_path / "quantised")
    (tmp_path / "quantised" / "tokenizer.json").write_text("{}")
    get_peft_model(model, config_for(model, init_weights=False)).save_pretrained(tmp_path / "adapter")
    return tmp_path


def over(folders: Path, base: str) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folders / base)
    return logits(PeftModel.from_pretrained(model, folders / "adapter"))


def test_the_plain_checkpoint_takes_the_deltas_and_the_merge_says_what_they_were_trained_over(folders: Path) -> None:
    with pytest.warns(UserWarning, match="trained over experts in nf4"):
        merge_checkpoint(folders / "plain", folders / "adapter", folders / "merged")
    assert same_bits(logits(AutoModelForCausalLM.from_pretrained(folders / "merged")), over(folders, "plain"))


def test_the_quantised_checkpoint_keeps_merged_experts_in_full_precision(folders: Path) -> None:
    merge_checkpoint(folders / "quantised", folders / "adapter", folders / "merged")
    merged = AutoModelForCausalLM.from_pretrained(folders / "merged")
    assert same_bits(logits(merged), over(folders, "quantised"))
    assert merged.config.quantization_config.keep == {path: [1, 5, 6] for path in find_experts(merged)}
    before, after = (load_file(folders / name / "model.safetensors") for name in ("quantised", "merged"))
    unchanged = {name for name in before if "_bias" not in name}
    assert all(same_bits(after[name], before[name]) for name in unchanged)
    assert (
        sorted(name.rpartition(".")[2] for name in after.keys() - before.keys())
        == ["kept_experts"] * 4 + ["kept_rows"] * 4
    )
    assert (folders / "merged" / "tokenizer.json").read_text() == "{}"


def test_a_second_adapter_is_merged_over_the_first(folders: Path) -> None:
    merge_checkpoint(folders / "quantised", folders / "adapter", folders / "merged")
    model = AutoModelForCausalLM.from_pretrained(folders / "merged")
    torch.manual_seed(3)
    wrapped = get_peft_model(model, config_for(model, [6, 2], init_weights=False))
    wrapped.save_pretrained(folders / "second")
    expected = logits(wrapped)
    merge_checkpoint(folders / "merged", folders / "second", folders / "both")
    both = AutoModelForCausalLM.from_pretrained(folders / "both")
    assert same_bits(logits(both), expected)
    assert set(map(tuple, both.config.quantization_config.keep.values())) == {(1, 2, 5, 6)}


def test_what_cannot_be_merged_is_refused_and_nothing_is_written(folders: Path) -> None:
    with pytest.raises(NotImplementedError, match="Use the checkpoint that it was made from"):
        Base(folders / "quantised")  # of all other conversions
    with pytest.raises(NotImplementedError, match="untie is not supported"):
        merge_checkpoint(folders / "quantised", folders / "adapter", folders / "merged", untie=True)
    model = quantize_experts(AutoModelForCausalLM.from_pretrained(folders / "plain"))
    config = config_for(model, modules_to_save=["lm_head"])
    get_peft_model(model, config).save_pretrained(folders / "with_head")
    with pytest.raises(NotImplementedError, match=r"has .*lm_head.* only experts can be merged"):
        merge_checkpoint(folders / "quantised", folders / "with_head", folders / "merged")
    file = folders / "adapter" / "adapter_config.json"
    content = json.loads(file.read_text())
    content["target_experts"] = {path: [1, 5, 8] for path in content["target_experts"]}
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="8"):
        merge_checkpoint(folders / "quantised", folders / "adapter", folders / "merged")
    assert not (folders / "merged").exists()
