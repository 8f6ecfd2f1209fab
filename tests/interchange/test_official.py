"""The original code's files: import, export, and what is refused."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from peft_esft import ESFTConfig, ESFTLayer, find_experts
from peft_esft.interchange import (
    expert_cfg_from_selection,
    export_official,
    import_official,
    selection_from_expert_cfg,
)
from peft_esft.interchange.official import exact_delta

from families import tiny_model
from listed import listed_model


CONVERTED = ["olmoe", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "glm4_moe", "longcat_flash"]
SELECTED = [5, 1, 6]


def noise(value, seed, scale=0.05):
    generator = torch.Generator().manual_seed(seed)
    return (value.float() + scale * torch.randn(value.shape, generator=generator)).to(value.dtype)


def trained_model(family, dtype):
    """The family's model in which only the selected experts changed, as the original code trains them."""
    model = tiny_model(family, dtype)
    for number, container in enumerate(find_experts(model).values()):
        for weight in container.weights:
            rows = weight.read(container.module, SELECTED)
            weight.write(container.module, SELECTED, noise(rows, number))
    return model


def checkpoint_tensors(model, folder):
    """What transformers saves the model as."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def is_selected(key, experts=SELECTED):
    return any(f".experts.{expert}." in key for expert in experts)


def write_official(folder, tensors, cfg, *, prefix=True, shards=1):
    folder.mkdir()
    if cfg is not None:
        (folder / "expert_cfg.json").write_text(json.dumps(cfg))
    tensors = {key if prefix else key.removeprefix("model."): value for key, value in tensors.items()}
    keys = sorted(tensors)
    for number in range(shards):
        part = {key: tensors[key].contiguous() for key in keys[number::shards]}
        save_file(part, folder / f"model-{number + 1:05}-of-{shards:05}.safetensors")


def cfg_of(model, experts=SELECTED, **flags):
    layers = [container.layer_index for container in find_experts(model).values()]
    return {
        "experts": {str(layer): list(experts) for layer in layers},
        "shared_experts": False,
        "non_expert_modules": False,
        **flags,
    }


def effective(model):
    """The effective rows of a model's layers, by parameter name."""
    return {
        f"{layer.path}.{name}": layer.effective_rows(name, ["default"])
        for layer in model.modules()
        if isinstance(layer, ESFTLayer)
        for name in layer.weight_names
    }


def bits(tensor):
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize])


