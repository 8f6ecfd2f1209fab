"""`adapter_names`: every sample of a batch with an adapter of its own equals the sample alone with that adapter."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from transformers import GenerationConfig

from peft_esft import ESFTConfig, find_experts
from peft_esft.tuner.mixed_batch import current_batch
from peft_esft.tuner.restoring import restoring

import zoo
from families import tiny_model
from listed import listed_model
from oracle import random_tokens


NAMES = ["a", "__base__", "b", "c", "a"]
TOKENS = random_tokens(5, 8)


def with_adapters(base, **settings):
    """Three adapters: of different experts, of one layer only, and of other experts again."""
    torch.manual_seed(2)
    containers = find_experts(base)
    paths = list(containers)
    choices = {
        "a": {path: [e for e in (5, 1, 2) if e < containers[path].num_experts] for path in paths},
        "b": {paths[-1]: [0, 3]},
        "c": {path: [1] for path in paths},
    }
    model = None
    for name, target_experts in choices.items():
        config = ESFTConfig(target_experts=target_experts, init_weights=False, **settings)
        if model is None:
            model = get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    for name, parameter in model.named_parameters():
        if ".esft_" in name:
            parameter.data.mul_(5)
    return model.eval()


def rows_of(inputs, number):
    return {name: value[number : number + 1] for name, value in inputs.items()}


def alone(model, inputs, names):
    """Each sample run alone, with its adapter."""
    outputs = []
    for number, name in enumerate(names):
        sample = rows_of(inputs, number)
        if name == "__base__":
            with model.disable_adapter():
                outputs.append(zoo.output_of(model(**sample)))
        else:
            model.set_adapter(name)
            outputs.append(zoo.output_of(model(**sample)))
    return torch.cat(outputs)


# Experts of these see tokens in another order, or are called one by one.
REFUSED = {"dbrx", "doge", "jetmoe", "llama4"}
# In these, a sample's output depends on the other samples of its batch.
DEPENDENT = {"nllb_moe": "an expert's capacity is shared by the batch"}


@pytest.mark.parametrize("family", sorted({*zoo.model_types(), *zoo.VARIANTS}))
@pytest.mark.filterwarnings("ignore:.*computes the weights of all experts again")
@torch.no_grad()
def test_every_sample_equals_the_sample_alone(family):
    model = with_adapters(zoo.build(family))
    inputs = zoo.inputs_for(model.get_base_model(), rows=5)
    if family in REFUSED:
        with pytest.raises(ValueError, match=r"adapter_names is not supported by .*Call the model once"):
            model(**inputs, adapter_names=NAMES)
        return
    mixed = zoo.output_of(model(**inputs, adapter_names=NAMES))
    expected = alone(model, inputs, NAMES)
    tolerance = 1e-4 * float(expected.abs().max())
    if family not in DEPENDENT:
        torch.testing.assert_close(mixed, expected, rtol=1e-3, atol=tolerance)
    if family == "vitpose_backbone":
        return  # each image runs one expert, which its adapter need not have
    same = zoo.output_of(model(**inputs, adapter_names=["__base__"] * 5))
    assert not torch.allclose(mixed, same, rtol=1e-3, atol=tolerance)


@given(st.lists(st.sampled_from(["a", "b", "c", "__base__"]), min_size=1, max_size=6), st.integers(1, 5))
@settings(max_examples=25)
@torch.no_grad()
def test_any_mix_of_adapters(names, length):
    model = MODEL
    inputs = {"input_ids": random_tokens(len(names), length)}
    mixed = model(**inputs, adapter_names=names)[0]
    torch.testing.assert_close(mixed, alone(model, inputs, names), rtol=1e-4, atol=1e-5)


MODEL = with_adapters(tiny_model("longcat_flash"))


@torch.no_grad()
def test_generation_with_left_padding_caches_and_sampling():
    model = with_adapters(tiny_model("olmoe"))
    mask = torch.ones_like(TOKENS)
    mask[1, :3] = mask[4, :6] = 0
    inputs = {"input_ids": TOKENS, "attention_mask": mask}
    fixed = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    mixed = model.generate(**inputs, adapter_names=NAMES, **fixed)
    for number, name in enumerate(NAMES):
        sample = rows_of(inputs, number)
        if name == "__base__":
            with model.disable_adapter():
                expected = model.generate(**sample, **fixed)
        else:
            model.set_adapter(name)
            expected = model.generate(**sample, **fixed)
        assert torch.equal(mixed[number : number + 1], expected)
    uncached = model.generate(**inputs, adapter_names=NAMES, use_cache=False, **fixed)
    assert torch.equal(uncached, mixed)
    torch.manual_seed(0)
    sampled = model.generate(**inputs, adapter_names=NAMES, max_new_tokens=6, do_sample=True)
    assert sampled.shape[0] == 5


@torch.no_grad()
def test_beam_search_gives_each_beam_its_sample_s_adapter():
    model = with_adapters(tiny_model("qwen3_moe"))
    fixed = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": 3, "do_sample": False}
    mixed = model.generate(input_ids=TOKENS, adapter_names=NAMES, **fixed)
    for number, name in enumerate(NAMES):
        alone_names = [name]
        expected = model.generate(input_ids=TOKENS[number : number + 1], adapter_names=alone_names, **fixed)
        assert torch.equal(mixed[number : number + 1], expected)


@torch.no_grad()
def test_beam_search_leaves_the_encoder_its_samples():
    model = with_adapters(zoo.build("switch_transformers"))
    fixed = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 2, "do_sample": False}
    mixed = model.generate(input_ids=TOKENS, adapter_names=NAMES, **fixed)
    for number, name in enumerate(NAMES):
        expected = model.generate(input_ids=TOKENS[number : number + 1], adapter_names=[name], **fixed)
        assert torch.equal(mixed[number : number + 1], expected)


BEAMS = {
    "beams": {"num_beams": 3, "do_sample": False},
    "config": {"generation_config": GenerationConfig(num_beams=3, do_sample=False, pad_token_id=0)},
    "returned": {"num_beams": 4, "num_return_sequences": 2, "do_sample": False},
}


@pytest.mark.parametrize("settings_", BEAMS.values(), ids=BEAMS)
@torch.no_grad()
def test_whole_modules_of_some_adapters_follow_their_samples(settings_):
    """`modules_to_save` of one adapter: the others go on with the base's."""
    model = get_peft_model(tiny_model("olmoe"), ESFTConfig(target_experts={0: [1, 2]}, init_weights=False), "a").eval()
    model.add_adapter("b", ESFTConfig(target_experts={1: [3]}, init_weights=False, modules_to_save=["lm_head"]))
    model.base_model.model.lm_head.modules_to_save["b"].weight.neg_()
    names = ["b", "a", "__base__", "b", "a"]
    lengths = {"max_new_tokens": 5, "min_new_tokens": 5, **settings_}
    mixed = model.generate(input_ids=TOKENS, adapter_names=names, **lengths)
    each = len(mixed) // len(names)
    for number, name in enumerate(names):
        sample = {"input_ids": TOKENS[number : number + 1]}
        if name == "__base__":
            with model.disable_adapter():
                expected = model.generate(**sample, **lengths)
        else:
            model.set_adapter(name)
            expected = model.generate(**sample, **lengths)
        assert torch.equal(mixed[number * each : (number + 1) * each], expected)
    mixed = model(input_ids=TOKENS, adapter_names=["a"] * 5)[0]
    torch.testing.assert_close(mixed, alone(model, {"input_ids": TOKENS}, ["a"] * 5))


