"""Measures which experts a task uses: forward passes, no gradients, constant memory."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial, reduce
from typing import TYPE_CHECKING, Any, cast, get_args

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..moe.containers import ExpertsContainer, Place, find_experts
from ..moe.hooks import in_this_thread
from ..moe.routing import Routing
from ..moe.weights import ListedWeight
from .batches import batch_size_of, check_batch, is_encoder_decoder, text_batches, to_device, with_decoder_inputs
from .eval_mode import eval_mode
from .processes import ProcessShare, batches_in_step
from .scores import Averaging, ContainerScores, ExpertScores, HalfCounts
from .token_streams import TokenStream, streams_of_batch


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIRST_CHECKPOINT = 1024  # tokens; the next ones follow at each doubling


class RoutingAccumulator:
    """Sums up the routing of one container, on the device where it is computed, batch by batch.

    Memory is constant in the number of tokens; nothing is copied to the host before `result`.
    """

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self.top_k = self.num_tokens = self.num_samples = 0
        self.sees_gates = True
        self._place_on(torch.device("cpu"))

    def _place_on(self, device: torch.device) -> None:
        # Where the container's weights lie says nothing: they may be offloaded.
        self.device = device
        # By half: samples of even and of odd number.
        self.half_pairs = torch.zeros(2, self.num_experts, dtype=torch.int64, device=device)
        self.gate_weight_sum, self.token_share_sum, self.gate_share_sum = (
            torch.zeros(self.num_experts, dtype=torch.float64, device=device) for _ in range(3)
        )

    def update(self, routing: Routing, stream: TokenStream) -> None:
        """Counts one batch.

        A pair counts unless its weight is 0 or less: routers that skip an expert send it with weight 0. A NaN makes
        the sums of the gates NaN, which `score_experts` refuses.

        Args:
            routing: what was chosen for the tokens of the stream.
            stream: which of them count.
        """
        top_k_index, top_k_weights = routing.top_k_index, routing.top_k_weights
        if self.num_tokens == 0 and top_k_index.device != self.device:
            self._place_on(top_k_index.device)
        sample_of_token, lengths, half_of_sample = stream.on(top_k_index.device)
        self.top_k = max(self.top_k, routing.top_k)
        self.num_tokens += stream.num_tokens
        self.num_samples += stream.num_samples
        num_samples = lengths.shape[0]
        counted = (sample_of_token[:, None] >= 0) & ~(top_k_weights <= 0) & (top_k_index < self.num_experts)
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
        self.half_pairs.index_add_(0, half_of_sample, pairs)
        self.gate_weight_sum += gate_sums.sum(0)
        self.token_share_sum += (pairs / (tokens * routing.top_k)).sum(0)
        self.gate_share_sum += (gate_sums / tokens).sum(0)

    def update_counts(self, pairs: list[int], stream: TokenStream) -> None:
        """Counts a batch of which only the number of tokens that each expert got is known; it is one sample.

        Args:
            pairs: of each expert, `E` in all.
            stream: the tokens of the batch, all of which count.
        """
        self.sees_gates = False
        self.top_k = max(self.top_k, -(-sum(pairs) // stream.num_tokens))
        self.num_tokens += stream.num_tokens
        self.num_samples += stream.num_samples
        row = torch.tensor(pairs, device=self.half_pairs.device)
        self.half_pairs[int(stream.half_of_sample[0])] += row
        self.token_share_sum += row / (stream.num_tokens * self.top_k)

    def result(self) -> ContainerScores:
        """The sums so far, on the host."""
        return ContainerScores(
            top_k=self.top_k,
            num_tokens=self.num_tokens,
            num_samples=self.num_samples,
            selected_pairs=self.half_pairs.sum(0).tolist(),
            gate_weight_sum=self.gate_weight_sum.tolist() if self.sees_gates else None,
            token_share_sum=self.token_share_sum.tolist(),
            gate_share_sum=self.gate_share_sum.tolist() if self.sees_gates else None,
        )


def score_experts(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_tokens: int = 131_072,
    averaging: Averaging = "sample",
    answers_only: bool = False,
    progress: bool = True,
) -> ExpertScores:
    """Measures which experts a task uses, by forward passes over its training data.

    What counts is what is computed: the expert ids, and the values that multiply the experts' outputs, after whatever
    the router does to them. The model is scored as it is, active adapters included; it is put in eval mode for the
    time of the call. Other threads may call it meanwhile, or score it too.

    Where `torch.distributed` is initialised, call it on every process, each with its own part of the data: the counts
    are summed and every process returns the same scores. `max_tokens` is then shared out evenly. Processes that see
    the same batches (tensor parallelism) are counted once; those of a sharded model may have unequal numbers of them.

    Args:
        model: a transformers model, with or without adapters.
        batches: dicts of tensors as the model's forward takes them, rows being samples; `attention_mask` says which
            tokens count, and `position_ids` that start again at 0 say where a packed row's samples begin. `labels` are
            not passed on. With `tokenizer`: strings, or rows with a `text` or `messages` entry, see `text_batches`.
        tokenizer: makes batches of text.
        max_tokens: stop after exactly so many counted tokens; the paper's sample is 131,072.
        averaging: see `ExpertScores`.
        answers_only: count only tokens whose `labels` entry is not -100.
        progress: show a progress bar.

    Returns:
        The scores of all containers.

    Raises:
        ValueError: if the model has no experts containers that can be scored, `batches` holds no tokens or something
            else than batches, a container sees tokens of which it is not known whose they are, or routing weights are
            NaN or infinite.

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
    if tokenizer is not None:
        batches = text_batches(batches, tokenizer)

    share = ProcessShare.of(model)
    max_tokens = share.of_tokens(max_tokens)
    observer = _Observer(model, containers, averaging, answers_only, max_tokens)
    with (
        eval_mode(model),
        observer.watching(),
        torch.inference_mode(),
        tqdm(total=max_tokens, unit=" tokens", desc="Scoring experts", disable=not progress) as bar,
    ):
        for inputs, is_counted in batches_in_step(batches, observer.wants_more, share, model):
            before = observer.num_tokens
            if is_counted:
                observer.run(inputs, share.in_step)
            else:
                observer.run_uncounted(inputs)
            bar.update(observer.num_tokens - before)
    config = getattr(model, "config", None)
    scores = ExpertScores(
        containers={
            path: replace(accumulator.result(), parameters_per_expert=containers[path].parameters_per_expert)
            for path, accumulator in observer.accumulators.items()
        },
        num_tokens=observer.num_tokens,
        num_samples=observer.num_samples,
        averaging=averaging,
        model=getattr(config, "name_or_path", None) or None,
        revision=getattr(config, "_commit_hash", None),
        answers_only=answers_only,
        halves=observer.halves(),
    )
    scores = reduce(operator.add, share.gather(scores))
    if scores.num_tokens == 0:
        raise ValueError("the batches hold no token that counts; check that there are any, attention_mask and labels")
    _check_gates(scores)
    return scores


