"""A tiny random model of every architecture of transformers that has experts.

The list of architectures is read off the installed transformers, and one recipe shrinks any config by the names of its
fields, so a family that a later version adds is built without a new line here. What a family needs beyond the recipe
is data in `CONFIGS`, `MODEL_CLASSES` and `VARIANTS`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput


Group = Literal["A", "B", "C", "D"]

GROUPS: dict[Group, str] = {
    "A": "afmoe aria axk1 axk2 bailing_hybrid beam cohere2_moe deepseek_ocr2 deepseek_v2 deepseek_v3 deepseek_v32 "
    "deepseek_v4 diffusion_gemma dots1 dots3_note ernie4_5_moe ernie4_5_vl_moe exaone_moe flex_olmo flint gemma4 "
    "glm4_moe glm4_moe_lite glm4v_moe glm5_next glm_moe_dsa gpt_oss granitemoe granitemoe_swa granitemoehybrid "
    "granitemoeshared hunyuan_v1_moe hy_v3 hy_v4 inkling inkling2 jamba kimi_linear kolibri1 laguna lfm2_moe mellum "
    "mimo_v2_flash minimax minimax_m2 minimax_m3_vl mistral4 mistral_large4 mixtral muse_spark nemotron_h olmoe "
    "openai_privacy_filter phimoe qwen2_moe qwen3_5_moe qwen3_moe qwen3_next qwen3_omni_moe qwen3_vl_moe qwen4_exp "
    "solar_open unlimited_ocr zaya",
    "B": "longcat_flash step3p7",
    "C": "nllb_moe switch_transformers vitpose_backbone",
    "D": "dbrx doge jetmoe llama4",
}
"""How the experts are kept: A fused, with the flags of transformers; B fused, without them; C a module for each
expert; D in a layout of the family's own. A family that is not listed is taken to be of group A."""

VOCABULARY = 64
"""Ids from 3 up to this number are ordinary tokens in every model; those above stand for images and the like."""

_PLACEHOLDERS = 32
_NOISE = re.compile(r"drop(out|_rate|path)|pdrop|layerdrop|jitter")
_PLACEHOLDER = re.compile(r"token_(id|index)$|^codec_\w+_id$")
_HYBRID = ["linear_attention", "full_attention", "linear_attention"]
_NEMOTRON_LAYERS = ["linear_attention", "moe", "full_attention", "moe"]


def _table(sizes: Mapping[int, str]) -> dict[str, int]:
    return {name: size for size, names in sizes.items() for name in names.split()}


EXACT = _table(
    {
        0: "pad_token_id",
        1: "bos_token_id decoder_start_token_id first_k_dense_replace num_dense_layers n_shared_experts "
        "num_shared_experts moe_num_shared_experts",
        2: "eos_token_id num_experts_per_tok moe_topk moe_top_k moe_k top_k_experts",
        8: "num_experts num_local_experts n_routed_experts moe_num_experts",
        16: "shared_intermediate_size moe_latent_size",
        24: "moe_intermediate_size",
    }
)
"""Fields that say which tokens and experts there are: set to this whatever the default is, so that dense layers,
shared experts and a latent space are present wherever a family has them."""

AT_MOST = _table(
    {
        1: "depth topk_group encoder_sparse_step decoder_sparse_step",
        2: "n_group n_groups hc_mult hc_count",
        3: "num_hidden_layers n_layers num_layers encoder_layers decoder_layers num_decoder_layers",
        4: "num_attention_heads num_key_value_heads num_heads n_heads encoder_attention_heads decoder_attention_heads "
        "swa_num_attention_heads swa_num_key_value_heads linear_num_heads linear_num_key_heads linear_num_value_heads "
        "index_n_heads mamba_num_heads mamba_n_heads o_groups pos_emb_height pos_emb_width posemb_grid_size "
        "zero_expert_num index_block_size index_topk_blocks window_size num_code_groups",
        8: "head_dim kv_channels d_kv swa_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim "
        "index_head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim mamba_head_dim ssm_state_size mamba_d_state "
        "rotary_dim patch_size d_rel part_features hc_lowrank feature_size gated_norm_rank n_mel_bins",
        16: "q_lora_rank kv_lora_rank o_lora_rank router_hidden_size shared_expert_intermediate_size "
        "shared_experts_intermediate_size share_expert_dim moe_shared_expert_intermediate_size moe_hidden_size "
        "hidden_size_per_layer_input sliding_window sliding_window_size attention_chunk_size index_topk chunk_size "
        "keep_window_size mamba_chunk_size block_size canvas_length rel_extent num_position_embeddings "
        "max_source_positions",
        24: "expert_ffn_hidden_size",
        32: "hidden_size d_model text_hidden_size vision_hidden_size out_hidden_size projector_hidden_size "
        "projection_hidden_size projection_hidden_dim thinker_hidden_size vision_output_dim projector_input_dim "
        "projector_output_dim adapter_in_dim adapter_out_dim adapter_input_size downsample_hidden_size output_dim "
        "output_channels image_size max_img_size",
        40: "intermediate_size d_ff encoder_ffn_dim decoder_ffn_dim ffn_hidden_size dense_intermediate_size "
        "intermediate_size_mlp mlp_dim projection_intermediate_size",
        64: "max_position_embeddings max_seq_len position_embedding_size",
        VOCABULARY + _PLACEHOLDERS: "vocab_size vocab_size_per_layer_input mel_vocab_size unpadded_vocab_size",
    }
)
"""Sizes: reduced to this, and left alone where the default is None or smaller. No experts' weight is square."""

