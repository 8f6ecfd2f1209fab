"""Two processes joined by gloo compute what one does on the joint batch, and save what one saves."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peft_esft import ESFTConfig

import engines
from engines import adapted, base_model, base_of, joint_batches, train, whole_deltas
from families import tiny_model


pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def largest_difference(found, expected):
    assert found.keys() == expected.keys()
    return max(float((found[key].float() - expected[key].float()).abs().max()) for key in expected)


def report(record_property, engine, **differences):
    for name, value in differences.items():
        record_property(f"{engine}: {name}", value)
        print(f"{engine}: {name}: {value:.2g}")


@pytest.fixture(scope="module")
def single():
    """One process: the deltas after three and after six steps on the joint batches."""
    model = adapted(base_model())
    optimizer = train(model, joint_batches())
    three = whole_deltas(model)
    assert min(float(delta.abs().max()) for delta in three.values()) > 1e-3
    train(model, joint_batches(), optimizer)
    return three, whole_deltas(model)


@pytest.fixture(scope="module")
def single_scores():
    model = adapted(base_model())
    train(model, joint_batches())
    return engines.scores_of(model, lambda batch: batch), engines.uneven_scores(model, None)


def check_scores(found, expected):
    assert found.num_tokens == expected.num_tokens
    for path, container in expected.containers.items():
        assert found.containers[path].selected_pairs == container.selected_pairs
        torch.testing.assert_close(
            torch.tensor(found.containers[path].gate_weight_sum), torch.tensor(container.gate_weight_sum)
        )
        torch.testing.assert_close(found.token()[path], expected.token()[path])


def check_adapter(folder, expected):
    loaded = PeftModel.from_pretrained(base_model(), folder)
    found = whole_deltas(loaded)
    assert largest_difference(found, expected) == 0


def test_ddp(tmp_path, single, single_scores, record_property):
    results = engines.run(engines.ddp, tmp_path)
    assert any(
        first > 0 and second == 0 for first, second in zip(results[0]["tokens"], results[1]["tokens"], strict=True)
    )
    for found in results:
        for checkpointing in (False, True):
            deltas = found[f"deltas, checkpointing {checkpointing}"]
            difference = largest_difference(deltas, single[0])
            report(record_property, "DDP", **{f"checkpointing {checkpointing}": difference})
            assert difference < 1e-6
        assert largest_difference(found["base"], base_of(adapted(base_model()))) == 0
        check_scores(found["scores"], single_scores[0])
    check_adapter(tmp_path / "adapter", results[0]["deltas, checkpointing True"])


def test_fsdp2(tmp_path, single, single_scores, record_property):
    results = engines.run(engines.fsdp2, tmp_path)
    reference = adapted(base_model())
    for found in results:
        for checkpointing in (False, True):
            difference = largest_difference(found[f"deltas, checkpointing {checkpointing}"], single[0])
            report(record_property, "FSDP2", **{f"checkpointing {checkpointing}": difference})
            assert difference < 1e-6
        assert largest_difference(found["deltas, compiled"], single[0]) < 1e-6
        assert largest_difference(found["base"], base_of(reference)) == 0
        check_scores(found["scores"], single_scores[0])
        check_scores(found["scores of uneven data"], single_scores[1])
        assert largest_difference(found["deltas after six steps"], single[1]) < 1e-5
        assert largest_difference(found["deltas after resuming"], found["deltas after six steps"]) == 0
        # Only deltas are gathered to save an adapter.
        assert sorted(found["gathered for the adapter"]) == sorted(tuple(d.shape) for d in single[0].values())
    for name, parameter in reference.named_parameters():
        held = [found["held"][name] for found in results]
        assert sum(held) == parameter.numel()
        assert max(held) <= parameter.numel() * 2 / 3  # base and deltas: three rows on two processes
    check_adapter(tmp_path / "adapter", results[0]["deltas, checkpointing True"])

    reference.load_state_dict(results[0]["full checkpoint"])
    assert largest_difference(whole_deltas(reference), results[0]["deltas, checkpointing True"]) == 0
    # The sharded checkpoint loads in one process.
    state = {"model": {n: p.detach().zero_() for n, p in adapted(base_model()).named_parameters() if ".esft_" in n}}
    dcp.load(state, checkpoint_id=tmp_path / "sharded")
    reference.load_state_dict(state["model"], strict=False)
    assert largest_difference(whole_deltas(reference), results[0]["deltas, checkpointing True"]) == 0

    half = adapted(base_model(torch.bfloat16))
    train(half, joint_batches())
    difference = largest_difference(results[0]["deltas on a bf16 base"], whole_deltas(half))
    report(record_property, "FSDP2", **{"bf16 base": difference})
    assert all(delta.dtype == torch.float32 for delta in results[0]["deltas on a bf16 base"].values())
    assert difference < 0.05 * max(float(delta.abs().max()) for delta in whole_deltas(half).values())


@pytest.fixture(scope="module")
def single_trainer(tmp_path_factory):
    return engines.run_trainer(tmp_path_factory.mktemp("single"), 4)


def check_trainer(name, found, single_trainer, record_property):
    difference = largest_difference(found["deltas"], single_trainer["deltas"])
    report(record_property, name, training=difference)
    assert difference < 1e-6 < float(max(delta.abs().max() for delta in single_trainer["deltas"].values()))
    assert largest_difference(found["deltas after resuming"], found["deltas"]) == 0
    assert found["losses"] == pytest.approx(single_trainer["losses"], abs=1e-5)
    assert len(set(found["losses"])) > 1


def test_trainer_with_ddp(tmp_path, single_trainer, record_property):
    for found in engines.run(engines.trainer_ddp, tmp_path):
        check_trainer("Trainer, DDP", found, single_trainer, record_property)
    check_adapter(tmp_path / "run" / "checkpoint-4", found["deltas"])


def test_trainer_with_fsdp2(tmp_path, single_trainer, record_property):
    for results in engines.run(engines.trainer_fsdp2, tmp_path):
        for kind, found in results.items():
            assert found["sharded"]
            check_trainer(f"Trainer, FSDP2, {kind}", found, single_trainer, record_property)
            check_adapter(tmp_path / kind / "adapter", found["deltas"])
    check_adapter(tmp_path / "FULL_STATE_DICT" / "run" / "checkpoint-4", found["deltas"])
    assert not list(tmp_path.rglob("model*.safetensors"))


def test_expert_parallelism(tmp_path, record_property):
    torch.manual_seed(0)
    base = tiny_model(engines.EP_FAMILY)
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    results = engines.run(engines.expert_parallel, tmp_path)
    for rank in (None, 2):
        model = engines.ep_adapted(copy.deepcopy(base), rank=rank)
        norm = engines.clipped_step(model, joint_batches()[0])
        train(model, joint_batches())
        expected = get_peft_model_state_dict(model)
        with torch.no_grad():
            logits = model.eval()(input_ids=joint_batches()[0])[0]
            plain = base(input_ids=joint_batches()[0])[0]
        scores = engines.scores_of(model, lambda batch: batch)
        for name in engines.LAYOUTS:
            saved = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / f"{name}, rank {rank}")
            difference = largest_difference(get_peft_model_state_dict(saved), expected)
            report(record_property, f"EP, {name}, rank {rank}", training=difference)
            assert difference < 2e-6 < 0.01 < max(float(rows.abs().max()) for rows in expected.values())
            for process, found in enumerate(results):
                rows = slice(2 * process, 2 * process + 2) if "fsdp" in name else slice(None)
                assert found[name, rank, "norm"] == pytest.approx(norm, rel=1e-5)
                for state in ("logits", "reloaded", "merged"):
                    torch.testing.assert_close(found[name, rank, state], logits[rows], atol=1e-4, rtol=1e-4)
                went_on, resumed = found[name, rank, "resumed"]
                assert largest_difference(resumed, went_on) == 0
                torch.testing.assert_close(found[name, rank, "disabled"], plain[rows], atol=1e-4, rtol=1e-4)
                if rank is not None:
                    check_scores(found[name, "scores"], scores)
                    held = {key: shape[0] for key, shape in found[name, "held"].items()}
                    # As many rows as the process with most of the selected experts owns.
                    assert {key: rows for key, rows in held.items() if ".layers.0." in key and rows != 2} == {}
            if rank == 2:
                by_peft = load_file(tmp_path / f"{name}, by PEFT" / "adapter_model.safetensors")
                assert largest_difference(by_peft, get_peft_model_state_dict(saved)) == 0


def adapter_with_other_experts(base, folder):
    """Saves it, and returns its logits. In the first layer it has as many rows on each of four processes, in the
    second more."""
    selection = dict(zip(engines.EP_SELECTION, ([1, 2], [0, 1, 7]), strict=True))
    model = get_peft_model(base, ESFTConfig(target_experts=selection, task_type="CAUSAL_LM"))
    train(model, joint_batches())
    model.save_pretrained(folder)
    with torch.no_grad():
        return model.eval()(input_ids=joint_batches()[0])[0]


def test_an_adapter_goes_on_with_four_processes_and_comes_back(tmp_path, record_property):
    torch.manual_seed(0)
    base = tiny_model(engines.EP_FAMILY)
    base.save_pretrained(tmp_path / "base")
    single = engines.ep_adapted(copy.deepcopy(base))
    optimizer = train(single, joint_batches())
    single.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        logits = single.eval()(input_ids=joint_batches()[0])[0]
    other = adapter_with_other_experts(copy.deepcopy(base), tmp_path / "other")
    assert largest_difference({"": other}, {"": logits}) > 0.01
    results = engines.run(engines.expert_parallel_of_four, tmp_path, processes=4)
    optimizer.state.clear()
    train(single, joint_batches(), optimizer)
    for tp_size in (1, 2):
        for found in results:
            torch.testing.assert_close(found[tp_size], logits, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(found[tp_size, "swapped for other"], other, atol=1e-4, rtol=1e-4)
            assert torch.equal(found[tp_size, "swapped for adapter"], found[tp_size])
        saved = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / f"trained on, tp {tp_size}")
        difference = largest_difference(whole_deltas(saved), whole_deltas(single))
        report(record_property, f"EP of four, tp {tp_size}", training=difference)
        assert difference < 2e-6


def test_trainer_with_expert_parallelism(tmp_path, record_property):
    torch.manual_seed(0)
    base = tiny_model(engines.EP_FAMILY)
    base.save_pretrained(tmp_path / "base")
    single = engines.make_trainer(tmp_path / "single", 4, engines.ep_adapted(copy.deepcopy(base)))
    single.train()
    losses = [log["eval_loss"] for log in single.state.log_history if "eval_loss" in log]
    for found in engines.run(engines.trainer_expert_parallel, tmp_path):
        for name in engines.LAYOUTS:
            assert found[name] == pytest.approx(losses, abs=1e-5)
    for name in engines.LAYOUTS:
        saved = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name / "checkpoint-4")
        difference = largest_difference(whole_deltas(saved), whole_deltas(single.model))
        report(record_property, f"Trainer, EP, {name}", training=difference)
        assert difference < 1e-6 < float(max(delta.abs().max() for delta in whole_deltas(saved).values()))


def test_other_distributed_weights_are_refused_by_name(tmp_path):
    torch.manual_seed(0)
    tiny_model(engines.EP_FAMILY).save_pretrained(tmp_path / "base")
    for found in engines.run(engines.refused, tmp_path):
        assert "distributed tensor" in found["tp_size"]
        assert "ep_size=" in found["tp_size"]
        assert "With FSDP, attach the adapter before the model is sharded" in found["fsdp_size"]
        assert "whole experts" in found["experts also sharded"]


FAILING = """
import sys, warnings
import torch.distributed as dist
import engines
from peft_esft.checkpoints import save_adapter

warnings.simplefilter("ignore")
dist.init_process_group("gloo")
model = engines.shard(engines.adapted(engines.base_model()))
batches = [engines.own_rows(batch) for batch in engines.joint_batches()]
where = sys.argv[1]
if where == "step" and dist.get_rank() == 1:
    batches[1] = batches[1] + 1000  # no such token
engines.train(model, batches)
save_adapter(model, sys.argv[2])  # a file: the writing process refuses it
"""


@pytest.mark.parametrize(
    ("where", "message"), [("step", "index out of range"), ("save", "is a file; an adapter is saved to a folder")]
)
def test_a_process_that_fails_ends_the_job_with_its_error(where, message, tmp_path):
    (tmp_path / "script.py").write_text(FAILING)
    (tmp_path / "adapter").write_text("years of work")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent / "support"), *sys.path])
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, tmp_path / "script.py", where, tmp_path / "adapter"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,  # far below the half hour that gloo waits
        check=False,
    )
    assert done.returncode != 0
    assert message in done.stderr
    assert (tmp_path / "adapter").read_text() == "years of work"
