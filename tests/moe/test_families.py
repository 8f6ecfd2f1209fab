"""Every family of transformers: found, scored, trained as the dense model is, merged, saved and loaded."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_esft import ESFTConfig, ESFTLayer, find_experts, score_experts
from peft_esft.tuner.layers.tied import TiedLayer

import zoo
from oracle import task_loss
from recorded import RecordedRouting


EXPERTS = [5, 1, 2]
FAMILIES = sorted({*zoo.model_types(), *zoo.VARIANTS})
LEARNING_RATE = 0.1
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*computes the weights of all experts again"),
    # the rotary embedding of llama4
    pytest.mark.filterwarnings("ignore:Casting complex values to real"),
]


def select(model):
    return {path: [e for e in EXPERTS if e < c.num_experts] for path, c in find_experts(model).items()}


def run(model, inputs):
    return zoo.output_of(model(**inputs))


def wrap(base, **settings):
    return get_peft_model(base, ESFTConfig(target_experts=select(base), **settings))


class InputGradients:
    """The gradients of what a model's embeddings give, the only input of most families that can have one."""

    def __init__(self, model):
        self.outputs = []
        with contextlib.suppress(NotImplementedError):
            model.get_input_embeddings().register_forward_hook(self._keep)

    def _keep(self, module, arguments, output):
        if isinstance(output, torch.Tensor) and output.is_leaf:
            self.outputs.append(output.requires_grad_())

    def take(self):
        gradients = [output.grad for output in self.outputs]
        self.outputs = []
        return gradients


class MaskedTraining:
    """The oracle: a copy of the whole model of which only the selected experts' entries are trained, by masks.

    It shares nothing with the package but the positions of the entries, which the model's outputs check.
    """

    def __init__(self, base):
        self.model = copy.deepcopy(base).requires_grad_(False)
        self.inputs = InputGradients(self.model)
        self.masks = {}
        for path, container in find_experts(self.model).items():
            before = {id(p): p.detach().clone() for p in container.parameters()}
            for weight in container.weights:
                ids = select(self.model)[path]
                rows = weight.read(container.module, ids)
                weight.write(container.module, ids, torch.full_like(rows, torch.inf))
            for parameter in container.parameters():
                self.masks[parameter] = parameter.detach().isinf()
                parameter.data.copy_(before[id(parameter)])
                parameter.requires_grad_()

    def step(self, inputs):
        for parameter in self.masks:
            parameter.grad = None
        output = run(self.model, inputs)
        task_loss(output).backward()
        for parameter, mask in self.masks.items():
            if parameter.grad is not None:
                parameter.data -= LEARNING_RATE * parameter.grad * mask
        return output.detach()


@pytest.mark.parametrize("family", FAMILIES)
def test_training_equals_masked_training_of_the_whole_model(family):
    base = zoo.build(family)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    dense = MaskedTraining(base)
    model = wrap(base)
    own_inputs = InputGradients(base)
    deltas = [p for p in model.parameters() if p.requires_grad]
    for step in range(3):
        inputs = zoo.inputs_for(base, seed=step)
        own_inputs.take()  # making inputs may have called the embeddings
        expected = dense.step(inputs)
        for delta in deltas:
            delta.grad = None
        output = run(model, inputs)
        task_loss(output).backward()
        torch.testing.assert_close(output, expected, rtol=2e-3, atol=2e-4 * float(expected.abs().max()))
        for own, reference in zip(own_inputs.take(), dense.inputs.take(), strict=True):
            assert (own is None) == (reference is None)
            if own is not None:
                torch.testing.assert_close(own, reference, rtol=5e-3, atol=1e-3 * float(reference.abs().max()))
        with torch.no_grad():
            for delta in deltas:
                if delta.grad is not None:
                    delta.sub_(LEARNING_RATE * delta.grad)
    trained = [delta for delta in deltas if delta.any()]
    assert trained
    # Frozen means frozen; then merged, the whole model is the dense one.
    model.merge_adapter()
    inputs = zoo.inputs_for(base, seed=9)
    with torch.no_grad():
        merged = run(model, inputs)
        reference = run(dense.model, inputs)
    torch.testing.assert_close(merged, reference, rtol=2e-3, atol=2e-4 * float(reference.abs().max()))
    model.unmerge_adapter()
    after = model.unload().state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_are_saved_loaded_and_merged_into_ordinary_checkpoints(family, tmp_path):
    base = zoo.build(family)
    again = copy.deepcopy(base)
    inputs = zoo.inputs_for(base)
    with torch.no_grad():
        plain = run(base, inputs)
        model = wrap(base).eval()
        zero = run(model, inputs)
        torch.testing.assert_close(zero, plain, rtol=1e-4, atol=1e-5 * float(plain.abs().max()))
        for name, parameter in model.named_parameters():
            if ".esft_" in name:
                parameter.normal_(std=0.1)
        expected = run(model, inputs)
        assert not torch.allclose(expected, plain, rtol=1e-3, atol=1e-4 * float(plain.abs().max()))
        model.save_pretrained(tmp_path / "adapter")
        loaded = PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
        assert torch.equal(run(loaded, inputs), expected)
        merged = model.merge_and_unload()
        assert not any(isinstance(module, ESFTLayer | TiedLayer) for module in merged.modules())
        output = run(merged, inputs)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5 * float(plain.abs().max()))
        merged.save_pretrained(tmp_path / "merged")
        plain_class = type(merged)
        fresh = plain_class.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(run(fresh, inputs), output, rtol=1e-4, atol=1e-5 * float(plain.abs().max()))


