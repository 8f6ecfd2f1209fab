"""Scoring and inference from several threads on one model: every answer is the one that it would be alone."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from peft import get_peft_model

from peft_esft import ESFTConfig, score_experts
from peft_esft.moe.containers import find_experts

from families import tiny_model
from listed import listed_model
from oracle import config_for, random_tokens


THREADS, CALLS = 4, 6
BUILDS = {"fused": lambda: tiny_model("olmoe"), "listed": listed_model}


@pytest.fixture(autouse=True)
def _frequent_switches():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def adapted(build):
    model = get_peft_model(build(), config_for(build(), init_weights=False), adapter_name="a").eval()
    model.add_adapter("b", ESFTConfig(target_experts={1: [2, 1]}, init_weights=False))
    return model


def in_threads(call):
    """`call(number)` of all threads, which begin together."""
    barrier = Barrier(THREADS)

    def begin(number):
        barrier.wait()
        return call(number)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(begin, range(THREADS)))


def tokens_of(thread, call):
    return random_tokens(2, 5 + (thread + call) % 4, seed=10 * thread + call)


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
@pytest.mark.parametrize("active", ["a", ["a", "b"]], ids=str)
def test_inference(active, build):
    model = adapted(build)
    model.base_model.set_adapter(active)

    def answers(thread):
        with torch.no_grad():
            return [model(input_ids=tokens_of(thread, call))[0] for call in range(CALLS)]

    found = in_threads(answers)
    for thread in range(THREADS):
        assert all(torch.equal(a, b) for a, b in zip(found[thread], answers(thread), strict=True))


def test_each_thread_has_adapters_of_its_own_in_its_batch():
    model = adapted(BUILDS["fused"])
    names = [["a", "b"], ["b", "__base__"], None, ["b", "a"]]

    def answers(thread):
        settings = {} if names[thread] is None else {"adapter_names": names[thread]}
        with torch.no_grad():
            return [model(input_ids=tokens_of(thread, call), **settings)[0] for call in range(5 * CALLS)]

    found = in_threads(answers)
    for thread in range(THREADS):
        # Which kernel computes a product depends on how many rows of adapters there are by then.
        torch.testing.assert_close(found[thread], answers(thread), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        other = model(input_ids=tokens_of(0, 0), adapter_names=["b", "a"])[0]
    assert (other - found[0][0]).abs().max() > 1e-2


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_scoring_counts_the_calls_of_its_own_thread_only(build):
    """Half of the threads score, each its own data; the others use the model meanwhile."""
    model = adapted(build)

    def work(thread):
        batches = [{"input_ids": tokens_of(thread, call)} for call in range(CALLS)]
        if thread % 2:
            with torch.no_grad():
                return [model(**batch)[0] for batch in batches]
        return score_experts(model, batches, progress=False)

    found = in_threads(work)
    for thread in range(THREADS):
        alone = work(thread)
        if thread % 2:
            assert all(torch.equal(a, b) for a, b in zip(found[thread], alone, strict=True))
        else:
            assert found[thread] == alone


def test_a_hook_called_without_keywords_in_another_thread_sees_nothing():
    """As PyTorch calls it while the thread that registered it removes it."""
    model = listed_model()
    container = next(iter(find_experts(model).values()))
    gate = container.places[0].watched(container.routing)
    seen = []
    handle = container.routing.watch(gate, seen.append)
    gate._forward_hooks_with_kwargs.clear()
    hidden_states = torch.randn(3, model.config.hidden_size)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(gate, hidden_states).result()
    handle.remove()
    assert not seen


def test_a_call_beside_one_with_adapter_names_uses_the_active_adapter_throughout():
    model = get_peft_model(
        tiny_model("olmoe"), ESFTConfig(target_experts={0: [1]}, modules_to_save=["lm_head"])
    ).eval()
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.neg_()
    tokens = tokens_of(0, 0)
    beside = []

    def call_beside(*_):
        handle.remove()
        with torch.no_grad(), ThreadPoolExecutor(1) as pool:
            beside.append(pool.submit(lambda: model(input_ids=tokens)[0]).result())

    with torch.no_grad():
        alone = model(input_ids=tokens)[0]
        handle = model.base_model.model.model.layers[0].register_forward_hook(call_beside)
        mixed = model(input_ids=tokens, adapter_names=["__base__", "__base__"])[0]
    assert torch.equal(beside[0], alone)
    assert not torch.equal(mixed, alone)


def test_gradients_of_several_threads_are_each_their_own():
    model = adapted(BUILDS["fused"])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def gradients(thread):
        loss = model(input_ids=tokens_of(thread, 0))[0].float().square().mean()
        return torch.autograd.grad(loss, trained)

    found = in_threads(gradients)
    for thread in range(THREADS):
        assert all(torch.equal(a, b) for a, b in zip(found[thread], gradients(thread), strict=True))
