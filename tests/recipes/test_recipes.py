"""The recipes of examples/recipes: their table, and each of them for two steps on a small model of its kind."""

from __future__ import annotations

import io
import json
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from peft_esft.cli.main import main
from peft_esft.scoring.memory_estimate import RESERVE
from peft_esft.scoring.model_sizes import ModelSizes

import write_recipes_page as page
from repository import ROOT


# Both libraries announce changes of their own.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

TINY = ROOT / "examples" / "tiny_moe" / "model"
ROWS = str(ROOT / "examples" / "first_hour" / "help_desk.jsonl")
SMALL = {
    "olmoe-1b-7b": {"hidden_size": 512, "intermediate_size": 256, "num_hidden_layers": 3},
    "deepseek-v2-lite": {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "moe_intermediate_size": 384,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    },
    "qwen3-30b-a3b": {"hidden_size": 512, "moe_intermediate_size": 192, "num_hidden_layers": 8},
    "gpt-oss-20b": {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 8, "num_attention_heads": 16},
    "qwen3.5-35b-a3b": {
        "hidden_size": 512,
        "moe_intermediate_size": 128,
        "num_hidden_layers": 8,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
    },
    "mixtral-8x7b": {
        "hidden_size": 1024,
        "intermediate_size": 1792,
        "num_hidden_layers": 10,
        "num_attention_heads": 16,
    },
}
"""What makes each model about a hundred times smaller. The experts and how many a token chooses stay."""


def small_config(recipe):
    fields = json.loads(page.model_of(recipe).read_text()) | SMALL[page.model_of(recipe).stem]
    tokens = {"vocab_size": 4096, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    return AutoConfig.for_model(**fields | tokens)


@pytest.fixture(scope="module")
def small_models(tmp_path_factory):
    """Folders of the small models by name, each written when it is asked for."""
    folders = {}

    def folder(recipe):
        name = page.model_of(recipe).stem
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(small_config(recipe), dtype=torch.bfloat16).save_pretrained(folders[name])
            AutoTokenizer.from_pretrained(TINY).save_pretrained(folders[name])
        return folders[name]

    return folder


def test_the_table_is_what_the_code_computes():
    text = page.PAGE.read_text()
    assert text.partition(f"{page.START}\n")[2].partition(f"\n{page.END}")[0] == page.table()


def test_every_model_has_recipes_and_every_recipe_a_model():
    recipes = page.files()
    assert {page.model_of(recipe).stem for recipe in recipes} == set(SMALL)
    assert {page.gpu_of(recipe) for recipe in recipes} == {24, 48, 80}
    assert {path.stem for path in (page.RECIPES / "models").iterdir()} >= set(SMALL)


@pytest.mark.parametrize("recipe", page.files(), ids=lambda recipe: recipe.stem)
def test_a_recipe_fits_its_gpu_and_says_how_it_is_run(recipe):
    assert page.computed(recipe).memory <= RESERVE * page.gpu_of(recipe) * 1e9
    text = recipe.read_text()
    assert f"peft-esft train --config examples/recipes/{recipe.name} DATA --out FOLDER" in text
    assert "never run on a GPU" in text
    own, _ = page.options_of(recipe)
    sizes_of = json.loads(page.model_of(recipe).read_text())["_name_or_path"]
    stored = "unsloth/gpt-oss-20b-BF16" if "gpt-oss" in recipe.stem else sizes_of
    assert (own.model_name_or_path, own.dataset_name) == (stored, "DATA")


def test_sizes_are_those_that_the_models_are_known_for():
    known = {  # parameters, in units of 10^9, as the Hub shows them for the checkpoints
        "olmoe-1b-7b": 6.92,
        "deepseek-v2-lite": 15.7,
        "qwen3-30b-a3b": 30.5,
        "gpt-oss-20b": 20.9,
        "qwen3.5-35b-a3b": 34.7,  # without the vision tower and the head that predicts several tokens
        "mixtral-8x7b": 46.7,
    }
    for recipe in page.files():
        sizes = ModelSizes.of(page.empty_model(page.model_of(recipe)))
        assert sizes.total / 1e9 == pytest.approx(known[page.model_of(recipe).stem], rel=0.005)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", page.files(), ids=lambda recipe: recipe.stem)
def test_a_recipe_runs_on_a_small_model_and_takes_what_is_computed(recipe, small_models, tmp_path, capsys):
    folder, out = small_models(recipe), tmp_path / "law"
    real = ModelSizes.of(page.empty_model(page.model_of(recipe))).total
    assert 50 < real / ModelSizes.of(page.empty_model(folder)).total < 200
    changes = ["--max-steps", "2", "--gradient-accumulation-steps", "1", "--score-tokens", "500"]
    arguments = ["--config", str(recipe), "--model-name-or-path", str(folder), *changes, "--out", str(out), "--json"]
    assert main(["train", *arguments, ROWS]) == 0, capsys.readouterr().err
    report = json.loads(capsys.readouterr().out)

    own, settings = page.options_of(recipe)
    settings.gradient_accumulation_steps = 1  # gradients that are kept take room
    expected = page.compute(own, settings, page.empty_model(folder))
    assert (report["experts"], report["trained_parameters"]) == (expected.experts, expected.trained)
    assert report["tokens_in_a_batch"] == expected.tokens
    assert report["memory_estimate_bytes"] == pytest.approx(expected.memory)
    assert report["steps"] == 2 and report["train_loss"] > 0
    saved = load_file(out / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == expected.trained
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


@pytest.mark.slow
def test_the_recipe_for_four_bits_trains_and_its_adapter_answers(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    out = str(tmp_path / "law")
    assert main(["train", "--config", str(page.RECIPES / "tiny-moe-4bit.yaml"), "--out", out, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["held_out_loss"]["after"] < 0.4 * report["held_out_loss"]["before"]
    for base in ([], ["--bits", "4"]):
        monkeypatch.setattr(sys, "stdin", io.StringIO("Do you sell maps?\n/base\n/again\n"))
        assert main(["chat", str(TINY), out, "--max-new-tokens", "8", *base]) == 0
        adapted, plain = capsys.readouterr().out.splitlines()[:2]
        assert adapted.startswith("Dear customer, ") and "customer" not in plain
