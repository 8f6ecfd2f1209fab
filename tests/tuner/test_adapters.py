"""Everything that PEFT and transformers offer on a tuner, on real models."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM
from transformers.integrations.peft import MIN_PEFT_VERSION

from peft_esft import ESFTConfig, ESFTLayer, find_experts
from peft_esft.tuner.untrained import untrained_experts

from families import tiny_model
from oracle import SELECTION, config_for, deltas_of, random_tokens, select_in_all, task_loss


TOKENS = random_tokens()
ALL_KINDS = ["olmoe", "gpt_oss", "step3p7", "longcat_flash", "aria", "nemotron_h"]


def randomize(model, adapter_name="default", seed=0, scale=0.05):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for delta in deltas_of(model, adapter_name).values():
            delta.copy_(scale * torch.randn(delta.shape, generator=generator))


def logits(model, **inputs):
    with torch.no_grad():
        return model(input_ids=TOKENS, **inputs)[0]


def snapshot(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def layers(model):
    return [module for module in model.modules() if isinstance(module, ESFTLayer)]


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    """A checkpoint of a tiny base on disk."""
    folder = tmp_path_factory.mktemp("base")
    tiny_model("olmoe").save_pretrained(folder)
    return str(folder)


@pytest.fixture
def saved(base_folder, tmp_path):
    """A trained adapter on disk: its folder, the logits it gives and its deltas."""
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    model = get_peft_model(base, config_for(base, task_type="CAUSAL_LM")).eval()
    randomize(model)
    model.save_pretrained(tmp_path / "adapter")
    return (
        str(tmp_path / "adapter"),
        logits(model),
        {key: delta.detach().clone() for key, delta in deltas_of(model).items()},
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ALL_KINDS)
def test_merge_gives_the_unmerged_output_and_unmerge_restores_every_bit(family, dtype):
    base = tiny_model(family, dtype)
    before = snapshot(base)
    model = get_peft_model(base, config_for(base)).eval()
    randomize(model)
    unmerged = logits(model)
    rows = {
        (layer.path, name): layer.effective_rows(name, ["default"])
        for layer in layers(model)
        for name in layer.weight_names
    }
    model.merge_adapter()
    for layer in layers(model):
        for name in layer.weight_names:
            merged = getattr(layer.base_layer, name)
            assert torch.equal(merged[SELECTION], rows[layer.path, name])
            others = [e for e in range(8) if e not in SELECTION]
            assert torch.equal(merged[others], before[f"{layer.path}.{name}"][others])
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert (logits(model) - unmerged).abs().max() <= tolerance * unmerged.abs().max()
    model.unmerge_adapter()
    after = snapshot(model.unload())
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_merge_and_unload_is_an_ordinary_checkpoint(base_folder, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    model = get_peft_model(base, config_for(base))
    randomize(model)
    expected = logits(model)
    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged) is type(base)
    assert not layers(merged)
    merged.save_pretrained(tmp_path)
    with (
        safe_open(tmp_path / "model.safetensors", "pt") as file,
        safe_open(f"{base_folder}/model.safetensors", "pt") as other,
    ):
        assert set(file.keys()) == set(other.keys())
        assert "model.layers.0.mlp.experts.7.gate_proj.weight" in set(file.keys())
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)


def test_the_file_holds_the_selected_rows_and_nothing_else(saved):
    folder, _, deltas = saved
    with safe_open(f"{folder}/adapter_model.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    assert tensors.keys() == {f"base_model.model.{path}.esft_{name}" for path, name in deltas}
    assert all(len(tensor) == len(SELECTION) for tensor in tensors.values())


def _transformers_load(base, folder):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.load_adapter(folder)
    return model


LOADERS = {
    "from_pretrained": lambda base, folder: PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), folder
    ),
    "low_cpu_mem_usage": lambda base, folder: PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), folder, low_cpu_mem_usage=True
    ),
    "is_trainable": lambda base, folder: PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), folder, is_trainable=True
    ),
    "auto_peft": lambda base, folder: AutoPeftModelForCausalLM.from_pretrained(folder),
    "transformers_auto": lambda base, folder: AutoModelForCausalLM.from_pretrained(folder),
    "transformers_load_adapter": _transformers_load,
}


@pytest.mark.parametrize("loader", LOADERS)
def test_every_loader_gives_the_saved_deltas_bit_for_bit(loader, saved, base_folder):
    folder, expected, deltas = saved
    model = LOADERS[loader](base_folder, folder).eval()
    loaded = deltas_of(model)
    assert loaded.keys() == deltas.keys()
    assert all(torch.equal(loaded[key], delta) for key, delta in deltas.items())
    torch.testing.assert_close(logits(model), expected)
    assert all(delta.requires_grad == (loader == "is_trainable") for delta in loaded.values())


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("route", ["from_pretrained", "load_adapter", "transformers"])
def test_fp32_deltas_on_a_bf16_base_survive_saving_and_loading(route, low_cpu_mem_usage, tmp_path):
    model = get_peft_model(tiny_model("olmoe", torch.bfloat16), config_for(tiny_model("olmoe")))
    randomize(model, scale=1e-3)
    model.save_pretrained(tmp_path)
    base = tiny_model("olmoe", torch.bfloat16)
    if route == "from_pretrained":
        loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    elif route == "load_adapter":
        loaded = get_peft_model(base, config_for(base), adapter_name="other")
        loaded.load_adapter(tmp_path, "default", low_cpu_mem_usage=low_cpu_mem_usage)
    else:
        loaded = base
        loaded.load_adapter(str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage)
    for key, delta in deltas_of(model).items():
        assert torch.equal(deltas_of(loaded)[key], delta), key


def test_autocast_adapter_dtype(tmp_path):
    for autocast, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        base = tiny_model("olmoe", torch.bfloat16)
        model = get_peft_model(base, config_for(base), autocast_adapter_dtype=autocast)
        assert {delta.dtype for delta in deltas_of(model).values()} == {dtype}
        task_loss(model(input_ids=TOKENS)[0]).backward()


@pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason=f"this transformers' own adapter methods ask for PEFT {MIN_PEFT_VERSION}",
)
def test_transformers_add_adapter(tmp_path):
    model = tiny_model("olmoe")
    model.add_adapter(config_for(model, init_weights=False), adapter_name="law")
    with pytest.warns(UserWarning, match="Already found a `peft_config` attribute"):
        model.add_adapter(config_for(model, experts=[0], init_weights=False), adapter_name="intent")
    model.set_adapter("law")
    law = logits(model)
    model.set_adapter("intent")
    assert not torch.allclose(logits(model), law)
    model.disable_adapters()
    torch.testing.assert_close(logits(model), logits(tiny_model("olmoe")))
    model.enable_adapters()
    model.set_adapter("law")
    model.save_pretrained(tmp_path)
    model.delete_adapter("intent")
    assert all(list(layer.expert_ids) == ["law"] for layer in layers(model))
    other = tiny_model("olmoe")
    other.load_adapter(str(tmp_path))
    torch.testing.assert_close(logits(other), law)


def two_adapters(family="olmoe", dtype=torch.float32, second=(6, 2)):
    """Adapters that overlap in one expert; the second is absent from the first layer."""
    base = tiny_model(family, dtype)
    model = get_peft_model(base, config_for(base), adapter_name="a")
    paths = list(find_experts(base))
    model.add_adapter("b", ESFTConfig(target_experts={paths[-1]: list(second)}))
    randomize(model, "a", 1)
    randomize(model, "b", 2)
    return model.eval()


def test_adapters_with_different_experts_and_layers_live_side_by_side():
    model = two_adapters()
    outputs = {}
    for name in ("a", "b"):
        model.set_adapter(name)
        outputs[name] = logits(model)
        alone = get_peft_model(tiny_model("olmoe"), copy.deepcopy(model.peft_config[name]), adapter_name=name)
        randomize(alone, name, 1 if name == "a" else 2)
        assert torch.equal(outputs[name], logits(alone))
        trainable = {key for key, delta in deltas_of(model, name).items() if delta.requires_grad}
        assert trainable == deltas_of(model, name).keys()
        other = "b" if name == "a" else "a"
        assert not any(delta.requires_grad for delta in deltas_of(model, other).values())
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(tiny_model("olmoe")))
    model.set_adapter("a")
    assert torch.equal(logits(model), outputs["a"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_active_adapters_add_up(dtype):
    model = two_adapters(dtype=dtype)
    model.base_model.set_adapter(["a", "b"])
    output = logits(model)
    dense = tiny_model("olmoe", dtype)
    with torch.no_grad():
        totals = {}
        for name in ("a", "b"):
            for (path, weight), delta in deltas_of(model, name).items():
                ids = model.peft_config[name].target_experts[path]
                full = totals.setdefault((path, weight), dense.get_parameter(f"{path}.{weight}").float().clone())
                for expert, row in zip(ids, delta.float(), strict=True):
                    full[expert] += row
        for (path, weight), full in totals.items():
            dense.get_parameter(f"{path}.{weight}").copy_(full)
    expected = logits(dense)
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    assert (output - expected).abs().max() <= tolerance * expected.abs().max()
    model.merge_adapter()
    merged = dict(model.get_base_model().named_parameters())
    for path, weight in totals:
        parameter = merged[f"{path}.base_layer.{weight}"]
        assert torch.equal(parameter, dense.get_parameter(f"{path}.{weight}"))


SEQUENCES = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["merge", "set"]), st.sampled_from([["a"], ["b"], ["a", "b"]])),
        st.tuples(st.sampled_from(["unmerge", "broken_merge", "disable", "forward", "train"]), st.none()),
    ),
    max_size=10,
)


@given(SEQUENCES)
@settings(max_examples=25)
def test_the_base_is_restored_after_any_sequence_of_operations(operations):
    run_and_check_restored(operations)


@pytest.mark.slow
@given(SEQUENCES)
@settings(max_examples=400)
def test_the_base_is_restored_after_many_sequences_of_operations(operations):
    run_and_check_restored(operations)


def run_and_check_restored(operations):
    model = two_adapters(dtype=torch.bfloat16)
    before = snapshot(tiny_model("olmoe", torch.bfloat16))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for operation, argument in operations:
            if operation == "merge":
                model.merge_adapter(argument)
            elif operation == "unmerge":
                model.unmerge_adapter()
            elif operation == "set":
                model.base_model.set_adapter(argument)
            elif operation == "disable":
                with model.disable_adapter():
                    torch.testing.assert_close(logits(model), logits(tiny_model("olmoe", torch.bfloat16)))
            elif operation == "forward":
                logits(model)
            elif operation == "train" and not any(layer.merged for layer in layers(model)):
                trainable = [p for p in model.parameters() if p.requires_grad]
                task_loss(model(input_ids=TOKENS)[0]).backward()
                torch.optim.SGD(trainable, lr=0.1).step()
            elif operation == "broken_merge":
                delta = next(iter(deltas_of(model, "b").values()))
                kept = delta.detach().clone()
                delta.data[0] = float("nan")
                if not any("b" in layer.merged_adapters for layer in layers(model)):
                    state = snapshot(model)
                    with pytest.raises(ValueError, match="NaNs detected"):
                        model.merge_adapter(["a", "b"], safe_merge=True)
                    assert all(
                        torch.equal(value.nan_to_num(), state[name].nan_to_num())
                        for name, value in model.state_dict().items()
                    )
                delta.data.copy_(kept)
        if any(layer.merged for layer in layers(model)):
            model.unmerge_adapter()
        after = snapshot(model.unload())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_safe_merge_refuses_before_it_touches_any_layer():
    model = two_adapters()
    deltas = list(deltas_of(model, "a").values())
    deltas[-1].data[0, 0] = float("inf")
    model.set_adapter("a")
    before = snapshot(model)
    message = "NaNs detected in the merged weights. The adapter a seems to be broken"
    with pytest.raises(ValueError, match=message):
        model.merge_adapter(safe_merge=True)
    with pytest.raises(ValueError, match=message):
        model.merge_and_unload(safe_merge=True)
    assert not any(layer.merged for layer in layers(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_safe_merge_refuses_adapters_that_overflow_together_only():
    model = get_peft_model(tiny_model("olmoe", torch.float16), config_for(tiny_model("olmoe")), adapter_name="a")
    model.add_adapter("b", config_for(tiny_model("olmoe")))
    for name in ("a", "b"):
        for delta in deltas_of(model, name).values():
            delta.data.fill_(40_000)
    before = snapshot(model)
    message = r"The sum of the adapters \['a', 'b'\] seems to be broken"
    with pytest.raises(ValueError, match=message):
        model.merge_adapter(["a", "b"], safe_merge=True)
    model.merge_adapter(["a"], safe_merge=True)
    with pytest.raises(ValueError, match=message):
        model.merge_adapter(["b"], safe_merge=True)
    model.unmerge_adapter()
    model.merge_adapter(["b"], safe_merge=True)
    model.unmerge_adapter()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_merging_twice_and_unmerging_twice_only_warn():
    model = two_adapters()
    model.merge_adapter(["a"])
    state = snapshot(model)
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        model.merge_adapter(["a"])
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()


def test_delete_adapter():
    model = two_adapters()
    model.set_adapter("b")
    expected = logits(model)
    model.delete_adapter("a")
    torch.testing.assert_close(logits(model), expected)
    assert not any("a" in key.split(".") for key in model.state_dict())
    assert all("a" not in layer.expert_ids for layer in layers(model))
    model.add_adapter("a", config_for(tiny_model("olmoe"), experts=[0, 1, 2, 3]))
    model.set_adapter("a")
    torch.testing.assert_close(logits(model), logits(tiny_model("olmoe")))


def test_modules_to_save(tmp_path):
    base = tiny_model("olmoe")
    model = get_peft_model(base, config_for(base, modules_to_save=["lm_head"]))
    randomize(model)
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.add_(0.1)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("olmoe"), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model))


def test_exclude_modules_and_layers_to_transform():
    for settings_, kept in (
        ({"layers_to_transform": [0]}, [0]),
        ({"layers_to_transform": 1}, [1]),
        ({"layers_to_transform": [1], "layers_pattern": "layers"}, [1]),
        ({"exclude_modules": ["layers.0.mlp.experts"]}, [1]),
        ({"exclude_modules": r".*\.1\..*"}, [0]),
    ):
        base = tiny_model("olmoe")
        model = get_peft_model(base, config_for(base, **settings_))
        assert [layer.path for layer in layers(model)] == [f"model.layers.{index}.mlp.experts" for index in kept]


def test_layers_to_transform_counts_the_layers_of_a_model_without_a_head():
    base = tiny_model("olmoe").model
    model = get_peft_model(base, config_for(base, layers_to_transform=[0]))
    assert [layer.path for layer in layers(model)] == ["layers.0.mlp.experts"]


def test_status_and_parameter_counts(capsys):
    model = two_adapters()
    status = model.get_model_status()
    assert (status.base_model_type, status.adapter_model_type) == ("OlmoeForCausalLM", "ESFTModel")
    assert status.peft_types == {"a": "ESFT", "b": "ESFT"}
    assert status.active_adapters == ["a"]
    assert status.num_adapter_layers == 2
    assert [layer.module_type for layer in model.get_layer_status()] == ["esft.FusedExperts"] * 2
    model.print_trainable_parameters()
    per_expert = next(iter(find_experts(model).values())).parameters_per_expert
    assert f"trainable params: {2 * 3 * per_expert:,}" in capsys.readouterr().out


def test_the_experts_module_stays_visible_through_the_layer():
    base = tiny_model("olmoe")
    experts = base.model.layers[0].mlp.experts
    get_peft_model(base, config_for(base))
    layer = base.model.layers[0].mlp.experts
    assert layer.num_experts == 8
    assert layer.gate_up_proj is experts.gate_up_proj
    assert layer.act_fn is experts.act_fn
    assert (layer.in_features, layer.out_features) == (32, 32)
    with pytest.raises(AttributeError, match="OlmoeExperts"):
        _ = layer.nonsense
    assert repr(layer).startswith("esft.FusedExperts(")


def test_layers_survive_deepcopy_and_pickle():
    model = two_adapters()
    model.merge_adapter(["a"])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), logits(model))
        twin.unmerge_adapter()
        assert all(layer.merged for layer in layers(model))


def test_generation_with_a_cache_equals_the_merged_model():
    base = tiny_model("qwen3_moe")
    model = get_peft_model(base, config_for(base)).eval()
    randomize(model)
    settings_ = {"max_new_tokens": 6, "do_sample": False, "num_beams": 2}
    own = model.generate(input_ids=TOKENS, **settings_)
    merged = model.merge_and_unload()
    assert torch.equal(merged.generate(input_ids=TOKENS, **settings_), own)


def test_experts_without_tokens_are_reported_after_training(tmp_path):
    base = tiny_model("olmoe")
    model = get_peft_model(base, config_for(base, experts=range(8)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)  # nothing was trained
    task_loss(model(input_ids=TOKENS[:1, :1])[0]).backward()
    torch.optim.AdamW(model.parameters(), lr=1e-3).step()
    with pytest.warns(UserWarning, match=r"12 selected experts received no token in training"):
        model.save_pretrained(tmp_path)
    for seed in range(20):
        task_loss(model(input_ids=random_tokens(8, 30, seed))[0]).backward()
    torch.optim.AdamW(model.parameters(), lr=1e-3).step()
    assert all(not untrained_experts(layer, "default") for layer in layers(model))


def test_injecting_without_a_peft_model():
    base = tiny_model("olmoe")
    model = peft.inject_adapter_in_model(config_for(base, init_weights=False), base)
    state = peft.get_peft_model_state_dict(model)
    assert set(state) == {
        f"{path}.esft_{name}" for path in select_in_all(base) for name in ("gate_up_proj", "down_proj")
    }
    other = tiny_model("olmoe")
    peft.inject_adapter_in_model(config_for(other), other, state_dict=state)
    peft.set_peft_model_state_dict(other, state)
    assert torch.equal(logits(other), logits(model))


def test_config_round_trip(tmp_path):
    config = ESFTConfig(target_experts={3: torch.tensor([4, 1]), "7": (2,)}, layers_to_transform=[0])
    assert config.target_experts == {"3": [4, 1], "7": [2]}
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert peft.get_peft_config(config.to_dict()) == config


def test_training_works_after_a_call_in_inference_mode():
    base = tiny_model("gpt_oss")
    model = get_peft_model(base, config_for(base))
    with torch.inference_mode():
        model(input_ids=TOKENS)
    task_loss(model(input_ids=TOKENS)[0]).backward()
    assert all(delta.grad is not None for delta in deltas_of(model).values())


def frozen_adapter():
    base = tiny_model("olmoe")
    model = get_peft_model(base, config_for(base, inference_mode=True)).eval()
    randomize(model)
    return model


def replace_by_an_alias(layer):
    """Another parameter in the same place, changed as often as the old one was, which alone tells them apart."""
    old = layer.esft_down_proj["default"]
    new = torch.nn.Parameter(old.data, requires_grad=False)
    while new._version < old._version:
        new.mul_(2)
    assert new._version == old._version > 0 and new.data_ptr() == old.data_ptr()
    layer.esft_down_proj["default"] = new


CHANGES = {
    "in place": lambda layer: layer.esft_down_proj["default"].mul_(2),
    "replaced": lambda layer: layer.esft_down_proj.update(
        {"default": torch.nn.Parameter(2 * layer.esft_down_proj["default"], requires_grad=False)}
    ),
    "data replaced": lambda layer: setattr(
        layer.esft_down_proj["default"], "data", 2 * layer.esft_down_proj["default"]
    ),
    "replaced by an alias": replace_by_an_alias,
    "base": lambda layer: layer.base_layer.down_proj.mul_(2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_effective_rows_follow_every_change_of_delta_or_base(change):
    model = frozen_adapter()
    before = logits(model)
    with torch.no_grad():
        CHANGES[change](layers(model)[0])
    after = logits(model)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, logits(copy.deepcopy(model).merge_and_unload()))


def test_effective_rows_follow_an_optimizer_that_leaves_versions_alone():
    base = tiny_model("olmoe")
    model = get_peft_model(base, config_for(base)).eval()
    deltas = list(deltas_of(model).values())
    optimizer = torch.optim.AdamW(deltas, lr=0.1, fused=True)
    outputs = []
    for _ in range(3):
        loss = task_loss(model(input_ids=TOKENS)[0])
        outputs.append(logits(model))  # between a training step's forward pass and its end
        loss.backward()
        optimizer.step()
    outputs.append(logits(model))
    assert all(not torch.allclose(first, second) for first, second in itertools.pairwise(outputs))
    merged = logits(copy.deepcopy(model).merge_and_unload())
    torch.testing.assert_close(outputs[-1], merged)


@pytest.mark.parametrize("options", [{}, {"rank": 2, "alpha": 8}, {"rank": 2, "use_rslora": True}])
def test_a_frozen_adapter_answers_and_is_saved_as_before(options, tmp_path):
    base = tiny_model("olmoe")
    model = get_peft_model(base, config_for(base, init_weights=False, **options)).eval()
    expected = logits(model)
    model.base_model.freeze_adapter("default")
    assert not deltas_of(model)
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model("olmoe"), tmp_path)), expected)


def test_rows_made_in_inference_mode_serve_a_later_backward():
    model = frozen_adapter()
    with torch.inference_mode():
        expected = model(input_ids=TOKENS)[0]
    embeddings = model.get_input_embeddings()(TOKENS).detach().requires_grad_()
    output = model(inputs_embeds=embeddings)[0]
    torch.testing.assert_close(output, expected.clone())
    task_loss(output).backward()
    assert embeddings.grad.any()


def test_a_model_made_in_inference_mode_answers():
    with torch.inference_mode():
        base = tiny_model("olmoe")
        expected = base(input_ids=random_tokens())[0]
        model = get_peft_model(base, config_for(base, inference_mode=True))
        torch.testing.assert_close(model(input_ids=random_tokens())[0], expected)


def test_switching_back_and_forth_uses_the_right_rows():
    model = two_adapters()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    outputs = {}
    for _ in range(2):
        for name in ("a", "b"):
            model.base_model.set_adapter(name, inference_mode=True)
            output = logits(model)
            assert torch.equal(outputs.setdefault(name, output), output)
    assert not torch.allclose(outputs["a"], outputs["b"])
