"""Measures which experts a task uses: forward passes, no gradients, constant memory."""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import reduce
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm.auto import tqdm

from .containers import ExpertsContainer, find_experts
from .selection import Metric


Averaging = Literal["sample", "token"]
FORMAT_VERSION = 1
FIRST_CHECKPOINT = 1024  # tokens; the next ones follow at each doubling
IGNORED_LABEL = -100  # what the losses of transformers leave out


@dataclass(frozen=True)
class ContainerScores:
    """What was observed at one container.

    Attributes:
        top_k: experts for each token; 0 if the container was never called.
        selected_pairs: how often each of the `E` experts was chosen.
        gate_weight_sum: sum of the values that multiplied each expert's output.
        token_share_sum: sum over samples of each sample's share of choices (its mean over tokens, divided by top_k).
        gate_share_sum: sum over samples of each sample's mean gate value.
        parameters_per_expert: number of weights of one expert.
    """

    top_k: int
    selected_pairs: list[int]
    gate_weight_sum: list[float]
    token_share_sum: list[float]
    gate_share_sum: list[float]
    parameters_per_expert: int = 1

    @property
    def num_experts(self) -> int:
        """Number of experts, `E`."""
        return len(self.selected_pairs)

    def __add__(self, other: ContainerScores) -> ContainerScores:
        sums: dict[str, Any] = {
            name: [a + b for a, b in zip(getattr(self, name), getattr(other, name), strict=True)]
            for name in ("selected_pairs", "gate_weight_sum", "token_share_sum", "gate_share_sum")
        }
        return replace(self, top_k=max(self.top_k, other.top_k), **sums)


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
        num_tokens: tokens counted (padding is not).
        num_samples: samples counted: rows of the batches with at least one counted token.
        averaging: "sample" for the paper's equations, the mean over samples of each sample's mean over tokens;
            "token" for the released code's flat mean over tokens. They agree where all samples are equally long.
        model: name of the scored model, for the record.
        halves: the counts of two disjoint halves of the samples, each time that the tokens had doubled and at the end.
    """

    containers: dict[str, ContainerScores]
    num_tokens: int
    num_samples: int
    averaging: Averaging = "sample"
    model: str | None = None
    halves: list[HalfCounts] = field(default_factory=list, repr=False)

    def token(self) -> dict[str, Tensor]:
        """Token selection ratio `r_i` (arXiv 2407.01906, equation 6), float64 `[E]`; sums to 1 over a container."""
        if self.averaging == "sample":
            return self._per_sample("token_share_sum")
        return {
            path: torch.tensor(c.selected_pairs, dtype=torch.float64) / max(1, self.num_tokens * c.top_k)
            for path, c in self.containers.items()
        }

    def gate(self) -> dict[str, Tensor]:
        """Average gate score `g_i` (arXiv 2407.01906, equation 5), float64 `[E]`; its sum depends on the router."""
        if self.averaging == "sample":
            return self._per_sample("gate_share_sum")
        return {
            path: torch.tensor(c.gate_weight_sum, dtype=torch.float64) / max(1, self.num_tokens)
            for path, c in self.containers.items()
        }

    def parameters_per_expert(self) -> dict[str, int]:
        """Number of weights of one expert of each container."""
        return {path: c.parameters_per_expert for path, c in self.containers.items()}

    def by_metric(self, metric: Metric) -> dict[str, Tensor]:
        """`token()` or `gate()`, by name."""
        return self.token() if metric == "token" else self.gate()

    def __add__(self, other: ExpertScores) -> ExpertScores:
        """Joins two runs over different data of the same model.

        Raises:
            ValueError: if the two runs differ in containers, experts, top_k or averaging.
        """
        if not isinstance(other, ExpertScores):
            return NotImplemented
        if self.averaging != other.averaging:
            raise ValueError(f"cannot join scores averaged by {self.averaging} and by {other.averaging}")
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
            model=self.model if self.model == other.model else None,
            halves=self.halves + [self.halves[-1] + half for half in other.halves] if self.halves else other.halves,
        )

    def to_dataframe(self) -> Any:
        """A `pandas.DataFrame` with a row for each expert: container, expert, selected_pairs, token, gate."""
        import pandas as pd

        token, gate = self.token(), self.gate()
        return pd.DataFrame(
            {
                "container": path,
                "expert": expert,
                "selected_pairs": pairs,
                "token": float(token[path][expert]),
                "gate": float(gate[path][expert]),
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
            ValueError: if the file is not a score file of a version that this release reads.
        """
        try:
            record = json.loads(Path(path).read_text())
            version = record.pop("format_version")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a file written by ExpertScores.save") from error
        if version != FORMAT_VERSION:
            raise ValueError(f"{path} has format version {version}; this release reads version {FORMAT_VERSION}")
        expected = {item.name for item in fields(cls)}
        if set(record) != expected:
            raise ValueError(f"{path} holds the fields {sorted(record)}; expected {sorted(expected)}")
        containers = {path_: ContainerScores(**values) for path_, values in record.pop("containers").items()}
        halves = [HalfCounts(**values) for values in record.pop("halves")]
        return cls(containers=containers, halves=halves, **record)

    def __repr__(self) -> str:
        shapes = sorted({(c.num_experts, c.top_k) for c in self.containers.values()})
        return (
            f"ExpertScores({len(self.containers)} containers of (experts, top_k) {shapes}, {self.num_tokens:,} tokens "
            f"in {self.num_samples:,} samples, averaging={self.averaging!r}, model={self.model!r})"
        )

    def _per_sample(self, name: str) -> dict[str, Tensor]:
        return {
            path: torch.tensor(getattr(c, name), dtype=torch.float64) / max(1, self.num_samples)
            for path, c in self.containers.items()
        }

    def _fits(self, other: ExpertScores) -> bool:
        pairs = [(c, other.containers.get(path)) for path, c in self.containers.items()]
        return len(self.containers) == len(other.containers) and all(
            d is not None and c.num_experts == d.num_experts and (c.top_k == d.top_k or 0 in (c.top_k, d.top_k))
            for c, d in pairs
        )

    def _signature(self) -> dict[str, tuple[int, int]]:
        return {path: (c.num_experts, c.top_k) for path, c in self.containers.items()}


