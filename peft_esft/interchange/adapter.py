"""An adapter's folder: read without trust, tensor by tensor; written whole or not at all."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..config import ESFTConfig
from ..containers import ExpertsContainer
from ..deltas import add_deltas
from ..fingerprint import check_num_experts, compare_bases
from ..storage import SUFFIXES, decode
from ..targets import resolve_container
from ..tensor_files import TensorFolder, write_tensors
from ..untrusted import KEY_PREFIX, MARK, WEIGHTS_NAME, expected_layout, fits
from ..weights import ExpertWeight
from .base import Base
from .selections import read_json, shortened


CONFIG_NAME = "adapter_config.json"

TensorLayout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class Change:
    """What an adapter does to one weight of one container.

    Attributes:
        container: whose experts.
        weight: which of their weights.
        expert_ids: the experts, in the order of the adapter's rows.
        adapter: the adapter.
        keys: its tensors for this weight, by suffix.
    """

    container: ExpertsContainer
    weight: ExpertWeight
    expert_ids: list[int]
    adapter: AdapterFolder = field(repr=False)
    keys: dict[str, str]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the changed rows, `[n, ...]`."""
        return (len(self.expert_ids), *self.weight.shape(self.container.module))

    @property
    def name(self) -> str:
        """The key of the weight in an adapter file, without a suffix."""
        return f"{KEY_PREFIX}{self.container.path}{MARK}{self.weight.name}"

    def effective(self, rows: Tensor) -> Tensor:
        """The effective rows `[n, ...]`, in the dtype of the base's `rows`; as `functional.add_deltas` gives them."""
        stored = self._read()
        if "_rows" in stored:
            return stored["_rows"].to(rows.dtype)
        return add_deltas(rows, [(None, self._delta(stored))])

    def delta(self, rows: Tensor | None = None) -> Tensor:
        """The change `[n, ...]` in fp32; `rows`, the base's, are needed if the adapter stores effective rows."""
        stored = self._read()
        if "_rows" not in stored:
            return self._delta(stored)
        if rows is None:
            raise ValueError("the adapter stores effective rows: their deltas need the base")
        wide = torch.promote_types(rows.dtype, torch.float32)
        return stored["_rows"].to(wide) - rows.to(wide)

    def _read(self) -> dict[str, Tensor]:
        return {suffix: self.adapter.files.read(key) for suffix, key in self.keys.items()}

    def _delta(self, stored: dict[str, Tensor]) -> Tensor:
        config = self.adapter.config
        if "_codes" in stored:
            return decode(config.storage, stored["_codes"], stored["_scales"], self.shape[-1])
        if "_A" in stored:
            return config.scaling * (stored["_B"] @ stored["_A"])
        return stored[""]


