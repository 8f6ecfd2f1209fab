"""Defines `AdapterPool`, which loads adapters when they are asked for, and drops those not used for longest."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Condition, RLock
from typing import Any

import torch
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, load_peft_weights, set_peft_model_state_dict
from torch import Tensor

from ..scoring.memory_size import bytes_of
from .config import ESFTConfig
from .file_checks import check_finite_header, compare_entries
from .fingerprint import compare_base
from .load_checks import expected_entries
from .mixed_batch import BASE
from .model import ESFTModel, adapters_lock
from .other_classes import moved_keys
from .preparation import check_adapter_name, resolve_config


@dataclass(frozen=True)
class PoolStatistics:
    """What a pool holds and has done.

    Attributes:
        resident: names of the adapters on the device, the least recently used first.
        device_bytes: of their effective rows.
        host_bytes: of the files' tensors in host memory.
        hits: how often an adapter was asked for that was on the device.
        misses: how often it was not.
        reads: files read.
        evictions: adapters that were dropped for room.
    """

    resident: tuple[str, ...]
    device_bytes: int
    host_bytes: int
    hits: int
    misses: int
    reads: int
    evictions: int


@dataclass(frozen=True)
class _HostCopy:
    """An adapter's config, and its tensors as the file has them, in host memory; for a moment on the device."""

    config: ESFTConfig
    weights: dict[str, Tensor]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.weights.values())


