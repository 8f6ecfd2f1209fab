"""Smaller forms of an adapter file: their bytes, what they hold, and who can read them."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from peft_esft import ESFTConfig, ESFTLayer
from peft_esft.interchange import compact
from peft_esft.ops.encodings import FORMS, decode, encode, stored_layout

from checkpoints import save_base_and_adapter
from families import tiny_model
from listed import listed_model
from oracle import random_tokens, select_in_all, task_loss


TOKENS = random_tokens()
SMALL = FORMS[1:]


def logits(model, **inputs):
    with torch.no_grad():
        return model(input_ids=TOKENS, **inputs)[0]


def effective(model, name="default"):
    return {
        (layer.path, weight): layer.effective_rows(weight, [name])
        for layer in model.modules()
        if isinstance(layer, ESFTLayer) and name in layer.expert_ids
        for weight in layer.weight_names
    }


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A bf16 base, an adapter, and its compact forms."""
    folder = tmp_path_factory.mktemp("compact")
    model = save_base_and_adapter(lambda: tiny_model("olmoe", torch.bfloat16), folder, task_type="CAUSAL_LM")
    rows = effective(model)
    for form in SMALL:
        compact(folder / "adapter", folder / form, form=form)
    return folder, rows


@st.composite
def deltas(draw):
    shape = [*draw(st.lists(st.integers(1, 5), min_size=1, max_size=2)), draw(st.integers(1, 37))]
    scale = draw(st.sampled_from([0.0, 1e-30, 1e-6, 1.0, 1e4]))
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))


@given(deltas(), st.sampled_from(SMALL[1:]))
def test_codes_are_within_half_a_step_of_the_delta(delta, form):
    encoded = encode(form, delta)
    expected = stored_layout(form, tuple(delta.shape), torch.float32)
    assert {suffix: (t.dtype, tuple(t.shape)) for suffix, t in encoded.items()} == expected
    decoded = decode(form, encoded["_codes"], encoded["_scales"], delta.shape[-1])
    assert decoded.shape == delta.shape
    error = (decoded - delta).norm(dim=-1)
    size = delta.norm(dim=-1)
    bound = {"int8": 0.5 / 127 * 1.02, "int4": 0.5 / 7 * 1.02}.get(form)
    if bound is not None:
        largest = delta.abs().amax(-1)
        assert (error <= bound * largest * delta.shape[-1] ** 0.5 + 1e-38).all()
    else:
        assert (error <= size * 1.01 + 1e-38).all()


def test_one_bit_is_the_sign_times_the_mean():
    delta = torch.tensor([[1.0, -3.0, 2.0, -2.0]])
    encoded = encode("int1", delta)
    assert decode("int1", encoded["_codes"], encoded["_scales"], 4).tolist() == [[2, -2, 2, -2]]
    assert encoded["_codes"].tolist() == [[0b0101]]
    nibbles = encode("int4", torch.tensor([[7.0, -7.0, 1.0]]))
    assert nibbles["_codes"].tolist() == [[15 | 1 << 4, 9]]


@pytest.mark.parametrize("form", SMALL)
def test_every_loader_reads_every_form(form, adapter):
    folder, rows = adapter
    base = folder / "base"

    def load_base():
        return AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)

    models = {
        "PeftModel": PeftModel.from_pretrained(load_base(), str(folder / form)),
        "low memory": PeftModel.from_pretrained(load_base(), str(folder / form), low_cpu_mem_usage=True),
        "Auto": AutoPeftModelForCausalLM.from_pretrained(str(folder / form), dtype=torch.bfloat16),
        "transformers": load_base(),
        "folder": AutoModelForCausalLM.from_pretrained(folder / form, dtype=torch.bfloat16),
    }
    models["transformers"].load_adapter(str(folder / form))
    expected = logits(models["PeftModel"])
    assert not torch.equal(expected, logits(load_base()))
    for name, model in models.items():
        assert torch.equal(logits(model), expected), name
        assert not any(p.requires_grad for p in model.parameters())
        if form == "rows":
            assert all(torch.equal(value, rows[key]) for key, value in effective(model).items()), name
        for layer in model.modules():
            if isinstance(layer, ESFTLayer):
                assert all(tensor.dtype != torch.float32 for tensor in layer.tensors_of("default").values())