@pytest.fixture(scope="module", params=["deepseek_v2"])
def official(request, tmp_path_factory):
    """A bf16 base and an official folder for it."""
    folder = tmp_path_factory.mktemp("official")
    base = tiny_model(request.param, torch.bfloat16)
    base.save_pretrained(folder / "base")
    tensors = checkpoint_tensors(trained_model(request.param, torch.bfloat16), folder / "trained")
    return folder / "base", {k: v for k, v in tensors.items() if is_selected(k)}, cfg_of(base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", CONVERTED)
def test_files_become_an_adapter_with_their_weights_and_back(family, dtype, tmp_path):
    base, trained = tiny_model(family, dtype), trained_model(family, dtype)
    tensors = {k: v for k, v in checkpoint_tensors(trained, tmp_path / "trained").items() if is_selected(k)}
    cfg = cfg_of(base)
    write_official(tmp_path / "official", tensors, cfg, prefix=family != "olmoe", shards=3)
    base.save_pretrained(tmp_path / "base")
    for name, given_base in (("folder", tmp_path / "base"), ("model", base)):
        import_official(tmp_path / "official", given_base, tmp_path / name)
        model = PeftModel.from_pretrained(tiny_model(family, dtype), str(tmp_path / name))
        rows = effective(model)
        assert len(rows) == 2 * len(cfg["experts"])
        for key, value in rows.items():
            assert torch.equal(bits(value), bits(trained.state_dict()[key][SELECTED])), key
        export_official(tmp_path / name, given_base, tmp_path / f"{name}-back")
        back = load_file(tmp_path / f"{name}-back" / "model.safetensors")
        assert back.keys() == tensors.keys()
        assert all(torch.equal(bits(back[key]), bits(tensors[key])) for key in tensors)
        assert json.loads((tmp_path / f"{name}-back" / "expert_cfg.json").read_text()) == cfg


def test_files_fit_a_base_of_separate_experts(official, tmp_path):
    _, tensors, cfg = official
    write_official(tmp_path / "official", tensors, cfg)
    import_official(tmp_path / "official", listed_model(torch.bfloat16), tmp_path / "adapter")
    model = PeftModel.from_pretrained(listed_model(torch.bfloat16), str(tmp_path / "adapter"))
    fused = PeftModel.from_pretrained(tiny_model("deepseek_v2", torch.bfloat16), str(tmp_path / "adapter"))
    for key, value in effective(model).items():
        assert torch.equal(value, effective(fused)[key])
    export_official(tmp_path / "adapter", listed_model(torch.bfloat16), tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == tensors.keys() and all(torch.equal(back[k], tensors[k]) for k in tensors)


@pytest.mark.parametrize("family", ["deepseek_v2", "qwen2_moe"])
def test_shared_experts_and_other_modules_are_honoured(family, tmp_path):
    base = tiny_model(family, torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    tensors = checkpoint_tensors(trained_model(family, torch.bfloat16), tmp_path / "trained")
    changed = {
        key: noise(value, 9) if ".experts." not in key else value
        for key, value in tensors.items()
        if is_selected(key) or ".experts." not in key
    }
    del changed["model.norm.weight"]  # a file need not have all other modules
    write_official(tmp_path / "official", changed, cfg_of(base, shared_experts=True, non_expert_modules=True))
    import_official(tmp_path / "official", tmp_path / "base", tmp_path / "adapter")
    model = PeftModel.from_pretrained(tiny_model(family, torch.bfloat16), str(tmp_path / "adapter"))
    merged = checkpoint_tensors(model.merge_and_unload(), tmp_path / "merged")
    assert all(torch.equal(bits(merged[key]), bits(value)) for key, value in changed.items())
    assert torch.equal(merged["model.norm.weight"], tensors["model.norm.weight"])
    export_official(tmp_path / "adapter", tmp_path / "base", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(bits(back[key]), bits(value)) for key, value in changed.items())


def test_a_selection_given_apart(official, tmp_path):
    base, tensors, cfg = official
    write_official(tmp_path / "official", tensors, None)
    with pytest.raises(FileNotFoundError, match="expert_cfg"):
        import_official(tmp_path / "official", base, tmp_path / "adapter")
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    import_official(tmp_path / "official", base, tmp_path / "a", expert_cfg=tmp_path / "cfg.json")
    import_official(tmp_path / "official", base, tmp_path / "b", expert_cfg=cfg)
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_weights_without_an_exact_delta_are_stored_as_rows(official, tmp_path):
    base, tensors, cfg = official
    key = next(iter(tensors))
    tensors = {**tensors, key: tensors[key].clone()}
    tensors[key].view(-1)[:3] = torch.tensor([1e-30, -0.0, 3e-9], dtype=torch.bfloat16)
    write_official(tmp_path / "official", tensors, cfg)
    with pytest.raises(ValueError, match=r"have no fp32 delta .* form='rows'"):
        import_official(tmp_path / "official", base, tmp_path / "adapter", form="delta")
    assert not (tmp_path / "adapter").exists()
    with pytest.warns(UserWarning, match="for inference only"):
        import_official(tmp_path / "official", base, tmp_path / "adapter")
    export_official(tmp_path / "adapter", base, tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(bits(back[key]), bits(tensors[key])) for key in tensors)
    weights = sum(value.numel() for value in tensors.values())
    size = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert 2 * weights < size < 2 * weights + 1000


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 0xFFFF), st.integers(0, 0xFFFF)), min_size=1, max_size=64))
def test_exact_deltas_are_exact_or_counted(pairs):
    values = torch.tensor(pairs, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    values = torch.where(values.float().abs() < 1e30, values, 1.0)  # finite, and no sum that overflows
    rows, trained = values[:, 0].contiguous(), values[:, 1].contiguous()
    delta, inexact = exact_delta(rows, trained)
    result = (rows.float() + delta).to(torch.bfloat16)
    assert inexact == int((bits(result) != bits(trained)).sum())
    close = (trained.float().abs() > rows.float().abs() * 2**-14) & (trained != 0)
    assert torch.equal(bits(result)[close], bits(trained)[close])


def break_off_by_one(tensors, cfg):
    return {k.replace("layers.1.", "layers.2."): v for k, v in tensors.items()}, cfg


def break_layer(tensors, cfg):
    return tensors, {**cfg, "experts": {"2": SELECTED}}


def break_dense_layer(tensors, cfg):
    return tensors, {**cfg, "experts": {"0": SELECTED}}


def break_expert(tensors, cfg):
    return {k.replace("experts.6.", "experts.8."): v for k, v in tensors.items()}, cfg


def break_selection(tensors, cfg):
    return tensors, {**cfg, "experts": {"1": [5, 1, 9]}}


def break_unselected(tensors, cfg):
    return tensors, {**cfg, "experts": {"1": [5, 1]}}


def break_missing(tensors, cfg):
    return {k: v for k, v in tensors.items() if "experts.6.up_proj" not in k}, cfg


def break_shape(tensors, cfg):
    return {k: v.T.contiguous() if "5.down" in k else v for k, v in tensors.items()}, cfg


def break_name(tensors, cfg):
    return {k.replace("gate_proj", "gates"): v for k, v in tensors.items()}, cfg


def break_nan(tensors, cfg):
    return {k: v * float("nan") if "5.down" in k else v for k, v in tensors.items()}, cfg


def break_flag(tensors, cfg):
    return tensors, {**cfg, "shared_experts": "yes"}


def break_twice(tensors, cfg):
    key = next(iter(tensors))
    return {**tensors, key.removeprefix("model."): tensors[key].clone()}, cfg


def break_repeat(tensors, cfg):
    return tensors, {**cfg, "experts": {"1": [5, 5]}}


def break_shared(tensors, cfg):
    return tensors, {**cfg, "shared_experts": True}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            break_off_by_one,
            r"layers\.2\.mlp.* is not a weight of DeepseekV2ForCausalLM .*counts layers from 1, subtract 1",
        ),
        (break_layer, "layer 2 has no experts module"),
        (break_dense_layer, "layer 0 has no experts module"),
        (break_expert, r"experts\.8\.\w+\.weight is not a weight of"),
        (break_selection, r"layers\.1\.mlp\.experts has 8 experts, .*it has no expert \[9\]"),
        (break_unselected, r"experts\.6\.\w+\.weight is not selected"),
        (break_missing, r"experts\.6\.up_proj\.weight is missing"),
        (break_shape, r"down_proj\.weight has the shape \[24, 32\], the base's is \[32, 24\]"),
        (break_name, "gates.weight is not a weight of"),
        (break_nan, "not all finite"),
        (break_flag, "\"shared_experts\" is 'yes'"),
        (break_twice, "are the same weight"),
        (break_repeat, "repeats"),
        (break_shared, r"shared_experts\.\w+\.weight is missing"),
    ],
)
def test_files_that_do_not_fit_are_refused(change, message, official, tmp_path):
    base, tensors, cfg = official
    write_official(tmp_path / "official", *change(tensors, cfg))
    with pytest.raises(ValueError, match=message):
        import_official(tmp_path / "official", base, tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["official"]


def test_what_exists_is_not_overwritten(official, tmp_path):
    base, tensors, cfg = official
    write_official(tmp_path / "official", tensors, cfg)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "precious").write_text("x")
    with pytest.raises(FileExistsError, match="exists already"):
        import_official(tmp_path / "official", base, tmp_path / "adapter")
    assert [path.name for path in (tmp_path / "adapter").iterdir()] == ["precious"]