class AdapterFolder:
    """An adapter on disk, of which only the config and the header are read.

    Args:
        folder: holds `adapter_config.json` and `adapter_model.safetensors`.

    Attributes:
        folder: the same.
        config: its config.
        files: its tensors.

    Raises:
        ValueError: if a file is malformed or too large, or the adapter is none of ESFT.
        FileNotFoundError: if a file is missing. Pickled weights (`.bin`) are never read.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config = read_config(self.folder)
        if not (self.folder / WEIGHTS_NAME).exists():
            pickled = (self.folder / "adapter_model.bin").exists()
            raise FileNotFoundError(
                f"{self.folder} has no {WEIGHTS_NAME}"
                + (
                    ". It has pickled weights, which could run code when read; have them saved as safetensors"
                    * pickled
                )
            )
        self.files = TensorFolder([self.folder / WEIGHTS_NAME])
        suffixes = ("_A", "_B") if self.config.rank is not None else SUFFIXES[self.config.storage]
        strange = [key for key in self.files.entries if MARK in key and _suffix(key) not in suffixes]
        if strange:
            kind = f"rank {self.config.rank}" if self.config.rank is not None else f"storage {self.config.storage!r}"
            raise ValueError(f"{self.folder}: with {kind} there are no tensors such as {shortened(strange)}")

    def changes(self, base: Base) -> list[Change]:
        """What the adapter does to a base, weight by weight, checked from the headers alone.

        A base with other weights than the one that the adapter was made over is warned of.

        Raises:
            ValueError: if a tensor does not belong to a selected weight of this base, or does not have its shape; if
                one is missing; or if the base has other weights, and another name on the Hub.
        """
        ids = self._expert_ids(base)
        modules = base.modules
        found: dict[tuple[str, str], dict[str, str]] = {}
        problems: list[str] = []
        for key in self.files.entries:
            path, mark, leaf = key.removeprefix(KEY_PREFIX).rpartition(MARK)
            if not mark:
                continue
            if path not in ids:
                problems.append(f"{key}: target_experts selects nothing of {path!r}")
                continue
            weight, suffix = _weight_and_suffix(leaf, modules[path].weight_names)
            if weight is None:
                problems.append(f"{key}: {path} has the weights {', '.join(modules[path].weight_names)}")
                continue
            found.setdefault((path, weight), {})[suffix] = key
        changes = [
            Change(modules[path], weight, ids[path], self, found[path, weight.name])
            for path in ids
            for weight in modules[path].weights
            if (path, weight.name) in found
        ]
        problems += [problem for change in changes for problem in self._misfits(change, base)]
        adapted = {change.container.path for change in changes}
        complete = {path for path in ids if all((path, name) in found for name in modules[path].weight_names)}
        if self.config.rank is None:
            problems += [f"{path} has no tensor for each of its weights" for path in sorted(adapted - complete)]
        if problems:
            raise ValueError(f"{self.folder} does not fit the base: {shortened(problems)}")
        if self.config.base_fingerprint is not None:
            current = base.record({path: own for path, own in ids.items() if path in base.experts})
            compare_bases(self.config.base_fingerprint, current, (self.config.base_model_name_or_path, base.name))
        return changes

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.num_bytes for entry in self.files.entries.values())

    def other_tensors(self) -> list[str]:
        """Keys of tensors that are no experts' changes: those of `modules_to_save`."""
        return [key for key in self.files.entries if MARK not in key]

    def _expert_ids(self, base: Base) -> dict[str, list[int]]:
        selection: dict[str, list[int]] = {}
        for key, ids in (self.config.target_experts or {}).items():
            path = resolve_container(key, base.experts)
            outside = [expert for expert in ids if expert >= base.experts[path].num_experts]
            if outside:
                raise ValueError(
                    f"{path} has {base.experts[path].num_experts} experts, there are none of id {outside}"
                )
            selection[path] = ids
        check_num_experts((self.config.selection, self.config.base_fingerprint), selection, base.experts)
        if self.config.train_shared_experts:
            selection |= {path: [0] for path in base.shared}
        if self.config.train_non_expert_modules:
            selection |= {path: [0] for path in base.others}
        return selection

    def _misfits(self, change: Change, base: Base) -> Iterator[str]:
        expected = expected_layout(self.config, change.shape, base.dtype(change.container, change.weight))
        if set(change.keys) != set(expected):
            yield f"{change.name} has the tensors {sorted(change.keys)}, expected are {sorted(expected)}"
            return
        for suffix, (dtype, shape) in expected.items():
            entry = self.files.entries[change.keys[suffix]]
            if not fits(entry, dtype, shape):
                yield (
                    f"{change.keys[suffix]} is {entry.dtype} {list(entry.shape)}, the base and the selection need "
                    f"{dtype} {list(shape)}"
                )


def read_config(folder: Path) -> ESFTConfig:
    """Reads an adapter's config, of bounded size.

    Raises:
        ValueError: if it is malformed, or the adapter is none of ESFT.
    """
    content = read_json(folder / CONFIG_NAME)
    if not isinstance(content, dict) or content.get("peft_type") != "ESFT":
        kind = content.get("peft_type") if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{folder} is no ESFT adapter: its peft_type is {str(kind)[:100]!r}")
    known = inspect.signature(ESFTConfig).parameters
    try:
        return ESFTConfig(**{name: value for name, value in content.items() if name in known})
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{folder / CONFIG_NAME} is malformed: {error}") from error


def write_adapter(
    folder: Path, config: ESFTConfig, layout: TensorLayout, tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Writes an adapter, tensor by tensor."""
    config.inference_mode = True
    write_tensors(folder / WEIGHTS_NAME, layout, tensors)
    config.save_pretrained(str(folder))


def _weight_and_suffix(leaf: str, names: Sequence[str]) -> tuple[str | None, str]:
    if leaf in names:
        return leaf, ""
    suffix = _suffix(leaf)
    name = leaf.removesuffix(suffix)
    return (name, suffix) if name in names else (None, "")


def _suffix(key: str) -> str:
    """What follows the name of a weight; empty for a delta."""
    return next((suffix for suffix in ("_A", "_B", "_rows", "_codes", "_scales") if key.endswith(suffix)), "")
