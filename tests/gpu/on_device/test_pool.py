"""How adapters of a pool come to the device."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from peft_esft import AdapterPool

from families import tiny_model
from oracle import config_for, random_tokens
from simulated_device import SimulatedDevice, on_host
from steps import DEVICE, adapted, run


@pytest.mark.parametrize("settings", [{}, {"rank": 2}, {"storage": "rows"}], ids=str)
def test_files_are_copied_from_page_locked_memory_on_another_stream(tmp_path, monkeypatch, settings):
    base = tiny_model("olmoe", torch.bfloat16)
    storage = settings.pop("storage", None)
    host = get_peft_model(base, config_for(base, [0, 2], init_weights=False, **settings)).eval()
    if storage:
        host.base_model.freeze_adapter("default")
    host.save_pretrained(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with SimulatedDevice() as device:
        model = adapted()
        pool = AdapterPool(model, device_bytes=2**20)
        pool.add("pooled", tmp_path)
        device.reset()
        pool.get("pooled")
        from_file = [copy for copy in device.copies if copy[0]]
        assert len(from_file) == len(pool._host["pooled"].result().weights)
        assert all(stream != 0 for _, stream in from_file)
        # What is used on another stream than it was made on keeps its memory until that one has read it.
        assert len(device.recorded) == len(from_file)
        assert {stream.stream_id for stream in device.recorded} == {0}
        assert not any(what == "copy from the host" for what, _ in device.waits_of_package())
        size = (2, 12)
        own = run(model, size, adapter_names=["pooled", "__base__"])
        with torch.no_grad():
            expected = host(input_ids=random_tokens(*size))[0]
        torch.testing.assert_close(on_host(own)[0].float(), expected[0].float(), rtol=0.05, atol=0.05)
        pool.close()
    assert str(own.device) == DEVICE