class AdapterPool:
    """Adapters of one base, of which as many are on the device as there is room for.

    All methods may be called from several threads, also while requests run. What a call with `adapter_names` began
    with it goes on with; `using` keeps adapters in place from before a call until after it.

    Args:
        model: a `PeftModel` with an ESFT adapter, which is not part of the pool.
        device_bytes: the most that the effective rows of the pool's adapters may take on the device: a number, or a
            text with a unit such as "8GB" or "512MiB".
        host_bytes: the most that their files' tensors may take in host memory, from where they are loaded again after
            they were dropped; None for no limit. The last one that was read always stays.

    Raises:
        ValueError: if the model has no ESFT adapter, or a size is none.

    Example:
        >>> pool = AdapterPool(model, device_bytes=8 * 2**30)
        >>> pool.add("law", "org/law")
        >>> with pool.using("law"):
        ...     model.generate(**batch, adapter_names=["law", "__base__"])
    """

    def __init__(self, model: PeftModel, device_bytes: int | str, host_bytes: int | str | None = None) -> None:
        if not isinstance(model, PeftModel) or not isinstance(model.base_model, ESFTModel):
            raise ValueError(
                f"model is a {type(model).__name__} without an ESFT adapter; wrap the base with "
                "PeftModel.from_pretrained(base, adapter) first"
            )
        self.model = model
        self._tuner: ESFTModel = model.base_model
        self.device_bytes = bytes_of("device_bytes", device_bytes)
        self.host_bytes = None if host_bytes is None else bytes_of("host_bytes", host_bytes)
        self._sources: dict[str, tuple[str, dict[str, Any]]] = {}
        self._host: OrderedDict[str, Future[_HostCopy]] = OrderedDict()
        self._resident: OrderedDict[str, None] = OrderedDict()  # the least recently used first
        self._sizes: dict[str, int] = {}  # bytes on the device, of all that were ever read
        self._users: dict[str, int] = {}
        self._hits = self._misses = self._reads = self._evictions = 0
        self._condition = Condition(RLock())
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="adapter-reader")
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="adapter-loader")

    def add(self, adapter_name: str, path: str | Path, **kwargs: Any) -> None:
        """Makes an adapter known. Its config is compared with the model; its weights are read when first asked for.

        Args:
            adapter_name: what it is called in `adapter_names`.
            path: folder or Hub name.
            **kwargs: passed to `ESFTConfig.from_pretrained` and `peft.load_peft_weights`, for example `revision`.

        Raises:
            ValueError: if the name is taken, or cannot be one; or the adapter is not found, is not ESFT's, has no
                weights or does not fit the model.
        """
        check_adapter_name(adapter_name, self._tuner.model)
        size = self._check_config(_read_config(str(path), kwargs))
        folder = Path(path, kwargs.get("subfolder") or "")
        if folder.is_dir() and not any((folder / name).is_file() for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)):
            raise ValueError(f"{folder} has the config of an adapter, but no {SAFETENSORS_WEIGHTS_NAME}")
        with self._condition:
            if adapter_name in self._sources or adapter_name in self.model.peft_config:
                raise ValueError(f"there already is an adapter {adapter_name!r}; choose another name")
            self._sources[adapter_name] = (str(path), kwargs)
            self._sizes[adapter_name] = size

    def __contains__(self, adapter_name: object) -> bool:
        return adapter_name in self._sources

    def __len__(self) -> int:
        return len(self._sources)

    def get(self, adapter_name: str) -> str:
        """Puts an adapter on the device, where it stays until others need its room; see `using`.

        Raises:
            ValueError: if it is unknown, does not fit the model, or is larger than the room for all.
        """
        with self.using(adapter_name):
            return adapter_name

    @contextmanager
    def using(self, *adapter_names: str) -> Iterator[list[str]]:
        """Puts adapters on the device and keeps them there within the context, which waits for room if it must.

        Args:
            *adapter_names: names, also repeated, and `"__base__"`.

        Raises:
            ValueError: if one is unknown, does not fit the model, or they are larger than the room for all, or than
                what active adapters of the pool leave of it.
        """
        names = [name for name in dict.fromkeys(adapter_names) if name != BASE]
        self._take(names)
        try:
            yield list(adapter_names)
        finally:
            with self._condition:
                for name in names:
                    self._users[name] -= 1
                self._condition.notify_all()

    def prefetch(self, *adapter_names: str) -> list[Future[str]]:
        """`get` in the background, one after another."""
        return [self._loader.submit(self.get, name) for name in adapter_names]

    def drop(self, adapter_name: str) -> None:
        """Takes an adapter off the device and out of host memory, when nobody uses it any more; it stays known."""
        self._check_known([adapter_name])
        with self._condition:
            self._condition.wait_for(lambda: not self._users.get(adapter_name))
            self._note_deleted()
            if adapter_name in self._resident:
                self._delete(adapter_name)
            self._host.pop(adapter_name, None)
            self._condition.notify_all()

    def statistics(self) -> PoolStatistics:
        """What the pool holds and has done so far."""
        with self._condition:
            return PoolStatistics(
                resident=tuple(self._resident),
                device_bytes=self._held(),
                host_bytes=self._host_nbytes(),
                hits=self._hits,
                misses=self._misses,
                reads=self._reads,
                evictions=self._evictions,
            )

    def close(self) -> None:
        """Ends the pool's threads, after what they have begun."""
        self._loader.shutdown()
        self._reader.shutdown()

    def _take(self, names: list[str]) -> None:
        self._check_known(names)
        is_taken = False
        while not is_taken:
            with self._condition:
                self._note_deleted()
            # Files are read while others hold the lock.
            copies = {name: self._read(name).result() for name in names if name not in self._resident}
            for name, own in copies.items():
                self._sizes[name] = self._nbytes(own.config)
            self._check_size(names)
            copies = {name: self._on_device(own) for name, own in copies.items()}
            with self._condition:
                self._condition.wait_for(lambda: self._makes_room(names))
                missing = [name for name in names if name not in self._resident]
                # Unless one was dropped that was still there when the files were read.
                is_taken = copies.keys() >= set(missing)
                if is_taken:
                    self._put(names, {name: copies[name] for name in missing})

    def _put(self, names: list[str], copies: dict[str, _HostCopy]) -> None:
        for name, own in copies.items():
            self._insert(name, own)
        for name in names:
            self._users[name] = self._users.get(name, 0) + 1
            self._resident.move_to_end(name)
        self._misses += len(copies)
        self._hits += len(names) - len(copies)

    def _note_deleted(self) -> None:
        """Takes adapters off the list that somebody deleted from the model itself."""
        for name in [name for name in self._resident if name not in self.model.peft_config]:
            del self._resident[name]

    def _check_known(self, names: Sequence[str]) -> None:
        unknown = [name for name in names if name not in self._sources]
        if unknown:
            raise ValueError(f"the pool has no adapters {unknown}; it has {sorted(self._sources)}")

    def _check_size(self, names: list[str]) -> None:
        needed = sum(self._sizes[name] for name in names)
        if needed > self.device_bytes:
            raise ValueError(
                f"{names} take {needed:,} bytes together, but device_bytes is {self.device_bytes:,}; increase it, "
                "or use fewer adapters at once"
            )

    def _check_config(self, config: ESFTConfig) -> int:
        """Compares a config with the model; returns the bytes of its rows."""
        with adapters_lock:
            resolved = resolve_config(config, self._tuner.model)
            config.move(resolved.prefixes)
            compare_base(config, self._tuner.model, resolved.experts, resolved.target_experts)
        return resolved.nbytes

    def _nbytes(self, config: ESFTConfig) -> int:
        with adapters_lock:
            return self._tuner.rows_nbytes(config)

    def _makes_room(self, names: list[str]) -> bool:
        """Drops what was not used for longest until there is room; False, and nothing dropped, if there cannot be yet.

        Active and merged adapters stay: calls without `adapter_names` use them.

        Raises:
            ValueError: if they leave no room, whatever else is dropped.
        """
        needed = sum(self._sizes[name] for name in names if name not in self._resident)
        free = self.device_bytes - self._held()
        staying = self._active() - set(names)
        if sum(self._sizes[name] for name in {*names, *staying}) > self.device_bytes:
            raise ValueError(
                f"there is no room for {names} beside {sorted(staying)}, which are active or merged: device_bytes is "
                f"{self.device_bytes:,}. Make another adapter active with set_adapter, which unmerges too, or "
                "increase device_bytes"
            )
        unused = [
            name for name in self._resident if not self._users.get(name) and name not in names and name not in staying
        ]
        if free + sum(self._sizes[name] for name in unused) < needed:
            return False
        for name in unused:
            if free >= needed:
                break
            free += self._sizes[name]
            self._delete(name)
            self._evictions += 1
        return True

    def _active(self) -> set[str]:
        """Adapters on the device that calls without `adapter_names` use."""
        merged = (name for layer in self._tuner._layers() for name in layer.merged_adapters)
        return {*self._tuner.active_adapters, *merged} & set(self._resident)

    def _held(self) -> int:
        return sum(self._sizes[name] for name in self._resident)

    def _insert(self, name: str, own: _HostCopy) -> None:
        with adapters_lock:
            if name in self.model.peft_config:
                raise ValueError(
                    f"the model has an adapter {name!r} that is not the pool's; delete it, or rename one of the two"
                )
            try:
                self._attach(name, own)
                self._tuner.freeze_layers(name)
            except BaseException:
                if name in self.model.peft_config:
                    self.model.delete_adapter(name)
                raise
            self._resident[name] = None

    def _attach(self, name: str, own: _HostCopy) -> None:
        config = copy.deepcopy(own.config)
        self.model.add_adapter(name, config, low_cpu_mem_usage=True)
        # No copies: what lives on are the rows, which `freeze_layers` computes, or loading itself has copied.
        weights = moved_keys(own.weights, config.prefixes)
        compare_entries(weights, expected_entries(self.model, own.config, name))
        set_peft_model_state_dict(self.model, dict(weights), adapter_name=name, low_cpu_mem_usage=True)
        for layer in self._tuner._layers():
            if name in layer.adapters:
                layer._move_adapter_to_device_of_base_layer(name)

    def _on_device(self, own: _HostCopy) -> _HostCopy:
        """The same on the device. It is copied on a stream of its own, beside what requests compute."""
        device = self._tuner._layers()[0].compute_device
        if device.type != "cuda":
            return own
        stream = torch.Stream(device)
        with stream:
            weights = {key: tensor.to(device, non_blocking=True) for key, tensor in own.weights.items()}
        stream.synchronize()
        for tensor in weights.values():
            # Used on another stream than it was made on: its memory is not given away while that one may read it.
            tensor.record_stream(torch.accelerator.current_stream(device))
        return _HostCopy(own.config, weights)

    def _delete(self, name: str) -> None:
        with adapters_lock:
            self.model.delete_adapter(name)
        del self._resident[name]

    def _read(self, name: str) -> Future[_HostCopy]:
        """The adapter's tensors in host memory, there already or on the way."""
        with self._condition:
            known = self._host.get(name)
            if known is None or (known.done() and known.exception() is not None):
                known = self._host[name] = self._reader.submit(self._read_file, name)
                self._reads += 1
            self._host.move_to_end(name)
            self._forget_host_copies()
            return known

    def _read_file(self, name: str) -> _HostCopy:
        path, kwargs = self._sources[name]
        config = _read_config(path, kwargs)
        # Here, once: what is loaded is a copy of this config. On the Hub the header is a request.
        header = config.pop_header()
        if header is not None:
            check_finite_header(header)
        weights = load_peft_weights(path, device="cpu", **kwargs)
        # A file that is only mapped into memory would be read when it is loaded.
        keep = torch.Tensor.pin_memory if torch.cuda.is_available() else torch.Tensor.clone
        return _HostCopy(config, {key: keep(tensor) for key, tensor in weights.items()})

    def _forget_host_copies(self) -> None:
        """Forgets the host copies that were not used for longest, but for the last one."""
        if self.host_bytes is None:
            return
        *older, _ = self._host
        for name in older:
            if self._host_nbytes() > self.host_bytes and _is_ready(self._host[name]):
                del self._host[name]

    def _host_nbytes(self) -> int:
        return sum(own.result().nbytes for own in self._host.values() if _is_ready(own))


def _read_config(path: str, kwargs: dict[str, Any]) -> ESFTConfig:
    config = ESFTConfig.from_pretrained(path, **kwargs)
    if not isinstance(config, ESFTConfig):
        raise ValueError(f"{path} holds an adapter of type {config.peft_type}, not ESFT")
    config.inference_mode = True
    return config


def _is_ready(own: Future[_HostCopy]) -> bool:
    return own.done() and own.exception() is None
