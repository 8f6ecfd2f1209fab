"""`peft-esft verify`: an exact adapter passes, one that is lost, inert or inexact fails with what is wrong."""

from __future__ import annotations

import json

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from peft_esft import ESFTConfig
from peft_esft.cli import verify
from peft_esft.cli.main import main
from peft_esft.tuner.layers.layer import ESFTLayer

from repository import ROOT


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

MODEL = str(ROOT / "examples" / "tiny_moe" / "model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An adapter with experts in two layers, and one whose deltas are zero."""
    folder = tmp_path_factory.mktemp("verify")
    for name, std in (("law", 0.02), ("inert", 0.0)):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
        model = get_peft_model(base, ESFTConfig(target_experts={0: [1, 2], 3: [5]}, task_type="CAUSAL_LM"))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(std=std)
        model.save_pretrained(folder / name)
    return folder


def verified(capsys, *arguments):
    """The exit code and the failed checks."""
    code = main(["verify", MODEL, *map(str, arguments), "--json"])
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert len(checks) == 7
    return code, {check: found for check, found in checks.items() if found != "ok"}


@pytest.mark.parametrize("options", ["--dtype float32", "--dtype bfloat16", "--bits 8", "--bits 4"])
def test_an_exact_adapter_passes(folder, capsys, options):
    assert verified(capsys, folder / "law", *options.split()) == (0, {})


def test_the_checks_are_listed(folder, capsys):
    assert main(["verify", MODEL, str(folder / "law")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7 and all(line.startswith("ok ") for line in lines)


def test_an_adapter_that_changes_nothing_fails(folder, capsys):
    code, failed = verified(capsys, folder / "inert")
    assert code == 1 and failed == {"the adapter changes the outputs": "they are the base's"}


def test_a_file_that_lacks_a_tensor_is_refused(folder, tmp_path, capsys):
    tensors = load_file(folder / "law" / "adapter_model.safetensors")
    lacking = sorted(tensors)[0]
    for file in (folder / "law").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    del tensors[lacking]
    save_file(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    assert main(["verify", MODEL, str(tmp_path)]) == 1
    assert lacking.split(".")[-1] in capsys.readouterr().err


def test_a_base_that_is_written_to_fails(folder, capsys, monkeypatch):
    def unmerge(self):
        self.get_base_layer().down_proj.data[7] += 1
        self.merge_record = None
        self.refresh_active()

    monkeypatch.setattr(ESFTLayer, "unmerge", unmerge)
    code, failed = verified(capsys, folder / "law")
    assert code == 1
    assert "mlp.experts.down_proj" in failed["the base has every bit back after unmerging"]
    assert "the adapter's outputs are the same after unmerging" in failed


def test_merging_that_is_not_exact_fails(folder, capsys, monkeypatch):
    merge = ESFTLayer.merge

    def wrong(self, *args, **kwargs):
        merge(self, *args, **kwargs)
        self.get_base_layer().down_proj.data.mul_(2)
        self.get_base_layer().down_proj.data.div_(2)
        self.get_base_layer().down_proj.data[self.expert_ids["default"][0]] *= 3

    monkeypatch.setattr(ESFTLayer, "merge", wrong)
    code, failed = verified(capsys, folder / "law", "--dtype", "float32")
    assert code == 1 and list(failed) == ["merged outputs are the unmerged ones within 0.0001"]


def test_an_expert_in_another_precision_fails(folder, capsys, monkeypatch):
    from peft_esft.cli import loading

    def load_base(*args, **kwargs):
        base = loading_base(*args, **kwargs)
        experts = base.model.layers[1].mlp.experts
        experts.down_proj.data = experts.down_proj.data.double()
        return base

    loading_base = loading.load_base
    monkeypatch.setattr(loading, "load_base", load_base)
    monkeypatch.setattr(verify, "_check_use", lambda *_: {str(number): "" for number in range(5)})
    code, failed = verified(capsys, folder / "law")
    assert code == 1 and "model.layers.1.mlp.experts is in torch.float64" in next(iter(failed.values()))


def test_an_adapter_of_another_kind_is_refused(tmp_path, capsys):
    assert main(["verify", MODEL, MODEL]) == 1
    assert "model" in capsys.readouterr().err
