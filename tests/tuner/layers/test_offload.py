"""Bases that accelerate keeps on the disk, and checkpoints in shards: what is loaded, and when."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.utils import OffloadedWeightsLoader
from peft import PeftConfig, get_peft_model, load_peft_weights, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME as WEIGHTS
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from peft_esft import AdapterPool, ESFTLayer, hotswap_adapter, score_experts
from peft_esft.checkpoints import save_adapter

from families import tiny_model
from listed import listed_model
from oracle import config_for, deltas_of, random_tokens, task_loss


TOKENS = random_tokens()
DEVICE_MAP = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}


@pytest.fixture
def folder(tmp_path):
    """A base in shards, and a trained adapter of it."""
    base = tiny_model("olmoe")
    base.save_pretrained(tmp_path / "base", max_shard_size="50KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    get_peft_model(base, config_for(base, init_weights=False)).save_pretrained(tmp_path / "adapter")
    return tmp_path


@pytest.fixture
def reads(monkeypatch):
    """The names of the weights that are read from the disk."""
    names: list[str] = []
    original = OffloadedWeightsLoader.__getitem__
    monkeypatch.setattr(
        OffloadedWeightsLoader, "__getitem__", lambda loader, key: names.append(key) or original(loader, key)
    )
    return names


def offloaded(folder):
    return AutoModelForCausalLM.from_pretrained(
        folder / "base", device_map=DEVICE_MAP, offload_folder=folder / "offloaded"
    )


def with_adapter(base, folder, **settings):
    model = get_peft_model(base, PeftConfig.from_pretrained(folder / "adapter"), **settings)
    set_peft_model_state_dict(model, load_peft_weights(folder / "adapter"), **settings)
    return model.eval()


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_an_offloaded_base_computes_the_same_and_is_read_once_a_call(folder, reads, low_cpu_mem_usage):
    expected = with_adapter(AutoModelForCausalLM.from_pretrained(folder / "base"), folder)
    base = offloaded(folder)
    reads.clear()
    model = with_adapter(base, folder, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not reads  # attaching and loading read no weight of the base
    assert all(delta.device.type == "cpu" for delta in deltas_of(model).values())

    outputs = [wrapped(input_ids=TOKENS)[0] for wrapped in (expected, model)]
    assert torch.equal(*outputs)
    experts = [name for name in reads if "experts" in name]
    assert sorted(experts) == [f"model.layers.1.mlp.experts.{name}" for name in ("down_proj", "gate_up_proj")]
    assert model.get_base_model().model.layers[1].mlp.experts.base_layer.down_proj.device.type == "meta"
    names = ["default", "__base__"] * (len(TOKENS) // 2)
    mixed = [wrapped(input_ids=TOKENS, adapter_names=names)[0] for wrapped in (expected, model)]
    assert torch.equal(*mixed)

    for checkpointing in (False, True):
        for wrapped in (expected, model):
            if checkpointing:
                wrapped.activation_checkpointing_enable({"use_reentrant": False})
                wrapped.train()
            for delta in deltas_of(wrapped).values():
                delta.requires_grad_()
                delta.grad = None
            task_loss(wrapped(input_ids=TOKENS, use_cache=False)[0]).backward()
            wrapped.eval()
        for key, delta in deltas_of(model).items():
            assert torch.equal(delta.grad, deltas_of(expected)[key].grad)
    scores = [score_experts(wrapped, [{"input_ids": TOKENS}], progress=False) for wrapped in (expected, model)]
    assert scores[0].token().keys() == scores[1].token().keys()
    assert all(torch.equal(scores[1].token()[path], share) for path, share in scores[0].token().items())

    save_adapter(model, folder / "saved")
    saved, original = (load_peft_weights(folder / name) for name in ("saved", "adapter"))
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[key], value) for key, value in original.items())
    model.merge_adapter()
    torch.testing.assert_close(model(input_ids=TOKENS)[0], outputs[0])
    model.unmerge_adapter()
    with model.disable_adapter(), expected.disable_adapter():
        assert torch.equal(model(input_ids=TOKENS)[0], expected(input_ids=TOKENS)[0])


def test_offloaded_lists_of_experts_are_refused_by_name():
    base = cpu_offload(listed_model())
    with pytest.raises(NotImplementedError, match=r"mlp.experts \(ModuleList\) is offloaded"):
        get_peft_model(base, config_for(base))


class LargestTensor(TorchDispatchMode):
    """Notes the size of the largest tensor that is made."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {tensor.untyped_storage().data_ptr() for tensor in args if isinstance(tensor, torch.Tensor)}
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.numel = max(self.numel, tensor.numel())
        return result


def test_attaching_makes_nothing_as_large_as_a_fused_weight():
    base = tiny_model("olmoe")
    fused = base.model.layers[0].mlp.experts.gate_up_proj
    with LargestTensor() as largest:
        model = get_peft_model(base, config_for(base))
    selected = max(delta.numel() for delta in deltas_of(model).values())
    assert selected == 3 * fused[0].numel()
    assert selected <= largest.numel <= 4 * fused[0].numel() < fused.numel()  # fingerprints look at four experts
    with LargestTensor() as largest:
        task_loss(model(input_ids=TOKENS)[0]).backward()
    assert largest.numel < fused.numel()