@torch.no_grad()
def test_arguments_that_have_no_row_for_each_sample_are_no_batch():
    model = with_adapters(tiny_model("olmoe"))
    expected = model(input_ids=TOKENS, adapter_names=NAMES)[0]
    last = torch.tensor([TOKENS.shape[1] - 1])
    found = model(logits_to_keep=last, input_ids=TOKENS, adapter_names=NAMES)[0]
    assert torch.equal(found, expected[:, -1:])
    with pytest.raises(ValueError, match="got 5 and 4"):
        model(logits_to_keep=last, input_ids=TOKENS[:4], adapter_names=NAMES)


@torch.no_grad()
def test_images_are_counted_too():
    model = zoo.build("vitpose_backbone")
    model = get_peft_model(model, ESFTConfig(target_experts={next(iter(find_experts(model))): [0]})).eval()
    inputs = zoo.inputs_for(model.get_base_model())
    with pytest.raises(ValueError, match="should be the same as the number of inputs"):
        model(**inputs, adapter_names=["default"] * (len(inputs["pixel_values"]) + 1))


@torch.no_grad()
def test_low_rank_and_whole_modules_mix_too():
    for family, settings_ in (("olmoe", {"rank": 2}), ("glm4_moe", {"train_shared_experts": True})):
        model = with_adapters(tiny_model(family), **settings_)
        mixed = model(input_ids=TOKENS, adapter_names=NAMES)[0]
        torch.testing.assert_close(mixed, alone(model, {"input_ids": TOKENS}, NAMES), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_adapters_come_and_go_between_batches():
    model = with_adapters(tiny_model("olmoe"))
    before = model(input_ids=TOKENS, adapter_names=NAMES)[0]
    model.add_adapter("d", ESFTConfig(target_experts={0: [7, 5]}, init_weights=False))
    with_d = model(input_ids=TOKENS, adapter_names=["a", "d", "b", "c", "d"])[0]
    torch.testing.assert_close(with_d, alone(model, {"input_ids": TOKENS}, ["a", "d", "b", "c", "d"]))
    model.set_adapter("a")
    model.delete_adapter("d")
    assert torch.equal(model(input_ids=TOKENS, adapter_names=NAMES)[0], before)
    model.base_model.set_scale("c", 0.0)
    scaled = model(input_ids=TOKENS, adapter_names=["c"] * 5)[0]
    torch.testing.assert_close(scaled, model(input_ids=TOKENS, adapter_names=["__base__"] * 5)[0])


@torch.no_grad()
def test_threads_do_not_mix_their_batches():
    model = with_adapters(tiny_model("olmoe"))
    batches = [NAMES, ["b"] * 5, ["__base__"] * 5, ["c", "a", "c", "b", "a"]]
    expected = [model(input_ids=TOKENS, adapter_names=names)[0] for names in batches]

    @torch.no_grad()
    def serve(number):
        names = batches[number % 4]
        return torch.equal(model(input_ids=TOKENS, adapter_names=names)[0], expected[number % 4])

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(serve, range(60)))


