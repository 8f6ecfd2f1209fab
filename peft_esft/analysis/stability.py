"""Checks whether a sample is large enough: do two halves of it select the same experts?"""

from __future__ import annotations

from dataclasses import dataclass

from ..scoring.scores import ExpertScores, HalfCounts
from ..scoring.selection import DEFAULT_TOP_P, select_experts


@dataclass(frozen=True)
class StabilityPoint:
    """How far the halves agree after a number of tokens.

    Attributes:
        num_tokens: tokens of both halves together.
        shared: by container path, the number of experts that both halves select.
        selected: by container path, the number of experts that a half selects, mean of the two.
    """

    num_tokens: int
    shared: dict[str, int]
    selected: dict[str, float]

    @property
    def agreement(self) -> float:
        """Share of the selected experts on which the halves agree, over all containers."""
        return sum(self.shared.values()) / max(1e-9, sum(self.selected.values()))


@dataclass(frozen=True)
class StabilityReport:
    """How far the halves agree as the number of tokens grows; `print` it.

    Attributes:
        top_p: the threshold of the selections that are compared (metric "token", flat mean over tokens).
        points: in growing order of tokens.
    """

    top_p: float
    points: list[StabilityPoint]

    def __str__(self) -> str:
        lines = [f"tokens    agreement of two halves (top_p {self.top_p})"]
        lines += [f"{point.num_tokens:<9,} {point.agreement:.0%}" for point in self.points]
        last = self.points[-1]
        weakest = min(last.shared, key=lambda path: last.shared[path] / last.selected[path])
        lines.append(
            f"least agreement: {weakest}, where the halves share {last.shared[weakest]} of "
            f"{last.selected[weakest]:.1f} experts"
        )
        return "\n".join(lines)


def stability_report(scores: ExpertScores, *, top_p: float = DEFAULT_TOP_P["token"]) -> StabilityReport:
    """Compares the selections of two disjoint halves of the scored samples, as the number of tokens grows.

    One half has the samples of even number, the other one those of odd number. Each has half of the tokens, so the
    whole sample is at least as reliable as the report says. The paper's sample has 131,072 tokens.

    Args:
        scores: from `score_experts`.
        top_p: the threshold of the selections, by the token selection ratio.

    Returns:
        The report.

    Raises:
        ValueError: if the scores hold no two halves, for example because there was a single sample.

    Example:
        >>> print(stability_report(scores))
    """
    points = [_compare(half, top_p) for half in scores.halves if min(half.num_tokens) > 0]
    if not points:
        raise ValueError("the scores have no two halves to compare; score at least two samples")
    return StabilityReport(top_p, points)


def _compare(half: HalfCounts, top_p: float) -> StabilityPoint:
    reached = {path: rows for path, rows in half.selected_pairs.items() if min(map(sum, rows)) > 0}
    first, second = (
        select_experts(
            {path: [pairs / sum(rows[number]) for pairs in rows[number]] for path, rows in reached.items()},
            top_p=top_p,
        )
        for number in (0, 1)
    )
    return StabilityPoint(
        num_tokens=sum(half.num_tokens),
        shared={path: len(set(ids) & set(second[path])) for path, ids in first.items()},
        selected={path: (len(ids) + len(second[path])) / 2 for path, ids in first.items()},
    )
