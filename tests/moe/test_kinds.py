"""Containers that are not fused experts: lists of modules, other layouts, modules trained whole; and low rank."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import OlmoeForCausalLM

from peft_esft import ESFTConfig, find_experts, score_experts
from peft_esft.moe.containers import find_other_modules, find_shared_experts
from peft_esft.tuner.layers.substituted import call_with

from checkpoints import randomize
from families import tiny_model
from listed import listed_model
from oracle import DenseOracle, config_for, deltas_of, random_tokens, select_in_all, task_loss


TOKENS = random_tokens()


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS)[0]


@pytest.mark.parametrize("choosing", [True, False])
def test_a_list_of_modules_is_found_by_its_router(choosing):
    model = listed_model(choosing=choosing)
    (container,) = find_experts(model).values()
    assert (container.path, container.kind, container.num_experts) == ("model.layers.1.mlp.experts", "listed", 8)
    fused = find_experts(tiny_model("deepseek_v2"))[container.path]
    assert container.weight_shapes == fused.weight_shapes
    assert container.parameters_per_expert == fused.parameters_per_expert
    # The list of layers is one of equal modules too.
    lone = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))})
    assert not find_experts(lone)


@pytest.mark.parametrize("choosing", [True, False])
def test_a_list_of_modules_equals_the_fused_model_in_outputs_gradients_and_files(choosing, tmp_path):
    listed, fused = listed_model(choosing=choosing), tiny_model("deepseek_v2")
    torch.testing.assert_close(logits(listed), logits(fused))
    config = config_for(fused, init_weights=False)
    models = {}
    for name, base in (("fused", fused), ("listed", listed)):
        models[name] = get_peft_model(base, copy.deepcopy(config))
        randomize(models[name])
        embeddings = base.get_input_embeddings()(TOKENS).detach().requires_grad_()
        task_loss(models[name](inputs_embeds=embeddings)[0]).backward()
        models[name].input_grad = embeddings.grad
        models[name].save_pretrained(tmp_path / name)
    torch.testing.assert_close(logits(models["listed"]), logits(models["fused"]))
    torch.testing.assert_close(models["listed"].input_grad, models["fused"].input_grad)
    own, reference = deltas_of(models["listed"]), deltas_of(models["fused"])
    assert own.keys() == reference.keys()
    for key, delta in own.items():
        torch.testing.assert_close(delta.grad, reference[key].grad)
    # One form on disk: each loads the other's file.
    files = {name: load_file(tmp_path / name / "adapter_model.safetensors") for name in models}
    assert files["fused"].keys() == files["listed"].keys()
    assert all(torch.equal(values, files["listed"][key]) for key, values in files["fused"].items())
    expected = logits(models["fused"])
    for target, source in ((listed_model(choosing=choosing), "fused"), (tiny_model("deepseek_v2"), "listed")):
        torch.testing.assert_close(logits(PeftModel.from_pretrained(target, tmp_path / source)), expected)


def test_a_list_of_modules_merges_and_unmerges_exactly():
    base = listed_model()
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    model = get_peft_model(base, config_for(base))
    randomize(model)
    expected = logits(model)
    model.merge_adapter()
    assert torch.equal(logits(model), expected)
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)
    after = dict(model.unload().named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert type(base.model.layers[1].mlp.experts) is torch.nn.ModuleList


def test_a_list_of_modules_still_looks_like_one():
    base = listed_model()
    experts = list(base.model.layers[1].mlp.experts)
    model = get_peft_model(base, config_for(base))
    layer = base.model.layers[1].mlp.experts
    assert len(layer) == 8
    assert [expert.act_fn for expert in layer.base_layer] == [expert.act_fn for expert in experts]
    weights = [expert.up_proj.weight for expert in experts]
    assert all(torch.equal(expert.up_proj.weight, own) for expert, own in zip(layer, weights, strict=True))
    assert all(torch.equal(expert.up_proj.weight, own) for expert, own in zip(layer[2:4], weights[2:4], strict=True))
    with model.disable_adapter():
        assert layer[3] is experts[3]


def test_experts_of_a_list_that_no_token_reaches_get_a_zero_gradient():
    base = listed_model()
    model = get_peft_model(base, config_for(base, experts=range(8)))
    task_loss(model(input_ids=TOKENS[:1, :1])[0]).backward()
    for delta in deltas_of(model).values():
        untouched = (delta.grad.flatten(1) == 0).all(1)
        assert untouched.any() and not untouched.all()
    base = listed_model()
    scores = score_experts(base, [{"input_ids": TOKENS[:1, :1]}], progress=False)
    unused = [e for e, pairs in enumerate(scores.containers["model.layers.1.mlp.experts"].selected_pairs) if not pairs]
    model = get_peft_model(base, config_for(base, experts=unused))
    task_loss(model(input_ids=TOKENS[:1, :1])[0]).backward()
    assert all(delta.grad is not None and not delta.grad.any() for delta in deltas_of(model).values())


def test_routers_that_return_logits_only_give_counts_but_no_gates():
    listed, fused = listed_model(choosing=False), tiny_model("deepseek_v2")
    batches = [{"input_ids": row[None]} for row in TOKENS]
    scores, expected = (score_experts(model, batches, progress=False) for model in (listed, fused))
    (path,) = scores.containers
    assert scores.containers[path].selected_pairs == expected.containers[path].selected_pairs
    torch.testing.assert_close(scores.token()[path], expected.token()[path])
    with pytest.raises(ValueError, match=r"gate values of model.layers.1.mlp.experts are not known"):
        scores.gate()
    with pytest.raises(ValueError, match="Use batches of one sample"):
        score_experts(listed, [{"input_ids": TOKENS}], progress=False)
    flat = score_experts(listed, [{"input_ids": TOKENS}], averaging="token", progress=False)
    assert flat.containers[path].selected_pairs == expected.containers[path].selected_pairs
    mask = torch.ones_like(TOKENS)
    mask[0, 0] = 0
    with pytest.raises(ValueError, match="in which all tokens count"):
        score_experts(listed, [{"input_ids": TOKENS, "attention_mask": mask}], averaging="token", progress=False)
    frame = scores.to_dataframe()
    assert frame["gate"].isna().all()


def test_routers_of_lists_that_return_their_choice_are_read():
    batches = [{"input_ids": TOKENS}]
    scores, expected = (
        score_experts(model, batches, progress=False) for model in (listed_model(), tiny_model("deepseek_v2"))
    )
    for path, row in expected.gate().items():
        torch.testing.assert_close(scores.gate()[path], row)


RANKED = ["olmoe", "gpt_oss", "deepseek_v2"]


@pytest.mark.parametrize("family", RANKED)
@pytest.mark.parametrize(
    ("settings", "scaling"), [({}, 1.0), ({"alpha": 6}, 2.0), ({"alpha": 6, "use_rslora": True}, 12**0.5)]
)
def test_low_rank_deltas_equal_their_product_as_full_deltas(family, settings, scaling, tmp_path):
    base = tiny_model(family)
    config = config_for(base, rank=3, init_weights=False, **settings)
    assert config.scaling == pytest.approx(scaling)
    low = get_peft_model(copy.deepcopy(base), config)
    full = get_peft_model(base, config_for(base))
    factors = deltas_of(low)
    with torch.no_grad():
        for (path, name), delta in deltas_of(full).items():
            if (path, f"{name}_A") in factors:
                delta.copy_(scaling * factors[path, f"{name}_B"] @ factors[path, f"{name}_A"])
    torch.testing.assert_close(logits(low), logits(full))
    task_loss(low(input_ids=TOKENS)[0]).backward()
    task_loss(full(input_ids=TOKENS)[0]).backward()
    for (path, name), delta in deltas_of(full).items():
        if (path, f"{name}_A") not in factors:
            continue  # biases stay as they are
        matrix_a, matrix_b = factors[path, f"{name}_A"], factors[path, f"{name}_B"]
        torch.testing.assert_close(matrix_a.grad, scaling * matrix_b.mT @ delta.grad, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(matrix_b.grad, scaling * delta.grad @ matrix_a.mT, rtol=1e-3, atol=1e-6)
    expected = logits(low)
    low.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(family), tmp_path)), expected)
    low.merge_adapter()
    torch.testing.assert_close(logits(low), expected)


def test_low_rank_deltas_start_from_zero_and_are_as_small_as_promised():
    base = tiny_model("olmoe")
    expected = logits(base)
    model = get_peft_model(base, config_for(base, rank=2))
    torch.testing.assert_close(logits(model), expected)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 2 * 3 * 2 * ((48 + 32) + (32 + 24))


def test_adapters_of_several_ranks_add_up():
    base = tiny_model("olmoe")
    model = get_peft_model(base, config_for(base, rank=2, init_weights=False), adapter_name="low")
    model.add_adapter("full", config_for(base, experts=[5, 0], init_weights=False))
    model.base_model.set_adapter(["low", "full"])
    expected = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected)


class WholeModules:
    """The dense counterpart: a copy of the model in which the named parameters are trained."""

    def __init__(self, model, names):
        self.model = copy.deepcopy(model)
        self.parameters = {}
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in names)
            if name in names:
                self.parameters[name] = parameter


WITH_SHARED = ["qwen2_moe", "deepseek_v2", "glm4_moe", "step3p7", "nemotron_h", "aria"]


@pytest.mark.parametrize("family", WITH_SHARED)
def test_shared_experts_are_trained_as_in_the_dense_model(family, tmp_path):
    base = tiny_model(family)
    shared = find_shared_experts(base)
    assert len(shared) == len(find_experts(base))
    names = {f"{path}.{name}" for path, c in shared.items() for name, _ in c.module.named_parameters()}
    dense = WholeModules(base, names)
    oracle = DenseOracle(base, select_in_all(base))
    model = get_peft_model(base, config_for(base, train_shared_experts=True))
    torch.testing.assert_close(logits(model), logits(dense.model))
    task_loss(model(input_ids=TOKENS)[0]).backward()
    task_loss(dense.model(input_ids=TOKENS)[0]).backward()
    task_loss(oracle(input_ids=TOKENS)).backward()
    deltas = deltas_of(model)
    for path, container in shared.items():
        for weight in container.weights:
            reference = dense.parameters[f"{path}.{weight.parameter}"].grad
            torch.testing.assert_close(deltas[path, weight.name].grad[0], reference, rtol=1e-3, atol=1e-6)
    for key, rows in oracle.rows.items():
        torch.testing.assert_close(deltas[key].grad, rows.grad, rtol=1e-3, atol=1e-6)
    randomize(model, 0.02)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(family), tmp_path)), expected)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected)
    model.unmerge_adapter()
    before = dict(tiny_model(family).named_parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.unload().named_parameters())


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "deepseek_v3", "gpt_oss", "nemotron_h"])
def test_all_other_modules_are_trained_as_in_the_dense_model(family, tmp_path):
    base = tiny_model(family)
    others, left_out = find_other_modules(base)
    assert not left_out
    shared = find_shared_experts(base)
    config = config_for(base, train_shared_experts=bool(shared), train_non_expert_modules=True)
    experts = {name for name, _ in base.named_parameters() if any(name.startswith(p) for p in find_experts(base))}
    dense = WholeModules(base, {name for name, _ in base.named_parameters()} - experts)
    model = get_peft_model(base, config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == sum(p.numel() for p in dense.parameters.values()) + sum(
        len(ids) * find_experts(base)[path].parameters_per_expert for path, ids in config.target_experts.items()
    )
    task_loss(model(input_ids=TOKENS)[0]).backward()
    task_loss(dense.model(input_ids=TOKENS)[0]).backward()
    deltas = deltas_of(model)
    for path, container in {**others, **shared}.items():
        for weight in container.weights:
            reference = dense.parameters[f"{path}.{weight.parameter}"].grad
            if reference is None:
                reference = torch.zeros_like(dense.parameters[f"{path}.{weight.parameter}"])
            own = deltas[path, weight.name].grad
            own = torch.zeros_like(reference) if own is None else own[0]
            torch.testing.assert_close(own, reference, rtol=1e-3, atol=1e-6, msg=lambda m, p=path: f"{p}: {m}")
    randomize(model, 0.02)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(family), tmp_path)), expected)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected)


def test_tied_embeddings_have_one_delta():
    base = tiny_model("olmoe", tied=True)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    others, _ = find_other_modules(base)
    places = [place.path for place in others["model.embed_tokens"].places]
    assert places == ["model.embed_tokens", "lm_head"]
    dense = WholeModules(base, {"model.embed_tokens.weight"})
    model = get_peft_model(base, config_for(base, train_non_expert_modules=True))
    task_loss(model(input_ids=TOKENS)[0]).backward()
    task_loss(dense.model(input_ids=TOKENS)[0]).backward()
    delta = deltas_of(model)["model.embed_tokens", "weight"]
    torch.testing.assert_close(delta.grad[0], dense.model.lm_head.weight.grad, rtol=1e-4, atol=1e-6)
    randomize(model, 0.02)
    expected = logits(model)
    model.merge_adapter()
    assert torch.equal(logits(model), expected)
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(tiny_model("olmoe", tied=True)))
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    torch.testing.assert_close(logits(merged), expected)


def test_tied_containers_have_one_delta(tmp_path):
    base = tiny_model("olmoe")
    first, second = (layer.mlp.experts for layer in base.model.layers)
    second.gate_up_proj, second.down_proj = first.gate_up_proj, first.down_proj
    (container,) = find_experts(base).values()
    assert [place.path for place in container.places] == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    scores = score_experts(base, [{"input_ids": TOKENS}], progress=False)
    assert scores.containers[container.path].num_tokens == 2 * TOKENS.numel()
    dense = WholeModules(base, {"model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"})
    model = get_peft_model(base, ESFTConfig(target_experts={"model.layers.1.mlp.experts": [4, 2]}))
    assert model.peft_config["default"].target_experts == {container.path: [4, 2]}
    task_loss(model(input_ids=TOKENS)[0]).backward()
    task_loss(dense.model(input_ids=TOKENS)[0]).backward()
    deltas = deltas_of(model)
    assert len(deltas) == 2
    for (path, name), delta in deltas.items():
        reference = dense.parameters[f"{path}.{name}"].grad[[4, 2]]
        torch.testing.assert_close(delta.grad, reference, rtol=1e-4, atol=1e-6)
    randomize(model)
    expected = logits(model)
    model.merge_adapter()
    assert torch.equal(logits(model), expected)
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 2
    status = model.get_model_status()
    assert status.active_adapters == ["default"] and status.merged_adapters == []
    model.add_adapter("second", ESFTConfig(target_experts={0: [1]}, init_weights=False))
    model.set_adapter("second")
    assert not torch.allclose(logits(model), expected)
    model.set_adapter("default")
    model.delete_adapter("second")
    assert torch.equal(logits(model), expected)
    unloaded = model.unload()
    assert type(unloaded.model.layers[1].mlp.experts) is type(first)


def test_disabling_a_merged_list_of_modules_gives_the_base():
    base = listed_model()
    expected = logits(base)
    model = get_peft_model(base, config_for(base))
    randomize(model)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)


def test_substitution_reaches_parameters_that_are_hidden_by_attributes():
    """As FSDP does while a forward runs."""
    linear = torch.nn.Linear(2, 2, bias=False)
    hidden = linear.weight.detach().clone()
    linear.__dict__["weight"] = hidden
    output = call_with(linear, {"weight": torch.eye(2)}, torch.tensor([3.0, 4.0]))
    assert output.tolist() == [3, 4]
    assert linear.__dict__["weight"] is hidden


class ScaledOlmoe(OlmoeForCausalLM):
    """A model whose own module has a parameter, as a class token is."""

    def __init__(self, config):
        super().__init__(config)
        self.scale = torch.nn.Parameter(torch.tensor([1.5]))

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output["logits"] = output["logits"] * self.scale
        return output


def test_parameters_of_the_models_own_module_stay_frozen():
    base = ScaledOlmoe(tiny_model("olmoe").config)
    others, left_out = find_other_modules(base)
    assert left_out == ["scale"]
    assert "lm_head" in others and "model.layers.0.self_attn.q_proj" in others and "" not in others
    with pytest.warns(UserWarning, match=r"cannot train these parameters.*stay frozen: \['scale'\]"):
        model = get_peft_model(base, config_for(base, train_non_expert_modules=True))
    model(input_ids=random_tokens(), labels=random_tokens()).loss.backward()
    assert model.base_model.model.scale.grad is None
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