@torch.no_grad()
@pytest.mark.parametrize("build", [tiny_model, lambda _: listed_model()], ids=["fused", "listed"])
def test_a_call_of_another_model_within_a_batch_has_the_other_s_adapter(build):
    """As of a draft model, a teacher, or a model that a logits processor asks."""
    model, other, tokens = with_adapters(tiny_model("olmoe")), with_adapters(build("olmoe")), random_tokens(2, 4)
    expected = [other(input_ids=tokens)[0], other.generate(input_ids=tokens, max_new_tokens=3, do_sample=False)]
    found = []

    def ask(*_):
        found.append(other(input_ids=tokens)[0])
        found.append(other.generate(input_ids=tokens, max_new_tokens=3, do_sample=False))

    handle = model.get_base_model().model.layers[1].register_forward_hook(ask)
    model(input_ids=TOKENS, adapter_names=NAMES)
    handle.remove()
    assert all(torch.equal(one, another) for one, another in zip(found, expected, strict=True))


def test_a_batch_that_begins_or_ends_beside_a_failing_operation_keeps_to_its_hooks():
    """As in two threads."""
    model = with_adapters(tiny_model("olmoe"))
    before = hooks_of(model)
    for begins_inside in (False, True):
        batch = model.base_model._enable_peft_forward_hooks(adapter_names=NAMES)
        if not begins_inside:
            batch.__enter__()
        with suppress(MemoryError), restoring(model.base_model):
            if begins_inside:
                batch.__enter__()
            else:
                batch.__exit__(None, None, None)
            during = hooks_of(model)
            raise MemoryError
        assert hooks_of(model) == during
        if begins_inside:
            batch.__exit__(None, None, None)
        assert hooks_of(model) == before


