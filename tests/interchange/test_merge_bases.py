"""Bases of all sorts that `merge_checkpoint` takes: on the Hub, variants, pickled, without a head, with a tied one."""

from __future__ import annotations

import json
import shutil

import huggingface_hub
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification

from peft_esft import find_experts
from peft_esft.cli.main import main
from peft_esft.interchange import compact, export_official, merge_checkpoint

from checkpoints import randomize, save_base_and_adapter, tensors_of
from families import tiny_model
from oracle import config_for


TOKENS = torch.arange(3, 15)[None]


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    model = save_base_and_adapter(lambda: tiny_model("olmoe"), root)
    model.merge_and_unload().save_pretrained(root / "expected")
    return root


def same(first, second):
    first, second = tensors_of(first), tensors_of(second)
    return first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Lays folders into an empty cache of the Hub, which cannot be reached."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def put(folder, name, commit, *refs):
        repository = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        shutil.copytree(folder, repository / "snapshots" / commit)
        for ref in refs:
            (repository / "refs").mkdir(exist_ok=True)
            (repository / "refs" / ref).write_text(commit)

    return put


def test_names_on_the_hub(folder, hub, tmp_path):
    other = tiny_model("olmoe")
    with torch.no_grad():
        other.model.norm.weight.mul_(2)
    other.save_pretrained(tmp_path / "other")
    hub(tmp_path / "other", "someone/base", "a" * 40, "main")
    hub(folder / "base", "someone/base", "b" * 40, "v2")
    hub(folder / "adapter", "someone/law", "c" * 40, "main")
    merge_checkpoint("someone/base", "someone/law", tmp_path / "main")
    assert torch.equal(tensors_of(tmp_path / "main")["model.norm.weight"], other.model.norm.weight)
    merge_checkpoint("someone/base", "someone/law", tmp_path / "v2", revision="v2")
    assert same(tmp_path / "v2", folder / "expected")
    arguments = ["merge", "someone/base", "someone/law", str(tmp_path / "cli"), "--revision", "v2"]
    assert main(arguments) == 0
    assert same(tmp_path / "cli", folder / "expected")
    compact("someone/law", tmp_path / "rows", base="someone/base")
    export_official("someone/law", "someone/base", tmp_path / "official")
    assert main(["export", "someone/law", "--base", "someone/base", "--out", str(tmp_path / "official2")]) == 0
    assert same(tmp_path / "official", tmp_path / "official2")


def test_what_is_not_there(folder, hub, tmp_path):
    hub(folder / "base", "someone/base", "b" * 40, "main")
    with pytest.raises(FileNotFoundError, match="someone/model is not a folder, and no repository of that name is"):
        merge_checkpoint("someone/model", folder / "adapter", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="of that name at revision v3 is in the cache"):
        merge_checkpoint("someone/base", folder / "adapter", tmp_path / "out", revision="v3")
    with pytest.raises(NotADirectoryError, match="neither a folder nor the name of a repository"):
        merge_checkpoint(tmp_path / "base", folder / "adapter", tmp_path / "out")
    with pytest.raises(ValueError, match="is a folder and has no revisions"):
        merge_checkpoint(folder / "base", folder / "adapter", tmp_path / "out", revision="v2")
    with pytest.raises(FileNotFoundError, match=r"has no weights: none of model\.fp16\.safetensors"):
        merge_checkpoint(folder / "base", folder / "adapter", tmp_path / "out", variant="fp16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shard_size", ["20KB", "10MB"])
