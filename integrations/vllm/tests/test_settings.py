"""The setting `esft`, what an engine must not do beside it, and the check of vLLM's version."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import vllm
from peft_esft_vllm import internals, plugin
from peft_esft_vllm.manager import ESFTManager
from peft_esft_vllm.settings import settings_of


GOLDEN = Path(__file__).parent / "golden"


def settings(esft: object):
    return settings_of(SimpleNamespace(additional_config={"esft": esft}))


def test_widths_are_the_largest_of_the_layer():
    assert settings_of(SimpleNamespace(additional_config={})) is None
    assert settings({"experts": 8}).width("model.layers.7.mlp.experts") == 8
    own = settings({"adapters": [str(GOLDEN / "delta"), str(GOLDEN / "rank")], "experts": 1})
    paths = [f"model.layers.{layer}.block_sparse_moe.experts" for layer in range(3)]
    assert [own.width(path) for path in paths] == [2, 3, 1]


@pytest.mark.parametrize("wrong", [8, {"experts": "8"}, {"experts": True}, {"expert": 8}, {}, {"experts": 0}])
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValueError, match="additional_config has 'esft'"):
        settings(wrong)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lora_config": None}, "--enable-lora"),
        ({"use_ep": True}, "expert parallelism"),
        ({"dp_size": 2}, "data parallelism"),
        ({"is_sequence_parallel": True}, "sequence parallelism"),
        ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"quant": object()}, "quantised base"),
        ({}, None),
    ],
)
def test_engines_that_adapters_would_be_wrong_in_are_refused(change, words):
    values = {
        "lora_config": object(), "use_ep": False, "dp_size": 1, "is_sequence_parallel": False,
        "pipeline_parallel_size": 1, "quant": None,
    } | change  # fmt: skip
    config = SimpleNamespace(**values, parallel_config=SimpleNamespace(**values))
    experts = SimpleNamespace(moe_parallel_config=SimpleNamespace(**values))
    if words is None:
        plugin._refuse_unsupported(config, experts, values["quant"])
        return
    with pytest.raises((ValueError, NotImplementedError), match=words):
        plugin._refuse_unsupported(config, experts, values["quant"])


def test_another_vllm_is_refused_at_start(monkeypatch):
    plugin.register()
    for version in ("0.30.2", "0.33.0", "1.0"):
        monkeypatch.setattr(vllm, "__version__", version)
        with pytest.raises(RuntimeError, match=r"made for vLLM 0\.31 and 0\.32"):
            plugin.register()


def test_changed_internals_are_named(monkeypatch):
    monkeypatch.setattr(internals, "_SIGNATURES", {internals.InputProcessor._validate_lora: "self adapter"})
    with pytest.raises(RuntimeError, match=r"validate_lora takes \(self lora_request\) in place of \(self adapter\)"):
        plugin.register()
    monkeypatch.undo()
    monkeypatch.setattr(internals.LRUCacheWorkerLoRAManager, "evict_adapter", None, raising=False)
    with pytest.raises(RuntimeError, match="new methods: evict_adapter"):
        internals.check(ESFTManager)


def test_tuned_triton_configs_are_those_of_the_base(monkeypatch):
    plugin.register()
    tuned = Path(internals.fused_moe.__file__).parent / "configs"
    name = "E=64,N=1280,device_name=NVIDIA_A100-SXM4-80GB.json"
    assert (tuned / name).exists()
    monkeypatch.setattr(internals.fused_moe, "get_config_file_name", lambda E, *rest: name.replace("E=64", f"E={E}"))
    find = internals.fused_moe.get_moe_configs
    assert find(96, 1280, None) is None
    monkeypatch.setitem(plugin._extended, 97, 64)
    assert find(97, 1280, None) == find(64, 1280, None) is not None


def test_a_layout_finds_every_weight_wherever_a_kernel_keeps_it(monkeypatch):
    from peft_esft_vllm import rows

    torch.manual_seed(0)
    shapes, padding = ((6, 5), (5, 3)), 4
    orders = [torch.randperm(columns * lines + padding) for columns, lines in shapes]

    def to_kernel(layer: object, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        padded = [torch.nn.functional.pad(weight.flatten(1), (0, padding)) for weight in weights]
        return tuple(weight[:, order] for weight, order in zip(padded, orders, strict=True))

    monkeypatch.setattr(rows, "to_kernel", to_kernel)
    monkeypatch.setattr(rows, "plain_shapes", lambda layer: shapes)
    plain = [torch.randn(7, *shape).bfloat16() for shape in shapes]
    w13, w2 = (torch.nn.Parameter(weight, requires_grad=False) for weight in to_kernel(None, *plain))
    layer = SimpleNamespace(w13_weight=w13, w2_weight=w2)
    ids = torch.tensor([4, 0, 6])
    for found, weight in zip(rows.Layout(layer).read(layer, ids), plain, strict=True):
        torch.testing.assert_close(found, weight[ids], rtol=0, atol=0)
