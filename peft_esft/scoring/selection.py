"""Chooses the experts to train from scores: by a share (`top_p`), a number (`top_k`) or a budget of parameters."""

from __future__ import annotations

import warnings
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Integral, Real
from typing import Any, get_args

import torch
from torch import Tensor

from .memory_estimate import Setup, describe, estimate, fits_on_gpus, what_would_fit
from .scores import ExpertScores, Metric


Selection = dict[str, list[int]]
DEFAULT_TOP_P: dict[str, float] = {"token": 0.2, "gate": 0.1, "gate_share": 0.2}
"""The paper's thresholds (arXiv 2407.01906, section 4.3). "gate_share" is not in the paper; it is a share too."""

_ROUNDING = 1e-9
"""Slack for the running sum, so that scores that add up to top_p on paper also do so in binary."""


def select_experts(
    scores: ExpertScores | Mapping[str, Tensor | Sequence[float]],
    *,
    top_p: float | None = None,
    metric: Metric = "token",
    top_k: int | None = None,
    budget: float | str | Setup | None = None,
    min_experts: int = 1,
    max_experts: int | None = None,
) -> Selection:
    """Chooses the experts to train in each experts module.

    The paper uses `top_p`: it takes the experts with the highest scores until their sum reaches `top_p`. Equal
    scores are ordered by expert id (arXiv 2407.01906, section 3.2; the order of the released selections).

    Args:
        scores: what `score_experts` returned, or `{path: scores [E]}`.
        top_p: the share of a layer's choices (metric "token"), the gate mass (metric "gate") or the share of a layer's
            gate mass (metric "gate_share") to cover; None means 0.2, 0.1 and 0.2, unless `top_k` or `budget` is given.
        metric: which of the scores to use. Ignored if `scores` is a plain mapping, apart from the default of top_p.
        top_k: the same number of experts in every experts module, instead of `top_p`.
        budget: a share of all experts' parameters, or memory, instead of `top_p`. With a share, the
            experts with the highest scores of the whole model are taken as long as they fit; experts of a plain
            mapping count as equally large. With memory of GPUs, such as "24GB" or "2x24GB", it takes the largest
            `top_p` whose selection can be trained there, over a base in the form that was scored. A
            `memory_estimate.Setup` also gives the optimizer, the rank, the form of the base and the tokens.
        min_experts: the fewest experts of an experts module.
        max_experts: the most experts of an experts module.

    Returns:
        `{path: expert ids}`, the ids in falling order of score, with at least one expert of each experts module that
        the data reached. Modules whose scores are all 0 are left out, with a warning.

    Raises:
        ValueError: if a setting is of the wrong type or out of range, two ways of choosing are given, the budget is
            too small for `min_experts` of every experts module, or a score is negative or not finite. For a budget of
            memory, the error lists settings that would fit.

    Example:
        >>> select_experts(scores, budget="24GB")
    """
    if metric not in get_args(Metric):
        raise ValueError(f"metric is {metric!r}; it is one of {get_args(Metric)}")
    _check_numbers({"top_p": top_p, "top_k": top_k, "budget": budget}, min_experts, max_experts)
    rows = _rows(scores, metric)
    unused = [path for path, row in rows.items() if not bool(row.any())]
    if unused:
        warnings.warn(
            f"no token of the scored data reached {len(unused)} of {len(rows)} experts modules, for example "
            f"{unused[0]}; none of their experts are selected",
            stacklevel=2,
        )
        rows = {path: row for path, row in rows.items() if path not in unused}
    orders = {path: ranking(row) for path, row in rows.items()}
    bounds = _bounds(rows, min_experts, max_experts)
    if isinstance(budget, str | Setup):
        share = top_p_for_memory(scores, budget, metric=metric, min_experts=min_experts, max_experts=max_experts)
        counts = {path: _count_by_top_p(row[orders[path]], share) for path, row in rows.items()}
    elif budget is not None:
        sizes = dict.fromkeys(rows, 1) if isinstance(scores, Mapping) else scores.parameters_per_expert()
        counts = _counts_by_budget(rows, bounds, sizes, budget)
    elif top_k is not None:
        counts = dict.fromkeys(rows, top_k)
    else:
        top_p = DEFAULT_TOP_P[metric] if top_p is None else top_p
        counts = {path: _count_by_top_p(row[orders[path]], top_p) for path, row in rows.items()}
        _warn_of_odd_sums(rows, counts, top_p, metric)
    return {path: orders[path][: _within(counts[path], bounds[path])].tolist() for path in rows}


