"""The plugin's reader of adapter files: equal to the library's on `golden/`, and strict."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft_esft_vllm.adapter_file import read_adapter, read_config
from safetensors.torch import load_file, save_file


GOLDEN = Path(__file__).parent / "golden"
FOLDERS = sorted(folder.name for folder in GOLDEN.iterdir() if folder.is_dir())


@pytest.mark.parametrize("name", FOLDERS)
def test_all_forms_are_read_as_the_library_reads_them(name):
    expected = {k: v for k, v in load_file(GOLDEN / "expected.safetensors").items() if k.startswith(f"{name}/")}
    found = {}
    for path, change in read_adapter(GOLDEN / name):
        assert (
            change.expert_ids
            == json.loads((GOLDEN / name / "adapter_config.json").read_text())["target_experts"][path]
        )
        assert change.is_effective == (name == "rows")
        found |= {f"{name}/{path}/gate_up_proj": change.gate_up, f"{name}/{path}/down_proj": change.down}
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=0)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return shutil.copytree(GOLDEN / "delta", tmp_path / "adapter")


def rewrite(adapter: Path, **fields: object) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"peft_type": "LORA"}, ValueError, "adapter of type LORA.*serves ESFT's alone"),
        ({"train_shared_experts": True}, NotImplementedError, "train_shared_experts.*peft-esft merge"),
        ({"train_non_expert_modules": True}, NotImplementedError, "train_non_expert_modules.*peft-esft merge"),
        ({"modules_to_save": ["lm_head"]}, NotImplementedError, "modules_to_save.*peft-esft merge"),
        ({"storage": "int2"}, ValueError, "storage is 'int2'"),
        ({"target_experts": {"model.layers.0.mlp.experts": [1, 1]}}, ValueError, "different expert ids"),
        ({"target_experts": None}, ValueError, "different expert ids"),
    ],
)
def test_configs_that_cannot_be_served_are_refused(adapter, fields, error, words):
    rewrite(adapter, **fields)
    with pytest.raises(error, match=words):
        read_config(adapter)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda t, key: t.pop(key), NotImplementedError, "gated experts without biases"),
        (lambda t, key: t.update({"base_model.model.lm_head.weight": torch.ones(2)}), NotImplementedError, "lm_head"),
        (lambda t, key: t.update({key: t[key][:1]}), ValueError, "do not fit 2 experts"),
        (lambda t, key: t.update({key: t[key][0, 0]}), ValueError, "do not fit each other"),
        (lambda t, key: t[key].fill_(torch.inf), ValueError, "not finite"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(adapter, change, error, words):
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors, "base_model.model.model.layers.0.mlp.experts.esft_down_proj")
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(error, match=words):
        list(read_adapter(adapter))


def test_broken_files_are_refused(adapter):
    (adapter / "adapter_model.safetensors").write_bytes(b"\x10")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        list(read_adapter(adapter))
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors"):
        list(read_adapter(adapter))
    (adapter / "adapter_config.json").write_text("[")
    with pytest.raises(ValueError, match="not the config of an adapter"):
        read_config(adapter)


def test_layers_that_the_config_leaves_out_have_no_tensors(adapter):
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({k: v for k, v in tensors.items() if ".layers.0." not in k}, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"no weights of model\.layers\.0"):
        list(read_adapter(adapter))
    rewrite(adapter, layers_to_transform=[1])
    assert [path for path, _ in read_adapter(adapter)] == ["model.layers.1.mlp.experts"]
