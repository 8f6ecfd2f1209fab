"""Deltas keep the precision that was asked for, also where TRL casts what is trained on a base in few bits."""

from __future__ import annotations

import json

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

from peft_esft import ESFTConfig, ESFTQuantizationConfig
from peft_esft.cli.main import main

from oracle import deltas_of
from repository import ROOT


# Both libraries announce changes of their own.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

MODEL = str(ROOT / "examples" / "tiny_moe" / "model")
CONFIG = {"target_experts": {0: [3, 7], 1: [12]}, "task_type": "CAUSAL_LM"}


def quantised_base():
    """Experts in 4 bits, and bitsandbytes' linear layers, by which TRL knows a quantised base."""
    linears = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    return AutoModelForCausalLM.from_pretrained(
        MODEL, dtype=torch.bfloat16, quantization_config=ESFTQuantizationConfig(bits=4, linears=linears)
    )


def trainer_of(model, folder):
    settings = {"max_steps": 2, "per_device_train_batch_size": 2, "max_length": 16, "learning_rate": 1e-3}
    return SFTTrainer(
        model,
        SFTConfig(str(folder), **settings, bf16=False, use_cpu=True, report_to="none", router_aux_loss_coef=0.0),
        train_dataset=Dataset.from_list([{"text": f"line {number} of a text"} for number in range(8)]),
        processing_class=AutoTokenizer.from_pretrained(MODEL),
    )


def dtypes(model):
    return {delta.dtype for delta in deltas_of(model).values()}


def test_deltas_that_trl_has_cast_are_trained_in_fp32(tmp_path):
    trainer = trainer_of(get_peft_model(quantised_base(), ESFTConfig(**CONFIG)), tmp_path)
    assert dtypes(trainer.model) == {torch.bfloat16}, "TRL no longer casts; `tuner/precision.py` may go"
    trainer.train()
    assert dtypes(trainer.model) == {torch.float32}
    assert all(state["exp_avg"].dtype == torch.float32 for state in trainer.optimizer.state.values())
    assert any((delta.bfloat16().float() != delta).any() for delta in deltas_of(trainer.model).values())


def test_deltas_asked_for_in_the_base_s_dtype_stay_in_it(tmp_path):
    model = get_peft_model(quantised_base(), ESFTConfig(**CONFIG), autocast_adapter_dtype=False)
    trainer = trainer_of(model, tmp_path)
    trainer.train()
    assert dtypes(trainer.model) == {torch.bfloat16}


def test_rounding_of_trained_deltas_is_said(tmp_path):
    model = get_peft_model(quantised_base(), ESFTConfig(**CONFIG, init_weights=False))
    model.save_pretrained(tmp_path / "trained")
    model = PeftModel.from_pretrained(quantised_base(), tmp_path / "trained", is_trainable=True)
    before = [delta.detach().clone() for delta in deltas_of(model).values()]
    trainer = trainer_of(model, tmp_path)
    with pytest.warns(UserWarning, match="has rounded the deltas"):
        trainer.model.train()
    after = deltas_of(trainer.model).values()
    assert all(torch.equal(new, old.bfloat16().float()) for new, old in zip(after, before, strict=True))


def test_several_processes_are_told_what_to_do(tmp_path, monkeypatch):
    model = trainer_of(get_peft_model(quantised_base(), ESFTConfig(**CONFIG)), tmp_path).model
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        monkeypatch.setattr(dist, "get_world_size", lambda: 2)
        with pytest.raises(ValueError, match=r"restore_delta_dtype\(\) on each process after the trainer is made"):
            model.train()
        model.base_model.restore_delta_dtype()
        model.train()
    finally:
        dist.destroy_process_group()
    assert dtypes(model) == {torch.float32}


def test_the_command_trains_deltas_in_fp32_over_experts_in_four_bits(tmp_path, capsys):
    rows = [{"prompt": f"What is {n} of it?", "completion": f"It is {n + 1}."} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "law"
    more = ["--bits", "4", "--bf16", "true", "--max-steps", "2", "--max-length", "32", "--learning-rate", "1e-3"]
    assert main(["train", MODEL, str(tmp_path / "rows.jsonl"), "--out", str(out), *more]) == 0, capsys.readouterr().err
    saved = load_file(out / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert any((tensor.bfloat16().float() != tensor).any() for tensor in saved.values())