@pytest.mark.parametrize("form", SMALL)
def test_small_adapters_switch_merge_save_and_go_like_others(form, adapter, tmp_path):
    folder, _ = adapter
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    plain = logits(base)
    model = PeftModel.from_pretrained(base, str(folder / form), adapter_name="small")
    expected = logits(model)
    model.load_adapter(str(folder / "adapter"), adapter_name="large")
    model.set_adapter("large")
    large = logits(model)
    model.set_adapter("small")
    assert torch.equal(logits(model), expected)
    assert torch.equal(large, expected) == (form == "rows")  # the only one without loss
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    model.merge_adapter()
    merged = logits(model)
    assert (merged - expected).abs().max() <= 0.05 * expected.abs().max()
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path)
    saved, original = (load_file(path / "adapter_model.safetensors") for path in (tmp_path / "small", folder / form))
    assert saved.keys() == original.keys() and all(torch.equal(saved[key], original[key]) for key in saved)
    model.set_adapter("large")
    model.delete_adapter("small")
    assert torch.equal(logits(model), large)
    assert all(torch.equal(value, before[name]) for name, value in model.unload().state_dict().items())


def test_rows_and_deltas_add_up(adapter):
    """Two adapters over different experts, one of them stored as rows, active or merged together."""
    folder, rows = adapter
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(base, str(folder / "rows"), adapter_name="rows")
    other = {path: [1, 3] for path in select_in_all(base)}
    model.add_adapter("other", ESFTConfig(target_experts=other, init_weights=False))
    model.base_model.set_adapter(["rows", "other"])
    layer = next(module for module in model.modules() if isinstance(module, ESFTLayer))
    both = layer.effective_rows("down_proj", ["rows", "other"])
    assert layer.union_of_experts(["rows", "other"]) == [5, 1, 6, 3]
    assert torch.equal(both[0], rows[layer.path, "down_proj"][0])
    base_rows = layer.get_base_layer().down_proj[[5, 1, 6]].float()
    delta = rows[layer.path, "down_proj"].float() - base_rows
    expected = (base_rows[1] + delta[1] + layer.get_delta_weight("other", "down_proj")[0]).bfloat16()
    torch.testing.assert_close(both[1], expected)
    before = layer.get_delta_weight("rows", "down_proj")
    assert torch.equal(before, delta)
    model.merge_adapter(["rows", "other"])
    assert torch.equal(layer.get_delta_weight("rows", "down_proj"), before)
    assert torch.equal(layer.get_base_layer().down_proj[[5, 1, 6, 3]], both)
    model.unmerge_adapter()
    assert torch.equal(layer.get_base_layer().down_proj[[5, 1, 6]].float(), base_rows)


@pytest.mark.parametrize("form", SMALL)
@pytest.mark.parametrize("family", ["gpt_oss", "nemotron_h", "deepseek_v2", "listed"])
def test_every_kind_of_container(family, form, tmp_path):
    def build():
        return listed_model(torch.bfloat16) if family == "listed" else tiny_model(family, torch.bfloat16)

    settings = {"train_shared_experts": True} if family == "deepseek_v2" else {}
    rows = effective(save_base_and_adapter(build, tmp_path, **settings))
    base = build() if family == "listed" else tmp_path / "base"
    compact(tmp_path / "adapter", tmp_path / form, form=form, base=base)
    model = PeftModel.from_pretrained(build(), str(tmp_path / form))
    for key, value in effective(model).items():
        if form == "rows":
            assert torch.equal(value, rows[key]), key
        elif form != "int1":
            scale = (rows[key] - 0).float().abs().max()
            assert (value.float() - rows[key].float()).abs().max() < 0.1 * scale
    logits(model)


