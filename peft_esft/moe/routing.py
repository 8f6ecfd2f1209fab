"""Reads the routing of experts modules: expert ids, and the values that multiply the experts' outputs.

Each reader belongs to one class of transformers, and takes its arguments or its result apart. Which class has
which reader is said in `architectures.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .hooks import in_this_thread


@dataclass(frozen=True)
class Routing:
    """The choices of some tokens.

    Attributes:
        top_k_index: int64 `[T, K]`, expert ids. Ids of experts that have no weights may occur.
        top_k_weights: `[T, K]`, what multiplies each expert's output; 0 where nothing is computed.
        top_k: number of experts that a token is meant to have; less than `K` where some columns stay empty.
        batch_size: number of samples, whose tokens follow one another; None if that is not known.
    """

    top_k_index: Tensor
    top_k_weights: Tensor
    top_k: int
    batch_size: int | None = None


RoutingReader = Callable[[nn.Module, dict[str, Any] | tuple[Any, ...], Any], Routing]


@dataclass(frozen=True)
class RoutingSource:
    """The module to watch for a container's routing.

    Attributes:
        read: makes a `Routing` of the watched module, its arguments and its result.
        watched: "container" for the container itself, or the name of a module beside it.
        of_result: True if the module's result is read, False if its arguments are, before it runs.
    """

    read: RoutingReader
    watched: str = "container"
    of_result: bool = False

    def watch(self, module: nn.Module, see: Callable[[Routing], None]) -> RemovableHandle:
        """Calls `see` with the routing of each call of the module in this thread, until the handle is removed."""

        @in_this_thread
        def observe(
            module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], result: Any = None
        ) -> None:
            see(self.read(module, (*arguments, *keywords.values()), result))

        if self.of_result:
            return module.register_forward_hook(observe, with_kwargs=True)
        return module.register_forward_pre_hook(observe, with_kwargs=True)


def read_standard_call(module: nn.Module, arguments: Any, result: Any) -> Routing:
    """`experts(hidden_states, top_k_index, top_k_weights)`: the fused experts of transformers, and DBRX's."""
    hidden_states, top_k_index, top_k_weights = arguments
    batch_size = hidden_states.shape[0] if hidden_states.dim() == 3 else None
    return Routing(top_k_index, top_k_weights, top_k_index.shape[-1], batch_size)


def read_one_hot_call(module: nn.Module, arguments: Any, result: Any) -> Routing:
    """Switch Transformers: a one-hot mask `[T, 1, E]`, all 0 for a token beyond the expert's capacity."""
    _, mask, weights = arguments
    return Routing(mask.argmax(-1), weights * mask.sum(-1), 1)


def read_nllb_call(module: nn.Module, arguments: Any, result: Any) -> Routing:
    """NLLB-MoE: transformers 5.23 takes the entries of the router's one-hot mask `[T, E]` for expert ids.

    So experts 0 and 1 run, whatever the router chose. Two of a token's `E` weights are above 0.
    """
    _, mask, weights = arguments
    return Routing(mask, weights, 2)


def read_vitpose_call(module: nn.Module, arguments: Any, result: Any) -> Routing:
    """ViTPose: the expert of each image is an input of the model; its output counts as it is."""
    hidden_states, indices = arguments
    batch_size, length = hidden_states.shape[:2]
    index = indices.reshape(batch_size, 1, 1).expand(batch_size, length, 1).reshape(-1, 1)
    return Routing(index, torch.ones_like(index, dtype=hidden_states.dtype), 1, batch_size)


def read_llama4_router(module: Any, arguments: Any, result: Any) -> Routing:
    """Llama 4: scores `[T, E]`, 0 for experts not chosen; they multiply the experts' inputs, not their outputs."""
    weights, index = result[0].topk(module.top_k, dim=-1)
    return Routing(index, weights, module.top_k)


def read_jetmoe_router(module: Any, arguments: Any, result: Any) -> Routing:
    """JetMoe: the pairs sorted by expert, and how many each expert has."""
    pairs, _, gates, expert_sizes, _ = result
    sizes = torch.as_tensor(expert_sizes, device=pairs.device)
    experts = torch.arange(module.num_experts, device=pairs.device)
    expert_of_pair = experts.repeat_interleave(sizes, output_size=pairs.shape[0])
    index = torch.empty_like(pairs).index_copy_(0, pairs, expert_of_pair)
    weights = torch.empty_like(gates).index_copy_(0, pairs, gates)
    return Routing(index.view(-1, module.top_k), weights.view(-1, module.top_k), module.top_k)


def read_doge_call(module: Any, arguments: Any, result: Any) -> Routing:
    """Doge: an expert is a pair of keys, one of each half; the module returns the halves' logits `[2, T, keys]`."""
    (scores_x, scores_y), (keys_x, keys_y) = result[1].topk(module.num_keys, dim=-1)
    scores = (scores_x[..., :, None] + scores_y[..., None, :]).flatten(-2)
    experts = (keys_x[..., :, None] * module.num_keys + keys_y[..., None, :]).flatten(-2)
    scores, places = scores.topk(module.top_k, dim=-1)
    return Routing(experts.gather(-1, places), scores.softmax(-1), module.top_k)


def read_router_result(module: nn.Module, arguments: Any, result: Any) -> Routing:
    """A router that returns expert ids and weights of one shape `[..., K]`, in any order, among other things.

    Raises:
        NotImplementedError: if its result holds no such pair.
    """
    tensors = [item for item in result if isinstance(item, Tensor)] if isinstance(result, tuple | list) else []
    for index in (item for item in tensors if not item.is_floating_point()):
        for weights in (item for item in tensors if item.is_floating_point() and item.shape == index.shape):
            top_k = index.shape[-1]
            return Routing(index.reshape(-1, top_k), weights.reshape(-1, top_k), top_k)
    raise NotImplementedError(
        f"{type(module).__name__} does not return expert ids and weights as two tensors of one shape, so its "
        "choices cannot be read"
    )
