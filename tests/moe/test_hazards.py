"""Tests the oddities of single families, and combinations with other adapters, which work or are refused."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model

from peft_esft import ESFTConfig, ESFTLayer, find_experts, score_experts, select_experts
from peft_esft.moe.routing import Routing
from peft_esft.scoring.counted_tokens import TokenStream
from peft_esft.scoring.measure import RoutingAccumulator

import zoo
from families import tiny_model
from oracle import config_for, random_tokens


TOKENS = random_tokens()


def test_pairs_of_weight_zero_and_ids_beyond_the_experts_are_not_counted():
    index = torch.tensor([[0, 1], [1, 8], [0, 0]])
    weights = torch.tensor([[0.0, 0.5], [0.5, 0.5], [0.2, 0.3]])
    accumulator = RoutingAccumulator(8)
    stream = TokenStream(torch.zeros(3, dtype=torch.int64), torch.tensor([3]), torch.tensor([0]))
    accumulator.update(Routing(index, weights, 2), stream)
    # An expert twice in a row is computed twice.
    assert accumulator.result().selected_pairs == [2, 2, 0, 0, 0, 0, 0, 0]
    assert accumulator.result().gate_weight_sum[:2] == pytest.approx([0.5, 1.0])


def test_skipped_experts_of_zaya_are_not_expert_0():
    model = zoo.build("zaya")
    for module in model.modules():
        if hasattr(module, "balancing_biases"):
            module.balancing_biases.zero_()[-1] = 100  # every token skips
    scores = score_experts(model, [{"input_ids": TOKENS}], progress=False)
    assert all(not any(c.selected_pairs) for c in scores.containers.values())
    assert all(c.num_tokens == TOKENS.numel() for c in scores.containers.values())


def test_hash_routers_count_repeated_experts_as_often_as_they_run():
    model = zoo.build("deepseek_v4")
    table = next(buffer for name, buffer in model.named_buffers() if name.endswith("tid2eid"))
    table.zero_()  # as a config without a checkpoint leaves it: expert 0 for every token, twice
    scores = score_experts(model, [{"input_ids": TOKENS}], progress=False)
    hashed = next(iter(scores.containers.values()))
    assert hashed.selected_pairs == [2 * TOKENS.numel(), *[0] * 7]
    assert float(hashed.token_share_sum[0]) == pytest.approx(len(TOKENS))


def test_identity_experts_take_a_share_that_is_no_expert_s():
    model = tiny_model("longcat_flash")
    scores = score_experts(model, [{"input_ids": TOKENS}], progress=False)
    for path, row in scores.token().items():
        assert 0 < float(row.sum()) < 1
        assert len(row) == find_experts(model)[path].num_experts == 8


def test_experts_that_the_data_never_reaches_are_left_out_of_the_selection():
    model = zoo.build("dots3_note")
    scores = score_experts(model, [zoo.inputs_for(model)], progress=False)
    silent = [path for path, c in scores.containers.items() if not any(c.selected_pairs)]
    assert silent and all("vision" in path for path in silent)
    with pytest.warns(UserWarning, match="no token of the scored data reached 2 of 4 experts modules"):
        selection = select_experts(scores)
    assert not set(selection) & set(silent)
    get_peft_model(model, ESFTConfig(target_experts=selection))


def test_vision_experts_may_differ_in_number_from_layer_to_layer():
    model = zoo.build("dots3_note")
    numbers = {path: c.num_experts for path, c in find_experts(model).items() if "vision" in path}
    assert sorted(numbers.values()) == [4, 8]
    path = min(numbers, key=numbers.get)
    with pytest.raises(ValueError, match=r"has 4 experts, with ids 0 to 3; it has no expert \[5\]"):
        get_peft_model(model, ESFTConfig(target_experts={path: [5]}))


def test_experts_in_a_narrower_space_than_the_model_s():
    for family in ("nemotron_h", "muse_spark"):
        model = tiny_model(family)
        (container,) = find_experts(model).values()
        assert container.hidden_size == 16 < model.config.hidden_size


def test_several_groups_of_one_layer_are_named_by_path():
    model = zoo.build("jetmoe")
    with pytest.raises(ValueError, match="layer 0 has several experts modules"):
        get_peft_model(model, ESFTConfig(target_experts={0: [1]}))
    scores = score_experts(model, [{"input_ids": TOKENS}], progress=False)
    selection = select_experts(scores)
    for path, ids in selection.items():
        # Both projections of an expert are chosen together.
        assert selection[path.replace("output_linear", "input_linear")] == ids


def test_slow_layouts_say_so_once():
    model = zoo.build("dbrx")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        get_peft_model(model, config_for(model))
    assert [str(w.message).partition(":")[0] for w in caught if "full fine-tuning" in str(w.message)] == [
        "DbrxExperts"
    ]


def test_scoring_is_not_disturbed_by_training_noise():
    model = zoo.build("mixtral").train()
    for module in model.modules():
        if hasattr(module, "jitter_noise"):
            module.jitter_noise = 0.5
    first, second = (score_experts(model, [{"input_ids": TOKENS}], progress=False) for _ in range(2))
    assert first == second
    assert model.training


def quantised(family):
    from transformers.integrations.finegrained_fp8 import FP8Experts
    from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

    model = tiny_model(family)
    model.config.num_experts = 8
    experts = Mxfp4GptOssExperts(model.config) if family == "gpt_oss" else FP8Experts(model.config, block_size=(8, 8))
    model.model.layers[1].mlp.experts = experts
    return model


@pytest.mark.parametrize(
    ("family", "name", "remedy"),
    [
        ("deepseek_v3", "FP8Experts", r"adopt_quantized_experts.*FineGrainedFP8Config\(dequantize=True\)"),
        ("gpt_oss", "Mxfp4GptOssExperts", r"Mxfp4Config\(dequantize=True\)"),
    ],
)
def test_quantised_experts_are_found_and_refused_with_what_would_do(family, name, remedy):
    model = quantised(family)
    assert find_experts(model)["model.layers.1.mlp.experts"].num_experts == 8
    with pytest.raises(NotImplementedError, match=rf"layers.1.mlp.experts \({name}\).*quantised.*{remedy}"):
        get_peft_model(model, ESFTConfig(target_experts={1: [0]}))
    assert not any(isinstance(module, ESFTLayer) for module in model.modules())


@pytest.mark.filterwarnings(
    "ignore:Already found a `peft_config`", "ignore:You are trying to modify a model with PEFT"
)
def test_lora_beside_experts_is_warned_of_when_saved_and_refused_when_loaded(tmp_path):
    """PEFT saves and loads one method at a time: half of the file would be dropped."""
    base = inject_adapter_in_model(LoraConfig(target_modules=["q_proj", "v_proj"]), tiny_model("olmoe"))
    model = get_peft_model(base, config_for(base))
    with pytest.warns(UserWarning, match="LoRA weights beside ESFT's"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"does not allow: .*lora_A.*Save and load them without ESFT's"):
        PeftModel.from_pretrained(tiny_model("olmoe"), tmp_path)


@pytest.mark.parametrize("family", ["dots3_note", "ernie4_5_vl_moe"])
def test_experts_for_images_count_the_image_s_tokens_of_single_samples(family):
    model = zoo.build(family)
    inputs = zoo.inputs_for(model, rows=1, images=True)
    executed = dict.fromkeys(find_experts(model), 0)
    for path, container in find_experts(model).items():
        container.module.register_forward_pre_hook(
            lambda module, args, path=path: executed.__setitem__(path, executed[path] + args[1].numel())
        )
    scores = score_experts(model, [inputs], progress=False)
    assert {path: sum(c.selected_pairs) for path, c in scores.containers.items()} == executed
    for path, row in scores.token().items():
        assert float(row.sum()) == pytest.approx(1), path
    with pytest.raises(ValueError, match="Use batches of one sample"):
        score_experts(model, [zoo.inputs_for(model, rows=2, images=True)], progress=False)
