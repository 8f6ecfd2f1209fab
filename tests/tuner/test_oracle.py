"""ESFT equals the dense model in which only the selected experts' rows are trained."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from peft_esft import ESFTConfig

from families import FAMILIES, tiny_model
from oracle import DenseOracle, config_for, deltas_of, random_tokens, select_in_all, task_loss


IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.3),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0),
}


def dispatchable(family: str) -> bool:
    """True for the families whose experts transformers runs in several implementations."""
    return family not in ("step3p7", "longcat_flash")


CASES = [
    (family, implementation)
    for family in FAMILIES
    for implementation in (IMPLEMENTATIONS if dispatchable(family) else ("eager",))
]


@pytest.mark.parametrize(("family", "implementation"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_zero_delta_leaves_the_output_unchanged(family, implementation, dtype):
    base = tiny_model(family, dtype, implementation if dispatchable(family) else None)
    tokens = random_tokens()
    with torch.no_grad():
        expected = base(input_ids=tokens)[0]
        output = get_peft_model(base, config_for(base))(input_ids=tokens)[0]
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    assert (output - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("family", [family for family in FAMILIES if dispatchable(family)])
def test_zero_delta_is_the_base_s_output_bit_for_bit_in_bf16(family):
    """In the implementation that transformers prefers: a different rounding would send tokens to other experts.

    In fp32 the last bit of a matrix product depends on where its operands lie in memory.
    """
    base = tiny_model(family, torch.bfloat16, "grouped_mm")
    tokens = random_tokens()
    with torch.no_grad():
        expected = base(input_ids=tokens)[0]
        assert torch.equal(get_peft_model(base, config_for(base))(input_ids=tokens)[0], expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_zero_delta_is_exact_in_double_precision(family):
    base = tiny_model(family, torch.float64, "eager" if dispatchable(family) else None)
    tokens = random_tokens()
    with torch.no_grad():
        expected = base(input_ids=tokens)[0]
        output = get_peft_model(base, config_for(base))(input_ids=tokens)[0]
    # These compute parts in fp32 whatever their dtype is.
    tolerance = {"nemotron_h": 1e-6, "openai_privacy_filter": 1e-6}.get(family, 1e-10)
    assert (output - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize(("family", "implementation"), CASES)
def test_gradients_equal_the_dense_model_s(family, implementation):
    base = tiny_model(family, experts_implementation=implementation if dispatchable(family) else None)
    selection = select_in_all(base)
    oracle = DenseOracle(base, selection)
    embeddings = base.get_input_embeddings()(random_tokens()).detach()

    expected_input = embeddings.clone().requires_grad_()
    expected = oracle(inputs_embeds=expected_input)
    task_loss(expected).backward()
    model = get_peft_model(base, config_for(base))
    own_input = embeddings.clone().requires_grad_()
    output = model(inputs_embeds=own_input)[0]
    task_loss(output).backward()

    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(own_input.grad, expected_input.grad, rtol=1e-3, atol=1e-5)
    deltas = deltas_of(model)
    assert deltas.keys() == oracle.rows.keys()
    for key, delta in deltas.items():
        torch.testing.assert_close(
            delta.grad, oracle.rows[key].grad, rtol=1e-3, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_after_training_equal_the_dense_model_s(family, optimizer):
    base = tiny_model(family)
    oracle = DenseOracle(base, select_in_all(base))
    model = get_peft_model(base, config_for(base))
    deltas = deltas_of(model)
    own_steps = OPTIMIZERS[optimizer](list(deltas.values()))
    dense_steps = OPTIMIZERS[optimizer](list(oracle.rows.values()))
    start = {key: rows.detach().clone() for key, rows in oracle.rows.items()}
    for step in range(4):
        tokens = random_tokens(seed=step)
        for run, steps in ((lambda t: model(input_ids=t)[0], own_steps), (lambda t: oracle(input_ids=t), dense_steps)):
            steps.zero_grad()
            # An offset keeps Adam away from its epsilon, where rounding decides the step.
            (100 * task_loss(run(tokens))).backward()
            steps.step()
    moved = 0.0
    for key, delta in deltas.items():
        expected = oracle.rows[key].detach() - start[key]
        moved = max(moved, float(expected.abs().max()))
        difference = (delta.detach() - expected).abs()
        # Adam divides by the gradient's size: an entry whose gradient is all rounding may go either way.
        assert difference.mean() <= 1e-4 * expected.abs().mean() + 1e-7, key
    assert moved > 1e-3


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "deepseek_v3", "step3p7"])
def test_bf16_base_with_fp32_deltas_equals_dense_rows_rounded_once(family):
    base = tiny_model(family, torch.bfloat16)
    oracle = DenseOracle(base, select_in_all(base), additive=True)
    model = get_peft_model(base, config_for(base))
    deltas = deltas_of(model)
    assert {delta.dtype for delta in deltas.values()} == {torch.float32}
    with torch.no_grad():
        for key, delta in deltas.items():
            change = 0.01 * torch.randn_like(delta)
            delta.copy_(change)
            oracle.rows[key].copy_(change)
    tokens = random_tokens()
    expected = oracle(input_ids=tokens)
    output = model(input_ids=tokens)[0]
    assert (output - expected).abs().max() <= 0.03 * expected.abs().max()
    task_loss(expected).backward()
    task_loss(output).backward()
    for key, delta in deltas.items():
        assert delta.grad.dtype == torch.float32
        reference = oracle.rows[key].grad
        assert (delta.grad - reference).norm() <= 0.05 * reference.norm(), key


def test_small_updates_add_up_on_a_bf16_base():
    base = tiny_model("olmoe", torch.bfloat16)
    model = get_peft_model(base, config_for(base))
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.experts")
    before = layer.effective_rows("down_proj", ["default"])
    for _ in range(200):
        with torch.no_grad():
            layer.esft_down_proj["default"] += 1e-5
    after = layer.effective_rows("down_proj", ["default"])
    assert after.dtype == torch.bfloat16
    change = (after.float() - before.float()).mean()
    torch.testing.assert_close(change, torch.tensor(2e-3), rtol=0.1, atol=0)


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "step3p7", "deepseek_v2"])
def test_the_base_stays_bit_identical_in_training(family, weight_decay):
    base = tiny_model(family)
    before = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    model = get_peft_model(base, config_for(base))
    # All parameters are handed over, as careless training loops do.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=weight_decay)
    for step in range(3):
        optimizer.zero_grad()
        task_loss(model(input_ids=random_tokens(seed=step))[0]).backward()
        optimizer.step()
    assert any(bool(delta.any()) for delta in deltas_of(model).values())
    after = dict(model.unload().named_parameters())
    assert after.keys() == before.keys()
    for name, parameter in before.items():
        assert torch.equal(after[name], parameter), name


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "step3p7", "longcat_flash"])
def test_an_expert_without_tokens_gets_a_zero_gradient(family):
    base = tiny_model(family)
    model = get_peft_model(base, config_for(base, experts=range(8)))
    task_loss(model(input_ids=random_tokens(1, 1))[0]).backward()
    gradients = [delta.grad for delta in deltas_of(model).values()]
    assert all(gradient is not None for gradient in gradients)
    untouched = [(gradient.flatten(1) == 0).all(1) for gradient in gradients]
    assert all(bool(rows.any()) and not bool(rows.all()) for rows in untouched)


def test_layers_below_the_first_trained_one_are_not_differentiated():
    base = tiny_model("olmoe").train()
    path = list(select_in_all(base))[-1]
    model = get_peft_model(base, ESFTConfig(target_experts={path: [5, 1]}))
    outputs = []
    for layer in base.model.layers:
        layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    output = model(input_ids=random_tokens())[0]
    assert [state.requires_grad for state in outputs] == [False, True]
    assert output.requires_grad


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(use_reentrant):
    gradients = []
    for checkpointing in (False, True):
        base = tiny_model("olmoe").train()
        model = get_peft_model(base, config_for(base))
        if checkpointing:
            model.enable_input_require_grads()
            # Its name before transformers 5.21 is deprecated now.
            enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
            enable({"use_reentrant": use_reentrant})
        task_loss(model(input_ids=random_tokens(), use_cache=False)[0]).backward()
        gradients.append({key: delta.grad for key, delta in deltas_of(model).items()})
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, msg=str(key))


def test_gradient_accumulation_equals_one_large_batch():
    tokens = random_tokens(rows=4)
    gradients = []
    for batches in (tokens[None], tokens.view(2, 2, -1)):
        base = tiny_model("qwen3_moe")
        model = get_peft_model(base, config_for(base))
        for batch in batches:
            (model(input_ids=batch)[0].square().sum() / 1000).backward()
        gradients.append({key: delta.grad for key, delta in deltas_of(model).items()})
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-4, atol=1e-6, msg=str(key))


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "step3p7"])
def test_autocast_runs_and_keeps_gradients_in_fp32(family):
    base = tiny_model(family)
    model = get_peft_model(base, config_for(base))
    with torch.no_grad():
        expected = model(input_ids=random_tokens())[0]
    with torch.autocast("cpu", torch.bfloat16):
        output = model(input_ids=random_tokens())[0]
    task_loss(output).backward()
    assert (output - expected).abs().max() <= 0.1 * expected.abs().max()
    assert {delta.grad.dtype for delta in deltas_of(model).values()} == {torch.float32}


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "deepseek_v2", "step3p7"])
def test_weight_decay_acts_on_the_change_of_the_rows(family, dtype, weight_decay):
    """The dense counterpart of a delta under weight decay: rows that are pulled towards their first values."""
    base = tiny_model(family, dtype)
    oracle = DenseOracle(base, select_in_all(base), additive=True)
    model = get_peft_model(base, config_for(base))
    deltas = deltas_of(model)
    own, dense = (
        torch.optim.AdamW(list(rows.values()), lr=1e-2, weight_decay=weight_decay) for rows in (deltas, oracle.rows)
    )
    for step in range(4):
        tokens = random_tokens(4, 16, seed=step)
        for run, steps in ((lambda t: model(input_ids=t)[0], own), (lambda t: oracle(input_ids=t), dense)):
            steps.zero_grad()
            (100 * task_loss(run(tokens))).backward()
            steps.step()
    for key, delta in deltas.items():
        expected = oracle.rows[key].detach()
        # In bf16 some gradients are all rounding, their sign is a matter of order, and Adam makes them full steps.
        tolerance = 1e-3 if dtype == torch.float32 else 0.3
        assert (delta.detach() - expected).norm() <= tolerance * expected.norm(), key
        assert torch.nn.functional.cosine_similarity(delta.flatten(), expected.flatten(), 0) > 0.95


def test_the_trainer_of_transformers_trains_an_adapter(tmp_path):
    from transformers import Trainer, TrainingArguments

    base = tiny_model("olmoe")
    before = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    model = get_peft_model(base, config_for(base, task_type="CAUSAL_LM"))
    rows = [{"input_ids": row, "labels": row} for row in random_tokens(8, 10)]
    arguments = TrainingArguments(
        tmp_path, max_steps=3, per_device_train_batch_size=4, report_to=[], disable_tqdm=True, use_cpu=True
    )
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    assert (tmp_path / "checkpoint-3" / "adapter_model.safetensors").exists()
    assert all(bool(delta.any()) for delta in deltas_of(model).values())
    after = dict(model.unload().named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())
