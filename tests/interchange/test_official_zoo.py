"""The original code's files, for every architecture of transformers that has experts."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from peft_esft import find_experts
from peft_esft.interchange import export_official, import_official

from checkpoints import tensors_of


zoo = pytest.importorskip("zoo")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
TOGETHER = [
    "aria",
    "dbrx",
    "diffusion_gemma",
    "doge",
    "gemma4",
    "gpt_oss",
    "granitemoe",
    "granitemoe_swa",
    "granitemoehybrid",
    "granitemoeshared",
    "hy_v4",
    "inkling",
    "inkling2",
    "jetmoe",
    "llama4",
    "mistral4",
    "muse_spark",
    "openai_privacy_filter",
    "qwen3_vl_moe",
    "step3p7",
    "zaya",
]
"""Families whose checkpoints keep all experts of a layer in one tensor: there are no keys for single ones."""
SEVERAL = ["dots3_note", "nllb_moe", "switch_transformers"]
"""Families with several containers in layers of the same number: a selection has to name their paths."""
MIXED = ["ernie4_5_vl_moe"]
"""Families whose checkpoints keep the experts of two containers in one list."""


def train(model, selection):
    """Changes the selected experts, as the original code's training does."""
    generator = torch.Generator().manual_seed(0)
    containers = find_experts(model)
    for path, ids in selection.items():
        for weight in containers[path].weights:
            rows = weight.read(containers[path].module, ids)
            weight.write(containers[path].module, ids, rows + 0.05 * torch.randn(rows.shape, generator=generator))


@pytest.mark.parametrize("model_type", zoo.model_types())
def test_files_go_there_and_back(model_type, tmp_path):
    base = zoo.build(model_type)
    containers = {path: c for path, c in find_experts(base).items() if c.refusal is None}
    selection = {path: [c.num_experts - 1, 0] for path, c in containers.items()}
    trained = copy.deepcopy(base)
    train(trained, selection)
    base.save_pretrained(tmp_path / "base", max_shard_size="100KB")
    trained.save_pretrained(tmp_path / "trained")
    before, after = tensors_of(tmp_path / "base"), tensors_of(tmp_path / "trained")
    changed = {key: value for key, value in after.items() if not torch.equal(value, before[key])}
    by_path = model_type in (*SEVERAL, *MIXED, "jetmoe")
    keys = {path: path if by_path else str(container.layer_index) for path, container in containers.items()}
    cfg = {"experts": {keys[path]: ids for path, ids in selection.items()}}
    cfg |= {"shared_experts": False, "non_expert_modules": False}
    (tmp_path / "official").mkdir()
    (tmp_path / "official" / "expert_cfg.json").write_text(json.dumps(cfg))
    save_file(changed, tmp_path / "official" / "model.safetensors")
    if model_type in TOGETHER:
        with pytest.raises(NotImplementedError, match=r"all experts of .* in one tensor"):
            import_official(tmp_path / "official", tmp_path / "base", tmp_path / "adapter")
        return
    if model_type in MIXED:
        with pytest.raises(NotImplementedError, match="in the same tensors as another parameter"):
            import_official(tmp_path / "official", tmp_path / "base", tmp_path / "adapter")
        return
    import_official(tmp_path / "official", tmp_path / "base", tmp_path / "adapter")
    model = PeftModel.from_pretrained(zoo.build(model_type), str(tmp_path / "adapter"))
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = tensors_of(tmp_path / "merged")
    assert merged.keys() == after.keys() and all(torch.equal(merged[key], after[key]) for key in after)
    if model_type in SEVERAL:
        with pytest.raises(ValueError, match="names experts modules by the index of their layer"):
            export_official(tmp_path / "adapter", tmp_path / "base", tmp_path / "back")
        return
    export_official(tmp_path / "adapter", tmp_path / "base", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == changed.keys() and all(torch.equal(back[key], changed[key]) for key in changed)
    assert json.loads((tmp_path / "back" / "expert_cfg.json").read_text()) == cfg
