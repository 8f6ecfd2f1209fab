"""Shows the routing of a model's containers, call by call, to whoever asks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..moe.containers import ExpertsContainer, find_experts
from ..moe.routing import Routing
from .batches import check_batch, to_device
from .eval_mode import eval_mode
from .token_streams import TokenStream, streams_of_batch


@contextmanager
def watching_routing(
    containers: Mapping[str, ExpertsContainer], see: Callable[[str, Routing], None]
) -> Iterator[None]:
    """Calls `see(path, routing)` at every call of a container, for the time of the context.

    Raises:
        ValueError: if the choices of a container's tokens cannot be seen.
    """
    handles: list[Any] = []
    try:
        for path, container in containers.items():
            if container.routing is None:
                raise ValueError(f"the router of {path} returns no choice of experts, so its tokens' cannot be seen")
            handles += [
                container.routing.watch(place.watched(container.routing), partial(see, path))
                for place in container.places
            ]
        yield
    finally:
        for handle in handles:
            handle.remove()


def run_batches(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    max_tokens: int,
    see: Callable[[str, Routing, Tensor], None],
) -> int:
    """Runs batches through a model in eval mode and shows the routing of the tokens that count.

    Args:
        model: a transformers model, with or without adapters.
        batches: as `score_experts` takes them.
        max_tokens: stop after so many tokens.
        see: called with a container's path, its routing, and which tokens count, bool `[T]` on the routing's device.

    Returns:
        The number of counted tokens.

    Raises:
        ValueError: if the model has no containers, something is no batch, or a container sees other tokens than
            the text's.
    """
    containers = find_experts(model)
    if not containers:
        raise ValueError(f"{type(model).__name__} has no experts container of a known kind")
    streams: dict[str, TokenStream] = {}
    num_tokens = 0

    def see_counted(path: str, routing: Routing) -> None:
        length = routing.top_k_index.shape[0]
        if list(streams) != ["text"] or streams["text"].sample_of_token.shape[0] != length:
            raise ValueError(f"{path} sees {length} tokens, and it is not sure that they are those of input_ids")
        see(path, routing, streams["text"].on(routing.top_k_index.device)[0] >= 0)

    with eval_mode(model), watching_routing(containers, see_counted), torch.inference_mode():
        for inputs in batches:
            remaining = max_tokens - num_tokens
            if remaining <= 0:
                break
            streams = streams_of_batch(check_batch(inputs), {"text": remaining, "decoder": remaining}, 0, False)
            model(**to_device(inputs, model))
            num_tokens += max((stream.num_tokens for stream in streams.values()), default=0)
    return num_tokens
