"""Holds, joins, saves and loads scores: how often a task chose each expert, and with what weight."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

import torch
from huggingface_hub.dataclasses import type_validator
from torch import Tensor

from .model_sizes import ModelSizes


if TYPE_CHECKING:
    from torch import nn

Averaging = Literal["sample", "token"]
Metric = Literal["token", "gate", "gate_share"]
Sums = list[float | int]
FORMAT_VERSION = 1


@dataclass(frozen=True)
class ContainerScores:
    """The counts of one container.

    Attributes:
        top_k: experts for each token; 0 if the container was never called.
        num_tokens: tokens counted here. They need not be those of the text: they may be a decoder's, for example.
        num_samples: samples that have these tokens.
        selected_pairs: how often each of the `E` experts was chosen.
        gate_weight_sum: for each expert, the sum of the values that multiplied its output; None if they could not be
            seen.
        token_share_sum: for each expert, the sum over samples of the sample's share of choices (the mean over its
            tokens, divided by top_k).
        gate_share_sum: for each expert, the sum over samples of the sample's mean gate value; None if gate values
            could not be seen.
        parameters_per_expert: number of weights of one expert.
    """

    top_k: int
    num_tokens: int
    num_samples: int
    selected_pairs: list[int]
    gate_weight_sum: Sums | None
    token_share_sum: Sums
    gate_share_sum: Sums | None
    parameters_per_expert: int = 1

    @property
    def num_experts(self) -> int:
        """Number of experts, `E`."""
        return len(self.selected_pairs)

    def __add__(self, other: ContainerScores) -> ContainerScores:
        return replace(
            self,
            top_k=max(self.top_k, other.top_k),
            num_tokens=self.num_tokens + other.num_tokens,
            num_samples=self.num_samples + other.num_samples,
            selected_pairs=_add(self.selected_pairs, other.selected_pairs),
            gate_weight_sum=_add(self.gate_weight_sum, other.gate_weight_sum),
            token_share_sum=_add(self.token_share_sum, other.token_share_sum),
            gate_share_sum=_add(self.gate_share_sum, other.gate_share_sum),
        )


@dataclass(frozen=True)
class HalfCounts:
    """The counts of two disjoint halves of the samples at one point of a run; see `analysis.stability_report`.

    Attributes:
        num_tokens: tokens of the first and of the second half.
        selected_pairs: by container path, how often each half chose each expert, two lists of `E`.
    """

    num_tokens: list[int]
    selected_pairs: dict[str, list[list[int]]]

    def __add__(self, other: HalfCounts) -> HalfCounts:
        pairs = {path: (halves, other.selected_pairs[path]) for path, halves in self.selected_pairs.items()}
        return HalfCounts(
            num_tokens=_add(self.num_tokens, other.num_tokens),
            selected_pairs={path: list(map(_add, own, others)) for path, (own, others) in pairs.items()},
        )


@dataclass(frozen=True)
class ExpertScores:
    """How often a task chose each expert, and with what weight.

    Attributes:
        containers: the counts of each container, by container path.
        num_tokens: tokens of the batches' text that were counted (padding is not).
        num_samples: samples with at least one counted token.
        averaging: "sample" for the paper's equations, the mean over samples of each sample's mean over tokens;
            "token" for the released code's flat mean over tokens. They agree where all samples are equally long.
        model: name of the scored model.
        revision: its commit on the Hub, if it came from there.
        answers_only: only tokens that are trained on were counted.
        halves: the counts of two disjoint halves of the samples, each time that the tokens doubled and at the end.
        sizes: of the model, for a budget of memory; None if they were not counted.
    """

    containers: dict[str, ContainerScores]
    num_tokens: int
    num_samples: int
    averaging: Averaging = "sample"
    model: str | None = None
    revision: str | None = None
    answers_only: bool = False
    halves: list[HalfCounts] = field(default_factory=list, repr=False)
    sizes: ModelSizes | None = field(default=None, repr=False)

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
            by_sample = self.averaging == "sample"
            sums, count = (c.gate_share_sum, c.num_samples) if by_sample else (c.gate_weight_sum, c.num_tokens)
            if sums is None:
                raise ValueError(
                    f"the gate values of {path} are not known, because its router returns no weights. Use "
                    "metric='token'"
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
        """The result of `token()`, `gate()` or `gate_share()`, by name."""
        return {"token": self.token, "gate": self.gate, "gate_share": self.gate_share}[metric]()

    def check_fits(self, model: nn.Module) -> None:
        """Checks that a model has the containers that were scored.

        Raises:
            ValueError: if containers differ in path or number of experts.
        """
        from ..moe.containers import find_experts

        own = {path: c.num_experts for path, c in self.containers.items()}
        found = {path: c.num_experts for path, c in find_experts(model).items()}
        if own != found:
            raise ValueError(
                f"these scores of {self.model or 'a model without a name'} do not fit {type(model).__name__}. "
                f"They are for these experts modules, with numbers of experts: {_sample(own)}. The model has "
                f"{_sample(found)}"
            )

    def __add__(self, other: ExpertScores) -> ExpertScores:
        """Joins two runs over different data of the same model.

        Raises:
            ValueError: if the two runs differ in containers, experts, top_k, averaging or the tokens that count.
        """
        if not isinstance(other, ExpertScores):
            return NotImplemented
        if self.averaging != other.averaging:
            raise ValueError(
                f"cannot join scores that are averaged differently: {self.averaging!r} and {other.averaging!r}"
            )
        if self.answers_only != other.answers_only:
            raise ValueError("cannot join scores of all tokens with scores of answers only")
        own, others = self._signature(), other._signature()
        if own.keys() != others.keys() or not all(_are_joinable(own[path], others[path]) for path in own):
            raise ValueError(
                f"cannot join scores of different models: the experts modules are {_sample(own)} and {_sample(others)}"
            )
        return replace(
            self,
            containers={path: c + other.containers[path] for path, c in self.containers.items()},
            num_tokens=self.num_tokens + other.num_tokens,
            num_samples=self.num_samples + other.num_samples,
            model=self.model if self.model == other.model else None,
            revision=self.revision if self.revision == other.revision else None,
            sizes=self.sizes or other.sizes,
            halves=self.halves + [self.halves[-1] + half for half in other.halves] if self.halves else other.halves,
        )

    def __radd__(self, other: object) -> ExpertScores:
        """Makes `sum` join runs: it starts from 0."""
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
            ValueError: if the file is not a score file, has a version that this release does not read, or has a field
                that is missing, unknown or malformed.
        """
        try:
            record = json.loads(Path(path).read_text())
            version = record.pop("format_version")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is not a file written by ExpertScores.save") from error
        if version != FORMAT_VERSION:
            raise ValueError(f"{path} has format version {version}; this release reads version {FORMAT_VERSION}")
        record.setdefault("sizes", None)  # files from before there were any
        in_file = {"containers": dict[str, dict[str, Any]], "halves": list, "sizes": dict[str, Any] | None}
        scores: ExpertScores = _read(cls, record, str(path), **in_file)
        if not record["containers"]:
            raise ValueError(f"{path}: containers is malformed: it is empty")
        containers = {
            name: _read(ContainerScores, values, f"{path}: {name}") for name, values in record["containers"].items()
        }
        halves = [_read(HalfCounts, values, f"{path}: halves") for values in record["halves"]]
        for half in halves:
            if len(half.num_tokens) != 2:
                raise ValueError(f"{path}: halves: num_tokens is malformed: {half.num_tokens}; expected two numbers")
            if strangers := sorted(half.selected_pairs.keys() - containers.keys()):
                raise ValueError(f"{path}: halves has {strangers[:4]}, but containers does not")
        for name, container in containers.items():
            sums = [container.gate_weight_sum, container.token_share_sum, container.gate_share_sum]
            pairs = [half.selected_pairs.get(name, []) for half in halves]
            lengths = {len(row) for row in chain(sums, *pairs) if row is not None}
            if lengths != {container.num_experts} or any(len(rows) != 2 for rows in pairs):
                raise ValueError(f"{path}: {name} has {container.num_experts} experts, but lists of another length")
        sizes = None if record["sizes"] is None else _read_sizes(record["sizes"], f"{path}: sizes")
        return replace(scores, containers=containers, halves=halves, sizes=sizes)

    def __repr__(self) -> str:
        shapes = sorted({(c.num_experts, c.top_k) for c in self.containers.values()})
        return (
            f"ExpertScores({len(self.containers)} containers of (experts, top_k) {shapes}, {self.num_tokens:,} tokens "
            f"in {self.num_samples:,} samples, averaging={self.averaging!r}, model={self.model!r})"
        )

    def _signature(self) -> dict[str, tuple[int, int]]:
        return {path: (c.num_experts, c.top_k) for path, c in self.containers.items()}


