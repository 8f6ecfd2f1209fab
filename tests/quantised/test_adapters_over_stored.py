"""Adapters over experts in few bits: every operation equals the one over a dense base that holds the same numbers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from torch.overrides import TorchFunctionMode

from peft_esft import ESFTConfig, find_experts, quantize_experts
from peft_esft.moe.quantised_formats import ENCODERS
from peft_esft.moe.stored_rows import KEPT, StoredRows

from families import tiny_model
from oracle import config_for, deltas_of, random_tokens, task_loss
from stored_bases import dense, dense_twin, quantised, same_bits


KINDS = [(4, "nf4"), (4, "fp4"), (4, "nf4 double"), (8, "nf4")]


def bases(family: str, bits: int, form: str = "nf4", dtype: torch.dtype = torch.bfloat16, **settings: object):
    plain = tiny_model(family, dtype)
    own = quantised(copy.deepcopy(plain), bits, form, **settings)
    return own, dense_twin(plain, own)


def adapted(model: torch.nn.Module, **settings: object) -> PeftModel:
    torch.manual_seed(1)
    wrapped = get_peft_model(model, config_for(model, init_weights=False, **settings))
    wrapped.add_adapter("other", config_for(model, [6, 2], init_weights=False, **settings))
    return wrapped.eval()


@torch.no_grad()
def logits(model: torch.nn.Module, **settings: object) -> Tensor:
    return model(input_ids=random_tokens(), **settings)[0]


@pytest.mark.parametrize(("bits", "form"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_operations_equal_those_over_the_dense_base(bits: int, form: str, dtype: torch.dtype) -> None:
    own, twin = map(adapted, bases("gpt_oss", bits, form, dtype))

    def compare(**settings: object) -> None:
        # In fp32 the last bit of a product depends on where its operands lie in memory.
        if dtype == torch.float32:
            torch.testing.assert_close(logits(own, **settings), logits(twin, **settings), rtol=1e-4, atol=1e-5)
        else:
            assert same_bits(logits(own, **settings), logits(twin, **settings))

    compare()
    compare(adapter_names=["default", "other"])
    compare(adapter_names=["__base__", "other"])
    for model in (own, twin):
        model.base_model.set_adapter(["default", "other"])
    compare()
    for model in (own, twin):
        model.add_weighted_adapter(["default", "other"], [0.5, 0.7], "sum")
        model.set_adapter("sum")
    compare()
    with own.base_model.hold(), twin.base_model.hold():
        compare()
    for model in (own, twin):
        model.merge_adapter(["default", "sum"])
    compare()
    own.unmerge_adapter()
    twin.unmerge_adapter()
    own, twin = own.merge_and_unload(), twin.merge_and_unload()
    compare()


@pytest.mark.parametrize("settings", [{}, {"rank": 3}], ids=["deltas", "low rank"])
def test_steps_of_adamw_and_files_equal_those_over_the_dense_base(settings: dict[str, int], tmp_path: Path) -> None:
    own, twin = (adapted(model, **settings).train() for model in bases("olmoe", 4))
    for name, model in {"own": own, "twin": twin}.items():
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for step in range(4):
            task_loss(model(input_ids=random_tokens(seed=step))[0]).backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(tmp_path / name)
    for key, delta in deltas_of(own).items() if not settings else ():
        assert same_bits(delta, deltas_of(twin)[key])
    assert same_bits(logits(own), logits(twin))
    file = "adapter_model.safetensors"
    assert (tmp_path / "own" / file).read_bytes() == (tmp_path / "twin" / file).read_bytes()


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_bit(reentrant: bool) -> None:
    gradients = []
    for is_checkpointed in (False, True):
        model = adapted(bases("olmoe", 4)[0]).train()
        if is_checkpointed:
            model.enable_input_require_grads()
            base = model.get_base_model()
            enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
            enable({"use_reentrant": reentrant})
        task_loss(model(input_ids=random_tokens())[0]).backward()
        gradients.append({key: delta.grad for key, delta in deltas_of(model).items()})
    for key, gradient in gradients[0].items():
        assert gradient.any() and same_bits(gradient, gradients[1][key])


def test_nothing_dequantised_is_kept_for_the_backward_pass() -> None:
    model = adapted(bases("olmoe", 4)[0]).train()
    shapes = {weight.shape(c.module) for c in find_experts(model).values() for weight in c.weights}
    saved: list[torch.Size] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = task_loss(model(input_ids=random_tokens())[0])
    loss.backward()
    trained = {(3, *shape) for shape in shapes}
    assert trained <= set(map(tuple, saved))  # the deltas
    assert not {shape for shape in map(tuple, saved) if shape[-2:] in shapes and shape not in trained}


def test_kept_experts_are_the_base_s_own_and_the_others_are_not() -> None:
    plain = tiny_model("olmoe", torch.bfloat16)
    quantised = quantize_experts(copy.deepcopy(plain), keep={0: [5, 1]})
    for (path, container), own in zip(find_experts(plain).items(), find_experts(quantised).values(), strict=True):
        for weight in container.weights:
            before, after = weight.whole(container.module), dense(own, weight.name)
            kept = [e for e in range(8) if same_bits(before[e], after[e])]
            assert kept == ([1, 5] if "layers.0." in path else [])


def test_parameters_are_frozen_and_take_the_bytes_that_are_promised() -> None:
    plain = tiny_model("olmoe", torch.bfloat16)
    before = sum(p.nbytes for c in find_experts(plain).values() for p in c.parameters())
    # An expert has 2,304 weights in 80 rows.
    for bits, share in ((4, 0.28125), (8, (2304 + 4 * 80) / 4608)):
        quantised = quantize_experts(copy.deepcopy(plain), bits=bits)
        after = sum(p.nbytes for c in find_experts(quantised).values() for p in c.parameters())
        assert after / before == pytest.approx(share, abs=0.011)
        assert not any(p.requires_grad for c in find_experts(quantised).values() for p in c.parameters())


class _NoMemoryOnce(TorchFunctionMode):
    """The first tensor of ids that is made on a device does not fit."""

    raised = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.tensor and "device" in (kwargs or {}) and not self.raised:
            self.raised = True
            raise torch.OutOfMemoryError("no memory")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("keeps", [True, False])
def test_a_merge_that_runs_out_of_memory_leaves_the_model_as_it_was(keeps: bool) -> None:
    (model, _) = _pair(4, keeps)
    before, state = logits(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(torch.OutOfMemoryError), _NoMemoryOnce():
        model.merge_adapter()
    assert same_bits(logits(model), before) and model.state_dict().keys() == state.keys()
    assert all(same_bits(tensor, state[name]) for name, tensor in model.state_dict().items())


NF4 = [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0]
NF4 += [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]


@pytest.mark.parametrize("shape", [(48, 32), (24, 40), (64, 128), (5, 7)], ids=str)
def test_nf4_is_the_nearest_of_its_sixteen_values_for_rows_of_any_length(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    rows = torch.randn(3, *shape)
    store = StoredRows.encoded(ENCODERS["nf4"], rows)()
    for expert in range(3):
        blocks = torch.nn.functional.pad(rows[expert].flatten(), (0, -rows[0].numel() % 64)).view(-1, 64)
        scales = blocks.abs().amax(1, keepdim=True)
        nearest = (blocks[:, :, None] / scales[:, :, None] - torch.tensor(NF4)).abs().argmin(-1)
        expected = (torch.tensor(NF4)[nearest] * scales).flatten()[: rows[0].numel()].view(shape)
        assert (store[expert] - expected).abs().max() <= 1e-5  # no other value is so near


def test_a_change_of_dtype_leaves_codes_and_scales_alone() -> None:
    model, _ = bases("olmoe", 4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "stored_" in name}
    model.to(torch.float16)
    state = model.state_dict()
    assert before and all(same_bits(state[name], tensor) for name, tensor in before.items())
    assert logits(model).dtype == torch.float16


MERGES = st.lists(st.sampled_from(["default", "other", "both", "unmerge", "disable"]), max_size=6)


@settings(max_examples=10, deadline=None)
@given(steps=MERGES, bits=st.sampled_from([4, 8]), keeps=st.booleans())
def test_any_sequence_of_merges_leaves_the_base_as_it_was(steps: list[str], bits: int, keeps: bool) -> None:
    base, _ = bases("olmoe", bits, keep={0: [5], 1: [6, 0]} if keeps else None)
    own = adapted(base)
    with own.disable_adapter():
        before = logits(own)
    state = {name: tensor.clone() for name, tensor in base.state_dict().items() if "stored_" in name}
    unmerged = {}
    for names in (["default"], ["other"], ["default", "other"]):
        own.base_model.set_adapter(names)
        unmerged[tuple(names)] = logits(own)
    merged: list[str] = []
    for step in steps:
        if step == "unmerge" and merged:
            own.unmerge_adapter()
            merged = []
        elif step == "disable":
            with own.disable_adapter():
                assert same_bits(logits(own), before)
            merged = []
        elif step != "unmerge":
            wanted = ["default", "other"] if step == "both" else [step]
            new = [name for name in wanted if name not in merged]
            if new:
                own.merge_adapter(new)
                merged += new
            assert same_bits(logits(own), unmerged[tuple(sorted(merged))])
    if merged:
        own.unmerge_adapter()
    now = {name: tensor for name, tensor in base.state_dict().items() if "stored_" in name}
    assert now.keys() == state.keys() and all(same_bits(now[name], state[name]) for name in now)


def test_one_file_loads_on_both_bases_without_a_warning(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    plain = tiny_model("olmoe", torch.bfloat16)
    quantised = quantize_experts(copy.deepcopy(plain))
    get_peft_model(copy.deepcopy(quantised), config_for(quantised, init_weights=False)).save_pretrained(tmp_path)
    fingerprints = ESFTConfig.from_pretrained(tmp_path).base_fingerprint["rows"]
    assert all(value.startswith("nf4:") for value in fingerprints.values())
    recwarn.clear()
    over_plain = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    over_quantised = PeftModel.from_pretrained(quantised, tmp_path)
    assert not [w for w in recwarn if "base with other weights" in str(w.message)]
    assert not torch.equal(logits(over_plain), logits(over_quantised))
    other = quantize_experts(tiny_model("olmoe", torch.bfloat16), bits=4)
    with torch.no_grad():
        other.model.layers[0].mlp.experts.stored_in.scales.mul_(2)
    with pytest.warns(UserWarning, match="base with other weights"):
        PeftModel.from_pretrained(other, tmp_path)


def test_kept_target_experts_have_the_fingerprint_of_the_plain_base() -> None:
    plain = tiny_model("olmoe", torch.bfloat16)
    quantised = quantize_experts(copy.deepcopy(plain), keep=config_for(plain).target_experts)
    records = [get_peft_model(m, config_for(m)).peft_config["default"].base_fingerprint for m in (plain, quantised)]
    assert records[0] == records[1]


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_state_dict_fits_the_model_that_it_is_of(bits, assign):
    first, second = (quantize_experts(tiny_model("olmoe"), bits=bits) for _ in range(2))
    with torch.no_grad():
        for parameter in second.parameters():
            if parameter.is_floating_point():
                parameter.zero_()
    state = first.state_dict()
    assert second.load_state_dict(state, assign=assign).missing_keys == []
    assert all(same_bits(tensor, state[name]) for name, tensor in second.state_dict().items())
    tokens = random_tokens()
    assert torch.equal(second(input_ids=tokens)[0], first(input_ids=tokens)[0])


PLACES = ["default", "other", "both", "none"]
"""What is merged when a state dict is taken, and when it is loaded: three, two, four experts or none."""


def _merge(models: list[PeftModel], which: str) -> None:
    for model in models:
        if which != "none":
            model.merge_adapter(["default", "other"] if which == "both" else [which])


def _pair(bits: int, keeps: bool) -> list[PeftModel]:
    """Adapters over experts in few bits, and over the dense twin."""
    return [adapted(base) for base in bases("olmoe", bits, keep={0: [5, 2], 1: [5, 2]} if keeps else None)]


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([4, 8]), st.booleans(), st.sampled_from(PLACES), st.sampled_from(PLACES), st.booleans())
def test_a_state_dict_brings_back_what_was_merged(bits: int, keeps: bool, taken: str, now: str, assign: bool) -> None:
    models = _pair(bits, keeps)
    _merge(models, taken)
    states = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in models]
    for model in models:
        if taken != "none":
            model.unmerge_adapter()
    _merge(models, now)
    for model, state in zip(models, states, strict=True):
        model.load_state_dict(state, assign=assign)
    with torch.no_grad():
        own, twin = (model(input_ids=random_tokens())[0] for model in models)
    assert same_bits(own, twin)


def test_a_state_dict_of_experts_that_there_are_not_is_refused() -> None:
    (model, _) = _pair(4, keeps=True)
    state = model.state_dict()
    name = next(name for name in state if name.endswith("kept_experts"))
    for ids in ([2, 99], [5, 2], [2, 2]):
        with pytest.raises(ValueError, match="expected ids of 8 experts, ascending"):
            model.load_state_dict({**state, name: torch.tensor(ids)})


def _changed(state: dict[str, Tensor], name: str, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """A state dict with other tensors of a name."""
    return {key: change(tensor) if key.endswith(f".{name}") else tensor for key, tensor in state.items()}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(
    ("form", "name", "change", "message"),
    [
        ((4, "nf4"), "scales", Tensor.bfloat16, r"stored_in.scales has dtype torch.bfloat16 in the state dict"),
        ((4, "nf4"), "codes", Tensor.float, r"stored_in.codes has dtype torch.float32 in the state dict"),
        ((8, "nf4"), "codes", Tensor.short, r"stored_in.codes has dtype torch.int16 in the state dict"),
    ],
    ids=["scales", "codes of 4 bits", "codes of 8 bits"],
)
def test_a_state_dict_that_was_cast_is_refused(
    form: tuple[int, str], name: str, change: Callable[[Tensor], Tensor], message: str, assign: bool
) -> None:
    (model, _) = bases("olmoe", *form)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        model.load_state_dict(_changed(state, name, change), assign=assign)


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_of_8_bits_with_the_scales_of_old_files_is_loaded(assign: bool) -> None:
    (model, _), (other, _) = bases("olmoe", 8), bases("olmoe", 8)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(_changed(state, "scales", Tensor.bfloat16), assign=assign)
    assert all(same_bits(tensor, state[key]) for key, tensor in other.state_dict().items())
    assert same_bits(logits(other), logits(model))


def test_a_state_dict_of_another_form_is_refused() -> None:
    (nf4, _), (fp4, _) = bases("olmoe", 4, "nf4"), bases("olmoe", 4, "fp4")
    with pytest.raises(ValueError, match=r"stored_in of the state dict is in nf4, and this model's is in fp4"):
        fp4.load_state_dict(nf4.state_dict())


def test_a_part_of_a_state_dict_never_gives_rows_to_other_experts() -> None:
    (model, _), (other, _) = (bases("olmoe", 4, keep={0: [expert]}) for expert in (5, 3))
    state = model.state_dict()
    for name in KEPT:
        part = {key: tensor for key, tensor in state.items() if not key.endswith(f".{name}")}
        with pytest.raises(ValueError, match="has only one of"):
            other.load_state_dict(part, strict=False)
    other.load_state_dict({key: tensor for key, tensor in state.items() if ".kept_" in key}, strict=False)
    (stored, own) = (m.model.layers[0].mlp.experts.stored_in for m in (other, model))
    assert stored.kept_ids == tuple(stored.kept_experts.tolist()) == (5,)
    assert same_bits(stored()[5], own()[5])


def test_the_mean_of_a_model_that_the_documentation_shows_leaves_the_experts_alone() -> None:
    (model, _) = _pair(4, keeps=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    mean = AveragedModel(model, avg_fn=lambda old, new, number: old.lerp(new, 1e-4) if new.requires_grad else new)
    for _ in range(2):
        mean.update_parameters(model)
        with torch.no_grad():
            for delta in deltas_of(model).values():
                delta.add_(1)
    for name, tensor in mean.module.state_dict().items():
        assert same_bits(tensor, before[name]) == (".default" not in name)


def test_a_functional_call_reads_the_tensors_that_it_is_given() -> None:
    (model, _), (other, _) = _pair(8, keeps=True), _pair(8, keeps=True)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name.endswith((".scales", ".kept_rows")):
                parameter.mul_(2)
        given = {name: parameter.detach() for name, parameter in other.named_parameters()}
        output = torch.func.functional_call(model, given, kwargs={"input_ids": random_tokens()})[0]
    assert same_bits(output, logits(other)) and not same_bits(output, logits(model))


@pytest.mark.parametrize("bits", [4, 8])
def test_pickles_and_copies_equal_the_model(bits: int) -> None:
    (model, _) = _pair(bits, keeps=True)
    model.merge_adapter()
    copies = [pickle.loads(pickle.dumps(model)), copy.deepcopy(model)]
    for merged in (True, False):
        with torch.no_grad():
            expected, *others = (each(input_ids=random_tokens())[0] for each in (model, *copies))
        assert all(same_bits(output, expected) for output in others)
        if merged:
            for each in (model, *copies):
                each.unmerge_adapter()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("bits", "keeps"), [(4, True), (4, False), (8, True)])
def test_unmerging_in_another_dtype_leaves_the_codes_alone(bits: int, keeps: bool, dtype: torch.dtype) -> None:
    (model, _), (twin, _) = _pair(bits, keeps), _pair(bits, keeps)
    model.merge_adapter(["default", "other"])
    for each in (model, twin):
        each.to(dtype)
    model.unmerge_adapter()
    state = {name: tensor for name, tensor in twin.state_dict().items() if "stored_" in name}
    own = {name: tensor for name, tensor in model.state_dict().items() if "stored_" in name}
    assert own.keys() == state.keys()
    assert all(same_bits(own[name], tensor) for name, tensor in state.items())
