"""Which tensors of a checkpoint make up which parameter of a model, by transformers' own conversion tables.

transformers keeps experts fused, checkpoints mostly keep them apart. Its tables (`transformers.conversion_mapping`)
say how keys and layouts correspond; its converters do the arithmetic in both directions. Nothing here knows a family.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    Interleave,
    Transpose,
    WeightConverter,
    WeightRenaming,
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
        stored: the shapes of the checkpoint's tensors by key; None means those that transformers would save.

    Attributes:
        sources: the tensors that make up each parameter, by parameter name.
        unknown: keys that belong to no parameter.
        mixed: parameters that the checkpoint stores in the same tensors as another one.
    """

    def __init__(self, model: Any, stored: Mapping[str, tuple[int, ...]] | None = None) -> None:
        self.model = model
        self._stored = stored
        self.shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        transforms = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
        self._by_pattern = {pattern: entry for entry in self._converters for pattern in entry.source_patterns}
        self.sources: dict[str, list[Source]] = {}
        self.unknown: list[str] = []
        self.mixed: set[str] = set()
        for key in sorted(self.saved_keys() if stored is None else stored, key=dot_natural_key):
            source = self.source(key)
            if source is None:
                self.unknown.append(key)
            else:
                self.sources.setdefault(source.parameter, []).append(source)
                self.mixed |= self._targets_after_the_first(source)

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
            renamed = key
            for renaming in self._renamings:
                renamed, _ = renaming.rename_source_key(renamed)
            match = re.search(pattern.replace("*.", r"(?P<expert>\d+)\.", 1), renamed)
            if match is None:
                return None
            expert = int(match["expert"])
        if pattern is not None and _transposition(self._by_pattern[pattern]) and self._is_as_in_the_model(key, name):
            pattern = None
        return Source(key, name, pattern, expert)

    def _is_as_in_the_model(self, key: str, name: str) -> bool:
        return self._stored is None or self._stored.get(key, self.shapes[name]) == self.shapes[name]

    def converts_by_expert(self, parameter: str) -> bool:
        """Whether tensors of all experts, `[E, ...]`, are converted expert by expert, so that some can be alone."""
        patterns = {source.pattern for source in self.sources[parameter]}
        operations = [op for pattern in patterns if pattern for op in self._by_pattern[pattern].operations]
        return all(
            (isinstance(op, Concatenate | Interleave) and op.dim > 0)
            or (isinstance(op, Transpose) and min(op.dim0, op.dim1) > 0)
            for op in operations
        )

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
        if transposition := _transposition(converter):
            transposition.check_dims = False
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
        if transposition := _transposition(self._by_pattern[sources[0].pattern or ""]):
            return {(sources[0].pattern, None): value.transpose(transposition.dim0, transposition.dim1).contiguous()}
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

    def _targets_after_the_first(self, source: Source) -> set[str]:
        if source.pattern is None:
            return set()
        first, *others = self._by_pattern[source.pattern].target_patterns
        return {source.parameter.replace(first, other) for other in others}

    def _check_simple(self, parameter: str, converter: WeightConverter) -> None:
        if len(converter.target_patterns) > 1:
            raise mixed_weights(parameter)


def _transposition(converter: WeightConverter) -> Transpose | None:
    """The step of a converter that transformers takes only if a tensor has not the parameter's shape already.

    Here that is decided once, by the shape of the whole tensor in the checkpoint. transformers' own code would decide
    by the shape of the few experts at hand, or by that of the parameter when it saves.
    """
    (operation, *others) = converter.operations
    if others or not isinstance(operation, Transpose) or not operation.check_dims:
        return None
    return operation


def mixed_weights(parameter: str) -> NotImplementedError:
    """The error for weights that a checkpoint stores in the same tensors as others."""
    return NotImplementedError(
        f"the checkpoint stores {parameter} in the same tensors as another parameter, so it cannot be read or written "
        "by itself. Load the whole model, and use merge_and_unload() and save_pretrained() there"
    )
