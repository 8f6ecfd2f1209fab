"""transformers' `Trainer` and TRL's trainers: training, evaluation, resuming, the best checkpoint, the reference."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import AutoTokenizer, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from peft_esft.checkpoints import last_complete_checkpoint

from families import tiny_model
from oracle import config_for, deltas_of, random_tokens
from repository import ROOT


# Both libraries announce changes of their own.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

STEPS = 6


def settings(folder, **more):
    return {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **more,
    }


def rows(number, seed):
    return [{"input_ids": row, "labels": row} for row in random_tokens(number, 12, seed=seed)]


def plain_trainer(folder, base, **more):
    model = get_peft_model(copy.deepcopy(base), config_for(base, task_type="CAUSAL_LM"))
    arguments = TrainingArguments(**settings(folder, **more))
    return Trainer(model, arguments, train_dataset=rows(20, seed=1), eval_dataset=rows(4, seed=2))


def text_rows(*columns):
    texts = [f"line {number} of a text on {number % 3} things" for number in range(20)]
    return Dataset.from_list([{column: f"{text}, {column}" for column in columns} for text in texts])


def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "examples" / "tiny_moe" / "model")


def sft_trainer(folder, base, **more):
    return SFTTrainer(
        copy.deepcopy(base),
        SFTConfig(**settings(folder, bf16=False, max_length=16, **more)),
        train_dataset=text_rows("text"),
        eval_dataset=text_rows("text").select(range(4)),
        processing_class=tokenizer(),
        peft_config=config_for(base, task_type="CAUSAL_LM"),
    )


def dpo_trainer(folder, base, **more):
    return DPOTrainer(
        copy.deepcopy(base),
        args=DPOConfig(**settings(folder, bf16=False, max_length=32, **more)),
        train_dataset=text_rows("prompt", "chosen", "rejected"),
        eval_dataset=text_rows("prompt", "chosen", "rejected").select(range(4)),
        processing_class=tokenizer(),
        peft_config=config_for(base, task_type="CAUSAL_LM"),
    )


TRAINERS = {"Trainer": plain_trainer, "SFTTrainer": sft_trainer, "DPOTrainer": dpo_trainer}


def base_for(kind):
    base = tiny_model("olmoe")
    if kind != "Trainer":
        base.resize_token_embeddings(4096, mean_resizing=False)  # of the embedded model's tokenizer
    return base


def weights(model):
    return {key: delta.detach().clone() for key, delta in deltas_of(model).items()}


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_resumed_run_continues_bit_for_bit(kind, tmp_path):
    base = base_for(kind)
    whole = TRAINERS[kind](tmp_path / "run", base)
    whole.train()
    after = {
        name.replace(".base_layer", ""): value
        for name, value in whole.model.get_base_model().state_dict().items()
        if ".esft_" not in name
    }
    assert all(torch.equal(after[name], value) for name, value in base.state_dict().items())

    saved = {path.name for path in (tmp_path / "run" / f"checkpoint-{STEPS}").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= saved
    assert not any(name.startswith(("model", "pytorch_model")) for name in saved)
    resumed = TRAINERS[kind](tmp_path / "resumed", base)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    expected, found = weights(whole.model), weights(resumed.model)
    assert all(torch.equal(found[key], delta) for key, delta in expected.items())
    assert any(delta.any() for delta in expected.values())

    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "run" / f"checkpoint-{STEPS}")
    assert all(torch.equal(weights(loaded)[key], delta) for key, delta in expected.items())


def test_evaluations_see_the_weights_of_their_step_and_the_best_come_back(tmp_path):
    base = tiny_model("olmoe")
    # Ever worse on the data of the evaluation: the first one is the best.
    trainer = plain_trainer(tmp_path, base, load_best_model_at_end=True, learning_rate=0.1, eval_on_start=True)
    trainer.train()
    losses = {log["step"]: log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log}
    assert len(set(losses.values())) == 1 + STEPS // 2
    for step in (2, 4, 6):
        reloaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / f"checkpoint-{step}").merge_and_unload()
        checked = Trainer(reloaded, trainer.args, eval_dataset=trainer.eval_dataset)
        assert checked.evaluate()["eval_loss"] == pytest.approx(losses[step], abs=1e-5)
    best = min((2, 4, 6), key=losses.get)
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], abs=1e-6)


def test_the_reference_of_dpo_is_the_base(tmp_path):
    base = base_for("DPOTrainer")
    trainer = dpo_trainer(tmp_path, base)
    trainer.train()
    batch = next(iter(trainer.get_eval_dataloader()))
    with torch.no_grad(), trainer.model.disable_adapter():
        reference = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = base.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert torch.equal(reference, expected)
    before = dpo_trainer(tmp_path / "fresh", base).evaluate()
    assert before["eval_rewards/margins"] == 0
    assert trainer.evaluate()["eval_rewards/margins"] > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("script", ["trainer.py", "sft.py", "dpo.py"])
def test_the_examples_run(script, tmp_path):
    command = [sys.executable, str(ROOT / "examples" / script), "--output", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "after; adapter of" in done.stdout
    if script == "trainer.py":
        assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-40")


def test_dpo_on_a_trained_adapter_has_that_adapter_as_its_reference(tmp_path):
    base = base_for("DPOTrainer")
    model = get_peft_model(copy.deepcopy(base), config_for(base, init_weights=False, task_type="CAUSAL_LM"))
    with pytest.warns(UserWarning, match="'ref' has the config of 'default' but not its weights"):
        trainer = DPOTrainer(
            model,
            args=DPOConfig(**settings(tmp_path, bf16=False, max_length=32)),
            train_dataset=text_rows("prompt", "chosen", "rejected"),
            eval_dataset=text_rows("prompt", "chosen", "rejected").select(range(4)),
            processing_class=tokenizer(),
        )
    # TRL makes the adapter "ref", but copies only weights whose names go on behind the adapter's.
    trainer.model.delete_adapter("ref")
    trainer.model.base_model.add_weighted_adapter(["default"], [1.0], "ref")
    trained = {key: delta.detach().clone() for key, delta in deltas_of(model, "default").items()}
    assert all(torch.equal(deltas_of(model, "ref")[key], delta) for key, delta in trained.items())
    assert trainer.evaluate()["eval_rewards/margins"] == 0
    trainer.train()
    assert trainer.evaluate()["eval_rewards/margins"] > 0.01
    assert all(torch.equal(deltas_of(model, "ref")[key], delta) for key, delta in trained.items())
    assert not any(torch.equal(deltas_of(model, "default")[key], delta) for key, delta in trained.items())


def test_the_recipes_of_the_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = base_for("SFTTrainer")
    namespace = {
        "base": base,
        "config": config_for(base, task_type="CAUSAL_LM"),
        "arguments": TrainingArguments(**settings("run", max_steps=2)),
        "sft_arguments": SFTConfig(**settings("sft", bf16=False, max_steps=1, max_length=16)),
        "dpo_arguments": DPOConfig(**settings("dpo", bf16=False, max_steps=1, max_length=32)),
        "rows": rows(8, seed=1),
        "texts": text_rows("text"),
        "pairs": text_rows("prompt", "chosen", "rejected"),
        "tokenizer": tokenizer(),
    }
    for page in ("training.md", "engines.md"):
        for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), flags=re.DOTALL):
            exec(compile(block, page, "exec"), namespace)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert (tmp_path / "sft" / "adapter_model.safetensors").exists()
    assert "ref" in namespace["trainer"].model.peft_config


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2", "zero3"])
def test_the_configurations_of_accelerate_are_read(engine):
    config = load_config_from_file(str(ROOT / "examples" / "accelerate" / f"{engine}.yaml"))
    expected = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    assert config.distributed_type == expected[engine]
    assert config.num_processes == (2 if engine == "ddp" else 8)
    assert engine != "fsdp2" or config.fsdp_config["fsdp_version"] == 2
    assert not engine.startswith("zero") or config.deepspeed_config["zero_stage"] == int(engine[-1])


@pytest.mark.slow
def test_the_example_runs_in_two_processes(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    config = ROOT / "examples" / "accelerate" / "ddp.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    script = [str(ROOT / "examples" / "trainer.py"), "--output", str(tmp_path), "--steps", "10"]
    done = subprocess.run([*command, *script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("after; adapter of") == 1
