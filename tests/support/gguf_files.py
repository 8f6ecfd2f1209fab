"""Writes a GGUF file of a tiny Qwen3.5-MoE, the only architecture with experts that transformers keeps in blocks."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig
from transformers.integrations.gguf.dequant import GGML_BLOCK, GGML_Q4_0, GGML_Q8_0


SIZES = {
    "block_count": 2,
    "context_length": 128,
    "embedding_length": 64,
    "attention.head_count": 2,
    "attention.head_count_kv": 1,
    "attention.key_length": 32,
    "full_attention_interval": 2,
    "ssm.conv_kernel": 4,
    "ssm.state_size": 16,
    "ssm.group_count": 2,
    "ssm.time_step_rank": 4,
    "ssm.inner_size": 64,
    "rope.dimension_count": 16,
    "expert_feed_forward_length": 32,
    "expert_shared_feed_forward_length": 32,
    "expert_count": 8,
    "expert_used_count": 2,
}
VOCABULARY = 64
NAMES = {
    "model.embed_tokens.": "token_embd.",
    "model.norm.": "output_norm.",
    "lm_head.": "output.",
    "model.layers.": "blk.",
    ".input_layernorm.": ".attn_norm.",
    ".post_attention_layernorm.": ".post_attention_norm.",
    ".self_attn.q_proj.": ".attn_q.",
    ".self_attn.k_proj.": ".attn_k.",
    ".self_attn.v_proj.": ".attn_v.",
    ".self_attn.o_proj.": ".attn_output.",
    ".self_attn.q_norm.": ".attn_q_norm.",
    ".self_attn.k_norm.": ".attn_k_norm.",
    ".linear_attn.in_proj_qkv.": ".attn_qkv.",
    ".linear_attn.in_proj_z.": ".attn_gate.",
    ".linear_attn.in_proj_a.": ".ssm_alpha.",
    ".linear_attn.in_proj_b.": ".ssm_beta.",
    ".linear_attn.conv1d.": ".ssm_conv1d.",
    ".linear_attn.norm.": ".ssm_norm.",
    ".linear_attn.out_proj.": ".ssm_out.",
    ".linear_attn.A_log": ".ssm_a",
    ".linear_attn.dt_bias": ".ssm_dt.bias",
    ".mlp.gate.": ".ffn_gate_inp.",
    ".mlp.shared_expert_gate.": ".ffn_gate_inp_shexp.",
    ".mlp.shared_expert.gate_proj.": ".ffn_gate_shexp.",
    ".mlp.shared_expert.up_proj.": ".ffn_up_shexp.",
    ".mlp.shared_expert.down_proj.": ".ffn_down_shexp.",
    ".mlp.experts.down_proj": ".ffn_down_exps.weight",
}
IN_VALUES = ("ffn_gate_inp", "norm", "ssm_a", "ssm_dt", "conv1d")
"""Tensors that llama.cpp keeps as fp32."""


def write_gguf(path: Path, of_experts: int = GGML_Q4_0, of_others: int = GGML_Q8_0) -> None:
    """Writes a file of random weights in blocks of the given types; those begin with the scale of a block."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, tuple[int, tuple[int, ...], bytes]] = {}
    for name, shape in _shapes().items():
        ggml_type = 0 if any(own in name for own in IN_VALUES) else of_experts if "_exps" in name else of_others
        if ggml_type == 0:
            values = torch.rand(shape, generator=generator) + 0.5
            values = -values if "ssm_a" in name and "alpha" not in name else values
            tensors[name] = 0, shape, values.numpy().tobytes()
        else:
            tensors[name] = ggml_type, shape, random_blocks(ggml_type, shape, generator).numpy().tobytes()
    metadata: dict[str, Any] = {"general.architecture": "qwen35moe"}
    metadata |= {f"qwen35moe.{name}": value for name, value in SIZES.items()}
    metadata |= {
        "qwen35moe.attention.layer_norm_rms_epsilon": 1e-6,
        "qwen35moe.rope.freq_base": 10000.0,
        "qwen35moe.rope.dimension_sections": [3, 3, 2, 0],
        "tokenizer.ggml.tokens": [f"t{token}" for token in range(VOCABULARY)],
    }
    head, data = [struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata))], b""
    head += [_text(key) + _value(value) for key, value in metadata.items()]
    for name, (ggml_type, shape, content) in tensors.items():
        head.append(_text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape)))
        head.append(struct.pack("<IQ", ggml_type, len(data)))
        data += content + bytes(-len(content) % 32)
    start = b"".join(head)
    path.write_bytes(start + bytes(-len(start) % 32) + data)


def random_blocks(ggml_type: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Blocks of random codes with a scale of a few thousandths: uint8 `[..., bytes of a row]`."""
    weights, size = GGML_BLOCK[ggml_type]
    blocks = torch.randint(256, (*shape[:-1], shape[-1] // weights, size), dtype=torch.uint8, generator=generator)
    scale = 0.002 if ggml_type == GGML_Q8_0 else 0.03
    blocks[..., :2] = torch.from_numpy(np.frombuffer(np.float16(scale).tobytes(), dtype=np.uint8).copy())
    return blocks.flatten(-2)


def _shapes() -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of the file, by llama.cpp's names."""
    config = Qwen3_5MoeTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=SIZES["embedding_length"],
        num_hidden_layers=SIZES["block_count"],
        num_attention_heads=SIZES["attention.head_count"],
        num_key_value_heads=SIZES["attention.head_count_kv"],
        head_dim=SIZES["attention.key_length"],
        full_attention_interval=SIZES["full_attention_interval"],
        linear_conv_kernel_dim=SIZES["ssm.conv_kernel"],
        linear_key_head_dim=SIZES["ssm.state_size"],
        linear_num_key_heads=SIZES["ssm.group_count"],
        linear_num_value_heads=SIZES["ssm.time_step_rank"],
        linear_value_head_dim=SIZES["ssm.inner_size"] // SIZES["ssm.time_step_rank"],
        moe_intermediate_size=SIZES["expert_feed_forward_length"],
        shared_expert_intermediate_size=SIZES["expert_shared_feed_forward_length"],
        num_experts=SIZES["expert_count"],
        num_experts_per_tok=SIZES["expert_used_count"],
    )
    with torch.device("meta"):
        model = Qwen3_5MoeForCausalLM(config)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            layer, experts, rows, width = name.split(".")[2], *tensor.shape
            half = (experts, rows // 2, width)
            shapes |= {f"blk.{layer}.ffn_{part}_exps.weight": half for part in ("gate", "up")}
            continue
        own = name
        for ours, theirs in NAMES.items():
            own = own.replace(ours, theirs)
        shapes[own] = (tensor.shape[0], tensor.shape[2]) if "conv1d" in own else tuple(tensor.shape)
    return shapes


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _value(value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    if isinstance(value, list) and isinstance(value[0], str):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_text, value))
    if isinstance(value, list):
        return struct.pack(f"<IIQ{len(value)}i", 9, 5, len(value), *value)
    return struct.pack("<If", 6, value) if isinstance(value, float) else struct.pack("<II", 4, value)
