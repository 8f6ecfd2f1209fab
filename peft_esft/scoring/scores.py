"""What scoring found: how often a task chose each expert, and with what weight; as a record, and as a file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor


if TYPE_CHECKING:
    from torch import nn

Averaging = Literal["sample", "token"]
Metric = Literal["token", "gate", "gate_share"]
FORMAT_VERSION = 1
_Check = Callable[[Any], bool]


@dataclass(frozen=True)
class ContainerScores:
    """What was observed at one container.

    Attributes:
        top_k: experts for each token; 0 if the container was never called.
        num_tokens: tokens counted here; a container may see others than the text's, for example a decoder's.
        num_samples: samples that these belong to.
        selected_pairs: how often each of the `E` experts was chosen.
        gate_weight_sum: sum of the values that multiplied each expert's output; None if they could not be seen.
        token_share_sum: sum over samples of each sample's share of choices (its mean over tokens, divided by top_k).
        gate_share_sum: sum over samples of each sample's mean gate value; None if they could not be seen.
        parameters_per_expert: number of weights of one expert.
    """

    top_k: int
    num_tokens: int
    num_samples: int
    selected_pairs: list[int]
    gate_weight_sum: list[float] | None
    token_share_sum: list[float]
    gate_share_sum: list[float] | None
    parameters_per_expert: int = 1

    @property
    def num_experts(self) -> int:
        """Number of experts, `E`."""
        return len(self.selected_pairs)

    def __add__(self, other: ContainerScores) -> ContainerScores:
        sums: dict[str, Any] = {}
        for name in ("selected_pairs", "gate_weight_sum", "token_share_sum", "gate_share_sum"):
            own, others = getattr(self, name), getattr(other, name)
            known = own is not None and others is not None
            sums[name] = [a + b for a, b in zip(own, others, strict=True)] if known else None
        return replace(
            self,
            top_k=max(self.top_k, other.top_k),
            num_tokens=self.num_tokens + other.num_tokens,
            num_samples=self.num_samples + other.num_samples,
            **sums,
        )


@dataclass(frozen=True)
class HalfCounts:
    """What two disjoint halves of the samples had chosen at one point of a run; see `analysis.stability_report`.

    Attributes:
        num_tokens: tokens of the first and of the second half.
        selected_pairs: by container path, how often each half chose each expert, two lists of `E`.
    """

    num_tokens: list[int]
    selected_pairs: dict[str, list[list[int]]]

    def __add__(self, other: HalfCounts) -> HalfCounts:
        return HalfCounts(
            num_tokens=[a + b for a, b in zip(self.num_tokens, other.num_tokens, strict=True)],
            selected_pairs={
                path: [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(halves, other_halves, strict=True)]
                for path, halves, other_halves in (
                    (path, halves, other.selected_pairs[path]) for path, halves in self.selected_pairs.items()
                )
            },
        )


@dataclass(frozen=True)
class ExpertScores:
    """How often a task chose each expert, and with what weight.

    Attributes:
        containers: what was observed, by container path.
        num_tokens: tokens of the batches' text that were counted (padding is not).
        num_samples: samples with at least one counted token.
        averaging: "sample" for the paper's equations, the mean over samples of each sample's mean over tokens;
            "token" for the released code's flat mean over tokens. They agree where all samples are equally long.
        model: name of the scored model.
        revision: its commit on the Hub, if it came from there.
        answers_only: only tokens that are trained on were counted.
        halves: the counts of two disjoint halves of the samples, each time that the tokens had doubled and at the end.
    """

    containers: dict[str, ContainerScores]
    num_tokens: int
    num_samples: int
    averaging: Averaging = "sample"
    model: str | None = None
    revision: str | None = None
    answers_only: bool = False
    halves: list[HalfCounts] = field(default_factory=list, repr=False)

    def token(self) -> dict[str, Tensor]:
        """Token selection ratio `r_i` (arXiv 2407.01906, equation 6), float64 `[E]`; sums to 1 over a container."""
        if self.averaging == "sample":
            return {path: _mean(c.token_share_sum, c.num_samples) for path, c in self.containers.items()}
        return {path: _mean(c.selected_pairs, c.num_tokens * c.top_k) for path, c in self.containers.items()}

    def gate(self) -> dict[str, Tensor]:
        """Average gate score `g_i` (arXiv 2407.01906, equation 5), float64 `[E]`; its sum depends on the router.

        Raises:
            ValueError: if gate values could not be seen at a container.
        """
        rows = {}
        for path, c in self.containers.items():
            sums, count = c.gate_weight_sum, c.num_tokens
            if self.averaging == "sample":
                sums, count = c.gate_share_sum, c.num_samples
            if sums is None:
                raise ValueError(
                    f"the gate values of {path} could not be seen: its router returns no weights. Use metric='token'"
                )
            rows[path] = _mean(sums, count)
        return rows

    def gate_share(self) -> dict[str, Tensor]:
        """`gate()` over its sum in each container, so that a threshold means the same for every router."""
        return {path: row / row.sum().clamp(min=1e-300) for path, row in self.gate().items()}

    def parameters_per_expert(self) -> dict[str, int]:
        """Number of weights of one expert of each container."""
        return {path: c.parameters_per_expert for path, c in self.containers.items()}

    def by_metric(self, metric: Metric) -> dict[str, Tensor]:
        """`token()`, `gate()` or `gate_share()`, by name."""
        return {"token": self.token, "gate": self.gate, "gate_share": self.gate_share}[metric]()

    def check_fits(self, model: nn.Module) -> None:
        """Refuses a model whose containers are not those that were scored.

        Raises:
            ValueError: if containers differ in path or number of experts.
        """
        from ..moe.containers import find_experts

        own = {path: c.num_experts for path, c in self.containers.items()}
        found = {path: c.num_experts for path, c in find_experts(model).items()}
        if own != found:
            raise ValueError(
                f"these scores, of {self.model or 'a model without a name'}, do not fit {type(model).__name__}: they "
                f"are for the containers (with so many experts) {_sample(own)}, the model has {_sample(found)}"
            )

    def __add__(self, other: ExpertScores) -> ExpertScores:
        """Joins two runs over different data of the same model.

        Raises:
            ValueError: if the two runs differ in containers, experts, top_k, averaging or the tokens that count.
        """
        if not isinstance(other, ExpertScores):
            return NotImplemented
        if self.averaging != other.averaging:
            raise ValueError(f"cannot join scores averaged by {self.averaging} and by {other.averaging}")
        if self.answers_only != other.answers_only:
            raise ValueError("cannot join scores of all tokens and of answers only")
        if not self._fits(other):
            raise ValueError(
                "cannot join scores of different models: their containers are "
                f"{_sample(self._signature())} and {_sample(other._signature())}"
            )
        return ExpertScores(
            containers={path: c + other.containers[path] for path, c in self.containers.items()},
            num_tokens=self.num_tokens + other.num_tokens,
            num_samples=self.num_samples + other.num_samples,
            averaging=self.averaging,
            answers_only=self.answers_only,
            model=self.model if self.model == other.model else None,
            revision=self.revision if self.revision == other.revision else None,
            halves=self.halves + [self.halves[-1] + half for half in other.halves] if self.halves else other.halves,
        )

    def __radd__(self, other: object) -> ExpertScores:
        """Lets `sum` join runs: it starts from 0."""
        return self if type(other) is int and other == 0 else NotImplemented

    def to_dataframe(self) -> Any:
        """A `pandas.DataFrame` with a row for each expert: container, expert, selected_pairs, token, gate."""
        import pandas as pd

        token = self.token()
        gate = self.gate() if all(c.gate_weight_sum is not None for c in self.containers.values()) else None
        return pd.DataFrame(
            {
                "container": path,
                "expert": expert,
                "selected_pairs": pairs,
                "token": float(token[path][expert]),
                "gate": None if gate is None else float(gate[path][expert]),
            }
            for path, container in self.containers.items()
            for expert, pairs in enumerate(container.selected_pairs)
        )

    def save(self, path: str | Path) -> None:
        """Writes the scores as JSON."""
        Path(path).write_text(json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> ExpertScores:
        """Reads what `save` wrote.

        Raises:
            ValueError: if the file is not a score file of a version that this release reads, or a field of it is
                missing, unknown or malformed.
        """
        try:
            record = json.loads(Path(path).read_text())
            version = record.pop("format_version")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is not a file written by ExpertScores.save") from error
        if version != FORMAT_VERSION:
            raise ValueError(f"{path} has format version {version}; this release reads version {FORMAT_VERSION}")
        where = str(path)
        scores: ExpertScores = _read(cls, record, _SCORES, where)
        containers: dict[str, ContainerScores] = {
            name: _read(ContainerScores, values, _CONTAINER, f"{where}: {name}")
            for name, values in record["containers"].items()
        }
        halves = [_read(HalfCounts, values, _HALVES, f"{where}: halves") for values in record["halves"]]
        for half in halves:
            if strangers := sorted(half.selected_pairs.keys() - containers.keys()):
                raise ValueError(f"{where}: halves names {strangers[:4]}, which are none of its containers")
        for name, container in containers.items():
            sums = (container.gate_weight_sum, container.token_share_sum, container.gate_share_sum)
            rows = [row for row in sums if row is not None]
            rows += [row for half in halves for row in half.selected_pairs.get(name, [[]])]
            if any(len(row) != container.num_experts for row in rows):
                raise ValueError(f"{where}: {name} has {container.num_experts} experts, but rows of another length")
        return replace(scores, containers=containers, halves=halves)

    def __repr__(self) -> str:
        shapes = sorted({(c.num_experts, c.top_k) for c in self.containers.values()})
        return (
            f"ExpertScores({len(self.containers)} containers of (experts, top_k) {shapes}, {self.num_tokens:,} tokens "
            f"in {self.num_samples:,} samples, averaging={self.averaging!r}, model={self.model!r})"
        )

    def _fits(self, other: ExpertScores) -> bool:
        pairs = [(c, other.containers.get(path)) for path, c in self.containers.items()]
        return len(self.containers) == len(other.containers) and all(
            d is not None and c.num_experts == d.num_experts and (c.top_k == d.top_k or 0 in (c.top_k, d.top_k))
            for c, d in pairs
        )

    def _signature(self) -> dict[str, tuple[int, int]]:
        return {path: (c.num_experts, c.top_k) for path, c in self.containers.items()}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_sum(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _row_of(is_right: _Check) -> _Check:
    return lambda value: isinstance(value, list) and len(value) > 0 and all(map(is_right, value))


def _pair_of(is_right: _Check) -> _Check:
    return lambda value: _row_of(is_right)(value) and len(value) == 2


def _by_path(is_right: _Check) -> _Check:
    return lambda value: isinstance(value, dict) and len(value) > 0 and all(map(is_right, value.values()))


def _or_none(is_right: _Check) -> _Check:
    return lambda value: value is None or is_right(value)


_SUMS = _row_of(_is_sum)
_CONTAINER: dict[str, _Check] = {
    **dict.fromkeys(("top_k", "num_tokens", "num_samples", "parameters_per_expert"), _is_count),
    "selected_pairs": _row_of(_is_count),
    "token_share_sum": _SUMS,
    **dict.fromkeys(("gate_weight_sum", "gate_share_sum"), _or_none(_SUMS)),
}
_HALVES: dict[str, _Check] = {
    "num_tokens": _pair_of(_is_count),
    "selected_pairs": _by_path(_pair_of(_row_of(_is_count))),
}
_SCORES: dict[str, _Check] = {
    "containers": _by_path(lambda value: isinstance(value, dict)),
    **dict.fromkeys(("num_tokens", "num_samples"), _is_count),
    "averaging": lambda value: value in get_args(Averaging),
    **dict.fromkeys(("model", "revision"), _or_none(lambda value: isinstance(value, str))),
    "answers_only": lambda value: isinstance(value, bool),
    "halves": lambda value: isinstance(value, list),
}


def _read(kind: Any, values: Any, checks: Mapping[str, _Check], where: str) -> Any:
    """Makes an object of a part of a file.

    Raises:
        ValueError: if it has other fields, or one of them another type.
    """
    found = sorted(values) if isinstance(values, dict) else type(values).__name__
    if found != sorted(checks):
        raise ValueError(f"{where} holds the fields {found}; expected {sorted(checks)}")
    for name, is_right in checks.items():
        if not is_right(values[name]):
            raise ValueError(f"{where}: {name} is malformed: {str(values[name])[:100]}")
    return kind(**values)


def _mean(sums: list[float] | list[int], count: int) -> Tensor:
    return torch.tensor(sums, dtype=torch.float64) / max(1, count)


def _sample(signature: Mapping[str, Any]) -> str:
    shown = dict(list(signature.items())[:2])
    return f"{shown}{' ...' if len(signature) > len(shown) else ''}"
