"""Measures which experts a task uses, by forward passes without gradients, in constant memory."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from functools import reduce
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..moe.containers import ExpertsContainer, find_experts, no_experts
from ..moe.routing import Routing
from .batches import batch_size_of, check_batch, is_encoder_decoder, text_batches, to_device, with_decoder_inputs
from .counted_tokens import TokenStream, streams_of_batch
from .model_sizes import ModelSizes
from .processes import ProcessShare, batches_in_step
from .scores import Averaging, ContainerScores, ExpertScores, HalfCounts
from .watching import watching_routing


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIRST_CHECKPOINT = 1024  # tokens; the next ones follow at each doubling
_BATCHES_ON_DEVICE = 64  # whose sums are brought to the host together


class RoutingAccumulator:
    """Sums up the routing of one experts module, batch by batch, on the device where the routing is computed.

    Memory is constant in the number of tokens. The host waits once in many batches: it adds their sums up in float64,
    which not every device has.
    """

    def __init__(self, num_experts: int, parameters_per_expert: int = 1) -> None:
        self.num_experts = num_experts
        self.parameters_per_expert = parameters_per_expert
        self.top_k = self.num_tokens = self.num_samples = 0
        self.sees_gates = True
        self._place_on(torch.device("cpu"))

    def _place_on(self, device: torch.device) -> None:
        # The device of the container's weights may be another one: they may be offloaded.
        self.device = device
        # One row for the samples of even number, one for those of odd number.
        self.half_pairs = torch.zeros(2, self.num_experts, dtype=torch.int64, device=device)
        # Of gate weights, of each sample's share of tokens and of gate weights, `[3, E]`: so far, and of each batch.
        self._sums = torch.zeros(3, self.num_experts, dtype=torch.float64)
        self._batches: list[Tensor] = []
        self._dtype = torch.float64 if device.type == "cpu" else torch.float32

    def update(self, routing: Routing, stream: TokenStream) -> None:
        """Counts one batch: the routing of the tokens of a stream.

        A pair counts unless its weight is 0 or less: routers that skip an expert send it with weight 0. A NaN makes
        the sums of the gates NaN, which `score_experts` refuses.
        """
        top_k_index, top_k_weights = routing.top_k_index, routing.top_k_weights
        if self.num_tokens == 0 and top_k_index.device != self.device:
            self._place_on(top_k_index.device)
        sample_of_token, lengths, half_of_sample = stream.on(top_k_index.device)
        self._add_tokens(stream, routing.top_k)
        num_samples = lengths.shape[0]
        counted = (sample_of_token[:, None] >= 0) & ~(top_k_weights <= 0) & (top_k_index < self.num_experts)
        # Pairs that do not count go to a bin of their own: no shape depends on the data, so nothing waits for it.
        bins = sample_of_token[:, None] * self.num_experts + top_k_index
        bins = torch.where(counted, bins, num_samples * self.num_experts).reshape(-1)
        gates = torch.where(counted, top_k_weights, 0).reshape(-1).to(self._dtype)

        def sum_in_bins(values: Tensor) -> Tensor:
            sums = torch.zeros(num_samples * self.num_experts + 1, dtype=values.dtype, device=values.device)
            return sums.index_add(0, bins, values)[:-1].view(num_samples, self.num_experts)

        pairs, gate_sums = sum_in_bins(torch.ones_like(bins)), sum_in_bins(gates)
        tokens = lengths.clamp(min=1)[:, None].to(self._dtype)
        self.half_pairs.index_add_(0, half_of_sample, pairs)
        sums = (gate_sums.sum(0), (pairs / (tokens * routing.top_k)).sum(0), (gate_sums / tokens).sum(0))
        self._batches.append(torch.stack(sums))
        if len(self._batches) == _BATCHES_ON_DEVICE:
            self._add_batches()

    def update_counts(self, pairs: list[int], stream: TokenStream) -> None:
        """Counts a batch of one sample, all of whose tokens count, where only each expert's number of tokens is known.

        `pairs` has `E` such numbers.
        """
        self.sees_gates = False
        self._add_tokens(stream, -(-sum(pairs) // stream.num_tokens))
        row = torch.tensor(pairs)
        self.half_pairs[int(stream.half_of_sample[0])] += row.to(self.device, non_blocking=True)
        self._sums[1] += row.double() / (stream.num_tokens * self.top_k)

    def _add_tokens(self, stream: TokenStream, top_k: int) -> None:
        self.top_k = max(self.top_k, top_k)
        self.num_tokens += stream.num_tokens
        self.num_samples += stream.num_samples

    def _add_batches(self) -> None:
        if self._batches:
            self._sums += torch.stack(self._batches).cpu().double().sum(0)
            self._batches.clear()

    def result(self) -> ContainerScores:
        """The sums so far, on the host."""
        self._add_batches()
        gate_weights, token_shares, gate_shares = self._sums.tolist()
        return ContainerScores(
            self.top_k,
            self.num_tokens,
            self.num_samples,
            selected_pairs=self.half_pairs.sum(0).tolist(),
            gate_weight_sum=gate_weights if self.sees_gates else None,
            token_share_sum=token_shares,
            gate_share_sum=gate_shares if self.sees_gates else None,
            parameters_per_expert=self.parameters_per_expert,
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

    It counts the expert ids that are computed, and the values that multiply the experts' outputs. The model is scored
    with its active adapters, and is in eval mode for the time of the call. Other threads may call or score it too.

    If `torch.distributed` is initialised, call this function on every process, each with its own part of the data. The
    counts are summed, and every process returns the same scores. `max_tokens` is divided evenly. Processes that see
    the same batches (tensor parallelism) are counted once. Processes of a sharded model may have unequal numbers of
    batches.

    Args:
        model: a transformers model, with or without adapters.
        batches: dicts of tensors as the model's forward takes them; a row is a sample. `attention_mask` says which
            tokens count. In packed rows, samples begin where `position_ids` are 0. `labels` are not passed on. With
            `tokenizer`: strings, or rows as TRL takes them, see `text_batches`.
        tokenizer: makes batches of text.
        max_tokens: stop after exactly this many counted tokens; the paper's sample is 131,072.
        averaging: see `ExpertScores`.
        answers_only: count only tokens whose output enters the loss, which predict a token whose `labels` entry is not
            -100. With `tokenizer`, answers are completions, or what the chat template marks with `{% generation %}`.
        progress: show a progress bar.

    Returns:
        The scores of all experts modules.

    Raises:
        ValueError: if the model has no experts modules that can be scored, `batches` holds no tokens or something
            else than batches, the samples of an experts module's tokens are not known, or routing weights are NaN or
            infinite.

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
        raise ValueError(f"the model cannot be scored: {no_experts(model)}")
    if tokenizer is not None:
        batches = text_batches(batches, tokenizer, answers_only=answers_only)

    share = ProcessShare.of(model)
    max_tokens = share.of_tokens(max_tokens)
    counter = _Counter(model, containers, averaging, answers_only, max_tokens)
    with (
        watching_routing(model, containers, counter.see, counter.see_expert_call),
        tqdm(total=max_tokens, unit=" tokens", desc="Scoring experts", disable=not progress) as bar,
    ):
        for inputs, is_counted in batches_in_step(batches, counter.wants_more, share, model):
            before = counter.num_tokens
            counter.run(inputs, is_counted, share.in_step)
            bar.update(counter.num_tokens - before)
        bar.total = counter.num_tokens  # the data may end before `max_tokens`
        bar.refresh()
    config = getattr(model, "config", None)
    scores = ExpertScores(
        containers={path: accumulator.result() for path, accumulator in counter.accumulators.items()},
        num_tokens=counter.num_tokens,
        num_samples=counter.num_samples,
        averaging=averaging,
        model=getattr(config, "name_or_path", None) or None,
        revision=getattr(config, "_commit_hash", None),
        answers_only=answers_only,
        halves=counter.halves(),
        sizes=_sizes_of(model),
    )
    scores = reduce(operator.add, share.gather(scores))
    # From here on, all processes see the same scores, so all refuse them or none does.
    if scores.num_tokens == 0:
        raise ValueError(
            "no token of the batches counts; check that there are any, and their attention_mask and labels"
        )
    broken = [path for path, own in scores.containers.items() if not math.isfinite(sum(own.gate_weight_sum or [0.0]))]
    if broken:
        raise ValueError(
            f"the routing weights of {len(broken)} of {len(scores.containers)} experts modules are NaN or "
            f"infinite for some tokens; the first is {broken[0]}. Scores would be wrong. In fp16 this is often an "
            "overflow: score the model in bf16 or fp32. Otherwise look for NaN in its weights and in the batches"
        )
    return scores


def _sizes_of(model: nn.Module) -> ModelSizes | None:
    try:
        return ModelSizes.of(model)
    except ValueError:  # a router that does not say how many experts it chooses can be scored all the same
        return None


class _Counter:
    """Runs batches through a model and counts the routing that `watching_routing` reports."""

    def __init__(
        self,
        model: nn.Module,
        containers: Mapping[str, ExpertsContainer],
        averaging: Averaging,
        answers_only: bool,
        max_tokens: int,
    ) -> None:
        self.model = model
        self.averaging = averaging
        self.answers_only = answers_only
        self.max_tokens = max_tokens
        self.num_tokens = self.num_samples = 0
        self.accumulators = {
            path: RoutingAccumulator(container.num_experts, container.parameters_per_expert)
            for path, container in containers.items()
        }
        self._decoder = _decoder_path(model)
        self._decoder_tokens = self._num_rows = 0
        self._half_tokens = torch.zeros(2, dtype=torch.int64)
        self._halves: list[HalfCounts] = []
        self._next_checkpoint = FIRST_CHECKPOINT
        # Of the batch that is being run:
        self._is_counting = True
        self._batch_size = 0
        self._streams: dict[str, TokenStream] = {}
        self._other_streams: dict[int, TokenStream] = {}  # by number of tokens
        self._expert_calls: dict[str, list[int]] = {}

    def wants_more(self) -> bool:
        """True if more tokens are to be counted."""
        return self.num_tokens < self.max_tokens

    def run(self, inputs: Mapping[str, Any], is_counted: bool, in_step: bool) -> None:
        """Runs one batch. It is counted unless only other processes need it; `in_step` runs it in any case."""
        check_batch(inputs)
        if self._decoder is not None:
            inputs = with_decoder_inputs(inputs, self.model)
        self._is_counting = is_counted and self._start_batch(inputs)
        if self._is_counting or not is_counted or in_step:
            self.model(**to_device(inputs, self.model))
        if self._is_counting:
            self._end_batch()

    def see(self, container: ExpertsContainer, path: str, routing: Routing) -> None:
        """Counts one call of an experts module."""
        if self._is_counting:
            self.accumulators[container.path].update(routing, self._stream_of(path, routing))

    def see_expert_call(self, container: ExpertsContainer, expert_id: int, num_tokens: int) -> None:
        """Counts one call of an expert."""
        if self._is_counting:
            pairs = self._expert_calls.setdefault(container.path, [0] * container.num_experts)
            pairs[expert_id] += num_tokens

    def halves(self) -> list[HalfCounts]:
        """The counts of both halves each time that the tokens had doubled, and at the end."""
        if not self._halves or self._halves[-1].num_tokens != self._half_tokens.tolist():
            self._note_halves()
        return self._halves

    def _note_halves(self) -> None:
        pairs = {path: accumulator.half_pairs.tolist() for path, accumulator in self.accumulators.items()}
        self._halves.append(HalfCounts(self._half_tokens.tolist(), pairs))

    def _start_batch(self, inputs: Mapping[str, Any]) -> bool:
        """Finds the tokens of a batch that count; returns False if there are none."""
        remaining = {"text": self.max_tokens - self.num_tokens, "decoder": self.max_tokens - self._decoder_tokens}
        self._streams = streams_of_batch(inputs, remaining, self._num_rows, self.answers_only)
        self._other_streams, self._expert_calls = {}, {}
        self._batch_size = batch_size_of(inputs)
        self._num_rows += self._batch_size
        return "text" not in self._streams or self._streams["text"].num_tokens > 0

    def _end_batch(self) -> None:
        """Adds the tokens of a batch after its forward pass."""
        for path, pairs in self._expert_calls.items():
            self.accumulators[path].update_counts(pairs, self._stream_of_calls(path))
        # In a batch without text, the tokens of the first container that was called count in its place.
        text = self._streams.get("text", next(iter(self._other_streams.values()), None))
        if text is None:
            return
        self.num_tokens += text.num_tokens
        self.num_samples += text.num_samples
        self._decoder_tokens += self._streams["decoder"].num_tokens if "decoder" in self._streams else 0
        self._half_tokens.index_add_(0, text.half_of_sample, text.lengths)
        if self.num_tokens >= self._next_checkpoint:
            self._note_halves()
            self._next_checkpoint = 2 * self.num_tokens

    def _stream_name(self, path: str) -> str:
        return "decoder" if self._decoder is not None and path.startswith(f"{self._decoder}.") else "text"

    def _stream_of(self, path: str, routing: Routing) -> TokenStream:
        """The tokens that an experts module sees."""
        num_tokens = routing.top_k_index.shape[0]
        stream = self._streams.get(self._stream_name(path))
        if stream is not None and stream.sample_of_token.shape[0] == num_tokens:
            return stream
        # Tokens that are not the text's: an image's, for example. All of them count if their samples are known.
        batch_size = 1 if self._batch_size == 1 else routing.batch_size
        if batch_size != self._batch_size or (stream is not None and not stream.counts_all):
            raise ValueError(
                f"{path} receives {num_tokens} tokens for a batch of {self._batch_size} samples. They are not the "
                "tokens of input_ids, so it is not known which sample each belongs to. Use batches of one "
                "sample, without padding"
            )
        if num_tokens not in self._other_streams:
            stands_for_text = not self._streams and not self._other_streams
            remaining = self.max_tokens - self.num_tokens if stands_for_text else num_tokens
            counts = torch.ones(batch_size, num_tokens // batch_size, dtype=torch.bool)
            first_sample = self._num_rows - batch_size
            self._other_streams[num_tokens] = TokenStream.from_mask(counts, None, remaining, first_sample)
        return self._other_streams[num_tokens]

    def _stream_of_calls(self, path: str) -> TokenStream:
        """The tokens of an experts module where only the calls of its experts can be seen."""
        stream = self._streams[self._stream_name(path)]
        if not stream.counts_all or (self.averaging == "sample" and len(stream.lengths) > 1):
            raise ValueError(
                f"the router of {path} does not return its choices: the number of tokens of each expert is known, "
                "but not which tokens. Use batches of one sample in which all tokens count. With "
                "averaging='token', batches may be larger"
            )
        return stream


def _decoder_path(model: Any) -> str | None:
    """The path of the decoder in an encoder-decoder model."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not is_encoder_decoder(base):
        return None
    decoder = base.get_decoder()
    return next(path for path, module in base.named_modules() if module is decoder)
