"""`RoutingCallback`: what it counts in training equals what scoring counts on the same batches."""

from __future__ import annotations

import logging

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_esft import ESFTConfig, find_experts, score_experts
from peft_esft.analysis import LayerRouting, RoutingCallback

from families import tiny_model


pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing.* is deprecated:FutureWarning", "ignore:.*pin_memory.*"
)


def padded_rows(number, seed):
    """Rows of unequal length: padding must not be counted."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for row in range(number):
        ids = torch.randint(3, 64, (8,), generator=generator)
        mask = (torch.arange(8) < 8 - row % 3).long()
        labels = ids.where((mask == 1) & (torch.arange(8) > 2), -100)
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return rows


def arguments(folder, **more):
    settings = {"max_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1, "learning_rate": 0.0}
    quiet = {"report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    return TrainingArguments(output_dir=str(folder), **{**settings, **quiet, **more})


def adapted(family="olmoe"):
    base = tiny_model(family)
    last = list(find_experts(base))[-1]
    return get_peft_model(base, ESFTConfig(target_experts={last: [1, 3]}, task_type="CAUSAL_LM")), last


def hooks_of(model):
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("answers_only", [False, True])
def test_counts_equal_those_of_scoring(tmp_path, checkpointing, answers_only):
    model, last = adapted()
    rows = padded_rows(12, seed=1)
    settings = arguments(tmp_path, gradient_checkpointing=checkpointing, eval_strategy="steps", eval_steps=1)
    trainer = Trainer(model, settings, train_dataset=rows, eval_dataset=padded_rows(4, seed=2))
    routing = RoutingCallback.add_to(trainer, answers_only=answers_only)
    trainer.train()

    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    scores = score_experts(model, [batch], answers_only=answers_only, progress=False)
    for path, container in scores.containers.items():
        assert routing.layers[path].pairs == container.selected_pairs
    pairs = scores.containers[last].selected_pairs
    assert routing.layers[last].selected == [1, 3]
    assert routing.layers[last].selected_share == pytest.approx((pairs[1] + pairs[3]) / sum(pairs))


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen3_moe", "deepseek_v2"])
def test_every_log_of_the_loss_has_the_shares_and_trackers_see_them(tmp_path, family):
    model, last = adapted(family)
    seen = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    trainer = Trainer(model, arguments(tmp_path), train_dataset=padded_rows(12, seed=1), callbacks=[Tracker()])
    routing = RoutingCallback.add_to(trainer)
    trainer.train()
    losses = [log for log in trainer.state.log_history if "loss" in log]
    assert len(losses) == 3
    for log, told in zip(losses, [log for log in seen if "loss" in log], strict=True):
        assert log["experts/selected_share"] == told["experts/selected_share"]
        assert 0 <= log["experts/selected_share_min"] <= log["experts/selected_share"] <= 1
        assert 1 <= log["experts/effective"] <= 8
    assert not any("experts/effective" in log for log in trainer.state.log_history if "train_runtime" in log)
    # The logs divide the run: their mean, weighted by tokens, is the whole run's.
    assert sum(routing.layers[last].pairs) == 2 * sum(int(row["attention_mask"].sum()) for row in padded_rows(12, 1))


def test_training_is_the_same_with_it(tmp_path):
    results = []
    for watched in (False, True):
        torch.manual_seed(0)
        model, _ = adapted()
        trainer = Trainer(model, arguments(tmp_path, learning_rate=1e-2), train_dataset=padded_rows(12, seed=1))
        before = hooks_of(model)
        if watched:
            RoutingCallback.add_to(trainer)
        trainer.train()
        results.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
        assert hooks_of(model) == before
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[1][name], value) for name, value in results[0].items())


def test_the_summary_names_experts_that_the_choice_missed(tmp_path, caplog):
    model, last = adapted()
    trainer = Trainer(model, arguments(tmp_path), train_dataset=padded_rows(12, seed=1))
    routing = RoutingCallback.add_to(trainer)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert routing.summary() in caplog.text
    assert routing.summary().startswith("the trained experts took ")
    routing.layers = {last: LayerRouting([1, 3], [10, 60, 5, 1, 40, 4, 0, 0])}
    assert "1 trained experts were hardly used" in routing.summary() and f"{last} 3" in routing.summary()
    assert "1 frozen experts took more than the trained ones on average" in routing.summary()
    assert f"{last} 4" in routing.summary()


def test_measures_of_a_layer():
    even = LayerRouting([0], [5, 5, 5, 5])
    assert even.selected_share == 0.25 and even.effective_experts == pytest.approx(4)
    assert even.hardly_used == [] and even.came_up == []
    one = LayerRouting([1], [7, 0, 0, 0])
    assert one.selected_share == 0 and one.effective_experts == pytest.approx(1)
    assert one.hardly_used == [1] and one.came_up == [0]
    assert LayerRouting([], [1, 2]).came_up == []
    assert LayerRouting([0], [0, 0]).selected_share == 0