def test_nothing_stays_behind_after_an_error():
    model = with_adapters(tiny_model("olmoe"))
    before = hooks_of(model)
    with pytest.raises(IndexError):
        model(input_ids=torch.full((5, 3), 10_000), adapter_names=NAMES)
    assert current_batch() is None
    assert hooks_of(model) == before


def hooks_of(model):
    return [
        [*module._forward_pre_hooks, *module._forward_pre_hooks_with_kwargs, *module._forward_hooks]
        for module in model.modules()
    ]


@torch.no_grad()
def test_names_are_honoured_by_the_model_inside_of_peft_s_too():
    model = with_adapters(tiny_model("olmoe"))
    expected = model(input_ids=TOKENS, adapter_names=NAMES)[0]
    assert torch.equal(model.base_model(input_ids=TOKENS, adapter_names=NAMES)[0], expected)
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): typo"):
        model.base_model(input_ids=TOKENS, adapter_names=["typo"] * 5)
    assert torch.equal(model.base_model(input_ids=TOKENS)[0], model(input_ids=TOKENS)[0])


@torch.no_grad()
def test_names_that_reach_the_base_itself_are_refused():
    native = tiny_model("olmoe")
    native.add_adapter(ESFTConfig(target_experts={0: [1]}, init_weights=False), "a")
    wrapped = with_adapters(tiny_model("olmoe"))
    for call in (native, native.generate, wrapped.get_base_model(), wrapped.base_model.generate):
        with pytest.raises(ValueError, match="adapter_names"):
            call(input_ids=TOKENS, adapter_names=["__base__"] * 5)
    with pytest.raises(ValueError, match=r"is not known to OlmoeForCausalLM itself.*Call the PeftModel around it"):
        native(input_ids=TOKENS, adapter_names=["__base__"] * 5)
    assert torch.equal(native(input_ids=TOKENS, adapter_names=None)[0], native(input_ids=TOKENS)[0])
    assert not any(map(any, hooks_of(wrapped.unload())))


@pytest.mark.parametrize("names", ["typo", ["a", "typo"]])
def test_names_that_no_adapter_has_are_not_made_active(names):
    model = with_adapters(tiny_model("olmoe"))
    with pytest.raises(ValueError, match=r"there are no adapters \['typo'\]; there are \['a', 'b', 'c'\]"):
        model.base_model.set_adapter(names)
    assert model.active_adapters == ["a"] and model.base_model.active_adapters == ["a"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a"], r"Length of `adapter_names` should be the same as the number of inputs, but got 1 and 5"),
        (["a"] * 4 + ["d"], r"non-existing adapter\(s\): d"),
        ([], "expected a list with a name for each sample"),
        ("a", "expected a list with a name for each sample"),
    ],
)
def test_bad_names_are_refused(names, message):
    model = with_adapters(tiny_model("olmoe"))
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=message):
            call(input_ids=TOKENS, adapter_names=names)


def test_training_merged_adapters_and_lists_called_expert_by_expert_are_refused():
    model = with_adapters(tiny_model("olmoe"))
    with pytest.raises(ValueError, match="in training mode"):
        model.train()(input_ids=TOKENS, adapter_names=NAMES)
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="when there are merged adapters"):
        model(input_ids=TOKENS, adapter_names=NAMES)
    with pytest.raises(ValueError, match="ModuleList is called expert by expert"):
        with_adapters(listed_model())(input_ids=TOKENS, adapter_names=NAMES)


@pytest.mark.filterwarnings("ignore:.*computes the weights of all experts again")
def test_experts_that_see_tokens_in_another_order_are_refused():
    model = with_adapters(zoo.build("dbrx"))
    with pytest.raises(ValueError, match=r"DbrxExperts does not keep a batch's tokens in order\. Call the model once"):
        model(**zoo.inputs_for(model.get_base_model(), rows=5), adapter_names=NAMES)