def test_bytes_per_weight_at_real_widths(tmp_path):
    from transformers import OlmoeConfig, OlmoeForCausalLM

    config = OlmoeConfig(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_experts=4,
        num_experts_per_tok=2,
        pad_token_id=0,
    )
    model = OlmoeForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    wrapped = get_peft_model(model, ESFTConfig(target_experts={0: [1, 2], 1: [3]}, init_weights=False))
    wrapped.save_pretrained(tmp_path / "adapter")
    weights = 3 * 3 * 256 * 128
    for form, most in {"rows": 2.01, "int8": 1.05, "int4": 0.55, "int1": 0.16}.items():
        compact(tmp_path / "adapter", tmp_path / form, form=form, base=tmp_path / "base")
        assert (tmp_path / form / "adapter_model.safetensors").stat().st_size <= most * weights


def test_training_what_is_stored_small_is_refused(adapter):
    folder, _ = adapter
    for form in SMALL:
        base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
        with pytest.raises(ValueError, match="for inference only"):
            PeftModel.from_pretrained(base, str(folder / form), is_trainable=True)
        assert not any(isinstance(module, ESFTLayer) for module in base.modules())


def test_a_small_adapter_passes_gradients_to_the_input(adapter):
    folder, _ = adapter
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32), str(folder / "int8")
    )
    embeddings = model.get_input_embeddings()(TOKENS).detach().requires_grad_()
    task_loss(model(inputs_embeds=embeddings)[0]).backward()
    assert embeddings.grad.abs().sum() > 0


def test_modules_to_save_stay(tmp_path):
    save_base_and_adapter(lambda: tiny_model("olmoe", torch.bfloat16), tmp_path, modules_to_save=["lm_head"])
    for form in SMALL:
        compact(tmp_path / "adapter", tmp_path / form, form=form)
        before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", form))
        assert torch.equal(before["base_model.model.lm_head.weight"], after["base_model.model.lm_head.weight"])
        PeftModel.from_pretrained(tiny_model("olmoe", torch.bfloat16), str(tmp_path / form))


def test_what_cannot_be_made_smaller_is_refused(adapter, tmp_path):
    folder, _ = adapter
    with pytest.raises(ValueError, match="form is 'int2'; it is one of rows, int8, int4, int1"):
        compact(folder / "adapter", tmp_path / "x", form="int2")
    with pytest.raises(ValueError, match="stored with int8"):
        compact(folder / "int8", tmp_path / "x", form="int4")
    (tmp_path / "ranked").mkdir()
    save_base_and_adapter(lambda: tiny_model("olmoe"), tmp_path / "ranked", rank=2)
    with pytest.raises(ValueError, match="stored with rank 2"):
        compact(tmp_path / "ranked" / "adapter", tmp_path / "x", form="int4")
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    (tmp_path / "broken").mkdir()
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "broken" / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "a/b"}))
    save_file({k: v / 0 for k, v in tensors.items()}, tmp_path / "broken" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="holds a NaN or an infinity"):
        compact(tmp_path / "broken", tmp_path / "x", form="int4")
    with pytest.raises(ValueError, match="'a/b' is not a folder; give base="):
        compact(tmp_path / "broken", tmp_path / "x")
    path = next(iter(config["target_experts"]))
    kept = {key: value for key, value in tensors.items() if path not in key}
    save_file(kept, tmp_path / "broken" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=rf"no weights of {path}, which target_experts selects"):
        compact(tmp_path / "broken", tmp_path / "x", form="int4")
    assert not (tmp_path / "x").exists()
    with pytest.raises(ValueError, match="storage is 'int2'"):
        ESFTConfig(target_experts={0: [1]}, storage="int2")
    with pytest.raises(ValueError, match="adapters of full rank"):
        ESFTConfig(target_experts={0: [1]}, storage="int8", rank=2)
