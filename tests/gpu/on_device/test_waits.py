"""How often the host waits for the device, and for what."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from peft_esft import find_experts, score_experts
from peft_esft.ops import grouped_mm

from families import tiny_model
from oracle import config_for, random_tokens
from simulated_device import ADA, AMPERE, BLACKWELL_RTX, HOPPER, TURING, SimulatedDevice
from steps import DEVICE, FEW, LAYERS, MANY, adapted, run, train, waits_in
from zoo import build, inputs_for


CARDS = [TURING, AMPERE, ADA, HOPPER, BLACKWELL_RTX]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def plain_waits(device, dtype, size, is_trained):
    """Those of the model itself, as whichever implementation of its experts waits least, for each layer."""
    waits = []
    # What copies the matrices of all pairs is for few rows.
    for implementation in ("grouped_mm", "batched_mm") if size == FEW else ("grouped_mm",):
        model = tiny_model("olmoe", dtype, implementation).to(DEVICE).train(is_trained)
        call = train if is_trained else run
        waits.append(waits_in(device, lambda call=call, model=model: call(model, size))[0])
    return min(waits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("card", CARDS)
def test_waits_of_a_layer(card, dtype):
    """Decoding never waits. A step of many rows waits once a layer; without a kernel the model itself does more."""
    has_kernel = card == HOPPER and dtype == torch.bfloat16
    with SimulatedDevice(card) as device:
        model = adapted("olmoe", dtype, others=["other"])
        names = ["default", "other"]
        for size in (FEW, MANY):
            plain = plain_waits(device, dtype, size, False)
            mixed = names * (size[0] // 2)
            for kwargs in ({}, {"adapter_names": mixed}):
                everything, own = waits_in(device, lambda size=size, kwargs=kwargs: run(model, size, **kwargs))
                assert own <= (0 if size == FEW else 1), device.waits
                assert everything <= plain + (has_kernel and size == MANY), device.waits
            plain = plain_waits(device, dtype, size, True)
            trained = adapted("olmoe", dtype, is_trained=True)
            everything, own = waits_in(device, lambda size=size, trained=trained: train(trained, size))
            assert own <= (0 if has_kernel and size == FEW else 1), device.waits
            assert size == FEW or everything <= plain + has_kernel, device.waits


@pytest.mark.parametrize("settings", [{"rank": 2}, {"scale": 0.5}, {"others": ["other"]}], ids=str)
@pytest.mark.parametrize("card", [HOPPER, AMPERE])
def test_no_form_of_an_adapter_waits_more_often(card, settings):
    scale, settings = settings.get("scale"), {key: value for key, value in settings.items() if key != "scale"}
    with SimulatedDevice(card) as device:
        model = adapted(is_trained=True, **settings)
        if scale:
            model.base_model.set_scale("default", scale)
        if "others" in settings:
            model.base_model.set_adapter(["default", "other"])
        assert waits_in(device, lambda: train(model, MANY))[1] == 1


@pytest.mark.parametrize("card", [HOPPER, AMPERE])
def test_mixed_batches_of_held_rows_wait_no_more_often(card):
    with SimulatedDevice(card) as device:
        model = adapted(others=["other"])
        for name in ("default", "other"):
            model.base_model.freeze_adapter(name)
        for size, limit in ((FEW, 0), (MANY, 1)):
            names = ["other", "__base__"] * (size[0] // 2)
            assert waits_in(device, lambda size=size, names=names: run(model, size, adapter_names=names))[1] == limit


def test_switching_and_merging_do_not_wait():
    counts = []
    for experts in ([1, 2], [0, 1, 2, 3, 4, 5]):
        with SimulatedDevice() as device:
            base = tiny_model("olmoe", torch.bfloat16).to(DEVICE)
            model = get_peft_model(base, config_for(base, experts, init_weights=False, inference_mode=True))
            model.add_adapter("other", config_for(base, [3], init_weights=False, inference_mode=True))

            def switch(model=model):
                for name in ("other", "default"):
                    model.base_model.set_adapter(name, inference_mode=True)

            def merge(model=model, **kwargs):
                model.base_model.merge_adapter(["default"], **kwargs)
                model.unmerge_adapter()

            assert waits_in(device, switch)[0] == 0
            assert not device.operators
            assert waits_in(device, merge)[0] == 0
            counts.append(sum(device.operators.values()))
            assert device.operators["index_copy_"] == 2 * LAYERS * 2  # each weight of each layer, there and back
            assert waits_in(device, lambda merge=merge: merge(safe_merge=True))[0] <= 2
    assert counts[0] == counts[1]  # nothing is done expert by expert


@pytest.mark.parametrize("model_type", ["llama4", "dbrx", "jetmoe", "doge"])
@pytest.mark.filterwarnings("ignore:.*each training step computes the weights of all:UserWarning")
def test_experts_behind_a_forward_of_their_own_copy_nothing_from_the_host(model_type):
    host = build(model_type)
    inputs = inputs_for(host)
    with SimulatedDevice() as device, torch.no_grad():
        base = host.to(DEVICE)
        moved = {key: value.to(DEVICE) for key, value in inputs.items()}
        model = get_peft_model(base, config_for(base, [0, 1], init_weights=False, inference_mode=True))
        for _ in range(2):
            device.reset()
            model.get_base_model()(**moved)
        assert device.operators and not device.waits_of_package()


def test_kernels_get_no_more_groups_than_they_take(monkeypatch):
    """All adapters that are held lie in one tensor, of which each row is a group: past the limit the loop serves."""
    monkeypatch.setattr(grouped_mm, "_KERNEL_GROUPS", 10)
    with SimulatedDevice() as device:
        model = adapted(others=["second", "third", "fourth"])
        for name in list(model.peft_config):
            model.base_model.freeze_adapter(name)
        names = ["default", "second"] * (MANY[0] // 2)
        own = run(model, MANY, adapter_names=names)
        assert own.isfinite().all() and max(device.groups, default=0) <= 10
        device.reset()
        run(model, MANY)
        assert device.groups  # the few rows of one adapter go by the kernel


def test_a_kernel_is_believed_only_where_nothing_waits():
    for card in CARDS:
        for dtype in (*DTYPES, torch.float64):
            with SimulatedDevice(card) as device:
                has_kernel = grouped_mm.has_fast_kernel(torch.device(DEVICE), dtype)
                assert has_kernel == (card == HOPPER and dtype == torch.bfloat16)
                device.reset()
                assert grouped_mm.has_fast_kernel(torch.device(DEVICE), dtype) == has_kernel
                assert not device.operators  # asked once
    assert not grouped_mm.has_fast_kernel(torch.device("meta"), torch.bfloat16)


@pytest.mark.parametrize("has_float64", [True, False])
def test_scoring_waits_no_more_often_with_more_layers_and_needs_no_float64(has_float64):
    model = tiny_model("olmoe")
    batches = [{"input_ids": random_tokens(2, 12, seed)} for seed in range(4)]
    expected = score_experts(model, batches, progress=False)
    with SimulatedDevice(has_float64=has_float64) as device:
        moved = tiny_model("olmoe").to(DEVICE)
        waits = []
        for number in (2, 4):
            device.reset()
            found = score_experts(moved, batches[:number], progress=False)
            waits.append(sum(count for (what, _), count in device.waits_of_package().items()))
    assert waits[1] - waits[0] <= 2 * 5  # masks, lengths and inputs of each batch, whatever the number of layers
    assert list(found.containers) == list(find_experts(model))
    for path, own in found.containers.items():
        other = expected.containers[path]
        assert own.selected_pairs == other.selected_pairs
        for name in ("gate_weight_sum", "token_share_sum", "gate_share_sum"):
            torch.testing.assert_close(torch.tensor(getattr(own, name)), torch.tensor(getattr(other, name)))
