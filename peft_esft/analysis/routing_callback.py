"""Counts, in training, how the task's tokens spread over the experts and how many of them the trained ones take."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..moe.containers import ExpertsContainer, find_experts
from ..moe.routing import Routing
from ..scoring.batches import is_encoder_decoder
from ..scoring.counted_tokens import enters_loss
from ..scoring.watching import watch_place


logger = logging.getLogger(__name__)

SHOWN = 8  # layers of which a summary names experts


@dataclass(frozen=True)
class LayerRouting:
    """What the tokens of a training run chose in one layer.

    Attributes:
        selected: ids of the experts that are trained, sorted.
        pairs: for each expert the number of tokens that chose it, a list of `E` integers.
    """

    selected: list[int]
    pairs: list[int]

    @property
    def shares(self) -> list[float]:
        """The share of all choices that each expert took."""
        total = max(1, sum(self.pairs))
        return [pairs / total for pairs in self.pairs]

    @property
    def selected_share(self) -> float:
        """The share of all choices that the trained experts took."""
        return sum(self.shares[expert] for expert in self.selected)

    @property
    def effective_experts(self) -> float:
        """The number of experts that an even spread of the same entropy would use: between 1 and `E`."""
        return math.exp(-sum(share * math.log(share) for share in self.shares if share > 0))

    @property
    def hardly_used(self) -> list[int]:
        """The trained experts that took less than an even spread would give them, `1 / E` of the choices."""
        return [expert for expert in self.selected if self.shares[expert] * len(self.pairs) < 1]

    @property
    def came_up(self) -> list[int]:
        """The frozen experts that took more than a trained one does on average."""
        if not self.selected:
            return []
        mean = self.selected_share / len(self.selected)
        return [expert for expert, share in enumerate(self.shares) if share > mean and expert not in self.selected]


class RoutingCallback(TrainerCallback):
    """Logs how the task's tokens spread over the experts, and what share of their choices the trained experts take.

    Three numbers join the training loss in each log, as means over the layers since the log before:
    `experts/selected_share`, the smallest one of a layer as `experts/selected_share_min`, and
    `experts/effective`, the number of experts that an even spread of the same entropy would use. At the end of
    training a summary goes to the log of this module, as a warning: which trained experts were hardly used, and which
    frozen ones came up.

    Add it with `add_to`, which puts it before the trackers (TensorBoard, Weights & Biases and so on), so that they see
    its numbers too. Counting is a few operations on `[T, K]` integers in each layer and waits for nothing. With
    gradient checkpointing, the repetition of a forward pass is not counted. The counts of all processes are summed.

    Args:
        answers_only: count only tokens whose output enters the loss, as `score_experts` does.

    Example:
        >>> trainer = SFTTrainer(base, arguments, train_dataset=rows, peft_config=config)
        >>> routing = RoutingCallback.add_to(trainer)
        >>> trainer.train()
        >>> routing.layers["model.layers.0.mlp.experts"].selected_share
        0.31
    """

    def __init__(self, *, answers_only: bool = False) -> None:
        self.answers_only = answers_only
        self.layers: dict[str, LayerRouting] = {}
        self._containers: Mapping[str, ExpertsContainer] = {}
        self._selected: dict[str, list[int]] = {}
        self._handles: list[RemovableHandle] = []
        self._is_counting = False
        self._counted: Tensor | None = None  # which tokens of the batch count; None for all
        self._pairs: dict[str, Tensor] = {}  # since the last log

    @classmethod
    def add_to(cls, trainer: Any, *, answers_only: bool = False) -> RoutingCallback:
        """Adds the callback to a `Trainer`, before its other callbacks.

        Args:
            trainer: a `transformers.Trainer` or one of TRL's, whose model has an ESFT adapter.
            answers_only: see the class.

        Returns:
            The callback; `layers` has the counts after training.
        """
        callback = cls(answers_only=answers_only)
        trainer.callback_handler.callbacks.insert(0, callback)
        return callback

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts to count."""
        model: nn.Module = kwargs["model"]
        self._containers = find_experts(model)
        trained = _trained_experts(model)
        self._selected = {path: trained[path] for path in self._containers if path in trained}
        self.layers, self._pairs = {}, {}
        self._handles = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, always_call=True),
        ]
        for container in self._containers.values():
            for place in container.places:
                self._handles += watch_place(container, place, self._see, self._see_expert_call)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds the numbers to a log of the training loss."""
        if logs is None or "loss" not in logs or not self._handles:
            return
        recent = self._collect()
        if not recent:
            return
        shares = [layer.selected_share for path, layer in recent.items() if path in self._selected]
        numbers = {"experts/effective": fmean([layer.effective_experts for layer in recent.values()])}
        if shares:
            numbers |= {"experts/selected_share": fmean(shares), "experts/selected_share_min": min(shares)}
        logs.update(numbers)
        state.log_history[-1].update(numbers)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stops counting and says which experts the choice missed."""
        self._collect()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if state.is_world_process_zero and self.layers:
            logger.warning(self.summary())

    def summary(self) -> str:
        """What the tokens of the whole run chose, in a few lines."""
        chosen = {path: layer for path, layer in self.layers.items() if path in self._selected}
        if not chosen:
            return "no expert was trained, or no token was counted"
        shares = [layer.selected_share for layer in chosen.values()]
        lines = [
            f"the trained experts took {fmean(shares):.0%} of the choices in training "
            f"({min(shares):.0%} to {max(shares):.0%} in a layer)"
        ]
        for name, what in (
            ("hardly_used", "trained experts were hardly used (less than an even share of the choices)"),
            ("came_up", "frozen experts took more than the trained ones on average; score the training data again"),
        ):
            found = {path: getattr(layer, name) for path, layer in chosen.items() if getattr(layer, name)}
            if found:
                lines.append(f"{sum(map(len, found.values()))} {what}: {_listed(found)}")
        return "\n".join(lines)

    def _begin(self, model: nn.Module, arguments: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        self._is_counting = model.training
        is_decoder = is_encoder_decoder(model)
        self._counted = _counted_tokens(inputs, self.answers_only, is_decoder) if model.training else None

    def _end(self, model: nn.Module, arguments: tuple[Any, ...], outputs: Any) -> None:
        self._is_counting, self._counted = False, None

    def _see(self, container: ExpertsContainer, path: str, routing: Routing) -> None:
        if not self._is_counting:
            return
        index, weights = routing.top_k_index, routing.top_k_weights
        counted = (weights.detach() > 0) & (index < container.num_experts)
        mask = self._counted
        if mask is not None and mask.shape[0] == index.shape[0]:  # else these are not the tokens of the text
            counted = counted & mask.to(index.device)[:, None]
        # What does not count goes to a bin of its own: no shape depends on the data, so nothing waits for it.
        bins = torch.where(counted, index, container.num_experts).reshape(-1)
        sums = self._sums(container, index.device)
        sums.index_add_(0, bins.long(), torch.ones_like(bins, dtype=sums.dtype))

    def _see_expert_call(self, container: ExpertsContainer, expert_id: int, num_tokens: int) -> None:
        if self._is_counting:
            self._sums(container, torch.device("cpu"))[expert_id] += num_tokens

    def _sums(self, container: ExpertsContainer, device: torch.device) -> Tensor:
        if container.path not in self._pairs:
            self._pairs[container.path] = torch.zeros(container.num_experts + 1, dtype=torch.int64, device=device)
        return self._pairs[container.path]

    def _collect(self) -> dict[str, LayerRouting]:
        """The counts since the last call, of all processes, which are added to those of the whole run."""
        counts = {path: sums[:-1].tolist() for path, sums in self._pairs.items()}
        self._pairs = {}
        if dist.is_available() and dist.is_initialized():
            gathered: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, counts)
            counts = {path: _added([own[path] for own in gathered if path in own]) for own in gathered for path in own}
        recent = {path: LayerRouting(self._selected.get(path, []), pairs) for path, pairs in counts.items()}
        for path, layer in recent.items():
            before = self.layers[path].pairs if path in self.layers else [0] * len(layer.pairs)
            self.layers[path] = LayerRouting(layer.selected, _added([before, layer.pairs]))
        return recent


def _trained_experts(model: Any) -> dict[str, list[int]]:
    """The experts that the active adapters train, by experts module."""
    trained: dict[str, set[int]] = {}
    for name in getattr(model, "active_adapters", []):
        for path, ids in getattr(model.peft_config[name], "adapted_paths", {}).items():
            trained.setdefault(path, set()).update(ids)
    return {path: sorted(ids) for path, ids in trained.items()}


def _counted_tokens(inputs: Mapping[str, Any], answers_only: bool, is_decoder: bool) -> Tensor | None:
    mask, labels = inputs.get("attention_mask"), inputs.get("labels")
    if answers_only and isinstance(labels, Tensor):
        return enters_loss(labels, is_decoder=is_decoder).reshape(-1)
    return mask.bool().reshape(-1) if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _added(rows: list[list[int]]) -> list[int]:
    return [sum(column) for column in zip(*rows, strict=True)]


def _listed(found: Mapping[str, list[int]]) -> str:
    shown = [f"{path} {', '.join(map(str, ids))}" for path, ids in list(found.items())[:SHOWN]]
    more = f"; and in {len(found) - SHOWN} more layers" if len(found) > SHOWN else ""
    return "; ".join(shown) + more