def top_p_for_memory(
    scores: ExpertScores | Mapping[str, Tensor | Sequence[float]],
    budget: str | Setup,
    *,
    metric: Metric = "token",
    min_experts: int = 1,
    max_experts: int | None = None,
) -> float:
    """Finds the largest `top_p` whose selection can be trained in some memory, by the estimate of `peft-esft plan`.

    `select_experts` describes the arguments.

    Returns:
        A share above 0 and at most 1.

    Raises:
        ValueError: if the scores do not say how large the model is, or not even the fewest experts fit.
    """
    if not isinstance(scores, ExpertScores) or scores.sizes is None:
        name = budget if isinstance(budget, str) else budget.hardware
        raise ValueError(
            f"a budget of {name} needs the sizes of the model, and these scores do not have them. Score the model "
            "again with this version of peft_esft, or give the budget as a share of the experts"
        )
    sizes, per_expert = scores.sizes, scores.parameters_per_expert()
    setup = Setup.parse(budget, sizes) if isinstance(budget, str) else budget
    rows = {path: row for path, row in _rows(scores, metric).items() if bool(row.any())}
    bounds = _bounds(rows, min_experts, max_experts)
    falling = {path: row.sort(descending=True).values for path, row in rows.items()}
    shares = sorted({min(1.0, share) for row in falling.values() for share in row.cumsum(0).tolist()})

    def filled(top_p: float) -> Setup:
        counts = {path: _within(_count_by_top_p(row, top_p), bounds[path]) for path, row in falling.items()}
        trained = sum(count * per_expert[path] for path, count in counts.items())
        return replace(setup, share=min(1.0, trained / sizes.experts))

    if not shares:
        raise ValueError(
            "no token of the scored data reached any experts module, so there is nothing to choose "
            "from; check the data"
        )
    fitting = bisect_left(shares, True, key=lambda share: not fits_on_gpus(sizes, filled(share)))
    if fitting == 0:
        least = filled(shares[0])
        own, name = estimate(sizes, least), scores.model or "the model"
        ways = "; ".join(describe(way, sizes) for way in what_would_fit(sizes, least)[:4])
        raise ValueError(
            f"{name} does not fit a budget of {setup.hardware}, not even with the fewest experts. On one GPU it "
            f"takes {own.total / 1e9:.3g} GB, of which the base in {setup.base} takes {own.base / 1e9:.3g} GB. A "
            f"tenth of each GPU is kept free. These settings would fit: {ways or 'none that is known'}"
        )
    return shares[fitting - 1]


def _rows(scores: Any, metric: Metric) -> dict[str, Tensor]:
    """The scores of each experts module, float64 `[E]`."""
    if not isinstance(scores, Mapping | ExpertScores):
        raise ValueError(f"scores are a {type(scores).__name__}; expected ExpertScores or a dict {{path: scores [E]}}")
    table = scores if isinstance(scores, Mapping) else scores.by_metric(metric)
    return {path: score_row(path, values) for path, values in table.items()}


def _bounds(rows: Mapping[str, Tensor], least: int, most: int | None) -> dict[str, tuple[int, int]]:
    """The fewest and the most experts of each experts module."""
    return {path: (min(least, len(row)), min(most or len(row), len(row))) for path, row in rows.items()}


def _within(count: int, bounds: tuple[int, int]) -> int:
    return min(max(count, bounds[0]), bounds[1])


def ranking(row: Tensor) -> Tensor:
    """Expert ids in falling order of score, equal ones in order of id; int64 `[E]`."""
    return torch.sort(row, descending=True, stable=True).indices


def random_experts(selection: Mapping[str, Sequence[int]], num_experts: Mapping[str, int], *, seed: int) -> Selection:
    """Chooses as many random experts of each experts module as a selection has: the paper's control.

    Args:
        selection: what `select_experts` returned.
        num_experts: number of experts of each experts module.
        seed: equal seeds give equal choices.

    Returns:
        `{path: expert ids}`.
    """
    generator = torch.Generator().manual_seed(seed)
    return {
        path: torch.randperm(num_experts[path], generator=generator)[: len(ids)].tolist()
        for path, ids in selection.items()
    }