class RoutingAccumulator:
    """Sums up the routing of one container, on its device, batch by batch.

    Memory is constant in the number of tokens; nothing is copied to the host before `result`.
    """

    def __init__(self, num_experts: int, device: torch.device) -> None:
        self.num_experts = num_experts
        self.top_k = 0
        # By half: samples of even and of odd number.
        self.half_pairs = torch.zeros(2, num_experts, dtype=torch.int64, device=device)
        self.gate_weight_sum, self.token_share_sum, self.gate_share_sum = (
            torch.zeros(num_experts, dtype=torch.float64, device=device) for _ in range(3)
        )

    def update(
        self,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        sample_of_token: Tensor,
        lengths: Tensor,
        half_of_sample: Tensor | None = None,
    ) -> None:
        """Counts one batch.

        A pair counts if its weight is above 0: routers that skip an expert send it with weight 0.

        Args:
            top_k_index: int64 `[T, K]`.
            top_k_weights: `[T, K]`.
            sample_of_token: int64 `[T]`, the sample of each token; -1 for a token that does not count.
            lengths: int64 `[samples]`, counted tokens of each sample.
            half_of_sample: int64 `[samples]` of 0 and 1; None puts all samples into the first half.
        """
        self.top_k = top_k_index.shape[1]
        num_samples = lengths.shape[0]
        counted = (sample_of_token[:, None] >= 0) & (top_k_weights > 0) & (top_k_index < self.num_experts)
        # Pairs that do not count go to a bin of their own: no shape depends on the data, so nothing waits for it.
        bins = sample_of_token[:, None] * self.num_experts + top_k_index
        bins = torch.where(counted, bins, num_samples * self.num_experts).reshape(-1)
        gates = torch.where(counted, top_k_weights, 0).reshape(-1).to(torch.float64)
        num_bins = num_samples * self.num_experts + 1
        pairs = torch.zeros(num_bins, dtype=torch.int64, device=bins.device)
        pairs = pairs.index_add(0, bins, torch.ones_like(bins))[:-1].view(num_samples, self.num_experts)
        gate_sums = torch.zeros(num_bins, dtype=torch.float64, device=bins.device)
        gate_sums = gate_sums.index_add(0, bins, gates)[:-1].view(num_samples, self.num_experts)

        tokens = lengths.clamp(min=1)[:, None].to(torch.float64)
        half_of_sample = torch.zeros_like(lengths) if half_of_sample is None else half_of_sample
        self.half_pairs.index_add_(0, half_of_sample, pairs)
        self.gate_weight_sum += gate_sums.sum(0)
        self.token_share_sum += (pairs / (tokens * self.top_k)).sum(0)
        self.gate_share_sum += (gate_sums / tokens).sum(0)

    def result(self) -> ContainerScores:
        """The sums so far, on the host."""
        return ContainerScores(
            top_k=self.top_k,
            selected_pairs=self.half_pairs.sum(0).tolist(),
            gate_weight_sum=self.gate_weight_sum.tolist(),
            token_share_sum=self.token_share_sum.tolist(),
            gate_share_sum=self.gate_share_sum.tolist(),
        )