class ExecutedPairs:
    """How often each expert runs, seen where it runs and not where the package looks."""

    def __init__(self, model):
        self.pairs = {}
        for path, container in find_experts(model).items():
            self.pairs[path] = [0] * container.num_experts
            for place in container.places:
                self._watch(path, container, place)

    def _watch(self, path, container, place):
        def add(values):
            self.pairs[path] = [a + b for a, b in zip(self.pairs[path], values, strict=True)]

        def count(index, weights=None):
            chosen = index if weights is None else index[weights > 0]
            return [int((chosen == expert).sum()) for expert in range(container.num_experts)]

        name = type(place.module).__name__
        if name == "JetMoeParallelExperts":
            place.module.register_forward_pre_hook(lambda module, args: add(args[1]))
        elif name == "Llama4TextExperts":
            # What an expert was not chosen for reaches it as zeros.
            place.module.register_forward_pre_hook(
                lambda module, args: add(
                    args[0].view(container.num_experts, -1, args[0].shape[-1]).any(-1).sum(1).tolist()
                )
            )
        elif name == "DogeCDMoE":
            place.module.down_embed.register_forward_pre_hook(lambda module, args: add(count(args[0])))
        elif name == "VitPoseNaiveMoe":
            place.module.register_forward_pre_hook(
                lambda module, args: add(count(args[1].expand(-1, args[0].shape[1], 1)))
            )
        elif container.kind == "listed":
            for number, expert in enumerate(container.weights[0].expert_modules(place.module)):
                row = [int(number == other) for other in range(container.num_experts)]
                expert.register_forward_pre_hook(
                    lambda module, args, row=row: add([n * args[0].shape[:-1].numel() for n in row])
                )
        else:
            place.module.register_forward_pre_hook(lambda module, args: add(count(args[1], args[2])))


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_count_what_is_executed(family):
    model = zoo.build(family)
    inputs = zoo.inputs_for(model)
    executed = ExecutedPairs(model)
    scores = score_experts(model, [inputs], progress=False)
    assert any(map(any, executed.pairs.values()))
    for path, pairs in executed.pairs.items():
        observed = scores.containers[path]
        if family == "nllb_moe":
            # Expert 0 runs on tokens that have no weight for it.
            assert observed.selected_pairs[1:] == pairs[1:]
            continue
        assert observed.selected_pairs == pairs
    for metric in ("token", "gate", "gate_share"):
        for path, row in scores.by_metric(metric).items():
            assert (row >= 0).all() and bool(row.any()) == any(executed.pairs[path])
            assert metric == "gate" or float(row.sum()) <= 1 + 1e-9


MASKED = [f for f in FAMILIES if zoo.family(f).group in "AB"]


@pytest.mark.parametrize("family", MASKED)
def test_scores_equal_a_record_of_every_token(family):
    model = zoo.build(family)
    inputs = zoo.inputs_for(model, rows=3)
    if "decoder_input_ids" in inputs:
        pytest.skip("its containers see two streams, see test_encoder_and_decoder_count_their_own_tokens")
    tokens = inputs.get("input_ids", inputs.get("talker_input_ids"))
    mask = torch.ones(tokens.shape, dtype=torch.long)
    mask[0, -4:] = 0
    recorded = RecordedRouting(model)
    runs = {
        averaging: score_experts(model, [{**inputs, "attention_mask": mask}], averaging=averaging, progress=False)
        for averaging in ("sample", "token")
    }
    assert runs["sample"].num_tokens == 32
    for path, container in find_experts(model).items():
        if not recorded.calls[path]:
            continue
        recorded.calls[path] = recorded.calls[path][:1]
        expected = recorded.scores([mask], container.num_experts, [path])[path]
        for (metric, averaging), values in expected.items():
            row = torch.tensor(values, dtype=torch.float64)
            torch.testing.assert_close(runs[averaging].by_metric(metric)[path], row, rtol=1e-5, atol=1e-9)
