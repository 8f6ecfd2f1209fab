"""Merging into a checkpoint without loading the model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, OlmoeConfig, OlmoeForCausalLM, SwitchTransformersConfig
from transformers import SwitchTransformersForConditionalGeneration as Switch

from peft_esft import ESFTConfig, find_experts
from peft_esft.interchange import compact, export_official, merge_checkpoint

import zoo
from checkpoints import randomize, save_base_and_adapter, tensors_of
from families import FAMILIES, tiny_model
from oracle import config_for


def same_bits(left, right):
    return left.dtype == right.dtype and torch.equal(left.view(torch.uint8), right.view(torch.uint8))


def prepare(build, folder, shard_size="20KB", **settings):
    """A base checkpoint and a random adapter for it; returns what merging in memory gives, as a checkpoint."""
    model = save_base_and_adapter(build, folder, shard_size, **settings)
    model.merge_and_unload().save_pretrained(folder / "expected")
    return tensors_of(folder / "expected")


def check(folder, expected):
    merge_checkpoint(folder / "base", folder / "adapter", folder / "merged")
    base, merged = tensors_of(folder / "base"), tensors_of(folder / "merged")
    assert list(merged) == list(base)
    assert merged.keys() == expected.keys()
    for key, value in merged.items():
        assert same_bits(value, expected[key]), key
    assert any(not torch.equal(merged[key], base[key]) for key in base)
    files = {path.name for path in (folder / "base").iterdir()}
    assert {path.name for path in (folder / "merged").iterdir()} == files
    if "model.safetensors.index.json" in files:
        indices = [json.loads((folder / f / "model.safetensors.index.json").read_text()) for f in ("base", "merged")]
        assert indices[0] == indices[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_equals_merging_in_memory_bit_for_bit(family, dtype, tmp_path):
    check(tmp_path, prepare(lambda: tiny_model(family, dtype), tmp_path))


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("deepseek_v2", {"rank": 4}),
        ("gpt_oss", {"rank": 4}),
        ("deepseek_v2", {"train_shared_experts": True}),
        ("deepseek_v2", {"train_non_expert_modules": True}),
        ("gpt_oss", {"train_non_expert_modules": True}),
    ],
)
def test_every_sort_of_adapter_is_merged(family, settings, tmp_path):
    check(tmp_path, prepare(lambda: tiny_model(family, torch.bfloat16), tmp_path, **settings))


@pytest.mark.filterwarnings("ignore:train_non_expert_modules leaves")
@pytest.mark.parametrize("experts", [[7, 0, 3], list(range(8))], ids=["some", "all"])
@pytest.mark.parametrize("width", [24, 32], ids=["oblong", "square"])
@pytest.mark.parametrize("transposed", [False, True], ids=["as saved", "as published"])
def test_both_layouts_of_qwen3_vl(transposed, width, experts, tmp_path):
    """Its published checkpoints have the experts transposed, which transformers tells by the shape alone."""
    config = zoo.build("qwen3_vl_moe").config
    config.text_config.moe_intermediate_size = width
    zoo.family("qwen3_vl_moe").model_class(config).save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    if transposed:
        transposed_on_disk(tmp_path / "base")
    tensors = load_file(file)
    # A square weight, down_proj here, is taken as it is in either layout.
    model = zoo.family("qwen3_vl_moe").model_class.from_pretrained(tmp_path / "base")
    selection = dict.fromkeys(find_experts(model), experts)
    wrapped = get_peft_model(model, ESFTConfig(target_experts=selection, init_weights=False))
    wrapped.save_pretrained(tmp_path / "adapter")
    expected = wrapped.merge_and_unload().state_dict()
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = type(model).from_pretrained(tmp_path / "merged").state_dict()
    assert all(torch.equal(value, merged[key]) for key, value in expected.items())
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert {key: value.shape for key, value in stored.items()} == {key: value.shape for key, value in tensors.items()}


def test_tied_embeddings_are_written_once(tmp_path):
    check(tmp_path, prepare(lambda: tiny_model("olmoe", tied=True), tmp_path, train_non_expert_modules=True))


def test_experts_in_modules_of_their_own(tmp_path):
    def build():
        torch.manual_seed(0)
        config = SwitchTransformersConfig(
            vocab_size=64,
            d_model=32,
            d_ff=24,
            d_kv=8,
            num_heads=4,
            num_layers=2,
            num_decoder_layers=2,
            num_experts=8,
            num_sparse_encoder_layers=1,
            num_sparse_decoder_layers=1,
        )
        return Switch(config)

    check(tmp_path, prepare(build, tmp_path))


def test_modules_to_save_replace_the_bases(tmp_path):
    tiny_model("olmoe").save_pretrained(tmp_path / "base")
    model = get_peft_model(tiny_model("olmoe"), config_for(tiny_model("olmoe"), modules_to_save=["lm_head"]))
    randomize(model)
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.normal_()
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "expected")
    check(tmp_path, tensors_of(tmp_path / "expected"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modules_to_save": ["embed_tokens"]}, "embed_tokens.weight is tied in the base.*merge_and_unload"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight is tied in the base.*merge_and_unload"),
        ({"trainable_token_indices": [5]}, "has the embeddings of some tokens.*merge_and_unload"),
    ],
    ids=["embed_tokens", "lm_head", "tokens"],
)
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings=True.*")
def test_embeddings_that_the_base_ties_are_refused(settings, message, tmp_path):
    base = tiny_model("olmoe")
    base.config.tie_word_embeddings = True
    base.tie_weights()
    base.save_pretrained(tmp_path / "base")
    get_peft_model(base, config_for(tiny_model("olmoe"), **settings)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=message):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("form", ["rows", "int8", "int4", "int1"])
def test_compact_adapters_are_merged(form, tmp_path):
    prepare(lambda: tiny_model("olmoe", torch.bfloat16), tmp_path)
    (tmp_path / "adapter").rename(tmp_path / "deltas")
    compact(tmp_path / "deltas", tmp_path / "adapter", form=form, base=tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    merged = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).merge_and_unload()
    merged.save_pretrained(tmp_path / "expected-too")
    check(tmp_path, tensors_of(tmp_path / "expected-too"))


def test_transformers_loads_it(tmp_path):
    prepare(lambda: tiny_model("mixtral"), tmp_path)
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    tokens = torch.arange(3, 15)[None]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).merge_and_unload()
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens)[0], adapted(input_ids=tokens)[0])


def break_shapes(adapter):
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({k: v[..., :-1].contiguous() for k, v in tensors.items()}, adapter / "adapter_model.safetensors")


def break_values(adapter):
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({k: v * float("inf") for k, v in tensors.items()}, adapter / "adapter_model.safetensors")


def break_names(adapter):
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({k.replace("gate_up", "up_gate"): v for k, v in tensors.items()}, adapter / "adapter_model.safetensors")


def leave_out_a_layer(adapter):
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({k: v for k, v in tensors.items() if ".layers.1." not in k}, adapter / "adapter_model.safetensors")


def without_note(adapter):
    """As files of earlier versions are: their header does not name the experts."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(tensors, adapter / "adapter_model.safetensors")


