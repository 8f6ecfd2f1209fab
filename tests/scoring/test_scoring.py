"""Scoring: the golden token-level routing, and a reference that records every token's routing."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from peft import get_peft_model
from transformers import DataCollatorWithFlattening

from peft_esft import ESFTConfig, ExpertScores, find_experts, score_experts, select_experts
from peft_esft.cli.main import main
from peft_esft.moe.routing import Routing
from peft_esft.scoring import measure as scoring
from peft_esft.scoring.counted_tokens import TokenStream, streams_of_batch
from peft_esft.scoring.measure import RoutingAccumulator
from peft_esft.scoring.model_sizes import ModelSizes
from peft_esft.scoring.scores import ContainerScores

import zoo
from families import tiny_model
from golden import FOLDER as GOLDEN
from oracle import config_for, random_tokens
from recorded import RecordedRouting


@pytest.mark.parametrize("task", ["intent", "translation"])
def test_golden_sums_give_the_released_scores(task):
    record = json.loads((GOLDEN / f"{task}.json").read_text())
    zeros = [0.0] * 64
    scores = ExpertScores(
        {
            layer: ContainerScores(
                record["top_k"], record["num_tokens"], 1, row["selected_pairs"], row["gate_weight_sum"], zeros, zeros
            )
            for layer, row in record["layers"].items()
        },
        num_tokens=record["num_tokens"],
        num_samples=1,
        averaging="token",
    )
    for metric in ("token", "gate"):
        for layer, values in scores.by_metric(metric).items():
            released = torch.tensor(record["layers"][layer][f"{metric}_score_4dp"], dtype=torch.float64)
            assert (values - released).abs().max() <= 5.1e-5, (metric, layer)


@pytest.mark.parametrize("task", ["intent", "translation"])
@pytest.mark.parametrize("samples_per_batch", [1, 5])
def test_golden_routing_streamed_through_the_accumulator(task, samples_per_batch):
    data = np.load(GOLDEN / f"{task}.tokens.npz")
    lengths = data["sample_lengths"].tolist()
    ends = np.cumsum(lengths).tolist()
    for layer in range(0, 26, 5):
        accumulator = RoutingAccumulator(64)
        for first in range(0, len(lengths), samples_per_batch):
            batch = torch.tensor(lengths[first : first + samples_per_batch])
            start = ends[first] - lengths[first]
            tokens = slice(start, start + int(batch.sum()))
            index = torch.from_numpy(data["expert_ids"][layer, tokens].astype(np.int64))
            gates = torch.from_numpy(data["gate_e4"][layer, tokens].astype(np.float64)) / 10_000
            # Rounded gates of 0 were above 0: the router chose these experts.
            gates = gates.clamp(min=1e-300)
            stream = TokenStream(
                torch.arange(len(batch)).repeat_interleave(batch), batch, torch.arange(len(batch)) % 2
            )
            accumulator.update(Routing(index, gates, 6), stream)
        result = accumulator.result()
        assert result.selected_pairs == data["count"][layer].tolist()
        for averaging, name in (("token", "flat"), ("sample", "per_sample_mean")):
            scores = ExpertScores({"layer": result}, sum(lengths), len(lengths), averaging)
            for metric in ("token", "gate"):
                expected = torch.from_numpy(data[f"{metric}_score_{name}"][layer])
                torch.testing.assert_close(scores.by_metric(metric)["layer"], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("averaging", ["sample", "token"])
@pytest.mark.parametrize(
    "family", ["olmoe", "mixtral", "qwen2_moe", "deepseek_v2", "deepseek_v3", "gpt_oss", "glm4_moe", "longcat_flash"]
)
def test_scores_equal_a_record_of_every_token(family, averaging):
    model = tiny_model(family)
    masks = [torch.ones(3, 10, dtype=torch.long), torch.ones(2, 7, dtype=torch.long)]
    masks[0][0, :4] = 0
    masks[1][1, :] = 0
    batches = [
        {"input_ids": random_tokens(*mask.shape, seed=number), "attention_mask": mask, "labels": None}
        for number, mask in enumerate(masks)
    ]
    recorded = RecordedRouting(model)
    scores = score_experts(model, batches, averaging=averaging, progress=False)
    assert scores.num_tokens == sum(int(mask.sum()) for mask in masks)
    assert scores.num_samples == 4
    for path, expected in recorded.scores(masks, 8).items():
        for metric in ("token", "gate"):
            values = torch.tensor(expected[metric, averaging], dtype=torch.float64)
            torch.testing.assert_close(scores.by_metric(metric)[path], values, rtol=1e-6, atol=1e-9)
        if family != "longcat_flash":  # its identity experts take a share
            assert math.isclose(float(scores.token()[path].sum()), 1)


def test_max_tokens_is_exact_and_cuts_inside_a_batch():
    model = tiny_model("olmoe")
    batches = [{"input_ids": random_tokens(2, 8, seed=seed)} for seed in range(4)]
    cut = score_experts(model, batches, max_tokens=21, progress=False)
    assert (cut.num_tokens, cut.num_samples) == (21, 3)
    mask = torch.tensor([[1] * 5 + [0] * 3, [0] * 8])
    same = score_experts(model, [batches[0], {**batches[1], "attention_mask": mask}], progress=False)
    # Later tokens do not change the routing of earlier ones in a causal model.
    for path, values in cut.token().items():
        torch.testing.assert_close(values, same.token()[path])


def test_scoring_sees_through_an_adapter_and_leaves_no_trace():
    base = tiny_model("qwen3_moe").train()
    batches = [{"input_ids": random_tokens()}]
    expected = score_experts(base, batches, progress=False)
    model = get_peft_model(base, config_for(base)).train()
    hooks = {module: dict(module._forward_pre_hooks) for module in model.modules()}
    scores = score_experts(model, batches, progress=False)
    for path, observed in scores.containers.items():
        assert observed.selected_pairs == expected.containers[path].selected_pairs
        torch.testing.assert_close(scores.gate()[path], expected.gate()[path])
    assert model.training
    assert {module: dict(module._forward_pre_hooks) for module in model.modules()} == hooks


def test_a_failing_forward_leaves_no_trace():
    model = tiny_model("olmoe").train()
    with pytest.raises(IndexError):
        score_experts(model, [{"input_ids": torch.tensor([[10_000]])}], progress=False)
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_joined_runs_equal_one_run_and_files_round_trip(tmp_path):
    model = tiny_model("olmoe")
    batches = [{"input_ids": random_tokens(2, 9, seed=seed)} for seed in range(3)]
    whole = score_experts(model, batches, progress=False)
    parts = [score_experts(model, part, progress=False) for part in (batches[:1], batches[1:])]
    joined = parts[0] + parts[1]
    assert sum(parts) == joined
    assert joined.num_tokens == whole.num_tokens == 54
    for path, values in whole.gate().items():
        torch.testing.assert_close(joined.gate()[path], values)
    whole.save(tmp_path / "scores.json")
    assert ExpertScores.load(tmp_path / "scores.json") == whole
    assert repr(whole) == (
        "ExpertScores(2 containers of (experts, top_k) [(8, 2)], 54 tokens in 6 samples, "
        "averaging='sample', model=None)"
    )


def test_a_plain_mapping_of_scores_is_no_record_for_a_config():
    rows = {"model.layers.0.mlp.experts": [0.1, 0.9]}
    with pytest.raises(ValueError, match=r"scores are a dict.*target_experts=select_experts\(scores\)"):
        ESFTConfig.from_scores(rows)
    assert ESFTConfig(target_experts=select_experts(rows)).target_experts == {"model.layers.0.mlp.experts": [1]}
    with pytest.raises(ValueError, match="scores are a list"):
        select_experts([0.1, 0.9])


def test_config_from_scores_records_the_choice():
    model = tiny_model("olmoe")
    scores = score_experts(model, [{"input_ids": random_tokens()}], progress=False)
    config = ESFTConfig.from_scores(scores, metric="gate", task_type="CAUSAL_LM")
    assert config.selection == {
        "metric": "gate", "top_p": 0.1, "averaging": "sample", "num_tokens": 24, "num_samples": 2,
        "num_experts": dict.fromkeys(find_experts(model), 8),
    }  # fmt: skip
    assert list(config.target_experts) == list(find_experts(model))
    assert config.task_type == "CAUSAL_LM"


def test_the_data_frame_has_a_row_for_each_expert():
    scores = score_experts(tiny_model("olmoe"), [{"input_ids": random_tokens()}], progress=False)
    frame = scores.to_dataframe()
    assert len(frame) == 16
    assert frame.groupby("container")["token"].sum().tolist() == pytest.approx([1, 1])
    assert frame["selected_pairs"].sum() == 2 * 2 * scores.num_tokens


def test_answers_only_counts_the_trained_tokens():
    model = tiny_model("olmoe")
    tokens = random_tokens(2, 8)
    labels = tokens.clone()
    labels[0, :5] = labels[1, :] = -100
    mask = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 0], [0] * 8])  # each predicts a token that counts
    recorded = RecordedRouting(model)
    scores = score_experts(model, [{"input_ids": tokens, "labels": labels}], answers_only=True, progress=False)
    assert (scores.num_tokens, scores.num_samples) == (3, 1)
    for path, expected in recorded.scores([mask], 8).items():
        values = torch.tensor(expected["token", "sample"], dtype=torch.float64)
        torch.testing.assert_close(scores.token()[path], values)
    with pytest.raises(ValueError, match="answers_only needs labels"):
        score_experts(model, [{"input_ids": tokens}], answers_only=True, progress=False)


def test_runs_join_where_one_never_called_a_container():
    called = ContainerScores(2, 2, 1, [3, 1], [1.0, 0.5], [1.5, 0.5], [0.5, 0.25])
    silent = ContainerScores(0, 0, 0, [0, 0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0])
    joined = ExpertScores({"image": called}, 2, 1) + ExpertScores({"image": silent}, 5, 2)
    assert joined.containers["image"].top_k == 2
    assert joined.num_tokens == 7


def _score_on_one_process(rank, world_size, folder):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )
    torch.set_num_threads(1)
    batches = [{"input_ids": random_tokens(2, 9, seed=seed)} for seed in range(5)]
    # Process 2 has no data.
    own = batches[rank :: world_size - 1] if rank < world_size - 1 else []
    score_experts(tiny_model("olmoe"), own, progress=False).save(f"{folder}/{rank}.json")
    torch.distributed.destroy_process_group()


def test_several_processes_give_the_scores_of_one(tmp_path):
    torch.multiprocessing.spawn(_score_on_one_process, (3, str(tmp_path)), nprocs=3)
    expected = score_experts(
        tiny_model("olmoe"), [{"input_ids": random_tokens(2, 9, seed=seed)} for seed in range(5)], progress=False
    )
    for rank in range(3):
        scores = ExpertScores.load(tmp_path / f"{rank}.json")
        assert (scores.num_tokens, scores.num_samples) == (90, 10)
        for path, values in expected.containers.items():
            assert scores.containers[path].selected_pairs == values.selected_pairs
            torch.testing.assert_close(scores.gate()[path], expected.gate()[path], rtol=1e-5, atol=1e-9)


def test_bad_input_is_refused(tmp_path):
    model = tiny_model("olmoe")
    batch = {"input_ids": random_tokens()}
    scores = score_experts(model, [batch], progress=False)
    with pytest.raises(ValueError, match="averaging is 'mean'"):
        score_experts(model, [batch], averaging="mean")
    with pytest.raises(ValueError, match="max_tokens is 0"):
        score_experts(model, [batch], max_tokens=0)
    with pytest.raises(ValueError, match="no token of the batches counts"):
        score_experts(model, [], progress=False)
    with pytest.raises(ValueError, match="no token of the batches counts"):
        score_experts(model, [{**batch, "attention_mask": torch.zeros(2, 12)}], progress=False)
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        score_experts(model, [{"pixels": batch["input_ids"]}], progress=False)
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 3\)"):
        score_experts(model, [{**batch, "attention_mask": torch.ones(2, 3)}], progress=False)
    with pytest.raises(ValueError, match="Linear has no experts module"):
        score_experts(torch.nn.Linear(2, 2), [batch], progress=False)
    with pytest.raises(ValueError, match="averaged differently: 'sample' and 'token'"):
        scores + score_experts(model, [batch], averaging="token", progress=False)
    with pytest.raises(ValueError, match="different models"):
        scores + score_experts(tiny_model("deepseek_v2"), [batch], progress=False)
    path = tmp_path / "scores.json"
    for text in ("", "[]", "{}", '{"format_version": 99}', '{"format_version": 1}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"scores\.json"):
            ExpertScores.load(path)


PATH = "model.layers.0.mlp.experts"


def test_scores_have_the_sizes_of_the_model_and_are_read_without(tmp_path):
    file, model = tmp_path / "scores.json", tiny_model("olmoe")
    scores = score_experts(model, [{"input_ids": random_tokens()}], progress=False)
    scores.save(file)
    assert scores.sizes == ModelSizes.of(model) == ExpertScores.load(file).sizes
    record = json.loads(file.read_text())
    del record["sizes"]  # as an earlier version wrote it
    file.write_text(json.dumps(record))
    earlier = ExpertScores.load(file)
    assert earlier.sizes is None and (earlier + scores).sizes == scores.sizes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record.update(containers=[]), "containers is malformed"),
        (lambda record: record.update(containers={}), "containers is malformed"),
        (lambda record: record["containers"].update({PATH: 3}), "containers is malformed"),
        (lambda record: record["containers"][PATH].update(extra=1), rf"{PATH} has the fields \['extra'"),
        (lambda record: record["containers"][PATH].pop("top_k"), f"{PATH} has the fields"),
        (lambda record: record["containers"][PATH].update(top_k=True), f"{PATH}: top_k is malformed: True"),
        (lambda record: record["containers"][PATH].update(selected_pairs=[1.5] * 8), "selected_pairs is malformed"),
        (lambda record: record["containers"][PATH].update(token_share_sum="abc"), "token_share_sum is malformed"),
        (
            lambda record: record["containers"][PATH].update(gate_share_sum=[math.nan] * 8),
            "gate_share_sum is malformed",
        ),
        (
            lambda record: record["containers"][PATH].update(gate_weight_sum=[0.5] * 7),
            "8 experts, but lists of another",
        ),
        (lambda record: record["halves"].append(3), "halves has the fields int"),
        (lambda record: record["halves"][0].update(num_tokens=[1]), "halves: num_tokens is malformed"),
        (lambda record: record["halves"][0]["selected_pairs"].update({PATH: [[1], [2]]}), "lists of another length"),
        (lambda record: record["halves"][0]["selected_pairs"].pop(PATH), "lists of another length"),
        (
            lambda record: record["halves"][0]["selected_pairs"].update(zz=[[1] * 8, [2] * 8]),
            r"halves has \['zz'\], but containers does not",
        ),
        (lambda record: record.update(num_tokens="3"), "num_tokens is malformed"),
        (lambda record: record.update(averaging="mean"), "averaging is malformed: mean"),
        (lambda record: record.update(model=3), "model is malformed"),
        (lambda record: record.update(answers_only=1), "answers_only is malformed"),
        (lambda record: record.pop("halves"), "has the fields"),
        (lambda record: record.update(sizes=[]), "sizes is malformed"),
        (lambda record: record["sizes"].pop("units"), "sizes has the fields"),
        (lambda record: record["sizes"].update(total=0), "sizes is malformed"),
        (lambda record: record["sizes"].update(unit_experts=[3]), "sizes is malformed"),
        (lambda record: record["sizes"].update(units=[-1, -1]), "sizes is malformed"),
    ],
)
def test_a_malformed_score_file_is_refused_with_its_fault(change, message, tmp_path, capsys):
    file = tmp_path / "scores.json"
    score_experts(tiny_model("olmoe"), [{"input_ids": random_tokens()}], progress=False).save(file)
    record = json.loads(file.read_text())
    change(record)
    file.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=rf"scores\.json.*{message}"):
        ExpertScores.load(file)
    assert main(["select", str(file), "--out", str(tmp_path / "config")]) == 1
    assert "scores.json" in capsys.readouterr().err
    assert not (tmp_path / "config").exists()


def test_packed_samples_are_told_apart_by_their_positions():
    model = tiny_model("olmoe")
    lengths = [5, 3, 7]
    rows = [random_tokens(1, length, seed=length) for length in lengths]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    packed = {"input_ids": torch.cat(rows, 1), "position_ids": positions}
    recorded = RecordedRouting(model)
    scores = score_experts(model, [packed], progress=False)
    assert (scores.num_tokens, scores.num_samples) == (15, 3)
    # What the packed row was routed like, cut into samples of a row each.
    for calls in recorded.calls.values():
        (index, gates) = calls.pop()
        ends = [sum(lengths[: number + 1]) for number in range(3)]
        for end, length in zip(ends, lengths, strict=True):
            calls.append((index[end - length : end], gates[end - length : end]))
    masks = [torch.ones(1, length) for length in lengths]
    for path, expected in recorded.scores(masks, 8).items():
        for metric in ("token", "gate"):
            values = torch.tensor(expected[metric, "sample"], dtype=torch.float64)
            torch.testing.assert_close(scores.by_metric(metric)[path], values)
    cut = score_experts(model, [packed], max_tokens=6, progress=False)
    assert (cut.num_tokens, cut.num_samples) == (6, 2)
    # Padding on the left has positions too, and is no sample.
    mask = torch.tensor([[0, 0, 1, 1]])
    padded = {"input_ids": random_tokens(1, 4), "attention_mask": mask, "position_ids": torch.tensor([[1, 1, 0, 1]])}
    assert score_experts(model, [padded], progress=False).num_samples == 1
    # A row that is the continuation of another is a sample of its own.
    rows = {"input_ids": random_tokens(2, 4), "position_ids": torch.arange(8).view(2, 4)}
    assert score_experts(model, [rows], progress=False).num_samples == 2


def test_answers_of_packed_samples_are_those_of_samples_in_rows():
    samples = [{"input_ids": [4, 5, 6, 7], "labels": [-100, -100, 6, 7]}, {"input_ids": [8, 9], "labels": [-100, 9]}]
    packed = DataCollatorWithFlattening()([*samples, {"input_ids": [3], "labels": [3]}])
    remaining = {"text": 100, "decoder": 100}
    stream = streams_of_batch(packed, remaining, 0, answers_only=True)["text"]
    # The collator puts -100 at the first token of each sample: the third has no answer, so it is no sample.
    assert stream.sample_of_token.tolist() == [-1, 0, 0, -1, 1, -1, -1]
    assert (stream.num_samples, stream.lengths.tolist()) == (2, [2, 1, 0])
    scores = score_experts(tiny_model("olmoe"), [packed], answers_only=True, progress=False)
    assert (scores.num_tokens, scores.num_samples) == (3, 2)


def test_encoder_and_decoder_count_their_own_tokens():
    model = zoo.build("switch_transformers")
    model.config.decoder_start_token_id = 0
    batch = {
        "input_ids": random_tokens(2, 6),
        "attention_mask": torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]]),
        "decoder_input_ids": random_tokens(2, 6, seed=1),
        "decoder_attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6]),
    }
    scores = score_experts(model, [batch], progress=False)
    assert (scores.num_tokens, scores.num_samples) == (9, 2)
    for path, container in scores.containers.items():
        expected = 9 if path.startswith("encoder") else 10
        assert container.num_tokens == sum(container.selected_pairs) == expected
        assert float(scores.token()[path].sum()) == pytest.approx(1)
    # Labels make the decoder's input, as in training, and say which of its tokens are answers.
    labels = random_tokens(2, 5, seed=2)
    labels[0, 3:] = -100
    both = {"input_ids": batch["input_ids"], "labels": labels}
    answers = score_experts(model, [both], answers_only=True, progress=False)
    counts = {path: c.num_tokens for path, c in answers.containers.items()}
    assert counts == {path: 12 if path.startswith("encoder") else 8 for path in counts}
    with pytest.raises(ValueError, match="needs decoder_input_ids"):
        score_experts(model, [{"input_ids": batch["input_ids"]}], progress=False)


def test_nllb_moe_is_scored_from_labels_alone_as_it_is_trained():
    """Its forward pass shifts the labels; there is no method that does."""
    model = zoo.build("nllb_moe")
    labels = random_tokens(2, 5, seed=2)
    labels[0, 3:] = -100
    batch, seen = {"input_ids": random_tokens(2, 6), "labels": labels}, []
    model.model.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    model(**batch)
    scores = score_experts(model, [batch], progress=False)
    assert torch.equal(*seen)
    counts = {path: container.num_tokens for path, container in scores.containers.items()}
    assert counts == {path: 8 if ".decoder." in path else 12 for path in counts}
    adapted = get_peft_model(model, ESFTConfig.from_scores(scores, top_p=0.1))
    assert score_experts(adapted, [batch], progress=False).token().keys() == counts.keys()
    assert torch.equal(seen[0], seen[2])


def test_a_batch_that_is_run_for_other_processes_is_made_whole_and_not_counted(monkeypatch):
    model = zoo.build("switch_transformers")
    model.config.decoder_start_token_id = 0
    batch = {"input_ids": random_tokens(2, 6), "labels": random_tokens(2, 5, seed=2)}
    expected = score_experts(model, [batch], progress=False)
    # As for the process whose data end first, which goes on with its last batch.
    monkeypatch.setattr(scoring, "batches_in_step", lambda *arguments: iter([(batch, True), (batch, False)]))
    scores = score_experts(model, [batch], progress=False)
    assert (scores.num_tokens, scores.num_samples) == (expected.num_tokens, expected.num_samples)
    for path, container in expected.containers.items():
        assert scores.containers[path].selected_pairs == container.selected_pairs


def test_images_count_patch_by_patch():
    model = zoo.build("vitpose_backbone")
    inputs = zoo.inputs_for(model, rows=3)
    scores = score_experts(model, [inputs], progress=False)
    assert scores.num_samples == 3
    for container in scores.containers.values():
        assert container.num_tokens == scores.num_tokens == sum(container.selected_pairs)
    cut = score_experts(model, [inputs, inputs], max_tokens=scores.num_tokens // 3 + 1, progress=False)
    assert (cut.num_tokens, cut.num_samples) == (scores.num_tokens // 3 + 1, 2)


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_offloaded_models_are_scored(offload, tmp_path):
    from accelerate import cpu_offload, disk_offload

    batches = [{"input_ids": random_tokens()}]
    expected = score_experts(tiny_model("olmoe"), batches, progress=False)
    model = tiny_model("olmoe")
    if offload == "cpu":
        cpu_offload(model, execution_device="cpu")
    else:
        disk_offload(model, tmp_path, execution_device="cpu")
    assert any(parameter.is_meta for parameter in model.parameters())
    scores = score_experts(model, batches, progress=False)
    assert scores.containers == expected.containers


def test_scores_are_refused_by_a_model_that_they_do_not_fit():
    model = tiny_model("olmoe")
    scores = score_experts(model, [{"input_ids": random_tokens()}], progress=False)
    scores.check_fits(model)
    other = tiny_model("deepseek_v2")
    with pytest.raises(ValueError, match=r"do not fit DeepseekV2ForCausalLM.*layers.0.mlp.experts': 8"):
        scores.check_fits(other)
    larger = tiny_model("olmoe")
    for layer in larger.model.layers:
        experts = layer.mlp.experts
        experts.num_experts = 16
        experts.gate_up_proj = torch.nn.Parameter(experts.gate_up_proj.repeat(2, 1, 1))
        experts.down_proj = torch.nn.Parameter(experts.down_proj.repeat(2, 1, 1))
    with pytest.raises(ValueError, match=r"were chosen among 8, but this model has 16"):
        get_peft_model(larger, ESFTConfig.from_scores(scores))


def test_gate_shares_select_the_same_for_any_scale_of_the_gates():
    model = tiny_model("deepseek_v2")
    scores = score_experts(model, [{"input_ids": random_tokens()}], progress=False)
    for row in scores.gate_share().values():
        assert float(row.sum()) == pytest.approx(1)
    selection = select_experts(scores, metric="gate_share", top_p=0.5)
    for layer in model.model.layers[1:]:
        layer.mlp.gate.routed_scaling_factor *= 3
    scaled = score_experts(model, [{"input_ids": random_tokens()}], progress=False)
    assert select_experts(scaled, metric="gate_share", top_p=0.5) == selection


def test_routing_weights_that_are_no_numbers_are_refused_by_name():
    """They would count as tokens without experts, and too many experts would be chosen."""
    model = tiny_model("olmoe")
    model.model.embed_tokens.weight.data[7] = math.nan
    batch = {"input_ids": torch.tensor([[3, 4, 5, 6], [3, 7, 5, 6]])}
    with pytest.raises(ValueError, match=r"2 of 2 experts modules are NaN.* model.layers.0.mlp.experts.*bf16 or fp32"):
        score_experts(model, [batch], progress=False)
    # What does not count may be anything.
    accumulator = RoutingAccumulator(3)
    gates = torch.tensor([[0.5, 0.5], [math.nan, math.inf], [1.0, 0.0]])
    stream = TokenStream(torch.tensor([0, -1, 0]), torch.tensor([2]), torch.tensor([0]))
    accumulator.update(Routing(torch.tensor([[0, 1], [0, 1], [2, 0]]), gates, 2), stream)
    assert accumulator.result().selected_pairs == [1, 1, 1] and accumulator.result().gate_weight_sum == [0.5, 0.5, 1.0]


@pytest.mark.parametrize(
    "rule",
    [
        {"top_p": np.float32(0.5)},
        {"top_k": np.int64(2), "min_experts": np.int32(2), "max_experts": np.int16(3)},
        {"budget": np.float64(0.5)},
    ],
    ids="+".join,
)
def test_numbers_of_numpy_are_kept_as_numbers_of_python(rule, tmp_path):
    scores = score_experts(tiny_model("olmoe"), [{"input_ids": random_tokens()}], progress=False)
    config = ESFTConfig.from_scores(scores, **rule)
    config.save_pretrained(tmp_path)
    assert ESFTConfig.from_pretrained(tmp_path).selection == config.selection
    assert {name: config.selection[name] for name in rule} == rule