FACTORS = dict.fromkeys(
    [
        "routed_scaling_factor",
        "moe_routed_scaling_factor",
        "moe_router_scaling_factor",
        "router_scaling_factor",
        "route_scale",
    ],
    1.5,
)
"""Factors of the experts' output: set to this where the default would hide whether they are applied."""

FIXED = {"mlp_layer_types": ["dense", "sparse", "sparse"], "swiglu_limit": 0.5}
"""Set to this wherever they exist. The limit is low enough to be reached."""

CONFIGS: dict[str, dict[str, Any]] = {
    # The first layers are linear ones, and a cache needs one with attention.
    "bailing_hybrid": {"layer_group_size": 2},
    "granitemoehybrid": {"layer_types": _HYBRID},
    "jamba": {"num_hidden_layers": 4, "attn_layer_offset": 2},
    "kimi_linear": {"layer_types": _HYBRID},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "qwen3_5_moe": {"text_config": {"layer_types": _HYBRID}},
    "qwen3_next": {"layer_types": _HYBRID},
    # The experts are off by default, or in fewer than two layers.
    "doge": {"is_moe": True, "num_experts": 16},  # the square of the keys that a token chooses two of
    "flint": {"mlp_only_layers": [0]},
    "gemma4": {"text_config": {"enable_moe_block": True, "global_head_dim": 8}},
    "nemotron_h": {"layers_block_type": _NEMOTRON_LAYERS},
    "nemotron_h_omni": {"text_config": {"layers_block_type": _NEMOTRON_LAYERS}},
    # The defaults do not run.
    "dbrx": {"attn_config": {"clip_qkv": 8, "rope_theta": 10000.0}},
    "hunyuan_v1_moe": {"head_dim": 8},
    "qwen3_omni_moe_talker": {"text_config": {"shared_expert_intermediate_size": 16}, "spatial_merge_size": 2},
    "qwen4_exp": {
        "text_config": {
            "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
            "indexer_n_heads": 4,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 8,
            "indexer_compress_ratio": 4,
        }
    },
    "step3p7": {
        "text_config": {
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "sliding_window": 16,
            "swiglu_limits": [None, 0.5, None],
        }
    },
    # Only one expert for a token, or one more than two so that identity experts are not all that a token has.
    "longcat_flash": {"moe_topk": 3},
    "zaya": {"num_experts_per_tok": 1},
    # Lists that are as long as something else, or sizes that depend on one another.
    "deepseek_ocr2": {"vision_config": {"sam_config": {"downsample_channels": [32, 32]}}},
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe", "moe"]},
    "diffusion_gemma": {"text_config": {"global_head_dim": 8}},
    "dots3_note": {
        "text_config": {"use_sliding_window": False},
        "vision_config": {"per_layer_config": {1: {"num_local_experts": 4}, 2: {"num_local_experts": 8}}},
    },
    "ernie4_5_vl_moe": {
        "text_config": {
            "moe_intermediate_size": [24, 40],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        }
    },
    "glm4v_moe": {
        "text_config": {
            "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        }
    },
    "glm5_next": {"text_config": {"layer_types": ["linear_attention", "indexed_attention", "linear_attention"]}},
    "inkling": {"vision_config": {"patch_size": 2}},
    "mimo_v2_flash": {"num_key_value_heads": 2},
    "muse_spark": {"audio_config": {"patch_sizes": [4, 4, 4], "hidden_sizes": [8, 16, 32], "depths": [1, 1, 1]}},
    "qwen3_omni_moe": {
        "vision_config": {"deepstack_visual_indexes": [0]},
        "vision_start_token_id": VOCABULARY + _PLACEHOLDERS - 1,  # no field, but read where there is a mask
    },
    "qwen3_vl_moe": {"vision_config": {"deepstack_visual_indexes": [0]}},
    "unlimited_ocr": {"vision_config": {"sam_config": {"downsample_channels": [32, 32]}}},
    "vitpose_backbone": {"image_size": [32, 16], "patch_size": [8, 8]},
}
"""What a family's config needs beyond the recipe."""

MODEL_CLASSES = {
    "nemotron_h_omni": "NemotronH_Omni_Reasoning_V3",
    "qwen3_omni_moe": "Qwen3OmniMoeThinkerForConditionalGeneration",
    "qwen3_omni_moe_talker": "Qwen3OmniMoeTalkerForConditionalGeneration",
}
"""Where the end of its name does not tell the class to build. Thinker and talker have no forward pass in common."""

VARIANTS = {
    "qwen3_omni_moe_talker": "qwen3_omni_moe",
    "kimi_k25": "kimi_k25",
    "nemotron_h_omni": "nemotron_h_omni",
}
"""Further models with experts, and the module of transformers that each is in."""

_MODELS = Path(transformers.__file__).parent / "models"
_EXPERTS_CLASS = re.compile(r"^class \w*(?:Experts|MoE|MoeMLP)\(", re.MULTILINE)
_CLASS_ENDINGS = ("ForConditionalGeneration", "ForCausalLM", "ForBlockDiffusion", "ForTokenClassification", "Backbone")


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        model_type: the name of its folder in transformers, or of a variant.
        model_class: the class that a user loads.
        group: how its experts are kept, see `GROUPS`.
    """

    model_type: str
    model_class: type[PreTrainedModel]
    group: Group


@functools.cache
def model_types() -> list[str]:
    """The architectures whose modeling file defines experts, by the name of its folder."""
    files = sorted(_MODELS.glob("*/modeling_*.py"))
    return [file.parent.name for file in files if _EXPERTS_CLASS.search(file.read_text(encoding="utf-8"))]


@functools.cache
def family(model_type: str) -> Family:
    folder = VARIANTS.get(model_type, model_type)
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    if model_type in MODEL_CLASSES:
        model_class = getattr(module, MODEL_CLASSES[model_type])
    else:
        own = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
        models = [c for c in own if issubclass(c, PreTrainedModel) and not c.__name__.endswith("PreTrainedModel")]
        model_class = next(c for ending in _CLASS_ENDINGS for c in models if c.__name__.endswith(ending))
    group = next((group for group, names in GROUPS.items() if folder in names.split()), "A")
    return Family(model_type, model_class, group)


def tiny_config(config_class: type[PreTrainedConfig], settings: Mapping[str, Any] | None = None) -> PreTrainedConfig:
    """A config with its sizes reduced, its experts on and its noise off.

    Args:
        config_class: any config class.
        settings: fields that take precedence; those of a nested config are a dict.
    """
    settings = dict(settings or {})
    tiny = dict(_tiny_fields(config_class, iter(range(VOCABULARY, VOCABULARY + _PLACEHOLDERS))))
    for name, declared in config_class.sub_configs.items():
        spec = config_class.sub_configs_defaults.get(name)
        given = settings.pop(name, {})
        if spec is not None and spec.optional and not given:
            continue
        known = {} if spec is None else spec.init_kwargs
        nested_class = declared if issubclass(declared, PreTrainedConfig) else CONFIG_MAPPING[spec.model_type]
        reduced = {key: min(size, AT_MOST[key]) for key, size in known.items() if key in AT_MOST}
        tiny[name] = tiny_config(nested_class, {**known, **reduced, **given})
    return config_class(**{**tiny, **settings})


def _tiny_fields(config_class: type[PreTrainedConfig], placeholders: Iterator[int]) -> Iterator[tuple[str, Any]]:
    for field in fields(config_class):
        default = _default(field)
        if field.name in EXACT:
            yield field.name, EXACT[field.name]
        elif field.name in FIXED:
            yield field.name, FIXED[field.name]
        elif field.name in AT_MOST and isinstance(default, int):
            yield field.name, min(default, AT_MOST[field.name])
        elif field.name in FACTORS and default in (None, 1.0):
            yield field.name, FACTORS[field.name]
        elif _NOISE.search(field.name) and isinstance(default, (int, float)):
            yield field.name, 0.0
        elif _PLACEHOLDER.search(field.name):
            yield field.name, next(placeholders)


def _default(field: Field) -> Any:
    if field.default is not MISSING:
        return field.default
    return None if field.default_factory is MISSING else field.default_factory()


def build(
    model_type: str, dtype: torch.dtype = torch.float32, experts_implementation: str | None = None
) -> PreTrainedModel:
    """A model as loading in `dtype` gives it, with seeded weights large enough that experts differ, in eval mode."""
    model_class = family(model_type).model_class
    config = tiny_config(model_class.config_class, CONFIGS.get(model_type))
    if experts_implementation == "grouped_mm":  # the default; to ask for it is an error where a part has no experts
        experts_implementation = None
    torch.manual_seed(0)
    model = model_class._from_config(config, dtype=dtype, experts_implementation=experts_implementation)
    if dtype in (torch.float16, torch.bfloat16):
        for name in model._keep_in_fp32_modules_strict:
            for path, tensor in model.state_dict(keep_vars=True).items():
                if f".{name}." in f".{path}.":
                    tensor.data = tensor.data.float()
    torch.manual_seed(0)
    fill(model)
    return model.eval()


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Random weights and biases, the same in every dtype up to rounding. Norms keep their scale."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.copy_(torch.randn(parameter.shape) * 0.2)
        elif name.endswith("bias"):
            parameter.copy_(torch.randn(parameter.shape) * 0.1)
    for name, buffer in model.named_buffers():
        if name.endswith("bias"):  # of the choice of experts
            buffer.copy_(torch.randn(buffer.shape) * 0.1)
        elif name.endswith("tid2eid"):  # the experts of each token, which only a checkpoint would fill
            tokens, chosen = buffer.shape
            buffer.copy_((3 * torch.arange(tokens)[:, None] + torch.arange(chosen)) % EXACT["n_routed_experts"])


def inputs_for(
    model: PreTrainedModel, rows: int = 2, length: int = 12, seed: int = 0, images: bool = False
) -> dict[str, Tensor]:
    """Keyword arguments of a forward pass: ordinary tokens, or pixels for a model that reads nothing else.

    Args:
        model: a model of `build`.
        rows: the batch size.
        length: tokens of each row.
        seed: of the random tokens and pixels.
        images: each row has one image of four tokens, which reaches experts for images. For models whose forward pass
            takes `image_grid_thw`.
    """
    generator = torch.Generator().manual_seed(seed)

    def tokens() -> Tensor:
        return torch.randint(3, VOCABULARY, (rows, length), generator=generator)

    if model.main_input_name == "pixel_values":
        pixels = torch.randn(rows, model.config.num_channels, *model.config.image_size, generator=generator)
        return {"pixel_values": pixels.to(model.dtype), "dataset_index": torch.arange(rows) % model.config.num_experts}
    parameters = inspect.signature(model.forward).parameters
    if "talker_input_ids" in parameters:
        ids = tokens()
        return {"inputs_embeds": model.get_input_embeddings()(ids).detach(), "talker_input_ids": ids}
    inputs = {"input_ids": tokens()}
    if "decoder_input_ids" in parameters:
        inputs["decoder_input_ids"] = tokens()
    if images:
        vision = model.config.vision_config
        merged = vision.spatial_merge_size
        channels = vision.num_channels if hasattr(vision, "num_channels") else vision.in_channels
        patches = torch.randn(rows * 4 * merged**2, channels * vision.patch_size**2, generator=generator)
        inputs["pixel_values"] = patches.to(model.dtype)
        inputs["image_grid_thw"] = torch.tensor([[1, 2 * merged, 2 * merged]]).expand(rows, -1)
        inputs["input_ids"][:, 2:6] = model.config.image_token_id
        kinds = (inputs["input_ids"] == model.config.image_token_id).int()
        for name in {"mm_token_type_ids", "moe_mm_token_type_ids"} & set(parameters):
            inputs[name] = kinds
    return inputs


def output_of(output: ModelOutput) -> Tensor:
    """The tensor of a model's output that depends on all of its experts."""
    for name in ("logits", "last_hidden_state"):
        if name in output:
            return output[name]
    return output["feature_maps"][-1]
