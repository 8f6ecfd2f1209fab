"""`adapter_names` where a model gathers tokens, or sees parts of images: every sample its own adapter, or an error."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_esft import ESFTConfig, find_experts
from peft_esft.tuner.mixed_batch import AdapterBatch
from peft_esft.tuner.samples import Tokens

import zoo
from families import tiny_model
from oracle import random_tokens


def two_adapters(base, **settings):
    target_experts = {path: list(range(c.num_experts)) for path, c in find_experts(base).items()}
    model = get_peft_model(base, ESFTConfig(target_experts=target_experts, init_weights=False, **settings), "a")
    model.add_adapter("b", ESFTConfig(target_experts=target_experts, init_weights=False, **settings))
    return model.eval()


def ernie():
    """Its experts see `hidden_states[~image_mask]` and `hidden_states[image_mask]`."""
    is_text_model = lambda module: type(module).__name__ == "Ernie4_5_VLMoeTextModel"  # noqa: E731
    (model,) = filter(is_text_model, zoo.build("ernie4_5_vl_moe").modules())
    return two_adapters(model)


def image_places(*rows):
    """Where tokens are an image's, `[len(rows), 10]`: so many of each row."""
    return torch.tensor([[0, 0] + [1] * count + [0] * (8 - count) for count in rows])


# Both numbers of text tokens and of image tokens can be divided among two samples.
@pytest.mark.parametrize("places", [image_places(2, 4), image_places(3, 3)], ids=["unequal", "equal"])
@torch.no_grad()
def test_experts_that_see_gathered_tokens_are_refused(places):
    model = ernie()
    inputs = {"input_ids": random_tokens(2, 10), "moe_mm_token_type_ids": places}
    with pytest.raises(ValueError, match=r"moe\.experts sees a tensor of shape .* may have gathered them"):
        model(**inputs, adapter_names=["a", "b"])
    # With one adapter for all it does not matter whose the tokens are.
    for name in "ba":
        model.set_adapter(name)
        assert torch.equal(model(**inputs, adapter_names=[name] * 2)[0], model(**inputs)[0])


@torch.no_grad()
def test_tokens_that_were_all_gathered_are_in_order():
    model = ernie()
    inputs = {"input_ids": random_tokens(2, 10), "moe_mm_token_type_ids": image_places(0, 0)}
    mixed = model(**inputs, adapter_names=["b", "a"])[0]
    for row, name in enumerate("ba"):
        model.set_adapter(name)
        alone = model(**{key: value[row : row + 1] for key, value in inputs.items()})[0]
        torch.testing.assert_close(mixed[row : row + 1], alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_experts_of_a_vision_tower_do_not_know_their_samples():
    model = two_adapters(zoo.build("dots3_note"))
    inputs = zoo.inputs_for(model.get_base_model(), rows=2, images=True)
    with pytest.raises(ValueError, match=r"vision_tower\..* or they are parts of images"):
        model(**inputs, adapter_names=["a", "b"])
    assert torch.equal(model(**inputs, adapter_names=["a", "a"])[0], model(**inputs)[0])
    # Without images the tower is not called.
    text = zoo.inputs_for(model.get_base_model(), rows=2)
    mixed = model(**text, adapter_names=["a", "b"])[0]
    torch.testing.assert_close(mixed[:1], model(input_ids=text["input_ids"][:1])[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_trained_modules_of_a_vision_tower_do_not_know_their_samples_either():
    base = zoo.build("dots3_note")
    path = next(path for path in find_experts(base) if "language" in path)
    model = get_peft_model(base, ESFTConfig(target_experts={path: [1]}, modules_to_save=["patch_embed"]), "a")
    model.add_adapter("b", ESFTConfig(target_experts={path: [2]}, modules_to_save=["patch_embed"]))
    inputs = zoo.inputs_for(model.get_base_model(), rows=2, images=True)
    with pytest.raises(ValueError, match=r"patch_embed: .* may keep a state or take rows that are not samples"):
        model.eval()(**inputs, adapter_names=["a", "b"])


@torch.no_grad()
def test_a_trained_head_serves_a_mixed_batch_that_asks_for_the_last_logits_only():
    base = tiny_model("olmoe")
    model = get_peft_model(base, ESFTConfig(target_experts={0: [1]}, init_weights=False, modules_to_save=["lm_head"]))
    model.add_adapter("b", ESFTConfig(target_experts={0: [2]}, init_weights=False))
    tokens = random_tokens(2, 6)
    names = ["default", "b"]
    whole = model.eval()(input_ids=tokens, adapter_names=names)[0]
    last = model(input_ids=tokens, adapter_names=names, logits_to_keep=2)[0]
    torch.testing.assert_close(last, whole[:, -2:])


TEXT = Tokens(samples=4, length=6)


@pytest.mark.parametrize(
    ("tokens", "shape", "holds"),
    [
        (TEXT, (24, 8), True),
        (TEXT, (4, 6, 8), True),
        (TEXT, (4, 8, 6), True),
        (TEXT, (24, 2, 8), True),
        (TEXT, (12, 8), False),
        (TEXT, (4, 8), False),
        (TEXT, (4, 6), False),
        (TEXT, (4, 9, 8), False),
        (TEXT, (1, 6, 8), False),
        (Tokens(4, 1), (4, 8), True),
        (Tokens(4, 1), (8, 8), False),
        (Tokens(4, None), (4, 9, 8), True),
        (Tokens(4, None), (36, 8), False),
    ],
)
def test_sizes_tell_whether_all_tokens_are_there(tokens, shape, holds):
    assert tokens.hold(torch.zeros(shape), is_logits=False) is holds


def test_ids_and_last_logits_have_a_row_for_each_sample():
    assert TEXT.hold(torch.zeros(4, 6, dtype=torch.long), is_logits=False)
    assert TEXT.hold(torch.zeros(4, 1, 64), is_logits=True)
    assert not TEXT.hold(torch.zeros(2, 1, 64), is_logits=True)


def test_nothing_is_known_outside_of_the_model_s_calls_and_after_those_that_ended_by_an_error():
    inner, outer = nn.Identity(), nn.Identity()
    batch = AdapterBatch(["a", "b"], {}, outer, is_counted=True)
    rows = torch.zeros(2, 3, 8)
    with pytest.raises(ValueError, match=r"experts sees a tensor of shape \[2, 3, 8\]"):
        batch.adapter_of_row(rows, inner, "experts")
    batch.calls.begin(outer, (), {"input_ids": torch.zeros(2, 3, dtype=torch.long)})
    batch.calls.begin(inner, (torch.zeros(7, 8),), {})
    with pytest.raises(ValueError, match="does not tell the tokens of the 2 samples"):
        batch.adapter_of_row(rows, inner, "experts")
    batch.calls.end(outer)
    batch.calls.begin(outer, (), {"input_ids": torch.zeros(2, 3, dtype=torch.long)})
    assert batch.adapter_of_row(rows, inner, "experts").tolist() == [0, 1]
