"""Saving that survives a killed process, and finding the last whole checkpoint."""

from __future__ import annotations

import copy
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from peft_esft.checkpoints import PREVIOUS_SUFFIX, last_complete_checkpoint, save_adapter

from families import tiny_model
from oracle import config_for


WRITER = """
import sys, warnings
import torch
from peft import get_peft_model
from peft_esft.checkpoints import save_adapter
from families import tiny_model
from oracle import config_for, deltas_of

warnings.simplefilter("ignore")
torch.manual_seed(0)
base = tiny_model("olmoe")
models = [get_peft_model(tiny_model("olmoe"), config_for(base, experts)) for experts in ([5, 1, 6], [0, 2])]
for value, model in enumerate(models, start=1):
    for delta in deltas_of(model).values():
        delta.data.fill_(value)
while True:
    for model in models:
        save_adapter(model, sys.argv[1])
        print("saved", flush=True)
"""


def holds_a_whole_adapter(folder, base):
    """True if the folder loads, and holds the weights that its config says."""
    model = PeftModel.from_pretrained(copy.deepcopy(base), folder)
    experts = next(iter(model.peft_config["default"].target_experts.values()))
    values = {
        float(value)
        for tensor in load_file(folder / "adapter_model.safetensors").values()
        for value in tensor.unique()
    }
    return values == {1.0 if experts == [5, 1, 6] else 2.0}


@pytest.mark.slow
def test_an_adapter_survives_its_writer_being_killed(tmp_path):
    folder, base, draw = tmp_path / "adapter", tiny_model("olmoe"), random.Random(0)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent / "support"), *sys.path])
    }
    for _ in range(3):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE, text=True, env=environment
        )
        assert writer.stdout.readline() == "saved\n"
        time.sleep(draw.random() / 2)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        # Between two renames it is the old adapter that is left, under the name of the previous one.
        found = folder if folder.exists() else folder.with_name(folder.name + PREVIOUS_SUFFIX)
        assert holds_a_whole_adapter(found, base)


