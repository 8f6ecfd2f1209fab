"""DeepSpeed's ZeRO-2 and ZeRO-3 on its CPU backend, where it is installed: two processes compute what one does."""

from __future__ import annotations

import pytest
import quantised_engines
from test_engines import check_adapter, check_scores, largest_difference, report

import engines
from engines import adapted, base_model, joint_batches, train, whole_deltas


pytest.importorskip("deepspeed", reason="DeepSpeed is no dependency: it builds from source; pip install deepspeed")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def test_zero(tmp_path, monkeypatch, record_property):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    single = adapted(base_model())
    optimizer = train(single, joint_batches())
    three = whole_deltas(single)
    train(single, joint_batches(), optimizer)
    six = whole_deltas(single)
    scores = engines.scores_of(single, lambda batch: batch)
    size = sum(parameter.numel() for parameter in single.parameters())
    for found in engines.run(engines.zero, tmp_path):
        for stage in (2, 3):
            for checkpointing in (False, True):
                difference = largest_difference(found[f"deltas, stage {stage}, checkpointing {checkpointing}"], three)
                report(record_property, f"ZeRO-{stage}", **{f"checkpointing {checkpointing}": difference})
                assert difference < 1e-6
            check_adapter(tmp_path / f"stage {stage}", found[f"deltas, stage {stage}, checkpointing True"])
            assert largest_difference(found[f"six steps, stage {stage}"], six) < 1e-5
            assert largest_difference(found[f"resumed, stage {stage}"], found[f"six steps, stage {stage}"]) == 0
            check_scores(found[f"scores, stage {stage}"], scores)
        assert found["attached to a shared-out base"] == {key: tuple(delta.shape) for key, delta in three.items()}
        assert found["held, stage 2"] == size
        assert found["held, stage 3"] <= 0.51 * size


def test_zero_over_quantised_experts(tmp_path, monkeypatch, record_property):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    single = quantised_engines.adapted("nf4")
    train(single, joint_batches())
    for found in engines.run(quantised_engines.zero, tmp_path):
        difference = largest_difference(found["deltas"], whole_deltas(single))
        report(record_property, "ZeRO-2, nf4", training=difference)
        assert difference < 1e-6
        stage, error = found["error"]
        assert stage == 3 and "Use FSDP2 or ZeRO-2" in error
