"""Counts the sizes of a model that estimates of memory need, without running it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from torch import nn

    from ..moe.containers import ExpertsContainer


_TOP_K_FIELDS = "num_experts_per_tok top_k moe_top_k moe_topk moe_k top_k_experts experts_per_token"
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


@dataclass(frozen=True)
class ModelSizes:
    """The sizes of a model that the formulas need; numbers of parameters where nothing else is said.

    Attributes:
        total: the whole model.
        units: each decoder layer, which FSDP gathers as one.
        unit_experts: the routed experts of each decoder layer.
        expert: one routed expert.
        expert_per_rank: factors of rank 1 on all matrices of one routed expert.
        num_experts: number of experts in a layer that has some.
        top_k: number of experts for each token.
        hidden_size: width of the experts' input.
        intermediate_size: width inside an expert.
        vocab_size: number of logits for each token.
        lora_per_rank: LoRA factors of rank 1 on all matrices of the decoder layers.
        attention_per_rank: LoRA factors of rank 1 on the matrices of attention.
        scored_heads: attention heads that keep a score for each pair of tokens, because torch's own attention cannot
            compute them; 0 where it can.
        stored_as: the form of the experts if they are in few bits ("nf4", ...), or else what the config says of the
            checkpoint's weights ("mxfp4", ...); None if nothing is quantised.
    """

    total: int
    units: tuple[int, ...]
    unit_experts: tuple[int, ...]
    expert: int
    expert_per_rank: int
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    lora_per_rank: int
    attention_per_rank: int
    scored_heads: int = 0
    stored_as: str | None = None

    @property
    def experts(self) -> int:
        """Parameters of all routed experts."""
        return sum(self.unit_experts)

    @property
    def root(self) -> int:
        """Parameters outside the decoder layers."""
        return self.total - sum(self.units)

    @property
    def num_moe_layers(self) -> int:
        """Number of layers with routed experts."""
        return sum(experts > 0 for experts in self.unit_experts)

    @classmethod
    def of(cls, model: nn.Module) -> ModelSizes:
        """Counts the parameters of a model, which may be on the meta device, quantised or adapted.

        Raises:
            ValueError: if the model has no routed experts.
        """
        # Here and below: scores have sizes, and are read by commands that load no model.
        from ..moe.containers import find_experts

        unwrap: Any = getattr(model, "get_base_model", None)
        model = model if unwrap is None else unwrap()
        containers = find_experts(model)
        if not containers:
            raise ValueError(
                f"{type(model).__name__} has no experts module of a known kind, so ESFT cannot be planned for it"
            )
        first = next(iter(containers.values()))
        layers = _decoder_layers(model)
        config: Any = getattr(model, "config", None)
        text_config = config.get_text_config() if config is not None else None
        experts = {path: c.num_experts * c.parameters_per_expert for path, c in containers.items()}
        # Fused experts are a stack of matrices, each of which has factors of its own.
        factors = [
            (name, math.prod(shape[:-2]) * sum(shape[-2:]))
            for layer in layers.values()
            for name, _, shape in _shapes(layer)
            if len(shape) > 1
        ]
        return cls(
            total=_numel(model),
            units=tuple(map(_numel, layers.values())),
            unit_experts=tuple(
                sum(size for path, size in experts.items() if not layer or path.startswith(f"{layer}."))
                for layer in layers
            ),
            expert=first.parameters_per_expert,
            expert_per_rank=sum(sum(shape) for shape in first.weight_shapes.values() if len(shape) == 2),
            num_experts=first.num_experts,
            top_k=_top_k(first, text_config),
            hidden_size=first.hidden_size,
            intermediate_size=first.parameters_per_expert // (3 * first.hidden_size),
            vocab_size=getattr(text_config, "vocab_size", 0),
            lora_per_rank=sum(own for _, own in factors),
            attention_per_rank=sum(own for name, own in factors if _ATTENTION.search(name)),
            scored_heads=0
            if getattr(model, "_supports_sdpa", True)
            else getattr(text_config, "num_attention_heads", 0),
            stored_as=_stored_as(model, config),
        )


def _shapes(module: nn.Module, path: str = "") -> Iterator[tuple[str, Any, tuple[int, ...]]]:
    """Name, identity and shape of each weight; of quantised weights as if they were not, of adapters none."""
    from ..moe.stored_rows import StoredRows
    from ..moe.weights import whole_shape

    # An adapter's layer stands around the module that it changes, or a copy of it that is trained.
    module = getattr(module, "base_layer", getattr(module, "original_module", module))
    if isinstance(module, StoredRows):
        yield path, module, tuple(module.shape)
        return
    for name, parameter in module.named_parameters(recurse=False):
        packed = getattr(parameter, "quant_state", None)  # of a linear layer of bitsandbytes in 4 bits
        yield f"{path}.{name}", parameter, tuple(packed.shape) if packed is not None else whole_shape(parameter)
    for name, child in module.named_children():
        yield from _shapes(child, f"{path}.{name}")


def _numel(module: nn.Module) -> int:
    """Number of weights; those that several modules share count once."""
    return sum({id(weight): math.prod(shape) for _, weight, shape in _shapes(module)}.values())


def _decoder_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that FSDP gathers as one, by path. No module is inside another one."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if type(module).__name__ in names and not any(path.startswith(f"{outer}.") for outer in layers):
            layers[path] = module
    return layers or {"": model}


def _top_k(container: ExpertsContainer, config: Any) -> int:
    parent = container.places[0].parent
    for source in (config, parent, *parent.children()):
        for field in _TOP_K_FIELDS.split():
            value = getattr(source, field, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    raise ValueError(f"it is not known how many experts {container.path} chooses for a token")


def _stored_as(model: nn.Module, config: Any) -> str | None:
    from ..moe.containers import quantisation_of
    from ..moe.stored_rows import StoredRows

    for module in model.modules():
        if isinstance(module, StoredRows):
            return module.format.name
    return quantisation_of(config)