def test_transformers_loader_is_refused_where_it_would_load_nothing(tmp_path):
    tiny_model("olmoe").save_pretrained(tmp_path / "base")
    config = config_for(tiny_model("olmoe"), init_weights=False)
    get_peft_model(tiny_model("olmoe"), config).save_pretrained(tmp_path / "a")
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", device_map={"": "disk"}, offload_folder=tmp_path / "offloaded"
    )
    with pytest.raises(NotImplementedError, match=r"experts is offloaded.*set_peft_model_state_dict"):
        base.load_adapter(str(tmp_path / "a"))
    assert not any(isinstance(module, ESFTLayer) for module in base.modules())


@pytest.mark.parametrize("settings", [{}, {"rank": 2}], ids=["delta", "rank"])
@pytest.mark.parametrize("offload", [cpu_offload, disk_offload])
def test_offloaded_adapters_are_saved_with_their_values(offload, settings, tmp_path):
    model = get_peft_model(tiny_model("olmoe"), config_for(tiny_model("olmoe"), init_weights=False, **settings))
    model.add_adapter("rows", config_for(model.get_base_model(), [0, 2], init_weights=False))
    model.base_model.freeze_adapter("rows")
    model.save_pretrained(tmp_path / "before")
    where = {"offload_dir": str(tmp_path / "weights")} if offload is disk_offload else {}
    offload(model, execution_device=torch.device("cpu"), **where)
    assert all(parameter.is_meta for parameter in model.parameters())
    model.save_pretrained(tmp_path / "after")
    for name in (".", "rows"):
        before, after = (load_file(tmp_path / when / name / WEIGHTS) for when in ("before", "after"))
        assert before.keys() == after.keys() and all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("names", [["default"], ["other", "default"]], ids=str)
def test_an_adapter_without_data_is_not_merged(names, rank):
    """PEFT's `low_cpu_mem_usage` makes one, whose weights are to be loaded."""
    base = tiny_model("olmoe")
    config = config_for(base, init_weights=False, rank=rank)
    model = get_peft_model(base, config, adapter_name="other")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.add_adapter("default", config_for(base), low_cpu_mem_usage=True)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(RuntimeError, match=r"adapter 'default' has no data in model\.layers\.0.*load_adapter"):
            merge(adapter_names=names)
    model.delete_adapter("default")
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def add(model, folder):
    model.load_adapter(folder / "other", "new")
    model.set_adapter("new")


def combine(model, folder):
    model.base_model.add_weighted_adapter(["default", "second"], [1.0, 0.5], "sum")
    model.set_adapter("sum")
    model.delete_adapter("default")


def hotswap(model, folder):
    hotswap_adapter(model, folder / "other")


def use_pool(model, folder):
    pool = AdapterPool(model, 10**7)
    pool.add("pooled", folder / "other")
    pool.get("pooled")
    model.set_adapter("pooled")
    pool.close()


@pytest.mark.parametrize("operation", [add, combine, hotswap, use_pool])
def test_adapters_change_after_accelerate_has_offloaded_them(operation, tmp_path):
    """As with LoRA, the adapters that join stay loaded."""
    torch.manual_seed(0)
    base = tiny_model("olmoe")
    config = config_for(base, init_weights=False)
    get_peft_model(tiny_model("olmoe"), config).save_pretrained(tmp_path / "other")
    model = get_peft_model(base, config).eval()
    model.add_adapter("second", config_for(base, [2, 1, 3], init_weights=False))
    offloaded = cpu_offload(copy.deepcopy(model))
    outputs = []
    with torch.no_grad():
        for changed in (model, offloaded):
            changed(input_ids=TOKENS)
            operation(changed, tmp_path)
            outputs.append([changed.eval()(input_ids=TOKENS).logits])
            changed.set_adapter("second")
            outputs[-1].append(changed(input_ids=TOKENS).logits)
    assert all(torch.equal(live, away) for live, away in zip(*outputs, strict=True))
    assert not torch.equal(*outputs[0])


@pytest.mark.parametrize("offload", [cpu_offload, disk_offload])
@pytest.mark.parametrize(
    ("build", "settings"),
    [(listed_model, {}), (lambda: tiny_model("qwen2_moe"), {"train_shared_experts": True})],
    ids=["listed", "shared"],
)
def test_modules_that_are_not_fused_are_refused_when_they_are_offloaded_later(build, settings, offload, tmp_path):
    base = build()
    model = get_peft_model(base, config_for(base, init_weights=False, **settings)).eval()
    merged = copy.deepcopy(model)
    merged.merge_adapter()
    expected = logits(merged)
    for each in (model, merged):
        offload(each, **({"offload_dir": str(tmp_path / str(each is merged))} if offload is disk_offload else {}))
        with pytest.raises(NotImplementedError, match=r"has offloaded modules in it.* would be lost"):
            (each.unmerge_adapter if each is merged else each.merge_adapter)()
        for names in (None, ["default", "__base__"]) if each is model else ():
            with pytest.raises(NotImplementedError, match=r"was offloaded after the adapter was attached"):
                each(input_ids=TOKENS, adapter_names=names)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(build().eval()))
    torch.testing.assert_close(logits(merged), expected)


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def test_a_list_of_experts_says_that_an_adapter_has_no_data():
    base = listed_model()
    model = get_peft_model(base, config_for(base, init_weights=False)).eval()
    model.add_adapter("empty", config_for(base), low_cpu_mem_usage=True)
    model.set_adapter("empty")
    with pytest.raises(RuntimeError, match=r"adapter 'empty' has no data in model\.layers"):
        logits(model)