@dataclass
class _Batch:
    """The batch that is going through the model: which of its tokens count, and to which sample they belong."""

    sample_of_token: Tensor
    lengths: Tensor
    half_of_sample: Tensor
    _by_device: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    def on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        if device not in self._by_device:
            tensors = (self.sample_of_token, self.lengths, self.half_of_sample)
            self._by_device[device] = tuple(tensor.to(device) for tensor in tensors)  # type: ignore[assignment]
        return self._by_device[device]


def score_experts(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    max_tokens: int = 131_072,
    averaging: Averaging = "sample",
    answers_only: bool = False,
    progress: bool = True,
) -> ExpertScores:
    """Measures which experts a task uses, by forward passes over its training data.

    What counts is what reaches the experts container: the expert ids, and the values that multiply the experts'
    outputs, after whatever the router does to them. The model is scored as it is, active adapters included; it is put
    in eval mode for the time of the call.

    Where `torch.distributed` is initialised, call it on every process, each with its own part of the data: the counts
    are summed and every process returns the same scores. `max_tokens` is then shared out evenly.

    Args:
        model: a transformers model, with or without adapters.
        batches: dicts of tensors as the model's forward takes them, rows being samples; `attention_mask` says which
            tokens count. A `labels` entry is not passed on.
        max_tokens: stop after exactly so many counted tokens; the paper's sample is 131,072.
        averaging: see `ExpertScores`.
        answers_only: count only tokens whose `labels` entry is not -100.
        progress: show a progress bar.

    Returns:
        The scores of all containers.

    Raises:
        ValueError: if the model has no experts containers that can be scored, `batches` holds no tokens, or a
            container sees tokens in another number than the batch has.

    Example:
        >>> scores = score_experts(model, loader)
        >>> scores.token()["model.layers.0.mlp.experts"].sum()
        tensor(1., dtype=torch.float64)
    """
    if averaging not in get_args(Averaging):
        raise ValueError(f"averaging is {averaging!r}; it is one of {get_args(Averaging)}")
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}; it is at least 1")
    containers = find_experts(model)
    if not containers:
        raise ValueError(f"{type(model).__name__} has no experts container of a known kind; nothing can be scored")

    processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if processes > 1:
        max_tokens = max_tokens // processes + (dist.get_rank() < max_tokens % processes)
    num_tokens = num_samples = num_rows = 0
    next_checkpoint = FIRST_CHECKPOINT
    was_training = model.training
    model.eval()
    try:
        with (
            _observing(containers) as observer,
            torch.inference_mode(),
            tqdm(total=max_tokens, unit=" tokens", desc="Scoring experts", disable=not progress) as bar,
        ):
            for inputs in batches:
                if num_tokens >= max_tokens:
                    break
                batch = _count_batch(inputs, max_tokens - num_tokens, num_rows, answers_only)
                counted = int(batch.lengths.sum())
                num_rows += len(batch.lengths)
                if counted == 0:
                    continue
                observer.batch = batch
                model(**_to_device(inputs, model))
                num_tokens += counted
                num_samples += int((batch.lengths > 0).sum())
                bar.update(counted)
                observer.half_tokens.index_add_(0, batch.half_of_sample, batch.lengths)
                if num_tokens >= next_checkpoint:
                    observer.note_halves()
                    next_checkpoint = 2 * num_tokens
    finally:
        model.train(was_training)
    scores = ExpertScores(
        containers={
            path: replace(accumulator.result(), parameters_per_expert=containers[path].parameters_per_expert)
            for path, accumulator in observer.accumulators.items()
        },
        num_tokens=num_tokens,
        num_samples=num_samples,
        averaging=averaging,
        model=getattr(getattr(model, "config", None), "name_or_path", None) or None,
        halves=observer.halves(),
    )
    if processes > 1:
        gathered: list[Any] = [None] * processes
        dist.all_gather_object(gathered, scores)
        scores = reduce(operator.add, gathered)
    if scores.num_tokens == 0:
        raise ValueError("the batches hold no token that counts; check that there are any, attention_mask and labels")
    return scores


