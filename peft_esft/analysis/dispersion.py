"""Measures how concentrated the routing of one task is (arXiv 2407.01906, section 2.3 and figure 2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from ..scoring.scores import Metric
from ..scoring.selection import ranking
from .shares import ScoreTable, layer_shares


SHARES = (0.1, 0.2, 0.5, 0.9)
"""The shares for which reports say how many experts they need."""

_ROUNDING = 1e-9  # slack for running sums, as in the selection


@dataclass(frozen=True)
class LayerDispersion:
    """How one layer's choices, or its gate mass, are spread over its experts.

    Attributes:
        expert_ids: the experts in falling order of share, equal ones in order of id.
        shares: their shares, float64 `[E]`, falling, with sum 1.
    """

    expert_ids: tuple[int, ...]
    shares: Tensor

    @property
    def num_experts(self) -> int:
        """Number of experts, `E`."""
        return self.shares.numel()

    def curve(self) -> Tensor:
        """Share that the first n experts cover, float64 `[E]` for n from 1 to `E`."""
        return self.shares.cumsum(0)

    def experts_for(self, share: float) -> int:
        """The least number of experts that together have at least `share`; whole ones, as a selection trains them."""
        _check_share(share)
        return min(int((self.curve() < share - _ROUNDING).sum()) + 1, self.num_experts)

    def uniform_experts_for(self, share: float) -> float:
        """The number of experts that uniform routing would need: `share * E`, not rounded."""
        _check_share(share)
        return share * self.num_experts

    def top_share(self, count: int) -> float:
        """The share of the `count` most used experts."""
        return float(self.shares[:count].sum())

    @property
    def entropy(self) -> float:
        """Shannon entropy of the shares in nats, from 0 (one expert) to `log(E)` (uniform)."""
        return float(torch.special.entr(self.shares).sum())

    @property
    def gini(self) -> float:
        """Gini coefficient of the shares, from 0 (uniform) to `1 - 1/E` (one expert)."""
        count = self.num_experts
        ranks = torch.arange(1, count + 1, dtype=torch.float64)
        return max(0.0, float(((count + 1 - 2 * ranks) * self.shares).sum()) / count)


@dataclass(frozen=True)
class Dispersion:
    """The dispersion of a task's routing, layer by layer; `print` it.

    Attributes:
        metric: "token" for shares of choices, "gate" or "gate_share" for shares of a layer's gate mass.
        layers: by container path, without those that no token reached.
    """

    metric: Metric
    layers: dict[str, LayerDispersion]

    def experts_for(self, share: float) -> float:
        """Whole experts needed for a share, mean over the layers."""
        return self._mean(lambda layer: layer.experts_for(share))

    def uniform_experts_for(self, share: float) -> float:
        """Experts that uniform routing would need, mean over the layers."""
        return self._mean(lambda layer: layer.uniform_experts_for(share))

    def top_share(self, count: int) -> float:
        """Share of the `count` most used experts, mean over the layers."""
        return self._mean(lambda layer: layer.top_share(count))

    @property
    def entropy(self) -> float:
        """Entropy in nats, mean over the layers."""
        return self._mean(lambda layer: layer.entropy)

    @property
    def gini(self) -> float:
        """Gini coefficient, mean over the layers."""
        return self._mean(lambda layer: layer.gini)

    @property
    def num_experts(self) -> float:
        """Experts of a layer, mean over the layers."""
        return self._mean(lambda layer: layer.num_experts)

    def __str__(self) -> str:
        of = "choices" if self.metric == "token" else "gate mass"
        lines = [f"share of {of}   experts per layer (mean, fewest to most) uniform"]
        for share in SHARES:
            counts = [layer.experts_for(share) for layer in self.layers.values()]
            spread = f"{fmean(counts):.1f} ({min(counts)} to {max(counts)})"
            lines.append(f"{share:<{10 + len(of)}.0%} {spread:<41} {self.uniform_experts_for(share):.1f}")
        lines.append(f"Gini {self.gini:.2f}, entropy {self.entropy:.2f} nats, means over {len(self.layers)} layers")
        return "\n".join(lines)

    def _mean(self, measure: Callable[[LayerDispersion], float]) -> float:
        return fmean(map(measure, self.layers.values()))


def dispersion(scores: ScoreTable, *, metric: Metric = "token") -> Dispersion:
    """Measures how concentrated a task's routing is.

    Args:
        scores: from `score_experts`, or `{path: scores [E]}`.
        metric: "token" for the experts' shares of a layer's choices, "gate" for their shares of its gate mass. Both
            are shares of the layer's own sum, so routers with and without renormalised gates can be compared.

    Returns:
        The dispersion of every container that a token reached.

    Raises:
        ValueError: if no container was reached, or the gate values could not be seen.

    Example:
        >>> dispersion(scores).experts_for(0.2)
        4.25
    """
    layers = {}
    for path, shares in layer_shares(scores, metric).items():
        order = ranking(shares)
        layers[path] = LayerDispersion(tuple(order.tolist()), shares[order])
    return Dispersion(metric, layers)


def _check_share(share: float) -> None:
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}; expected a number above 0 and at most 1")