@pytest.mark.parametrize("stage", ["save", "rename"])
def test_a_failed_save_leaves_the_old_adapter(stage, tmp_path, monkeypatch):
    base = tiny_model("olmoe")
    model = get_peft_model(copy.deepcopy(base), config_for(base, init_weights=False))
    folder = tmp_path / "adapter"
    save_adapter(model, folder)
    before = load_file(folder / "adapter_model.safetensors")

    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    if stage == "save":
        monkeypatch.setattr("peft.peft_model.PeftConfig.save_pretrained", fail)
        monkeypatch.setattr("peft_esft.tuner.config.ESFTConfig.save_pretrained", fail)
    else:
        monkeypatch.setattr("peft_esft.checkpoints.os.rename", fail)
    with pytest.raises(OSError, match="no space"):
        save_adapter(model, folder)
    monkeypatch.undo()
    after = load_file(folder / "adapter_model.safetensors")
    assert all(torch.equal(after[key], value) for key, value in before.items())
    save_adapter(model, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def adapted(*names):
    base = tiny_model("olmoe")
    model = get_peft_model(base, config_for(base, init_weights=False), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config_for(tiny_model("olmoe"), init_weights=False))
    return model


def test_a_run_keeps_its_checkpoints_and_whatever_else_it_holds(tmp_path):
    run, model = tmp_path / "run", adapted("default")
    checkpoint(run / "checkpoint-10", model)
    (run / "log.txt").write_text("years of work")
    (run / "latest").symlink_to("checkpoint-10")
    with (run / "log.txt").open("a") as log:
        save_adapter(model, run)
        log.write(", and on")  # by another process, which has it open
    assert (run / "log.txt").read_text() == "years of work, and on"
    assert os.readlink(run / "latest") == "checkpoint-10"
    assert last_complete_checkpoint(run) == str(run / "checkpoint-10")
    PeftModel.from_pretrained(tiny_model("olmoe"), run / "checkpoint-10")
    PeftModel.from_pretrained(tiny_model("olmoe"), run)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_other_adapters_of_the_folder_stay(tmp_path):
    model = adapted("law", "intent")
    for name in ("law", "intent"):
        save_adapter(model, tmp_path / "both", selected_adapters=[name])
    for name in ("law", "intent"):
        PeftModel.from_pretrained(tiny_model("olmoe"), tmp_path / "both" / name)


def test_a_card_that_was_written_by_hand_stays_and_the_old_one_is_not_written_to(tmp_path, monkeypatch):
    model, folder = adapted("default"), tmp_path / "adapter"
    save_adapter(model, folder)
    card = (folder / "README.md").read_text() + "\nTrained on law.\n"
    (folder / "README.md").write_text(card)
    (folder / "tokenizer.json").write_text("{}")
    monkeypatch.setattr("peft_esft.checkpoints.os.rename", None)
    with pytest.raises(TypeError):
        save_adapter(model, folder)
    assert (folder / "README.md").read_text() == card
    monkeypatch.undo()
    save_adapter(model, folder)
    assert "Trained on law." in (folder / "README.md").read_text()
    assert (folder / "tokenizer.json").exists()


def test_old_weights_do_not_stay_beside_new_ones_of_another_form(tmp_path):
    base = tiny_model("olmoe")
    save_adapter(adapted("default"), tmp_path / "adapter")
    save_adapter(adapted("default"), tmp_path / "adapter", safe_serialization=False)
    assert not (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    PeftModel.from_pretrained(base, tmp_path / "adapter", use_safetensors=False)


def test_files_are_copied_where_there_are_no_links(tmp_path, monkeypatch):
    def link(*_, **__):
        raise OSError("no links")

    (tmp_path / "run" / "logs").mkdir(parents=True)
    (tmp_path / "run" / "logs" / "log.txt").write_text("years of work")
    monkeypatch.setattr("peft_esft.checkpoints.os.link", link)
    save_adapter(adapted("default"), tmp_path / "run")
    assert (tmp_path / "run" / "logs" / "log.txt").read_text() == "years of work"


def test_a_process_killed_between_the_renames_loses_nothing(tmp_path, monkeypatch):
    model, folder = adapted("default"), tmp_path / "run"
    save_adapter(model, folder)
    (folder / "log.txt").write_text("years of work")
    shutil.copytree(folder, tmp_path / "run.partial")
    folder.rename(tmp_path / f"run{PREVIOUS_SUFFIX}")
    save_adapter(model, folder)
    assert (folder / "log.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_process_killed_while_it_deletes_the_old_folder_is_in_nobodys_way(tmp_path, monkeypatch):
    model, folder, delete = adapted("default"), tmp_path / "adapter", shutil.rmtree

    def be_killed(path, **_):
        if Path(path).exists():
            (Path(path) / "adapter_config.json").unlink()
            raise KeyboardInterrupt

    save_adapter(model, folder)
    monkeypatch.setattr("peft_esft.checkpoints.shutil.rmtree", be_killed)
    with pytest.raises(KeyboardInterrupt):
        save_adapter(model, folder)
    monkeypatch.setattr("peft_esft.checkpoints.shutil.rmtree", delete)
    save_adapter(model, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("place", [".", ".."])
def test_the_working_directory_is_not_replaced(place, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match="is the working directory, or around it"):
        save_adapter(adapted("default"), place)
    assert Path.cwd() == tmp_path / "here"


def test_other_processes_than_the_main_one_touch_no_disk(tmp_path):
    base = tiny_model("olmoe")
    save_adapter(get_peft_model(base, config_for(base)), tmp_path / "adapter", is_main_process=False)
    assert not list(tmp_path.iterdir())


def checkpoint(folder, model):
    model.save_pretrained(folder)
    (folder / "trainer_state.json").write_text("{}")


DAMAGE = {
    "no state": lambda folder: (folder / "trainer_state.json").unlink(),
    "half a state": lambda folder: (folder / "trainer_state.json").write_text('{"epoch": '),
    "no weights": lambda folder: (folder / "adapter_model.safetensors").unlink(),
    "half the weights": lambda folder: os.truncate(folder / "adapter_model.safetensors", 2000),
    "half a config": lambda folder: (folder / "adapter_config.json").write_text('{"peft_type": '),
    "nothing": lambda folder: shutil.rmtree(folder) or folder.mkdir(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_last_complete_checkpoint_is_found(damage, tmp_path):
    base = tiny_model("olmoe")
    model = get_peft_model(base, config_for(base))
    for step in (9, 10):
        checkpoint(tmp_path / f"checkpoint-{step}", model)
    (tmp_path / "checkpoint-last").mkdir()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    DAMAGE[damage](tmp_path / "checkpoint-10")
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-9")
    shutil.rmtree(tmp_path / "checkpoint-9")
    assert last_complete_checkpoint(tmp_path) is None
    assert last_complete_checkpoint(tmp_path / "nowhere") is None


def test_checkpoints_of_lora_and_of_whole_models_count(tmp_path):
    whole = tiny_model("olmoe")
    lora = get_peft_model(tiny_model("olmoe"), LoraConfig(target_modules=["q_proj"]))
    for name, model in (("whole", whole), ("lora", lora)):
        for step in (9, 10):
            checkpoint(tmp_path / name / f"checkpoint-{step}", model)
        assert last_complete_checkpoint(tmp_path / name) == str(tmp_path / name / "checkpoint-10")
        (weights,) = (tmp_path / name / "checkpoint-10").glob("*.safetensors")
        os.truncate(weights, 2000)
        assert last_complete_checkpoint(tmp_path / name) == str(tmp_path / name / "checkpoint-9")
