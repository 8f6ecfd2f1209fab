"""Finds out which tensors of a checkpoint make up which parameter of a model.

transformers fuses the experts of a model, while most checkpoints keep them apart. The tables of
`transformers.conversion_mapping` say how keys and layouts correspond, and transformers' converters compute the tensors
in both directions. This file knows no model family.
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
        parameter: the name of the parameter; the first name if the tensor is split among several.
        pattern: the source pattern of transformers' converter, which says which part of the parameter the tensor is.
            None if the parameter is stored as it is.
        expert: the expert that the tensor belongs to. None if the checkpoint does not keep the experts apart.
    """

    key: str
    parameter: str
    pattern: str | None
    expert: int | None


class KeyMap:
    """The correspondence of a checkpoint's keys and a model's parameters.

    Args:
        model: a transformers model, which may be on the meta device. It is not changed.
        stored: the shapes of the checkpoint's tensors by key. None means the tensors that transformers would save.

    Attributes:
        sources: the tensors that make up each parameter, by parameter name.
        mixed: parameters that the checkpoint stores in the same tensors as another one.
    """

    def __init__(self, model: Any, stored: Mapping[str, tuple[int, ...]] | None = None) -> None:
        self.model = model
        self._stored = stored
        self._shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        transforms = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
        self._by_pattern = {pattern: entry for entry in self._converters for pattern in entry.source_patterns}
        self.sources: dict[str, list[Source]] = {}
        self.mixed: set[str] = set()
        for key in sorted(self._saved_keys() if stored is None else stored, key=dot_natural_key):
            source = self.source(key)
            if source is not None:
                self.sources.setdefault(source.parameter, []).append(source)
                if source.pattern is not None:
                    first, *others = self._by_pattern[source.pattern].target_patterns
                    self.mixed |= {source.parameter.replace(first, other) for other in others}

    def _saved_keys(self) -> list[str]:
        """The keys under which transformers saves the model."""
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        empty = {name: torch.empty(shape, device="meta") for name, shape in self._shapes.items() if name not in tied}
        return list(revert_weight_conversion(self.model, empty))

    def source(self, key: str) -> Source | None:
        """What a key of a checkpoint means. None if it belongs to no parameter of the model."""
        prefix = self.model.base_model_prefix
        names: Any = self._shapes  # transformers only asks which names there are
        name, pattern = rename_source_key(key, self._renamings, self._converters, prefix, names)
        if name not in self._shapes and key in self._shapes:
            # transformers leaves a key that is a parameter's name alone when it loads a model.
            name, pattern = rename_source_key(key, [], [], prefix, names)
        if name not in self._shapes:
            return None
        expert = None
        if pattern is not None and "*" in pattern:
            renamed, _ = rename_source_key(key, self._renamings, [])
            match = re.search(pattern.replace("*.", r"(?P<expert>\d+)\.", 1), renamed)
            if match is None:
                return None
            expert = int(match["expert"])
        if pattern is not None and _transposition(self._by_pattern[pattern]):
            stored_shape = self._shapes[name] if self._stored is None else self._stored.get(key, self._shapes[name])
            if stored_shape == self._shapes[name]:
                pattern = None
        return Source(key, name, pattern, expert)

    def has(self, name: str) -> bool:
        """True if the model has a parameter or buffer of this name."""
        return name in self._shapes

    def converts_by_expert(self, parameter: str) -> bool:
        """True if a part of the experts in tensors `[E, ...]` can be converted without the others."""
        patterns = {source.pattern for source in self.sources[parameter]}
        operations = [op for pattern in patterns if pattern for op in self._by_pattern[pattern].operations]
        return all(
            (isinstance(op, Concatenate | Interleave) and op.dim > 0)
            or (isinstance(op, Transpose) and min(op.dim0, op.dim1) > 0)
            for op in operations
        )

    def join(self, parameter: str, parts: Mapping[str | None, Sequence[Tensor]]) -> Tensor:
        """Computes the value of a parameter from the tensors of a checkpoint.

        Args:
            parameter: its name.
            parts: tensors by pattern. If the checkpoint keeps experts apart, one tensor for each of `n` experts.

        Returns:
            The parameter, or `[n, ...]` for `n` of its experts.
        """
        if set(parts) == {None}:
            return parts[None][0]
        converter = deepcopy(self._converter(parameter, next(pattern for pattern in parts if pattern is not None)))
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
        pattern = next((s.pattern for s in self.sources.get(parameter, []) if s.pattern is not None), None)
        if pattern is None:
            return {(None, None): value}
        if transposition := _transposition(self._converter(parameter, pattern)):
            return {(pattern, None): value.transpose(transposition.dim0, transposition.dim1).contiguous()}
        parts: dict[tuple[str | None, int | None], Tensor] = {}
        for key, tensor in revert_weight_conversion(self.model, {parameter: value}).items():
            found = self.source(key)
            if found is None or found.parameter != parameter:
                raise NotImplementedError(
                    f"transformers' conversion tables do not convert {parameter} to {key} and back"
                )
            parts[found.pattern, found.expert] = tensor
        return parts

    def _converter(self, parameter: str, pattern: str) -> WeightConverter:
        """The converter of a parameter's tensors, if they hold no other parameter."""
        converter = self._by_pattern[pattern]
        if len(converter.target_patterns) > 1:
            raise mixed_weights(parameter)
        return converter


def _transposition(converter: WeightConverter) -> Transpose | None:
    """The step of a converter that transformers skips for tensors that have the parameter's shape already.

    `KeyMap` decides this once, by the shape of the whole tensor in the checkpoint. transformers would decide it by the
    shape of the few experts at hand, or by the shape of the parameter when it saves.
    """
    (operation, *others) = converter.operations
    return operation if isinstance(operation, Transpose) and operation.check_dims and not others else None


def mixed_weights(parameter: str) -> NotImplementedError:
    """The error for weights that a checkpoint stores in the same tensors as others."""
    return NotImplementedError(
        f"the checkpoint stores {parameter} in the same tensors as another parameter, so it cannot be read or "
        "written alone. Load the whole model, and use merge_and_unload() and save_pretrained()"
    )