class _Observer:
    """The pre-hooks' shared state: the batch under way and an accumulator for each container."""

    def __init__(self, containers: dict[str, ExpertsContainer]) -> None:
        self.batch: _Batch | None = None
        self.half_tokens = torch.zeros(2, dtype=torch.int64)
        self._noted: list[tuple[list[int], dict[str, Tensor]]] = []
        self.accumulators = {
            path: RoutingAccumulator(container.num_experts, container.module.down_proj.device)
            for path, container in containers.items()
        }

    def note_halves(self) -> None:
        """Keeps the counts of the halves as they are now, on their devices."""
        pairs = {path: accumulator.half_pairs.clone() for path, accumulator in self.accumulators.items()}
        self._noted.append((self.half_tokens.tolist(), pairs))

    def halves(self) -> list[HalfCounts]:
        """What was noted, and the counts at the end."""
        if not self._noted or self._noted[-1][0] != self.half_tokens.tolist():
            self.note_halves()
        return [HalfCounts(tokens, {path: p.tolist() for path, p in pairs.items()}) for tokens, pairs in self._noted]

    def hook(self, path: str) -> Any:
        def observe(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            names = ("hidden_states", "top_k_index", "top_k_weights")
            bound = {**dict(zip(names, arguments, strict=False)), **keywords}
            index, weights = bound["top_k_index"], bound["top_k_weights"]
            if self.batch is None:
                return
            sample_of_token, lengths, half_of_sample = self.batch.on(index.device)
            if index.shape[0] != sample_of_token.shape[0]:
                raise ValueError(
                    f"{path} was called with {index.shape[0]} tokens for a batch of {sample_of_token.shape[0]}; the "
                    "tokens of such a container cannot be told apart"
                )
            self.accumulators[path].update(index, weights, sample_of_token, lengths, half_of_sample)

        return observe


@contextmanager
def _observing(containers: dict[str, ExpertsContainer]) -> Iterator[_Observer]:
    observer = _Observer(containers)
    handles = [
        container.wrapper_or_module.register_forward_pre_hook(observer.hook(path), with_kwargs=True)
        for path, container in containers.items()
    ]
    try:
        yield observer
    finally:
        for handle in handles:
            handle.remove()


def _count_batch(inputs: Mapping[str, Any], remaining: int, first_sample: int, answers_only: bool) -> _Batch:
    """Which tokens of a batch count, at most `remaining` of them, in the order of the batch."""
    tokens = inputs.get("input_ids")
    if tokens is None:
        tokens = inputs.get("inputs_embeds")
    if tokens is None:
        raise ValueError(f"a batch has neither input_ids nor inputs_embeds, only {sorted(inputs)}")
    num_samples, length = tokens.shape[:2]
    mask = inputs.get("attention_mask")
    counts = torch.ones(num_samples, length, dtype=torch.bool) if mask is None else mask.bool().cpu()
    if counts.shape != (num_samples, length):
        raise ValueError(f"attention_mask has shape {tuple(counts.shape)}; expected {(num_samples, length)}")
    if answers_only:
        if inputs.get("labels") is None:
            raise ValueError(f"answers_only needs labels in every batch; this one has {sorted(inputs)}")
        counts = counts & (inputs["labels"].cpu() != IGNORED_LABEL)
    counts = counts & (counts.reshape(-1).cumsum(0).view_as(counts) <= remaining)
    samples = torch.arange(num_samples)[:, None].expand(num_samples, length)
    halves = (first_sample + torch.arange(num_samples)) % 2
    return _Batch(torch.where(counts, samples, -1).reshape(-1), counts.sum(1), halves)


def _to_device(inputs: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    device = next(model.parameters()).device
    return {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
        if name != "labels"
    }


def _sample(signature: dict[str, tuple[int, int]]) -> str:
    shown = dict(list(signature.items())[:2])
    return f"{shown}{' ...' if len(signature) > len(shown) else ''}"
