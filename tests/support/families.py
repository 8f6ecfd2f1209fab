"""Tiny random models of real transformers classes. Sizes differ from one another, so that no layout is guessed."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers
from transformers import PreTrainedModel


VOCABULARY = 64
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LATENT_ATTENTION = {
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 24,
    "intermediate_size": 40,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
}


def _build(config_class: str, model_class: str, **settings: object) -> Callable[[], PreTrainedModel]:
    def build() -> PreTrainedModel:
        config = getattr(transformers, config_class)(**{**_COMMON, **settings})
        return getattr(transformers, model_class)(config)

    return build


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "olmoe": _build("OlmoeConfig", "OlmoeForCausalLM", num_experts=8, intermediate_size=24),
    "mixtral": _build("MixtralConfig", "MixtralForCausalLM", num_local_experts=8, intermediate_size=24),
    "qwen2_moe": _build(
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        num_experts=8,
        moe_intermediate_size=24,
        intermediate_size=40,
        shared_expert_intermediate_size=16,
    ),
    "qwen3_moe": _build(
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        num_experts=8,
        moe_intermediate_size=24,
        intermediate_size=40,
        head_dim=8,
    ),
    "deepseek_v2": _build(
        "DeepseekV2Config", "DeepseekV2ForCausalLM", **_LATENT_ATTENTION, topk_method="greedy", head_dim=8
    ),
    "deepseek_v3": _build("DeepseekV3Config", "DeepseekV3ForCausalLM", **_LATENT_ATTENTION),
    "glm4_moe": _build(
        "Glm4MoeConfig",
        "Glm4MoeForCausalLM",
        head_dim=8,
        first_k_dense_replace=1,
        moe_intermediate_size=24,
        intermediate_size=40,
        n_routed_experts=8,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
    ),
    "gpt_oss": _build(
        "GptOssConfig", "GptOssForCausalLM", num_local_experts=8, intermediate_size=24, head_dim=8, sliding_window=16
    ),
    "step3p7": _build(
        "Step3p7TextConfig",
        "Step3p7TextModel",
        num_local_experts=8,
        n_routed_experts=8,
        moe_intermediate_size=24,
        share_expert_dim=24,
        intermediate_size=40,
        head_dim=8,
        layer_types=["full_attention", "full_attention"],
        mlp_layer_types=["dense", "sparse"],
        swiglu_limits=[None, 0.5],
        sliding_window=16,
    ),
    "longcat_flash": _build(
        "LongcatFlashConfig",
        "LongcatFlashForCausalLM",
        num_layers=2,
        n_routed_experts=8,
        zero_expert_num=4,
        expert_ffn_hidden_size=24,
        ffn_hidden_size=40,
        moe_topk=3,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        head_dim=8,
    ),
    "nemotron_h": _build(
        "NemotronHConfig",
        "NemotronHForCausalLM",
        head_dim=8,
        layers_block_type=["attention", "moe"],
        moe_intermediate_size=24,
        moe_shared_expert_intermediate_size=24,
        moe_latent_size=16,
    ),
    "muse_spark": _build(
        "MuseSparkTextConfig",
        "MuseSparkTextModel",
        num_local_experts=8,
        moe_hidden_size=16,
        moe_intermediate_size=24,
        intermediate_size=40,
        head_dim=8,
        sliding_window=16,
        layer_types=["full_attention", "full_attention"],
        mlp_layer_types=["dense", "sparse"],
        layer_rope_theta=[10000, 10000],
    ),
    "aria": _build(
        "AriaTextConfig",
        "AriaTextForCausalLM",
        moe_num_experts=8,
        moe_topk=2,
        intermediate_size=24,
        moe_num_shared_experts=1,
    ),
    "openai_privacy_filter": _build(
        "OpenAIPrivacyFilterConfig",
        "OpenAIPrivacyFilterForTokenClassification",
        num_local_experts=8,
        intermediate_size=24,
        head_dim=8,
    ),
}


def tiny_model(
    family: str,
    dtype: torch.dtype = torch.float32,
    experts_implementation: str | None = None,
    tied: bool = False,
) -> PreTrainedModel:
    """A model of `family` with seeded random weights large enough that experts differ, in eval mode."""
    torch.manual_seed(0)
    model = FAMILIES[family]()
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    if experts_implementation is not None:
        model.set_experts_implementation(experts_implementation)
    return model.to(dtype).eval()