def _read(kind: Any, values: Any, where: str, **in_file: Any) -> Any:
    """Makes a dataclass of a part of a score file, which error messages call `where`.

    `in_file` has the types in the file of fields that have other types there; their values are not checked.

    Raises:
        ValueError: if a field is missing, unknown or of another type, or a number is negative or not finite.
    """
    types = get_type_hints(kind) | in_file
    found = sorted(values) if isinstance(values, dict) else type(values).__name__
    if found != sorted(types):
        raise ValueError(f"{where} has the fields {found}; expected {sorted(types)}")
    for name, expected in types.items():
        try:
            type_validator(name, values[name], expected)
            if name not in in_file:
                _check_values(values[name])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {name} is malformed: {str(values[name])[:100]}") from error
    return kind(**values)


def _read_sizes(values: dict[str, Any], where: str) -> ModelSizes:
    sizes: ModelSizes = _read(ModelSizes, values, where, units=list[int], unit_experts=list[int])
    units, experts = tuple(sizes.units), tuple(sizes.unit_experts)
    least = min((*units, *experts, sizes.scored_heads), default=0)
    counts = (sizes.total, sizes.expert, sizes.num_experts, sizes.top_k, sum(experts))
    if least < 0 or min(counts) < 1 or len(units) != len(experts) or sum(experts) > sizes.total:
        raise ValueError(f"{where} is malformed: {str(values)[:100]}")
    return replace(sizes, units=units, unit_experts=experts)


def _check_values(value: Any) -> None:
    """Refuses empty lists and dicts, and numbers in them that are negative or not finite."""
    if isinstance(value, list | dict):
        if not value:
            raise ValueError("it is empty")
        for item in value.values() if isinstance(value, dict) else value:
            _check_values(item)
    elif isinstance(value, int | float) and not 0 <= value < math.inf:
        raise ValueError(f"{value} is not a finite number of at least 0")


def _add(own: Any, others: Any) -> Any:
    """The sum of two lists, item by item; None if one of them is not known."""
    return None if own is None or others is None else [a + b for a, b in zip(own, others, strict=True)]


def _are_joinable(own: tuple[int, int], other: tuple[int, int]) -> bool:
    (num_experts, top_k), (other_num_experts, other_top_k) = own, other
    return num_experts == other_num_experts and (top_k == other_top_k or 0 in (top_k, other_top_k))


def _mean(sums: list[float] | list[int], count: int) -> Tensor:
    return torch.tensor(sums, dtype=torch.float64) / max(1, count)


def _sample(signature: Mapping[str, Any]) -> str:
    shown = dict(list(signature.items())[:2])
    return f"{shown}{' ...' if len(signature) > len(shown) else ''}"
