"""Which tensors of a checkpoint make up which parameter of a model, by transformers' own conversion tables.

transformers keeps experts fused, checkpoints mostly keep them apart. Its tables (`transformers.conversion_mapping`)
say how keys and layouts correspond; its converters do the arithmetic in both directions. Nothing here knows a family.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)


@dataclass(frozen=True)
class Source:
    """A tensor of a checkpoint, as a part of a parameter.

    Attributes:
        key: its key in the checkpoint.
        parameter: the name of the parameter; the first one, where the tensor is split among several.
        pattern: which part of the parameter it is: the source pattern of transformers' converter; None if the
            parameter is stored as it is.
        expert: whose part it is, if the checkpoint keeps the experts apart; else None.
    """

    key: str
    parameter: str
    pattern: str | None
    expert: int | None


class KeyMap:
    """The correspondence of a checkpoint's keys and a model's parameters.

    Args:
        model: a transformers model; may be on the meta device, is not changed.
        keys: the checkpoint's keys; None means those that transformers would save the model under.

    Attributes:
        sources: the tensors that make up each parameter, by parameter name.
        unknown: keys that belong to no parameter.
    """

    def __init__(self, model: Any, keys: Iterable[str] | None = None) -> None:
        self.model = model
        self.shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        transforms = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
        self._by_pattern = {pattern: entry for entry in self._converters for pattern in entry.source_patterns}
        self.sources: dict[str, list[Source]] = {}
        self.unknown: list[str] = []
        for key in sorted(self.saved_keys() if keys is None else keys, key=dot_natural_key):
            source = self.source(key)
            if source is None:
                self.unknown.append(key)
            else:
                self.sources.setdefault(source.parameter, []).append(source)

    def source(self, key: str) -> Source | None:
        """What a key of a checkpoint means; None if it belongs to no parameter of the model."""
        prefix = self.model.base_model_prefix
        # transformers only asks whether a name is there.
        names: Any = self.shapes
        name, pattern = rename_source_key(key, self._renamings, self._converters, prefix, names)
        if name not in self.shapes and key in self.shapes:
            # As transformers does when it loads: a key that is a parameter's name is left alone.
            name, pattern = rename_source_key(key, [], [], prefix, names)
        if name not in self.shapes:
            return None
        expert = None
        if pattern is not None and "*" in pattern:
            renamed = apply_renamings(key, self._renamings)
            match = re.search(pattern.replace("*.", r"(?P<expert>\d+)\.", 1), renamed)
            if match is None:
                return None
            expert = int(match["expert"])
        return Source(key, name, pattern, expert)

    def saved_keys(self) -> list[str]:
        """The keys under which transformers saves the model."""
        empty = {name: torch.empty(shape, device="meta") for name, shape in self.shapes.items()}
        for name in getattr(self.model, "all_tied_weights_keys", None) or {}:
            empty.pop(name, None)
        return list(revert_weight_conversion(self.model, empty))

    def join(self, parameter: str, parts: Mapping[str | None, Sequence[Tensor]]) -> Tensor:
        """The value of a parameter from the tensors of a checkpoint.

        Args:
            parameter: its name.
            parts: `{pattern: tensors}`; where the checkpoint keeps experts apart, a tensor for each of `n` experts.

        Returns:
            The parameter; `[n, ...]` for `n` of its experts.

        Raises:
            NotImplementedError: if the tables mix several parameters.
        """
        if set(parts) == {None}:
            return parts[None][0]
        converter = deepcopy(self._by_pattern[next(pattern for pattern in parts if pattern is not None)])
        self._check_simple(parameter, converter)
        collected: Any = converter.collected_tensors
        for pattern, tensors in parts.items():
            collected[pattern] += tensors
        with torch.no_grad():
            converted = converter.convert(parameter, model=self.model, config=self.model.config)
        value = converted[parameter]
        return value[0] if isinstance(value, list) else value

    def split(self, parameter: str, value: Tensor) -> dict[tuple[str | None, int | None], Tensor]:
        """The inverse of `join`: the checkpoint's tensors, by pattern and position among the experts of `value`."""
        sources = self.sources.get(parameter, [])
        if all(source.pattern is None for source in sources):
            return {(None, None): value}
        for source in sources:
            self._check_simple(parameter, self._by_pattern[source.pattern or ""])
        parts: dict[tuple[str | None, int | None], Tensor] = {}
        for key, tensor in revert_weight_conversion(self.model, {parameter: value}).items():
            found = self.source(key)
            if found is None or found.parameter != parameter:
                raise NotImplementedError(f"transformers' tables do not lead from {parameter} to {key} and back")
            parts[found.pattern, found.expert] = tensor
        return parts

    def part_shapes(self, parameter: str, one_expert: bool) -> dict[str | None, tuple[int, ...]]:
        """The shape of each of a parameter's tensors in a checkpoint, those of one expert if they are kept apart."""
        shape = self.shapes[parameter]
        empty = torch.empty((1, *shape[1:]) if one_expert else shape, device="meta")
        return {pattern: tuple(tensor.shape) for (pattern, _), tensor in self.split(parameter, empty).items()}

    def _check_simple(self, parameter: str, converter: WeightConverter) -> None:
        if len(converter.target_patterns) > 1:
            raise NotImplementedError(
                f"transformers stores {parameter} mixed with other weights ({converter.target_patterns}); such a "
                "checkpoint cannot be read or written in part. Load the whole model and merge_and_unload() there."
            )
