"""Combines the deltas of several adapters into one delta over the union of their experts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Literal, get_args

import torch
from peft.utils.merge_utils import calculate_majority_sign_mask, disjoint_merge, prune
from torch import Tensor

from .config import ESFTConfig


CombinationType = Literal["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
MajoritySignMethod = Literal["total", "frequency"]


def combine_deltas(
    deltas: Sequence[tuple[Tensor, Tensor]],
    weights: Sequence[float],
    num_rows: int,
    combination_type: CombinationType,
    density: float | None = None,
    majority_sign_method: MajoritySignMethod = "total",
) -> Tensor:
    """Combines deltas as `peft.utils.merge_utils` does.

    Each delta is pruned on its own, without the experts that only other adapters have. The sign of an entry is elected
    among the deltas that have this entry.

    Args:
        deltas: pairs of positions int64 `[n]` in the union and delta `[n, ...]`.
        weights: of each delta.
        num_rows: rows of the union.
        combination_type: "linear" is the weighted sum; "magnitude_prune" and "dare_linear" prune before it; "ties" and
            "dare_ties" (arXiv 2306.01708, 2311.03099) also elect a sign for each entry and take the mean of those that
            have it.
        density: share of the entries that pruning keeps.
        majority_sign_method: how "ties" and "dare_ties" elect.

    Returns:
        `[num_rows, ...]` in the dtype of the deltas.
    """
    if density is not None and density < 1:
        is_random = combination_type.startswith("dare")
        method: Literal["random", "magnitude"] = "random" if is_random else "magnitude"
        deltas = [(places, prune(delta, density, method=method, rescale=is_random)) for places, delta in deltas]
    expanded = torch.stack(
        [delta.new_zeros(num_rows, *delta.shape[1:]).index_copy(0, places, delta) for places, delta in deltas]
    )
    factors = torch.tensor(weights, dtype=expanded.dtype, device=expanded.device)
    weighted = expanded * factors.view(-1, *[1] * (expanded.dim() - 1))
    if combination_type.endswith("ties"):
        mask = calculate_majority_sign_mask(expanded, method=majority_sign_method)
        merged: Tensor = disjoint_merge(weighted, mask)
        return merged
    return weighted.sum(0)


def check_combination(
    adapters: Sequence[str],
    weights: Sequence[float],
    combination_type: str,
    density: float | None,
    majority_sign_method: str,
) -> None:
    """Refuses settings that cannot be combined.

    Raises:
        ValueError: naming the setting.
    """
    if combination_type not in get_args(CombinationType):
        raise ValueError(
            f"combination_type is {combination_type!r}; it is one of {get_args(CombinationType)}. 'linear' adds "
            "deltas exactly, as 'cat' and 'svd' do for LoRA"
        )
    if isinstance(adapters, str) or len(set(adapters)) < len(adapters):
        raise ValueError(f"adapters is {adapters!r}; expected a list of different names")
    if not adapters or len(adapters) != len(weights):
        raise ValueError(
            f"{len(adapters)} adapters and {len(weights)} weights are given; give one weight for each adapter"
        )
    check_factors(weights)
    if majority_sign_method not in get_args(MajoritySignMethod):
        raise ValueError(
            f"majority_sign_method is {majority_sign_method!r}; it is one of {get_args(MajoritySignMethod)}"
        )
    if combination_type == "linear" and density is not None:
        raise ValueError("density has no effect on combination_type='linear'; leave it out")
    if combination_type != "linear" and (density is None or not 0 < density <= 1):
        raise ValueError(
            f"combination_type={combination_type!r} keeps a share of each delta's entries, but density is "
            f"{density}; give a density above 0 and at most 1"
        )


def check_factors(factors: Sequence[float]) -> None:
    """Refuses what is not a finite number.

    Raises:
        ValueError: naming the factors.
    """
    if not all(isinstance(factor, Real) and math.isfinite(factor) for factor in factors):
        raise ValueError(f"deltas can be multiplied only by finite numbers of Python or numpy, not by {factors}")


def check_combinable(configs: Mapping[str, ESFTConfig]) -> None:
    """Refuses adapters that also have whole modules or tokens, which have no deltas to combine.

    Raises:
        ValueError: naming the adapters.
    """
    with_modules = {name: config.modules_to_save for name, config in configs.items() if config.modules_to_save}
    with_tokens = [name for name, config in configs.items() if config.trainable_token_indices is not None]
    if with_tokens:
        raise ValueError(
            f"adapters with trainable_token_indices cannot be combined: {with_tokens}. Give each "
            "sample its adapter with adapter_names"
        )
    if with_modules:
        raise ValueError(
            f"adapters with modules_to_save cannot be combined: {with_modules}. Train these modules by deltas "
            "(train_shared_experts or train_non_expert_modules), or give each sample its adapter with "
            "adapter_names"
        )


def combined_config(
    configs: Sequence[ESFTConfig],
    weights: Mapping[str, float],
    target_experts: dict[str, list[int]],
    combination_type: CombinationType,
    density: float | None,
) -> ESFTConfig:
    """The config, for inference, of an adapter that changes what the given adapters change, weighted by name."""
    return ESFTConfig(
        target_experts=target_experts,
        train_shared_experts=any(config.train_shared_experts for config in configs),
        train_non_expert_modules=any(config.train_non_expert_modules for config in configs),
        task_type=configs[0].task_type,
        base_model_name_or_path=configs[0].base_model_name_or_path,
        inference_mode=True,
        selection={
            "combined": {name: float(weight) for name, weight in weights.items()},
            "combination_type": combination_type,
            **({} if density is None else {"density": float(density)}),
        },
    )
