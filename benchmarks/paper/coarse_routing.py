"""Makes the routers of a model choose groups of experts, as a coarser model would (arXiv 2407.01906, section 5.4)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from peft_esft import find_experts
from peft_esft.analysis import Groups
from peft_esft.moe.containers import ExpertsContainer


PROBES = 64  # random hidden states on which a router is compared with the rule that the simulation changes
TOLERANCE = 1e-2  # of gate values, relative; routers may compute them in half precision


@dataclass(frozen=True)
class RouterRule:
    """How a router makes gate values of the softmax of its logits.

    Attributes:
        top_k: experts for each token.
        renormalised: the chosen experts' values are divided by their sum.
        factor: what multiplies them in the end.
    """

    top_k: int
    renormalised: bool
    factor: float


@contextmanager
def coarse_routing(model: nn.Module, groups: Groups, *, groups_per_token: int | None = None) -> Iterator[None]:
    """Makes a model's routers choose groups of experts, for the time of the context.

    A group's affinity is the mean of its experts' (the softmax over all experts); the groups of highest affinity are
    chosen, and each expert of a group gets the group's affinity as its gate value, renormalised where the router does
    so. The routers are changed by hooks and restored on leaving. Scoring, training through PEFT, and gradients work as
    on any model: gradients reach the hidden states, and the routers if they train, through the mean affinities.

    The share of the experts that is active for a token stays what it was if the group size divides the router's
    top_k, which is then the default number of groups for a token, `top_k / size`. Other sizes must say how many groups
    a token gets; the share of active experts then changes.

    Args:
        model: a transformers model, with or without adapters, whose routers take a softmax over the experts and then
            the top_k of it (OLMoE, Mixtral, Qwen2-MoE, Qwen3-MoE, greedy DeepSeek-V2).
        groups: from `group_experts` or `random_groups`; all groups of a container are of one size.
        groups_per_token: groups that a token is routed to; None means `top_k / size`.

    Raises:
        ValueError: if the groups do not fit the model, or their size does not divide top_k and `groups_per_token` is
            not given.
        NotImplementedError: if a router works by another rule. The model is then unchanged.

    Example:
        >>> with coarse_routing(model, group_experts(co_occurrence(base, batches), 2)):
        ...     trainer.train()
    """
    containers = find_experts(model)
    if not containers or set(groups) != set(containers):
        raise ValueError(f"there are groups for {sorted(groups)}, and the model has {sorted(containers)}")
    hooks = []
    for path, container in containers.items():
        members = _members(path, groups[path], container.num_experts)
        for place in container.places:
            router = _find_router(container, place.parent, place.called)
            rule = _rule_of(router, container)
            count = _groups_per_token(path, rule.top_k, members.shape, groups_per_token)
            hooks.append((router, _regrouping(members, count, rule)))
    handles = [router.register_forward_hook(hook) for router, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def regroup(probabilities: Tensor, members: Tensor, groups_per_token: int, rule: RouterRule) -> tuple[Tensor, Tensor]:
    """Chooses groups of experts.

    Args:
        probabilities: `[T, E]`, affinities of the experts.
        members: int64 `[groups, size]`.
        groups_per_token: how many groups to choose.
        rule: how affinities become gate values; its top_k is not used.

    Returns:
        Gate values and expert ids, `[T, groups_per_token * size]` each, the experts of a group one after another.
    """
    size = members.shape[1]
    affinity = probabilities[:, members.reshape(-1)].unflatten(1, members.shape).mean(-1)
    top, chosen = affinity.topk(groups_per_token, dim=-1)
    weights = top.repeat_interleave(size, dim=1)
    if rule.renormalised:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * rule.factor, members[chosen].flatten(1)


def _regrouping(members: Tensor, groups_per_token: int, rule: RouterRule) -> Any:
    def hook(module: nn.Module, arguments: Any, result: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
        logits, weights, _ = result
        probabilities = logits.softmax(-1, dtype=torch.float32)
        new_weights, index = regroup(probabilities, members.to(logits.device), groups_per_token, rule)
        return logits, new_weights.to(weights.dtype), index

    return hook


def _members(path: str, groups: list[list[int]], num_experts: int) -> Tensor:
    if len({len(group) for group in groups}) != 1 or sorted(chain.from_iterable(groups)) != list(range(num_experts)):
        raise ValueError(f"the groups of {path} are not of one size, or do not hold each of its {num_experts} experts")
    return torch.tensor(groups)


def _groups_per_token(path: str, top_k: int, shape: torch.Size, asked: int | None) -> int:
    num_groups, size = shape
    if asked is None:
        if top_k % size:
            raise ValueError(
                f"groups of {size} do not divide the {top_k} experts that the router of {path} gives a token. Choose "
                f"a size of {[n for n in range(1, top_k + 1) if top_k % n == 0]}, or say how many groups a token gets "
                "with groups_per_token, which changes the share of active experts"
            )
        asked = top_k // size
    if not 1 <= asked <= num_groups:
        raise ValueError(f"groups_per_token is {asked}; {path} has {num_groups} groups")
    return asked


def _find_router(container: ExpertsContainer, parent: nn.Module, called: nn.Module) -> nn.Module:
    """The module beside a container that has a weight with a row for each expert."""
    found = [
        module
        for module in parent.children()
        if module is not called
        and isinstance(weight := getattr(module, "weight", None), Tensor)
        and weight.dim() == 2
        and weight.shape[0] == container.num_experts
    ]
    if len(found) != 1:
        raise NotImplementedError(
            f"beside {container.path} there are {len(found)} modules with a weight for each of its "
            f"{container.num_experts} experts, so its router is not known; coarse_routing cannot change it"
        )
    return found[0]


@torch.no_grad()
def _rule_of(router: nn.Module, container: ExpertsContainer) -> RouterRule:
    """Finds out by trying whether a router takes the top_k of a softmax, and what it does to their values.

    Raises:
        NotImplementedError: if it does something else.
    """
    weight: Any = router.weight
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(PROBES, weight.shape[1], generator=generator).to(weight)
    refusal = NotImplementedError(
        f"{type(router).__name__}, the router of {container.path}, does not take the top_k of a softmax over all "
        "experts; coarse_routing knows no other rule"
    )
    result = router(probes)
    if not (isinstance(result, tuple) and len(result) == 3 and all(isinstance(item, Tensor) for item in result)):
        raise refusal
    logits, weights, index = result
    if logits.shape != (PROBES, weight.shape[0]) or weights.shape != index.shape or index.is_floating_point():
        raise refusal
    top_k = index.shape[1]
    probabilities = logits.softmax(-1, dtype=torch.float32)
    values = probabilities.gather(1, index)
    # Values, not ids: in half precision experts tie.
    if not torch.equal(values.sort(-1, descending=True).values, probabilities.topk(top_k, dim=-1).values):
        raise refusal
    for renormalised, plain in ((False, values), (True, values / values.sum(-1, keepdim=True))):
        factors = weights.float() / plain
        factor = float(factors.mean())
        if bool(((factors - factor).abs() <= TOLERANCE * abs(factor)).all()):
            return RouterRule(top_k, renormalised, 1.0 if abs(factor - 1) <= TOLERANCE else factor)
    raise refusal
