"""An adapter's folder: read without trust, tensor by tensor; written whole or not at all."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft.utils.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from ..moe.containers import ExpertsContainer
from ..moe.weights import ExpertWeight
from ..ops.deltas import add_deltas
from ..ops.encodings import BITS, FROZEN_SUFFIXES, SUFFIXES, decode
from ..tuner.adapter_file import (
    DELTA_KEY,
    KEY_PREFIX,
    Entries,
    check_finite_header,
    compare_entries,
    delta_entries,
    read_json,
    write_file,
)
from ..tuner.config import ESFTConfig
from ..tuner.fingerprint import check_num_experts, compare_bases
from ..tuner.messages import shortened
from ..tuner.targets import not_excluded, resolve_target_experts
from .base import Base
from .tensor_files import TensorFolder


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
        return f"{KEY_PREFIX}{self.container.path}{DELTA_KEY}{self.weight.name}"

    def effective(self, rows: Tensor) -> Tensor:
        """The effective rows `[n, ...]`, in the dtype of the base's `rows`; as `deltas.add_deltas` gives them."""
        stored = self._read()
        if "_rows" in stored:
            return stored["_rows"].to(rows.dtype)
        return add_deltas(rows, [(None, self.adapter.decoded(stored, self.shape[-1]))])

    def delta(self, rows: Tensor | None = None) -> Tensor:
        """The change `[n, ...]` in fp32; `rows`, the base's, are needed if the adapter stores effective rows."""
        stored = self._read()
        if "_rows" not in stored:
            return self.adapter.decoded(stored, self.shape[-1])
        if rows is None:
            raise ValueError("the adapter stores effective rows: their deltas need the base")
        wide = torch.promote_types(rows.dtype, torch.float32)
        return stored["_rows"].to(wide) - rows.to(wide)

    def _read(self) -> dict[str, Tensor]:
        return {suffix: self.adapter.files.read(key) for suffix, key in self.keys.items()}


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
        if not (self.folder / SAFETENSORS_WEIGHTS_NAME).exists():
            pickled = (self.folder / WEIGHTS_NAME).exists()
            raise FileNotFoundError(
                f"{self.folder} has no {SAFETENSORS_WEIGHTS_NAME}"
                + (
                    ". It has pickled weights, which could run code when read; have them saved as safetensors"
                    * pickled
                )
            )
        self.files = TensorFolder([self.folder / SAFETENSORS_WEIGHTS_NAME])
        self._suffixes = ("_A", "_B") if self.config.rank is not None else SUFFIXES[self.config.storage]
        self.config.check_file(self.files.entries)
        strange = [key for key in self.files.entries if DELTA_KEY in key and _suffix(key) not in self._suffixes]
        if strange:
            kind = f"rank {self.config.rank}" if self.config.rank is not None else f"storage {self.config.storage!r}"
            raise ValueError(f"{self.folder}: with {kind} there are no tensors such as {shortened(strange)}")

    def changes(self, base: Base) -> list[Change]:
        """What the adapter does to a base, weight by weight, after header and values are checked.

        A base with other weights than the one that the adapter was made over is warned of.

        Raises:
            ValueError: if a tensor is missing, belongs to no selected weight of this base, does not have its shape or
                is not finite; or if the base has other weights, and another name on the Hub.
        """
        ids = self._expert_ids(base)
        expected: Entries = {}
        for path, own in ids.items():
            container = base.modules[path]
            expected |= delta_entries(
                path, container.weights, container.module, len(own), self.config.rank, self.config.storage
            )
        compare_entries({key: entry for key, entry in self.files.entries.items() if DELTA_KEY in key}, expected)
        check_finite_header(self.files.entries)
        stored = {key.removeprefix(KEY_PREFIX): key for key in self.files.entries}
        changes = [change for path in ids for change in self._changes_of(base.modules[path], ids[path], stored)]
        if self.config.base_fingerprint is not None:
            current = base.record({path: own for path, own in ids.items() if path in base.experts})
            compare_bases(self.config.base_fingerprint, current, (self.config.base_model_name_or_path, base.name))
        return changes

    def check_alone(self) -> None:
        """Checks what can be known without the base: no container is without weights, and all weights are finite.

        Raises:
            ValueError: naming the first few containers, or the tensor.
        """
        present = self.weights()
        # The index of a layer says no path.
        paths = [path for path in self.config.adapted_experts if not path.isdigit()]
        missing = [path for path in paths if path not in present]
        if missing:
            raise ValueError(f"{self.folder} has no weights of {shortened(missing)}, which target_experts selects")
        check_finite_header(self.files.entries)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.num_bytes for entry in self.files.entries.values())

    @property
    def num_parameters(self) -> int:
        """Weights of all changes, however few bits they are stored in; of low rank those of the factors."""
        counts = {key: math.prod(entry.shape) for key, entry in self.files.entries.items() if DELTA_KEY in key}
        return sum(
            0 if _suffix(key) == "_scales" else self._length(count) if _suffix(key) == "_codes" else count
            for key, count in counts.items()
        )

    def weights(self) -> dict[str, list[str]]:
        """The weights that are changed, by container path: names without a suffix."""
        names: dict[str, dict[str, None]] = {}
        for key in self.files.entries:
            if DELTA_KEY in key:
                path, _, name = key.removesuffix(_suffix(key)).removeprefix(KEY_PREFIX).rpartition(DELTA_KEY)
                names.setdefault(path, {})[name] = None
        return {path: list(own) for path, own in names.items()}

    def delta(self, path: str, name: str) -> Tensor | None:
        """A weight's delta `[n, ...]`, as far as it is known without the base; None for effective rows."""
        keys = {suffix: f"{KEY_PREFIX}{path}{DELTA_KEY}{name}{suffix}" for suffix in self._suffixes}
        if self.config.storage == "rows" or not self.files.entries.keys() >= set(keys.values()):
            return None
        return self.decoded({suffix: self.files.read(key) for suffix, key in keys.items()})

    def decoded(self, stored: Mapping[str, Tensor], length: int | None = None) -> Tensor:
        """The delta `[n, ...]` that a weight's tensors, by suffix, amount to; they are no effective rows.

        Args:
            stored: the tensors.
            length: of the last dimension; None means as many values as its codes may hold.
        """
        if "_codes" in stored:
            codes = stored["_codes"]
            length = self._length(codes.shape[-1]) if length is None else length
            return decode(self.config.storage, codes, stored["_scales"], length)
        if "_A" in stored:
            return self.config.scaling * (stored["_B"] @ stored["_A"])
        return stored[""]

    def other_tensors(self) -> list[str]:
        """Keys of tensors that are no experts' changes: those of `modules_to_save`."""
        return [key for key in self.files.entries if DELTA_KEY not in key]

    def _length(self, num_codes: int) -> int:
        """How many codes of few bits fit into so many bytes."""
        return num_codes * 8 // BITS[self.config.storage]

    def _expert_ids(self, base: Base) -> dict[str, list[int]]:
        """The experts that are adapted, by path, as the loader of adapters finds them."""
        target_experts = resolve_target_experts(self.config.target_experts or {}, base.experts)
        check_num_experts((self.config.selection, self.config.base_fingerprint), target_experts, base.experts)
        selection = target_experts | {path: [0] for path in base.trained_whole(self.config)}
        return {path: selection[path] for path in not_excluded(self.config.module_options, selection)}

    def _changes_of(
        self, container: ExpertsContainer, expert_ids: list[int], stored: Mapping[str, str]
    ) -> Iterator[Change]:
        """The changes in one container; `stored` has the file's keys by themselves without the prefix."""
        for weight in container.weights:
            name = f"{container.path}{DELTA_KEY}{weight.name}"
            keys = {suffix: stored[f"{name}{suffix}"] for suffix in self._suffixes if f"{name}{suffix}" in stored}
            if keys:  # vectors have no factors of low rank
                yield Change(container, weight, expert_ids, self, keys)


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


def write_adapter(folder: Path, config: ESFTConfig, tensors: dict[str, Tensor]) -> None:
    """Writes an adapter for inference."""
    config.inference_mode = True
    write_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, config.adapted_experts)
    config.save_pretrained(str(folder))


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """Writes a safetensors file as PEFT and transformers do."""
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file, metadata={"format": "pt"})


def _suffix(key: str) -> str:
    """What follows the name of a weight; empty for a delta."""
    return next((suffix for suffix in ("_A", "_B", *FROZEN_SUFFIXES) if key.endswith(suffix)), "")
