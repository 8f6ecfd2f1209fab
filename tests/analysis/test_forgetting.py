"""Forgetting, the view of tokens, and what training did to each expert, against plain computations."""

from __future__ import annotations

import pytest
import torch
from pages import Page
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoTokenizer

from peft_esft import ESFTConfig, ESFTLayer, find_experts, score_experts
from peft_esft.analysis import co_occurrence, expert_usage, forgetting, token_view

import zoo
from families import tiny_model
from oracle import config_for, random_tokens
from repository import ROOT


def perturbed(config=None, base=None):
    base = tiny_model("olmoe") if base is None else base
    model = get_peft_model(base, config_for(base) if config is None else config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    return model.eval()


@pytest.mark.parametrize("kind", ["esft", "lora"])
def test_forgetting_of_any_adapter_equals_a_plain_computation(kind):
    model = perturbed(LoraConfig(target_modules=["q_proj"]) if kind == "lora" else None).train()
    tokens, labels = random_tokens(2, 9), random_tokens(2, 9)
    labels[0, :5] = -100
    point = forgetting(model, {"x": [{"input_ids": tokens, "labels": labels}]}).points["x"]
    assert model.training
    model.eval()
    with torch.no_grad():
        after = model(tokens).logits[:, :-1].flatten(0, 1)
        with model.disable_adapter():
            before = model(tokens).logits[:, :-1].flatten(0, 1)
    targets = labels[:, 1:].flatten()
    counted = targets != -100
    assert point.num_tokens == counted.sum() == 4 + 8
    assert point.loss_before == pytest.approx(cross_entropy(before, targets).item(), rel=1e-5)
    assert point.loss_after == pytest.approx(cross_entropy(after, targets).item(), rel=1e-5)
    kl = kl_div(
        after.log_softmax(-1)[counted], before.log_softmax(-1)[counted], log_target=True, reduction="batchmean"
    )
    assert point.kl == pytest.approx(kl.item(), rel=1e-4) and point.kl > 0
    same = (before.argmax(-1) == after.argmax(-1))[counted].double().mean()
    assert point.same_top == pytest.approx(same.item())


@pytest.mark.parametrize("measure", ["score_experts", "co_occurrence", "forgetting"])
def test_every_module_is_in_the_mode_it_was_in_after_a_measurement(measure):
    model = perturbed().train()
    model.base_model.model.model.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    seen = []
    layer = model.base_model.model.model.layers[1]
    layer.register_forward_pre_hook(lambda module, inputs: seen.append(module.training))
    batches = [{"input_ids": random_tokens()}]
    functions = {"score_experts": score_experts, "co_occurrence": co_occurrence, "forgetting": forgetting}
    functions[measure](model, batches)
    assert seen and not any(seen)
    assert {name: module.training for name, module in model.named_modules()} == modes
    layer.register_forward_pre_hook(lambda module, inputs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        functions[measure](model, batches)
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_without_a_change_nothing_is_forgotten():
    base = tiny_model("olmoe")
    model = get_peft_model(base, config_for(base))
    result = forgetting(model, [{"input_ids": random_tokens()}])
    point = result.points["text"]
    # The wrapped layer sorts its rows in another order than the base does: equal up to rounding.
    assert (point.loss_change, point.kl) == pytest.approx((0, 0), abs=1e-5)
    assert point.same_top == 1
    assert "100.0%" in str(result)


def test_padding_is_not_text():
    model = perturbed()
    tokens = random_tokens(2, 9)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    labels[0, 4] = -100
    by_mask = forgetting(model, [{"input_ids": tokens, "attention_mask": mask}])
    assert by_mask == forgetting(model, [{"input_ids": tokens, "attention_mask": mask, "labels": labels}])
    assert by_mask.points["text"].num_tokens == 4 + 8


def test_two_models_can_be_compared():
    model = perturbed()
    batch = {"input_ids": random_tokens()}
    expected = forgetting(model, [batch])
    assert forgetting(model.merge_and_unload(), [batch], base=tiny_model("olmoe")).points["text"].kl == pytest.approx(
        expected.points["text"].kl, rel=1e-3
    )
    with pytest.raises(ValueError, match="has no adapters to disable"):
        forgetting(tiny_model("olmoe"), [batch])
    with pytest.raises(ValueError, match="no token to predict"):
        forgetting(perturbed(), [])


def test_a_decoder_predicts_its_labels_where_they_are():
    base = zoo.build("switch_transformers")
    base.config.decoder_start_token_id = 0
    tokens, labels = random_tokens(2, 6), random_tokens(2, 5, seed=2)
    labels[0, 3:] = -100
    path = next(path for path in find_experts(base) if path.startswith("decoder"))
    model = perturbed(ESFTConfig(target_experts={path: [0, 1]}), base)
    point = forgetting(model, [{"input_ids": tokens, "labels": labels}]).points["text"]
    with torch.no_grad():
        inputs = {"input_ids": tokens, "labels": labels, "decoder_attention_mask": (labels != -100).long()}
        # Without the auxiliary loss of the routers, which the model adds.
        after = cross_entropy(model(**inputs).logits.flatten(0, 1), labels.flatten())
        with model.disable_adapter():
            before = cross_entropy(model(**inputs).logits.flatten(0, 1), labels.flatten())
    assert point.num_tokens == 8
    assert (point.loss_before, point.loss_after) == pytest.approx((before.item(), after.item()), rel=1e-5)
    with pytest.raises(ValueError, match="needs labels"):
        forgetting(model, [{"input_ids": tokens, "decoder_input_ids": tokens}])


def test_a_merged_model_is_not_compared_with_itself():
    model = perturbed()
    batch = {"input_ids": random_tokens()}
    expected = forgetting(model, [batch])
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge"):
        forgetting(model, [batch])
    assert all(layer.merged for layer in model.modules() if isinstance(layer, ESFTLayer))
    given = forgetting(model, [batch], base=tiny_model("olmoe")).points["text"]
    assert given.kl == pytest.approx(expected.points["text"].kl, rel=1e-3)


def test_usage_is_the_norm_of_the_delta_over_the_base_and_the_scored_counts():
    model = perturbed()
    scores = score_experts(model, [{"input_ids": random_tokens()}], progress=False)
    usage = expert_usage(model, scores)
    assert [(use.path, use.expert) for use in usage] == [(path, e) for path in find_experts(model) for e in (5, 1, 6)]
    for use in usage:
        container = find_experts(model)[use.path]
        base = torch.cat([getattr(container.module, name)[use.expert].flatten() for name in container.weight_names])
        place = [5, 1, 6].index(use.expert)
        deltas = [getattr(container.wrapper_or_module, f"esft_{n}")["default"][place] for n in container.weight_names]
        change = torch.cat([delta.flatten() for delta in deltas]).norm() / base.norm()
        assert use.relative_change == pytest.approx(change.item(), rel=1e-5)
        assert use.pairs == scores.containers[use.path].selected_pairs[use.expert]
        assert use.share == pytest.approx(use.pairs / (2 * 24))
    assert expert_usage(model)[0].pairs is None
    base = tiny_model("olmoe")
    assert {use.relative_change for use in expert_usage(get_peft_model(base, config_for(base)))} == {0.0}


def test_usage_takes_no_scores_of_another_model():
    other = score_experts(tiny_model("deepseek_v2"), [{"input_ids": random_tokens()}], progress=False)
    with pytest.raises(ValueError, match=r"these scores of .* do not fit"):
        expert_usage(perturbed(), other)


def test_usage_needs_one_unmerged_adapter():
    model = perturbed()
    with pytest.raises(ValueError, match="no ESFT adapter named 'law'"):
        expert_usage(model, adapter_name="law")
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge"):
        expert_usage(model)
    with pytest.raises(ValueError, match=r"active ESFT adapters are \[\]"):
        expert_usage(tiny_model("olmoe"))


@pytest.fixture(scope="module")
def embedded():
    from tasks import load_base

    return load_base()


def test_the_token_view_counts_choices_and_escapes_text(embedded, tmp_path):
    model, tokenizer = embedded
    text = "<script>alert('x')</script> & «д» 日本"
    view = token_view(model, tokenizer, [text, ""], experts={0: [3, 4], "model.layers.2.mlp.experts": range(32)})
    assert all(span.choices % 24 == 0 and 0 <= span.hits <= span.choices // 2 for span in view.spans[0])
    assert 0.05 < view.mean_share < 0.4
    assert view.spans[1] == []
    view.save(tmp_path / "view.html")
    page = (tmp_path / "view.html").read_text()
    parsed = Page(page)
    assert text in parsed.text and "<script" not in page
    assert len(parsed.titles) == len(view.spans[0])
    assert view._repr_html_() in page


@pytest.mark.parametrize("expert", [64, 99, -1])
def test_the_token_view_refuses_experts_that_are_not_there(embedded, expert):
    with pytest.raises(ValueError, match=rf"{expert}"):
        token_view(*embedded, "a", experts={0: [1, expert]})


def test_the_token_view_needs_experts_to_look_for(embedded):
    with pytest.raises(ValueError, match="experts is empty"):
        token_view(*embedded, "a", experts={})


def test_the_token_view_equals_the_scores_of_the_same_tokens(embedded):
    model, tokenizer = embedded
    text = "NAME\nls - list directory contents\n"
    experts = {path: [1, 2, 3, 40] for path in find_experts(model)}
    view = token_view(model, tokenizer, text, experts=experts)
    scores = score_experts(model, [tokenizer(text, return_tensors="pt")], progress=False)
    hits = sum(c.selected_pairs[expert] for path, c in scores.containers.items() for expert in experts[path])
    assert sum(span.hits for span in view.spans[0]) == hits


def test_the_token_view_takes_the_active_adapters_experts():
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples" / "tiny_moe" / "model")
    model = tiny_model("olmoe")
    with pytest.raises(ValueError, match="no active ESFT adapter"):
        token_view(model, tokenizer, "a")
    model = get_peft_model(model, config_for(model))
    # The tiny model's vocabulary is smaller than the tokenizer's; these are bytes.
    view = token_view(model, tokenizer, "#$%&")
    expected = token_view(model, tokenizer, "#$%&", experts={path: [5, 1, 6] for path in find_experts(model)})
    assert view == expected