def test_wider_files_are_exact_on_a_base_of_their_dtype(official, tmp_path):
    base, tensors, cfg = official
    tensors = {key: noise(value.float(), 3, 0.001) for key, value in tensors.items()}
    write_official(tmp_path / "official", tensors, cfg)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import_official(tmp_path / "official", base, tmp_path / "adapter")
    assert any("dtype=torch.float32" in str(warning.message) for warning in caught)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, str(tmp_path / "adapter")).merge_and_unload()
    saved = checkpoint_tensors(merged, tmp_path / "merged")
    assert all(torch.equal(saved[key], value) for key, value in tensors.items())


@pytest.mark.parametrize("family", ["gpt_oss", "aria"])
def test_checkpoints_that_keep_experts_together_are_refused(family, tmp_path):
    base = tiny_model(family)
    write_official(tmp_path / "official", {"model.norm.weight": torch.ones(32)}, {"experts": {"0": [1]}})
    with pytest.raises(NotImplementedError, match=r"all experts of .* in one tensor"):
        import_official(tmp_path / "official", base, tmp_path / "adapter")


@given(st.dictionaries(st.sampled_from([0, 1]), st.sets(st.integers(0, 7), min_size=1), min_size=1))
def test_selections_go_there_and_back(selection):
    containers = find_experts(tiny_model("olmoe"))
    target = {f"model.layers.{layer}.mlp.experts": sorted(ids) for layer, ids in selection.items()}
    cfg = expert_cfg_from_selection(target, containers)
    assert cfg["experts"] == {str(layer): sorted(ids) for layer, ids in selection.items()}
    assert selection_from_expert_cfg(json.loads(json.dumps(cfg)), containers) == target


@pytest.mark.parametrize("content", [[], {}, {"experts": []}, {"experts": {"0": "x"}}, {"experts": {"0": [-1]}}, 3])
def test_malformed_selections_are_refused(content):
    with pytest.raises(ValueError, match="expert_cfg"):
        selection_from_expert_cfg(content, find_experts(tiny_model("olmoe")))


def test_the_config_records_the_base(official, tmp_path):
    base, tensors, cfg = official
    write_official(tmp_path / "official", tensors, cfg)
    import_official(tmp_path / "official", base, tmp_path / "adapter")
    config = ESFTConfig.from_pretrained(str(tmp_path / "adapter"))
    assert config.base_model_name_or_path == str(base)
    assert config.target_experts == {"model.layers.1.mlp.experts": SELECTED}
    assert config.task_type == "CAUSAL_LM"
