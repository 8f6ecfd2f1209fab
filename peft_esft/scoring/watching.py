"""Runs a model and reports which experts its routers choose, call by call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..moe.containers import ExpertsContainer, ModuleLocation, find_experts
from ..moe.hooks import in_this_thread
from ..moe.routing import Routing
from ..moe.weights import ListedWeight
from .batches import check_batch, eval_mode, to_device
from .counted_tokens import TokenStream, streams_of_batch


SeeRouting = Callable[[ExpertsContainer, str, Routing], None]
SeeExpertCall = Callable[[ExpertsContainer, int, int], None]


def _refuse_expert_call(container: ExpertsContainer, expert_id: int, num_tokens: int) -> None:
    raise ValueError(
        f"the router of {container.path} does not return its choices, so it is not known which experts a token uses"
    )


@contextmanager
def watching_routing(
    model: nn.Module,
    containers: Mapping[str, ExpertsContainer],
    see: SeeRouting,
    see_expert_call: SeeExpertCall = _refuse_expert_call,
) -> Iterator[None]:
    """Reports the routing of a model for the time of the context, in eval mode and without gradients.

    `see` is called with the container, the path of its module and the routing, at each call of a container. Where a
    router returns no choice of experts, `see_expert_call` is called with the container, the id of an expert and its
    number of tokens, at each call of an expert. The default raises a `ValueError`.
    """
    with ExitStack() as hooks, eval_mode(model), torch.inference_mode():
        for container in containers.values():
            for location in container.places:
                for handle in watch_place(container, location, see, see_expert_call):
                    hooks.enter_context(handle)
        yield


def watch_place(
    container: ExpertsContainer, location: ModuleLocation, see: SeeRouting, see_expert_call: SeeExpertCall
) -> list[RemovableHandle]:
    """Registers the hooks that report the routing of a container at one of its places, see `watching_routing`."""
    if container.routing is not None:
        return [container.routing.watch(location.watched(container.routing), partial(see, container, location.path))]

    def report(expert_id: int, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        see_expert_call(container, expert_id, arguments[0].shape[:-1].numel())

    # Such containers are lists of modules, whose weights are all listed in the same order.
    experts = cast(ListedWeight, container.weights[0]).expert_modules(location.module)
    return [
        expert.register_forward_pre_hook(in_this_thread(partial(report, expert_id)))
        for expert_id, expert in enumerate(experts)
    ]


def run_batches(
    model: nn.Module, batches: Iterable[Any], max_tokens: int, see: Callable[[str, Routing, Tensor], None]
) -> None:
    """Runs batches through a model and reports the routing of its text, until `max_tokens` tokens are counted.

    `see` is called with a container's path, its routing, and which tokens count, bool `[T]` on the routing's device.

    Raises:
        ValueError: if the model has no containers, a batch is not a dict, or a container sees other tokens than those
            of the text.
    """
    containers = find_experts(model)
    if not containers:
        raise ValueError(f"{type(model).__name__} has no experts module of a known kind")
    streams: dict[str, TokenStream] = {}
    num_tokens = 0

    def see_counted(container: ExpertsContainer, path: str, routing: Routing) -> None:
        length = routing.top_k_index.shape[0]
        if list(streams) != ["text"] or streams["text"].sample_of_token.shape[0] != length:
            raise ValueError(f"{path} receives {length} tokens, which may not be those of input_ids")
        see(container.path, routing, streams["text"].on(routing.top_k_index.device)[0] >= 0)

    with watching_routing(model, containers, see_counted):
        for inputs in batches:
            remaining = max_tokens - num_tokens
            if remaining <= 0:
                break
            streams = streams_of_batch(check_batch(inputs), {"text": remaining, "decoder": remaining}, 0, False)
            model(**to_device(inputs, model))
            num_tokens += max((stream.num_tokens for stream in streams.values()), default=0)