def name_others(adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["target_experts"] = {path: ids[::-1] for path, ids in config["target_experts"].items()}
    (adapter / "adapter_config.json").write_text(json.dumps(config))


def break_layers(adapter):
    without_note(adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["target_experts"]["model.layers.7.mlp.experts"] = [1]
    (adapter / "adapter_config.json").write_text(json.dumps(config))


def break_experts(adapter):
    without_note(adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["target_experts"] = {path: [1, 2, 8] for path in config["target_experts"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (break_shapes, "; expected torch.float32"),
        (break_values, "holds a NaN or an infinity"),
        (break_names, r"gate_up_proj is missing.*up_gate_proj is not selected, or not in this model"),
        (leave_out_a_layer, r"layers\.1\.mlp\.experts\.esft_\w+ is missing"),
        (name_others, "are for the experts .*, but its config names"),
        (break_layers, "is not the path of an experts module"),
        (break_experts, r"has 8 experts.*it has no expert \[8\]"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_nothing(change, message, tmp_path):
    prepare(lambda: tiny_model("olmoe"), tmp_path)
    change(tmp_path / "adapter")
    for number, use in enumerate((merge, export_official, publish_rows, publish_int8)):
        with pytest.raises(ValueError, match=message):
            use(tmp_path / "adapter", tmp_path / "base", tmp_path / f"out-{number}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "expected"]


def test_a_missing_factor_is_noticed(tmp_path):
    prepare(lambda: tiny_model("olmoe"), tmp_path, rank=2)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    kept = {key: value for key, value in tensors.items() if "layers.1.mlp.experts.esft_down" not in key}
    save_file(kept, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.esft_down_proj_A is missing"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")


def test_layers_that_options_leave_out_are_not_missing(tmp_path):
    expected = prepare(lambda: tiny_model("olmoe"), tmp_path, layers_to_transform=[1])
    check(tmp_path, expected)
    compact(tmp_path / "adapter", tmp_path / "small", form="int8")


def test_another_base_of_the_same_shape_is_noticed(tmp_path):
    prepare(lambda: tiny_model("deepseek_v2"), tmp_path)
    other = tiny_model("deepseek_v2")
    with torch.no_grad():
        other.model.layers[1].mlp.experts.down_proj.mul_(1.01)
    other.save_pretrained(tmp_path / "other")
    for number, use in enumerate((merge, export_official, publish_rows)):
        use(tmp_path / "adapter", tmp_path / "base", tmp_path / f"fits-{number}")
        with pytest.warns(UserWarning, match=r"over a base with other weights, which differ in 1 of 1 layers"):
            use(tmp_path / "adapter", tmp_path / "other", tmp_path / f"other-{number}")
    other.name_or_path = "someone/other"
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "someone/base"
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="Its base was 'someone/base', this one is 'someone/other'"):
        export_official(tmp_path / "adapter", other, tmp_path / "refused")


def merge(adapter, base, out):
    merge_checkpoint(base, adapter, out)


def publish_rows(adapter, base, out):
    compact(adapter, out, form="rows", base=base)


def publish_int8(adapter, base, out):
    compact(adapter, out, form="int8", base=base)


def test_quantised_bases_are_refused(tmp_path):
    prepare(lambda: tiny_model("olmoe"), tmp_path, shard_size="10MB")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    key = "model.layers.0.mlp.experts.5.gate_proj.weight"
    tensors = {k: v.to(torch.float8_e4m3fn) if ".experts." in k else v for k, v in tensors.items()}
    assert key in tensors
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    with pytest.raises(NotImplementedError, match="a quantised form"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


PEAK = """
import pathlib, re, sys
import torch
import peft_esft.interchange as interchange
from transformers import OlmoeForCausalLM
def memory(what):
    # Not ru_maxrss, which a process inherits from the one that started it.
    return 1024 * int(re.search(what + r":\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
pathlib.Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS")
interchange.merge_checkpoint(*sys.argv[1:4])
print(memory("VmHWM") - before)
"""


def large_olmoe():
    """Experts apart in the checkpoint."""
    config = OlmoeConfig(
        vocab_size=64,
        hidden_size=512,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_experts=16,
        num_experts_per_tok=2,
        pad_token_id=0,
    )
    return OlmoeForCausalLM, config


def large_qwen3_vl():
    """All experts of a layer in one tensor, which takes most of a shard."""
    config = zoo.build("qwen3_vl_moe").config
    config.text_config.num_experts, config.text_config.moe_intermediate_size = 256, 1024
    return zoo.family("qwen3_vl_moe").model_class, config


def transposed_on_disk(folder):
    """The layout in which that family is published."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        tensors = {k: v.transpose(1, 2).contiguous() if ".experts." in k else v for k, v in tensors.items()}
        save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures by Linux's /proc")
@pytest.mark.parametrize(("build", "change"), [(large_olmoe, None), (large_qwen3_vl, transposed_on_disk)])
def test_peak_memory_is_below_the_largest_shard_and_the_adapter(build, change, tmp_path):
    model_class, config = build()
    with torch.device("meta"):
        model = model_class(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    model.save_pretrained(tmp_path / "base", max_shard_size="60MB")
    selection = {path: [3, 7] for path in find_experts(model)}
    get_peft_model(model, ESFTConfig(target_experts=selection, init_weights=False)).save_pretrained(tmp_path / "a")
    if change is not None:
        change(tmp_path / "base")
    shards = [path.stat().st_size for path in (tmp_path / "base").glob("*.safetensors")]
    adapter = (tmp_path / "a" / "adapter_model.safetensors").stat().st_size
    command = [sys.executable, "-c", PEAK, *(str(tmp_path / name) for name in ("base", "a", "merged"))]
    peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    assert len(shards) > 2
    assert peak < max(shards) + adapter
