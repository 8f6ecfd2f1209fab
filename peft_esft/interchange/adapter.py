"""Reads an adapter's folder without trusting it, and writes one."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from peft.utils.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import Tensor

from ..ops.deltas import add_deltas
from ..ops.encodings import BITS, FROZEN_SUFFIXES, SUFFIXES, delta_from
from ..tuner.adapter_file import DELTA_KEY, KEY_PREFIX, read_json, write_file
from ..tuner.config import ESFTConfig
from ..tuner.file_checks import Entries, check_finite_header, compare_entries, delta_entries, module_entries
from ..tuner.fingerprint import compare_bases
from ..tuner.messages import shortened
from ..tuner.other_classes import find_prefixes, moved_keys
from .base import Base, Rows
from .repositories import local_folder
from .tensor_files import TensorFolder


@dataclass(frozen=True)
class Change(Rows):
    """The rows of one weight that an adapter changes."""

    adapter: AdapterFolder = field(repr=False)
    keys: dict[str, str]
    """The keys of the adapter's tensors for this weight, by suffix."""

    def effective(self, base: Base) -> Tensor:
        """The effective rows `[n, ...]` on the CPU, in the base's dtype."""
        if "_rows" in self.keys:
            return self.adapter.files.read(self.keys["_rows"]).to(base.dtype(self))
        return add_deltas(base.read(self).cpu(), [(None, self.delta())])

    def delta(self, base_rows: Tensor | None = None) -> Tensor:
        """The delta `[n, ...]` in fp32. An adapter that stores effective rows needs the base's rows for it."""
        return self.adapter.decoded(self.keys, self.shape[-1], base_rows)


class AdapterFolder:
    """An adapter on disk. Its config and the header of its weights are read at once, single tensors on demand.

    Args:
        folder: holds `adapter_config.json` and `adapter_model.safetensors`; or a name on the Hub.

    Attributes:
        config: its config.
        files: its tensors.

    Raises:
        ValueError: if a file is malformed or too large, or the adapter is not of ESFT.
        OSError: if there is no such adapter, or a file is missing. Pickled weights (`.bin`) are never read.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = local_folder(folder)
        self.config = read_config(self.folder)
        if not (self.folder / SAFETENSORS_WEIGHTS_NAME).exists():
            message = f"{self.folder} has no {SAFETENSORS_WEIGHTS_NAME}"
            if (self.folder / WEIGHTS_NAME).exists():
                message += (
                    ". It has pickled weights, which could run code when they are read; ask for weights "
                    "saved as safetensors"
                )
            raise FileNotFoundError(message)
        self.files = TensorFolder([self.folder / SAFETENSORS_WEIGHTS_NAME])
        self._suffixes = ("_A", "_B") if self.config.rank is not None else SUFFIXES[self.config.storage]
        self.config.check_file(self.files.entries)
        self._keys = _keys_by_weight(self.files.entries)
        strange = [k for keys in self._keys.values() for suffix, k in keys.items() if suffix not in self._suffixes]
        if strange:
            kind = f"rank {self.config.rank}" if self.config.rank is not None else f"storage {self.config.storage!r}"
            raise ValueError(f"{self.folder} has tensors that do not belong to the form {kind}: {shortened(strange)}")

    def fitted_to(self, base: Base) -> AdapterFolder:
        """The same adapter under the paths of a base. It may come from another class of the base's checkpoint."""
        prefixes = find_prefixes(self.config.target_experts or {}, base.experts)
        fitted = copy.copy(self)
        fitted.config, fitted.files = copy.copy(self.config), copy.copy(self.files)
        fitted.config.move(prefixes)
        fitted.files.entries = moved_keys(self.files.entries, prefixes)
        fitted._keys = _keys_by_weight(fitted.files.entries)
        return fitted

    def changes(self, base: Base) -> list[Change]:
        """The rows of a base that the adapter changes, after its header and values are checked.

        Warns if the base has other weights than the base that the adapter was made over.

        Raises:
            ValueError: if a tensor is missing, belongs to no selected weight of this base, does not have its shape or
                is not finite; or if the base has other weights, and another name on the Hub.
        """
        fitted = self.fitted_to(base)
        config, entries = fitted.config, fitted.files.entries
        ids = base.adapted_experts(config)
        expected: Entries = module_entries(base.model, config.modules_to_save or (), entries)
        for path, own in ids.items():
            container = base.modules[path]
            expected |= delta_entries(path, container.weights, container.module, len(own), config.rank, config.storage)
        compare_entries(entries, expected)
        check_finite_header(entries)
        if config.base_fingerprint is not None:
            current = base.record({path: own for path, own in ids.items() if path in base.experts})
            compare_bases(config.base_fingerprint, current, (config.base_model_name_or_path, base.name))
        return [
            Change(base.modules[path], weight, own, fitted, fitted._keys[path, weight.name])
            for path, own in ids.items()
            for weight in base.modules[path].weights
            if (path, weight.name) in fitted._keys  # vectors have no factors of low rank
        ]

    def check_alone(self) -> None:
        """Checks what can be known without the base: each experts module has weights, and all weights are finite."""
        present = self.weights()
        # A layer's index does not say the path of its container.
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
        total = 0
        for keys in self._keys.values():
            for suffix, key in keys.items():
                count = math.prod(self.files.entries[key].shape)
                if suffix == "_codes":
                    count = count * 8 // BITS[self.config.storage]
                total += 0 if suffix == "_scales" else count
        return total

    def weights(self) -> dict[str, list[str]]:
        """The names of the weights that are changed, by module path."""
        names: dict[str, list[str]] = {}
        for path, name in self._keys:
            names.setdefault(path, []).append(name)
        return names

    def delta(self, path: str, name: str) -> Tensor | None:
        """A weight's delta `[n, ...]` as known without the base; None for effective rows or if tensors are missing."""
        keys = self._keys.get((path, name), {})
        return None if "_rows" in keys or len(keys) < len(self._suffixes) else self.decoded(keys)

    def decoded(self, keys: dict[str, str], length: int | None = None, base_rows: Tensor | None = None) -> Tensor:
        """The delta `[n, ...]` of the weight that is stored under some keys; see `encodings.delta_from`."""
        stored = {suffix: self.files.read(key) for suffix, key in keys.items()}
        return delta_from(self.config.storage, stored, self.config.scaling, length, base_rows)

    def other_tensors(self) -> list[str]:
        """The keys of `modules_to_save`."""
        return [key for key in self.files.entries if DELTA_KEY not in key]


def _keys_by_weight(entries: Iterable[str]) -> dict[tuple[str, str], dict[str, str]]:
    """The keys of the tensors of deltas, by path and weight, then by suffix."""
    keys: dict[tuple[str, str], dict[str, str]] = {}
    for key in entries:
        if DELTA_KEY in key:
            suffix = next((suffix for suffix in ("_A", "_B", *FROZEN_SUFFIXES) if key.endswith(suffix)), "")
            path, _, name = key.removeprefix(KEY_PREFIX).removesuffix(suffix).rpartition(DELTA_KEY)
            keys.setdefault((path, name), {})[suffix] = key
    return keys


def read_config(folder: Path) -> ESFTConfig:
    """Reads an adapter's config, of bounded size.

    Raises:
        ValueError: if it is malformed, or the adapter is not of ESFT.
    """
    content = read_json(folder / CONFIG_NAME)
    if not isinstance(content, dict) or content.get("peft_type") != "ESFT":
        kind = content.get("peft_type") if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{folder} is not an ESFT adapter: its peft_type is {str(kind)[:100]!r}")
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