def _check_gates(scores: ExpertScores) -> None:
    """Refuses scores of a model that computed no numbers, on all processes alike."""
    broken = [path for path, own in scores.containers.items() if not math.isfinite(sum(own.gate_weight_sum or [0.0]))]
    if broken:
        raise ValueError(
            f"the routing weights in {len(broken)} of {len(scores.containers)} containers, the first of them "
            f"{broken[0]}, are NaN or infinite for some tokens, so nothing can be said of these. In fp16 an overflow "
            "is likely: score the model in bf16 or fp32. Otherwise look for NaN in its weights and in the batches"
        )


class _Observer:
    """Runs batches through a model and counts what hooks see at its containers."""

    def __init__(
        self,
        model: nn.Module,
        containers: dict[str, ExpertsContainer],
        averaging: Averaging,
        answers_only: bool,
        max_tokens: int,
    ) -> None:
        self.model = model
        self.containers = containers
        self.averaging = averaging
        self.answers_only = answers_only
        self.max_tokens = max_tokens
        self.num_tokens = self.num_samples = self._num_rows = 0
        self._decoder_tokens = 0
        self._is_counting = True
        self._decoder_path = _decoder_path(model)
        self._streams: dict[str, TokenStream] = {}
        self._batch_size = 0
        self._expert_calls: dict[str, list[int]] = {}
        self._half_tokens = torch.zeros(2, dtype=torch.int64)
        self._next_checkpoint = FIRST_CHECKPOINT
        self._noted: list[tuple[list[int], dict[str, Tensor]]] = []
        self.accumulators = {path: RoutingAccumulator(container.num_experts) for path, container in containers.items()}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks for the time of the context."""
        handles = [
            handle
            for container in self.containers.values()
            for place in container.places
            for handle in self._watch(container, place)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def wants_more(self) -> bool:
        """True if more tokens are to be counted."""
        return self.num_tokens < self.max_tokens

    def run_uncounted(self, inputs: Mapping[str, Any]) -> None:
        """Runs a batch for the sake of other processes."""
        self._is_counting = False
        self.model(**to_device(self._with_all_streams(inputs), self.model))
        self._is_counting = True

    def _with_all_streams(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        check_batch(inputs)
        return inputs if self._decoder_path is None else with_decoder_inputs(inputs, self.model)

    def run(self, inputs: Mapping[str, Any], in_step: bool = False) -> None:
        """Scores one batch; `in_step` runs it even if no token of it counts."""
        inputs = self._with_all_streams(inputs)
        remaining = {"text": self.max_tokens - self.num_tokens, "decoder": self.max_tokens - self._decoder_tokens}
        self._streams = streams_of_batch(inputs, remaining, self._num_rows, self.answers_only)
        self._batch_size = batch_size_of(inputs)
        self._num_rows += self._batch_size
        text = self._streams.get("text")
        if text is not None and text.num_tokens == 0:
            if in_step:
                self.run_uncounted(inputs)
            return
        before = {path: accumulator.num_tokens for path, accumulator in self.accumulators.items()}
        self._expert_calls = {}
        self.model(**to_device(inputs, self.model))
        for path, pairs in self._expert_calls.items():
            self.accumulators[path].update_counts(pairs, self._stream_of_calls(path))
        if text is None:
            text = self._stand_in_for_text(before)
        if text is None:
            return
        self.num_tokens += text.num_tokens
        self.num_samples += text.num_samples
        self._decoder_tokens += self._streams["decoder"].num_tokens if "decoder" in self._streams else 0
        self._half_tokens.index_add_(0, text.half_of_sample, text.lengths)
        if self.num_tokens >= self._next_checkpoint:
            self._note_halves()
            self._next_checkpoint = 2 * self.num_tokens

    def halves(self) -> list[HalfCounts]:
        """What was noted of the halves as the tokens doubled, and the counts at the end."""
        if not self._noted or self._noted[-1][0] != self._half_tokens.tolist():
            self._note_halves()
        return [HalfCounts(tokens, {path: p.tolist() for path, p in pairs.items()}) for tokens, pairs in self._noted]

    def _note_halves(self) -> None:
        """Keeps the counts of the halves as they are now, on their devices."""
        pairs = {path: accumulator.half_pairs.clone() for path, accumulator in self.accumulators.items()}
        self._noted.append((self._half_tokens.tolist(), pairs))

    def _watch(self, container: ExpertsContainer, place: Place) -> list[Any]:
        source = container.routing
        if source is None:
            # Such containers are lists of modules, whose weights are all listed in the same order.
            experts = cast(ListedWeight, container.weights[0]).expert_modules(place.module)
            return [
                expert.register_forward_pre_hook(self._call_hook(container, number))
                for number, expert in enumerate(experts)
            ]
        return [source.watch(place.watched(source), partial(self._see, container.path, place.path))]

    def _see(self, container_path: str, path: str, routing: Routing) -> None:
        if self._is_counting:
            self.accumulators[container_path].update(routing, self._stream_of(path, routing))

    def _call_hook(self, container: ExpertsContainer, expert_id: int) -> Any:
        @in_this_thread
        def observe(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            if not self._is_counting:
                return
            pairs = self._expert_calls.setdefault(container.path, [0] * container.num_experts)
            pairs[expert_id] += arguments[0].shape[:-1].numel()

        return observe

    def _stream_of(self, path: str, routing: Routing) -> TokenStream:
        """The stream that a container's tokens are."""
        num_tokens = routing.top_k_index.shape[0]
        in_decoder = self._decoder_path is not None and path.startswith(f"{self._decoder_path}.")
        stream = self._streams.get("decoder" if in_decoder else "text")
        if stream is not None and stream.sample_of_token.shape[0] == num_tokens:
            return stream
        # Tokens that are not the text's: an image's, for example. All of them count if it is clear whose they are.
        batch_size = 1 if self._batch_size == 1 else routing.batch_size
        if batch_size != self._batch_size or (stream is not None and not stream.counts_all):
            raise ValueError(
                f"{path} sees {num_tokens} tokens of a batch of {self._batch_size} samples, which are not those of "
                "input_ids; whose they are is not known. Score such data in batches of one sample, without padding"
            )
        name = f"{num_tokens} other tokens"
        if name not in self._streams:
            remaining = self.max_tokens - self.num_tokens if not self._streams else num_tokens
            counts = torch.ones(batch_size, num_tokens // batch_size, dtype=torch.bool)
            self._streams[name] = TokenStream.from_mask(counts, None, remaining, self._num_rows - batch_size)
        return self._streams[name]

    def _stream_of_calls(self, path: str) -> TokenStream:
        """The stream of a container of which only the calls of its experts can be seen."""
        in_decoder = self._decoder_path is not None and path.startswith(f"{self._decoder_path}.")
        stream = self._streams["decoder" if in_decoder else "text"]
        if not stream.counts_all or (self.averaging == "sample" and len(stream.lengths) > 1):
            raise ValueError(
                f"the router of {path} returns no choice of experts, so how many tokens each expert gets can be seen, "
                "but not which. Score in batches of one sample, of which all tokens count; with averaging='token' "
                "batches may be larger"
            )
        return stream

    def _stand_in_for_text(self, before: dict[str, int]) -> TokenStream | None:
        """What stands for the text in a batch without any: the tokens of the first container that saw some."""
        for name, stream in self._streams.items():
            if name.endswith("other tokens") and any(self.accumulators[p].num_tokens > n for p, n in before.items()):
                return stream
        return None


def _decoder_path(model: Any) -> str | None:
    """Where the decoder of an encoder-decoder model is."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not is_encoder_decoder(base):
        return None
    decoder = base.get_decoder()
    return next(path for path, module in base.named_modules() if module is decoder)
