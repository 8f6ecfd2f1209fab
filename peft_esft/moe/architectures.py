"""Describes single architectures as data: their layouts, weights and routers."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import torch
from torch import nn

from .routing import (
    RoutingSource,
    read_doge_call,
    read_jetmoe_router,
    read_llama4_router,
    read_nllb_call,
    read_one_hot_call,
    read_standard_call,
    read_vitpose_call,
)
from .weights import StackedForm


@dataclass(frozen=True)
class ExpertsLayout:
    """How fused experts are stored, and the operations between their projections.

    The first four are the flags of `transformers.integrations.use_experts_implementation`. Its fifth flag,
    `is_concatenated`, matters only to the module's own `_apply_gate`, which this package calls.

    Attributes:
        has_gate: the up projection is `gate_up_proj`, twice as wide, and not `up_proj`.
        has_bias: each projection has a bias.
        is_transposed: weights are `[E, in, out]` instead of `[E, out, in]`.
        has_post_expert_norm: `post_expert_norm`, shared by all experts, follows the down projection.
        identity_experts: the attribute with the number of experts without weights. These have ids from `num_experts`
            on and return their input. None if there are no such experts.
    """

    has_gate: bool = True
    has_bias: bool = False
    is_transposed: bool = False
    has_post_expert_norm: bool = False
    identity_experts: str | None = None


STANDARD_CALL = RoutingSource(read_standard_call)

UNFLAGGED_LAYOUTS: dict[str, ExpertsLayout] = {
    "Step3p7Experts": ExpertsLayout(),
    "LongcatFlashExperts": ExpertsLayout(identity_experts="zero_expert_num"),
}
"""Fused experts of transformers that share the call of the standard ones but do not carry their flags."""

REGISTERED_LAYOUTS: dict[type[nn.Module], ExpertsLayout] = {}
"""Fused experts of the user's own, see `register_experts`."""


def register_experts(
    experts_class: type[nn.Module],
    *,
    has_gate: bool = True,
    has_bias: bool = False,
    is_transposed: bool = False,
    has_post_expert_norm: bool = False,
) -> None:
    """Describes a class of fused experts of your own, so that its experts are found, scored and trained.

    Classes decorated with `transformers.integrations.use_experts_implementation` need no description. A class that
    you register has to work like them. Its `forward(hidden_states, top_k_index, top_k_weights)` takes
    `[tokens, hidden]` and two tensors `[tokens, top_k]`. It returns `[tokens, hidden]`: for each token, the sum of its
    experts' outputs times their weights. An expert is `down_proj(gate(gate_up_proj(x)))`, or
    `down_proj(act_fn(up_proj(x)))` without a gate. The gate is the module's `_apply_gate` if it has one, else
    `act_fn(first half) * second half`. Register the class in every process, before an adapter is loaded or trained.

    Args:
        experts_class: the module's class. Classes that inherit from it are described too.
        has_gate: the weights are `gate_up_proj` `[E, 2 * intermediate, hidden]` and `down_proj`
            `[E, hidden, intermediate]`. Without a gate, `up_proj` `[E, intermediate, hidden]` replaces the first.
        has_bias: each weight has a bias, for example `down_proj_bias` `[E, hidden]`.
        is_transposed: the weights are `[E, in, out]` instead of `[E, out, in]`.
        has_post_expert_norm: the module `post_expert_norm` follows each expert.

    Raises:
        ValueError: if it is not a class of modules.

    Example:
        >>> register_experts(MyExperts, is_transposed=True)
        >>> find_experts(model)["layers.0.experts"].num_experts
        16
    """
    if not (isinstance(experts_class, type) and issubclass(experts_class, nn.Module)):
        raise ValueError(
            f"experts_class is {experts_class!r}; expected the class of the module that holds the experts"
        )
    REGISTERED_LAYOUTS[experts_class] = ExpertsLayout(has_gate, has_bias, is_transposed, has_post_expert_norm)


@dataclass(frozen=True)
class KnownContainer:
    """The description of a class of experts modules that cannot be found out from its modules.

    Attributes:
        routing: where its routing can be seen.
        weights: `{name: parameter below the module}` of experts stacked in parameters, of which a module may have only
            some; empty for a list of modules.
        form: how the experts are stored in these parameters.
        refusal: why its experts cannot be trained, and what to do instead; None if they can be trained.
    """

    routing: RoutingSource
    weights: dict[str, str] = field(default_factory=dict)
    form: StackedForm = "stacked"
    refusal: str | None = None


ADOPTABLE = (
    "its experts are quantised by another package. Call peft_esft.adopt_quantized_experts(model) before you "
    "attach an adapter; it keeps their values"
)
_FUSED_WEIGHTS = {"gate_up_proj": "gate_up_proj", "down_proj": "down_proj"}

KNOWN_CONTAINERS: dict[str, KnownContainer] = {
    "Llama4TextExperts": KnownContainer(
        RoutingSource(read_llama4_router, watched="router", of_result=True), _FUSED_WEIGHTS
    ),
    "DbrxExperts": KnownContainer(STANDARD_CALL, {"w1": "mlp.w1", "v1": "mlp.v1", "w2": "mlp.w2"}, form="flat"),
    "JetMoeParallelExperts": KnownContainer(
        RoutingSource(read_jetmoe_router, watched="router", of_result=True), {"weight": "weight"}
    ),
    "DogeCDMoE": KnownContainer(
        RoutingSource(read_doge_call, of_result=True),
        {"down_embed": "down_embed.weight", "up_embed": "up_embed.weight"},
    ),
    "SwitchTransformersExperts": KnownContainer(RoutingSource(read_one_hot_call)),
    "NllbMoeExperts": KnownContainer(RoutingSource(read_nllb_call)),
    "VitPoseNaiveMoe": KnownContainer(RoutingSource(read_vitpose_call)),
    "FP8Experts": KnownContainer(
        STANDARD_CALL,
        _FUSED_WEIGHTS | {"up_proj": "up_proj"},
        refusal=f"{ADOPTABLE}; FineGrainedFP8Config(dequantize=True) loads them in full precision",
    ),
    "Mxfp4GptOssExperts": KnownContainer(
        STANDARD_CALL,
        _FUSED_WEIGHTS,
        refusal="transformers' MXFP4 kernels give no gradients. Load the checkpoint with "
        'ESFTQuantizationConfig(quant_type="mxfp4") instead of its own config (see docs/quantised.md), '
        "or with Mxfp4Config(dequantize=True)",
    ),
    "GgufExperts": KnownContainer(
        STANDARD_CALL,
        _FUSED_WEIGHTS,
        refusal=f"{ADOPTABLE}; GgufConfig(dequantize=True) loads them in full precision",
    ),
}
"""Containers that are neither standard fused experts nor a plain list of modules beside a router, by class."""

GATED_PROJECTIONS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
"""Names of the gate, up and down projection of listed experts; fused experts have `gate_up_proj` and `down_proj`."""

SHARED_EXPERTS = re.compile(r"shared_(experts?|mlp)")
"""Names of the modules that transformers' models have for shared experts."""

READABLE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