def _check_numbers(ways: Mapping[str, Any], min_experts: int, max_experts: int | None) -> None:
    given = {name: value for name, value in ways.items() if value is not None}
    if len(given) > 1:
        raise ValueError(f"{given} are different ways of choosing; give only one of them")
    if isinstance(given.get("budget"), str | Setup):
        del given["budget"]
    for name, value in (given | {"min_experts": min_experts, "max_experts": max_experts}).items():
        is_share = name in ("top_p", "budget")
        is_number = isinstance(value, Real if is_share else Integral) and not isinstance(value, bool)
        if is_share and not (is_number and 0 < value <= 1):
            raise ValueError(f"{name} is {value!r}; expected a share above 0 and at most 1")
        if not is_share and value is not None and not (is_number and value >= 1):
            raise ValueError(f"{name} is {value!r}; expected an integer of at least 1")
    if max_experts is not None and max_experts < min_experts:
        raise ValueError(f"max_experts is {max_experts}, less than min_experts, {min_experts}")


def score_row(path: str, values: Tensor | Sequence[float]) -> Tensor:
    row = torch.as_tensor(values, dtype=torch.float64)
    if row.dim() != 1 or row.numel() == 0 or not bool(torch.isfinite(row).all()) or bool((row < 0).any()):
        raise ValueError(
            f"the scores of {path} are {row}; expected a one-dimensional row of finite numbers of at least 0"
        )
    return row


def _count_by_top_p(falling: Tensor, top_p: float) -> int:
    reached = torch.cumsum(falling, 0) >= top_p - _ROUNDING
    return int(reached.to(torch.int8).argmax()) + 1 if bool(reached.any()) else falling.numel()


def _counts_by_budget(
    rows: Mapping[str, Tensor], bounds: Mapping[str, tuple[int, int]], sizes: Mapping[str, int], budget: float
) -> dict[str, int]:
    """Takes the highest scores of the whole model that fit, after the minimum of every experts module."""
    counts = {path: least for path, (least, _) in bounds.items()}
    left = budget * sum(len(row) * sizes[path] for path, row in rows.items()) * (1 + _ROUNDING)
    left -= sum(counts[path] * sizes[path] for path in rows)
    if left < 0:
        raise ValueError(
            f"budget={budget} of the experts' parameters is too small: min_experts requires "
            f"{sum(counts.values())} experts"
        )
    candidates = [
        (-score, rank, path)
        for path, row in rows.items()
        for rank, score in enumerate(row.sort(descending=True).values.tolist())
        if bounds[path][0] <= rank < bounds[path][1]
    ]
    for _, rank, path in sorted(candidates):
        # An expert is taken only after those of its container with higher scores.
        if rank == counts[path] and sizes[path] <= left:
            counts[path] += 1
            left -= sizes[path]
    return counts


def _warn_of_odd_sums(rows: Mapping[str, Tensor], counts: Mapping[str, int], top_p: float, metric: str) -> None:
    """Warns where top_p has another meaning than in the paper."""
    sums = {path: float(row.sum()) for path, row in rows.items()}
    too_little = [path for path, mass in sums.items() if mass < top_p - _ROUNDING]
    if too_little:
        warnings.warn(
            f"the scores of {len(too_little)} of {len(rows)} experts modules sum to less than top_p={top_p} (for "
            f"example {sums[too_little[0]]:.3f} in {too_little[0]}), so all their experts are selected. Choose a "
            "smaller top_p, or metric='token', whose scores always sum to 1.",
            stacklevel=3,
        )
    renormalised = [path for path, mass in sums.items() if mass > 0.99]
    if metric == "gate" and renormalised and top_p <= DEFAULT_TOP_P["gate"]:
        mean = sum(counts[path] for path in renormalised) / len(renormalised)
        warnings.warn(
            f"the gates of {len(renormalised)} of {len(rows)} experts modules sum to 1 or more, because their "
            f"router normalises them. The paper chose top_p={top_p} for gates that sum to 0.26 to 0.53; here it "
            f"selects {mean:.1f} experts per layer on average. Use metric='token' with top_p=0.2, which works for "
            "every router, or metric='gate_share', where top_p is a share of each layer's gates.",
            stacklevel=3,
        )