def test_a_variant(shard_size, folder, tmp_path):
    shutil.copytree(folder / "expected", tmp_path / "base")  # other weights under the usual names
    tiny_model("olmoe").save_pretrained(tmp_path / "base", variant="fp16", max_shard_size=shard_size)
    merge_checkpoint(tmp_path / "base", folder / "adapter", tmp_path / "merged", variant="fp16")
    assert all("fp16" in path.name for path in tmp_path.glob("merged/*safetensors*"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", variant="fp16", dtype=torch.float32)
    expected = AutoModelForCausalLM.from_pretrained(folder / "expected", dtype=torch.float32)
    assert torch.equal(logits(merged), logits(expected))


@pytest.mark.parametrize("is_sharded", [True, False], ids=["shards", "one file"])
def test_pickled_weights(is_sharded, folder, hub, tmp_path):
    """As older checkpoints have them; transformers reads them and writes safetensors."""
    base = tmp_path / "base"
    shutil.copytree(folder / "base", base)
    shards, weight_map = [{}, {}], {}
    for number, (key, tensor) in enumerate(tensors_of(base).items()):
        shards[number % 2 if is_sharded else 0][key] = tensor
        weight_map[key] = f"pytorch_model-0000{number % 2 + 1}-of-00002.bin"
    for path in base.glob("*safetensors*"):
        path.unlink()
    if is_sharded:
        (base / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        for number, tensors in enumerate(shards, 1):
            torch.save(tensors, base / f"pytorch_model-0000{number}-of-00002.bin")
    else:
        torch.save(shards[0], base / "pytorch_model.bin")
    merge_checkpoint(base, folder / "adapter", tmp_path / "merged")
    assert same(tmp_path / "merged", folder / "expected")
    assert not list(tmp_path.glob("merged/*.bin*"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    expected = AutoModelForCausalLM.from_pretrained(folder / "expected", dtype=torch.float32)
    assert torch.equal(logits(merged), logits(expected))
    hub(base, "someone/old", "d" * 40, "main")
    compact(folder / "adapter", tmp_path / "rows", base="someone/old")
    compact(folder / "adapter", tmp_path / "expected-rows", base=folder / "base")
    assert same(tmp_path / "rows", tmp_path / "expected-rows")


@pytest.mark.parametrize("shard_size", ["20KB", "10MB"])
@pytest.mark.parametrize(
    ("auto_class", "task_type"),
    [(AutoModelForSequenceClassification, "SEQ_CLS"), (AutoModelForTokenClassification, "TOKEN_CLS")],
)
@pytest.mark.filterwarnings("ignore:Some weights:UserWarning")
def test_a_head_that_the_base_has_not(auto_class, task_type, shard_size, tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path / "base", max_shard_size=shard_size)

    def classifier(folder, **labels):
        torch.manual_seed(0)
        return auto_class.from_pretrained(folder, dtype=torch.float32, **labels)

    base = classifier(tmp_path / "base", num_labels=5)
    model = get_peft_model(base, config_for(base, task_type=task_type))
    randomize(model)
    model.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = classifier(tmp_path / "merged")
    assert merged.config.num_labels == 5
    assert merged.config.architectures == [type(merged).__name__]
    assert torch.equal(logits(merged), logits(model.merge_and_unload()))


def tied_base(folder, shard_size="20KB"):
    base = tiny_model("olmoe")
    base.config.tie_word_embeddings = True
    base.tie_weights()
    base.save_pretrained(folder, max_shard_size=shard_size)
    assert "lm_head.weight" not in tensors_of(folder)
    return base


@pytest.mark.parametrize("shard_size", ["20KB", "10MB"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"train_non_expert_modules": True},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["lm_head", "embed_tokens"]},
    ],
    ids=["experts", "all", "embed_tokens", "lm_head", "both"],
)
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings=True.*")
def test_an_untied_head(settings, shard_size, tmp_path):
    base = tied_base(tmp_path / "base", shard_size)
    model = get_peft_model(base, config_for(tiny_model("olmoe"), **settings))
    randomize(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save.default" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", untie=True)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" in tensors_of(tmp_path / "merged")
    merged, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert merged.lm_head.weight is not merged.model.embed_tokens.weight
    assert torch.equal(logits(merged), logits(model))


def test_nothing_to_untie(folder, tmp_path):
    with pytest.raises(ValueError, match=r"untie needs a base whose head .* these are .*: \{\}"):
        merge_checkpoint(folder / "base", folder / "adapter", tmp_path / "merged", untie=True)
    assert main(["merge", str(folder / "base"), str(folder / "adapter"), str(tmp_path / "merged"), "--untie"]) == 1
    assert not (tmp_path / "merged").exists()


def test_files_without_an_index_stay_single(folder, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    base.save_pretrained(tmp_path / "base")
    merge_checkpoint(tmp_path / "base", folder / "adapter", tmp_path / "merged")
    assert [path.name for path in tmp_path.glob("merged/*safetensors*")] == ["model.safetensors"]
    adapted = PeftModel.from_pretrained(base, folder / "adapter")
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == tensors_of(folder / "base").keys()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert torch.equal(logits(merged), logits(adapted.merge_and_unload()))
    assert find_experts(merged).keys() == find_experts(base).keys()


def test_a_link_to_an_empty_folder_is_filled(folder, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    merge_checkpoint(folder / "base", folder / "adapter", tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and same(tmp_path / "disk", folder / "expected")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]
    with pytest.raises(FileExistsError, match="exists already"):
        merge_checkpoint(folder / "base", folder / "adapter", tmp_path / "link")
