"""The memory of a training step at the sizes of real models beside what `peft-esft plan` says; nothing is computed."""

from __future__ import annotations

import gc
from dataclasses import replace
from itertools import product

import pytest
import torch
import transformers
from peft import get_peft_model
from transformers import AutoModelForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peft_esft.ops import grouped_linear
from peft_esft.scoring.memory_estimate import Setup, estimate
from peft_esft.scoring.model_sizes import ModelSizes

from oracle import config_for
from simulated_device import DeviceTensor, SimulatedDevice
from steps import DEVICE


TOKENS = 4096
LATENT = {"kv_lora_rank": 512, "q_lora_rank": None, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
CONFIGS = {
    "OLMoE-1B-7B": ("OlmoeConfig", {"intermediate_size": 1024, "num_hidden_layers": 16, "vocab_size": 50304}),
    "DeepSeek-V2-Lite": (
        "DeepseekV2Config",
        {
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
            "first_k_dense_replace": 1,
            "vocab_size": 102400,
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "greedy",
            **LATENT,
        },
    ),
    "Qwen3-30B-A3B": (
        "Qwen3MoeConfig",
        {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "vocab_size": 151936,
        },
    ),
    "gpt-oss-20b": ("GptOssConfig", {"num_hidden_layers": 24, "num_local_experts": 32}),
}


class _FlashAttention(torch.autograd.Function):
    """Keeps what flash attention keeps."""

    @staticmethod
    def forward(ctx, query, key, value):
        output = query.new_empty(*query.shape[:3], value.shape[3])
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx, grad_output):
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _attention(module, query, key, value, mask=None, **kwargs):
    return _FlashAttention.apply(query, key, value).transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register("light", _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register("light", lambda *args, **kwargs: None)


def model_on(device, name):
    """A model of real size whose parameters are on the device, in name only."""
    config_class, settings = CONFIGS[name]
    config = getattr(transformers, config_class)(**settings)
    config._attn_implementation = "light"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = torch.nn.Parameter(_placed(device, parameter.data))
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = _placed(device, buffer)
    model.set_experts_implementation("grouped_mm")
    return model


def _placed(device, tensor):
    device.account(tensor)
    return DeviceTensor(tensor, torch.device(DEVICE))


def step(name, share, monkeypatch, optim="adamw_torch", rank=None, tokens=TOKENS):
    """A training step with gradient checkpointing.

    Returns:
        Its peak, what is planned, the largest piece that the package allocates, and the experts of a layer.
    """
    with SimulatedDevice(is_meta=True) as device:
        base = model_on(device, name)
        sizes = replace(ModelSizes.of(base), scored_heads=0)  # no model has its own attention here
        experts = list(range(max(1, round(share * sizes.num_experts))))
        share = len(experts) / sizes.num_experts

        def even_ends(ends, num_rows, dtype):
            trained = int(num_rows * share)
            frozen, groups = num_rows - trained, len(ends) - sizes.num_experts
            counts = [round(frozen * (place + 1) / sizes.num_experts) for place in range(sizes.num_experts)]
            return counts + [frozen + round(trained * (place + 1) / groups) for place in range(groups)]

        monkeypatch.setattr(grouped_linear, "ends_on_host", even_ends)
        model = get_peft_model(base, config_for(base, experts, rank=rank)).train()
        base.activation_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        ids = torch.zeros(1, tokens, dtype=torch.long).to(DEVICE)
        device.peak = device.largest = 0
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        moments = 8 * sum(parameter.numel() for parameter in trained)
        peak = device.peak + moments  # they are there from the second step on
        device.peak = 0
        # foreach is what a GPU has by itself.
        optimizer = torch.optim.AdamW(trained, foreach=optim == "adamw_torch", fused=optim == "adamw_torch_fused")
        optimizer.step()
        peak = max(peak, device.peak)
        del optimizer, model, base, trained
        gc.collect()
        setup = Setup(memory=1e12, tokens=tokens, share=share, rank=rank, optim=optim)
        return peak, estimate(sizes, setup), device.largest, 2 * sizes.num_experts * sizes.expert


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("OLMoE-1B-7B", 0.1),
        ("Qwen3-30B-A3B", 0.3),
        *(
            pytest.param(name, share, marks=pytest.mark.slow)
            for name, share in product(CONFIGS, (0.1, 0.3))
            if (name, share) not in (("OLMoE-1B-7B", 0.1), ("Qwen3-30B-A3B", 0.3))
        ),
    ],
)
def test_a_step_takes_what_is_planned_and_nothing_as_large_as_a_layers_experts(name, share, monkeypatch):
    peak, planned, largest, layer = step(name, share, monkeypatch)
    assert peak == pytest.approx(planned.total, rel=0.05)
    # The fp32 gradient of the larger weight of the selected experts, or a piece for the tokens.
    assert largest < layer * max(1 / 3, 1.05 * 4 / 3 * planned.setup.share)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    "settings",
    [{"optim": "adamw_torch_fused"}, {"rank": 16}, {"rank": 16, "tokens": 64}, {"tokens": 512}],
    ids=["fused", "rank", "rank of few tokens", "few tokens"],
)
def test_other_settings_take_what_is_planned(name, settings, monkeypatch):
    peak, planned, *_ = step(name, 0.3, monkeypatch, **settings)
    assert peak == pytest.approx(planned.total, rel=0.05)
