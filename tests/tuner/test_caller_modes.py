"""Tests that operations do the same in every mode of torch that the caller may be in."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model

from peft_esft import AdapterPool, ESFTConfig, hotswap_adapter
from peft_esft.tuner.layers.listed import ListedExperts

from families import tiny_model
from listed import listed_model
from oracle import random_tokens, task_loss


TOKENS = random_tokens(2, 6)
FAMILIES = {"olmoe": lambda: tiny_model("olmoe"), "gpt_oss": lambda: tiny_model("gpt_oss"), "listed": listed_model}
MODES: dict[str, Callable[[], AbstractContextManager]] = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "functorch_off": lambda: torch.autograd.set_multithreading_enabled(False),
}


def config(rank: int | None, *experts: int) -> ESFTConfig:
    return ESFTConfig(target_experts={1: list(experts)}, init_weights=False, rank=rank)


def build(family: str, rank: int | None) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(FAMILIES[family](), config(rank, 1, 5), adapter_name="a")
    model.add_adapter("b", config(rank, 5, 2, 6))
    model.set_adapter("a")
    return model


def freeze(model, folder):
    model.base_model.freeze_adapter("b")
    model.base_model.freeze_adapter("a")


def merge_for_a_while(model, folder):
    model.merge_adapter(["a", "b"])
    model(input_ids=TOKENS)
    model.unmerge_adapter()


def hold(model, folder):
    with model.base_model.hold():
        model(input_ids=TOKENS)


def mix(model, folder):
    model.eval()
    if any(isinstance(module, ListedExperts) for module in model.modules()):
        return
    model(input_ids=TOKENS, adapter_names=["b", "a"])


def use_pool(model, folder):
    if any(isinstance(module, ListedExperts) for module in model.modules()):
        return
    pool = AdapterPool(model, 10**7)
    pool.add("pooled", folder / "b")
    with pool.using("pooled"):
        model(input_ids=TOKENS)
    model.set_adapter("a")
    pool.close()


OPERATIONS: dict[str, Callable] = {
    "forward": lambda model, folder: model(input_ids=TOKENS),
    "switch": lambda model, folder: model.set_adapter("b"),
    "add": lambda model, folder: model.add_adapter("added", config(None, 4, 0)),
    "load": lambda model, folder: model.load_adapter(str(folder / "b"), "loaded", is_trainable=True),
    "reload": lambda model, folder: model.load_adapter(str(folder / "a"), "a", is_trainable=True),
    "hotswap": lambda model, folder: hotswap_adapter(model, folder / "b", "a"),
    "freeze": freeze,
    "scale": lambda model, folder: model.base_model.set_scale("a", 0.5),
    "combine": lambda model, folder: model.base_model.add_weighted_adapter(["a", "b"], [0.5, -1.0], "combined"),
    "merge_for_a_while": merge_for_a_while,
    "merge": lambda model, folder: model.merge_adapter(["b"]),
    "disable": lambda model, folder: model.base_model.disable_adapter_layers(),
    "delete": lambda model, folder: model.delete_adapter("b"),
    "to": lambda model, folder: model.to(torch.bfloat16).to(torch.float32),
    "load_state_dict": lambda model, folder: model.load_state_dict(model.state_dict()),
    "hold": hold,
    "mix": mix,
    "use_pool": use_pool,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}
    for family in FAMILIES:
        for rank in (None, 2):
            found[family, rank] = tmp_path_factory.mktemp(f"{family}-{rank}")
            build(family, rank).save_pretrained(found[family, rank])
    return found


def after(family, rank, folder, operations, mode) -> tuple[PeftModel, dict[str, torch.Tensor], list[str]]:
    """The model after some operations in a mode and then a training step, its state, and what was refused."""
    model, refusals = build(family, rank), []
    torch.manual_seed(1)
    with ExitStack() as stack:
        stack.enter_context(MODES[mode]())
        for name in operations:
            try:
                OPERATIONS[name](model, folder)
            except ValueError as error:  # as for an adapter that another operation has deleted
                refusals.append(str(error))
    model.base_model.enable_adapter_layers()
    model.unmerge_adapter()
    trained = [p for p in model.parameters() if p.requires_grad]
    loss = task_loss(model.train()(input_ids=TOKENS)[0])
    if trained:
        loss.backward()
        torch.optim.SGD(trained, lr=0.1).step()
    model.eval()
    found = {"loss": loss.detach(), **{name: value.clone() for name, value in model.state_dict().items()}}
    with torch.no_grad():
        found["logits"] = model(input_ids=TOKENS)[0]
    return model, found, refusals


def check(folders, family, rank, operations, mode):
    folder = folders[family, rank]
    if "to" in operations and mode == "inference_mode":
        return  # torch itself then gives the base inference tensors, which no training takes
    _, expected, expected_refusals = after(family, rank, folder, operations, "enable_grad")
    model, found, refusals = after(family, rank, folder, operations, mode)
    assert refusals == expected_refusals
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert not any(tensor.is_inference() for tensor in [*model.parameters(), *model.buffers()])


CASES = st.sampled_from([*FAMILIES]), st.sampled_from([None, 2])
SEQUENCES = st.lists(st.sampled_from([*OPERATIONS]), min_size=1, max_size=3, unique=True)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("mode", ["inference_mode", "autocast"])
@pytest.mark.filterwarnings("ignore")
def test_an_operation_does_not_keep_the_caller_s_mode(folders, operation, mode):
    check(folders, "olmoe", 2, [operation], mode)


@pytest.mark.slow
@given(*CASES, SEQUENCES, st.sampled_from([*MODES]))
@settings(max_examples=150)
@pytest.mark.filterwarnings("ignore")
def test_operations_do_not_keep_the_caller_s_mode(folders, family, rank, operations, mode):
    check(folders, family, rank, operations, mode)
