"""A simulated CUDA device on a CPU build of torch: tensors say "cuda:0" and are computed on the CPU.

Within `with SimulatedDevice(capability=(9, 0)) as device:` each tensor that is made on "cuda" or moved there is a
`DeviceTensor`, a wrapper around a CPU tensor. Python code takes a GPU's branches: `device.type`, `is_cuda`, streams.
Operators that make the host wait are counted, with the place in the code. `_grouped_mm` follows
`ATen/native/cuda/GroupedBlas.cpp`: its checks of strides, alignment, dtypes and the number of groups, and its copy of
the offsets to the host wherever it has no fast kernel (it has one on sm90 and sm100 in bf16).

This module has to be imported before torch, which asks only once which accelerators there are.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
import weakref
from collections import Counter
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock


def compiler() -> str | None:
    """The C++ compiler that builds the device."""
    return shutil.which(os.environ.get("CXX", "c++"))


def _load() -> None:
    """Builds `fake_cuda.cpp`, once for each version of torch, and loads it."""
    if "torch" in sys.modules:
        raise RuntimeError("import simulated_device before torch; tests/gpu/run.py does")
    source = Path(__file__).with_name("fake_cuda.cpp")
    torch_root = Path(importlib.util.find_spec("torch").origin).parent
    version = (torch_root / "version.py").read_bytes()
    digest = hashlib.sha256(source.read_bytes() + version + str(torch_root).encode()).hexdigest()[:12]
    library = Path(tempfile.gettempdir()) / f"peft-esft-{os.getuid()}-fake-cuda-{digest}.so"
    if not library.exists():
        include, lib = torch_root / "include", torch_root / "lib"
        built = library.with_suffix(f".{os.getpid()}")
        flags = ["-O1", "-std=c++20", "-shared", "-fPIC", f"-I{include}", f"-I{include}/torch/csrc/api/include"]
        links = [f"-L{lib}", f"-Wl,-rpath,{lib}", "-lc10", "-ltorch_cpu"]
        subprocess.run([compiler(), *flags, str(source), "-o", str(built), *links], check=True)
        built.rename(library)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


_load()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._python_dispatch import (  # noqa: E402
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)
from torch.utils._pytree import tree_map  # noqa: E402


HOPPER, AMPERE, ADA, BLACKWELL_RTX, TURING = (9, 0), (8, 0), (8, 9), (12, 0), (7, 5)

_WAITING = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
    "equal",
    "is_nonzero",
}
_INDEXING = ("index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_")
_MIXING = (*_INDEXING, "copy_", "_to_copy", "set_")
"""Operators that take tensors of the host beside those of a device."""
_ALLOCATION = 512  # bytes; CUDA's caching allocator rounds up to it


class DeviceTensor(Tensor):
    """A tensor of the simulated device, whose values are those of `inner`."""

    inner: Tensor

    @staticmethod
    def __new__(
        cls, tensor: Tensor, device: Any = None, requires_grad: bool = False, inner: Any = None, **_: Any
    ) -> Any:
        if inner is not None:  # accelerate makes a parameter anew, of its type and with its attributes
            return torch.nn.Parameter(tensor, requires_grad)
        inner = tensor
        wrapper = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=device,
            requires_grad=requires_grad,
        )
        wrapper.inner = inner
        return wrapper

    def __repr__(self, **_: Any) -> str:
        return f"DeviceTensor({self.inner})"

    def __format__(self, spec: str) -> str:
        return self.item().__format__(spec) if self.dim() == 0 else super().__format__(spec)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func == Tensor.data.__set__ and isinstance(args[1], DeviceTensor):
                func(*args)
                args[0].inner = args[1].inner
                return None
            if getattr(func, "__name__", "") == "numpy":
                raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
            if getattr(func, "__name__", "") == "is_pinned":
                return False
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert SimulatedDevice.current is not None
        return SimulatedDevice.current.run(func, args, kwargs or {})


def on_host(tensor: Tensor) -> Tensor:
    """The values of a tensor, wherever it is."""
    return tensor.inner if isinstance(tensor, DeviceTensor) else tensor


class SimulatedDevice(TorchDispatchMode):
    """What is simulated, and what was seen of it.

    Args:
        capability: as `torch.cuda.get_device_capability` has it.
        is_meta: compute nothing: the tensors inside are on the meta device. Values that the host reads are 0.
        has_float64: False for a device without this dtype, such as Apple's.

    Attributes:
        waits: how often the host waited, by what and where.
        operators: how often each operator ran.
        groups: of each call of a grouped kernel, the number of groups.
        copies: of each copy from the host, whether it was page-locked there, and on which stream it ran.
        live: bytes that are allocated now.
        peak: the most that there were since it was last set to 0.
        largest: the largest piece that the package itself has allocated.
    """

    current: SimulatedDevice | None = None

    def __init__(self, capability: tuple[int, int] = HOPPER, is_meta: bool = False, has_float64: bool = True) -> None:
        super().__init__()
        self.capability, self.is_meta, self.has_float64 = capability, is_meta, has_float64
        self.waits: Counter[tuple[str, str]] = Counter()
        self.operators: Counter[str] = Counter()
        self.groups: list[int] = []
        self.copies: list[tuple[bool, int]] = []
        self.recorded: list[Any] = []
        self.live = self.peak = self.largest = 0
        self._storages: set[int] = set()
        self._pinned: set[int] = set()
        self._sync_mode = 0
        self._stack = ExitStack()

    def reset(self) -> None:
        """Forgets what was seen."""
        for seen in (self.waits, self.operators, self.groups, self.copies):
            seen.clear()

    def waits_of_package(self) -> Counter[tuple[str, str]]:
        """The waits that code of the package asked for."""
        return Counter({key: count for key, count in self.waits.items() if key[1].startswith("peft_esft")})

    def __enter__(self) -> SimulatedDevice:
        from peft_esft.ops import grouped_mm

        SimulatedDevice.current = self
        grouped_mm._runs_without_waiting.cache_clear()
        patches: list[tuple[Any, str, Any]] = [
            (torch.cuda, "_lazy_init", lambda: None),
            (torch.cuda, "current_device", lambda: 0),
            (torch.cuda, "get_device_capability", lambda device=None: self.capability),
            (torch.cuda, "get_sync_debug_mode", lambda: self._sync_mode),
            (torch.cuda, "set_sync_debug_mode", self._set_sync_mode),
            (torch, "tensor", self._making(torch.tensor)),
            (torch, "as_tensor", self._making(torch.as_tensor)),
            # Wrappers have no version counter there, and composite operators come whole.
            (torch, "inference_mode", lambda mode=True: torch.no_grad() if mode else nullcontext()),
            (Tensor, "tolist", self._tolist(Tensor.tolist)),
            (Tensor, "data_ptr", self._data_ptr(Tensor.data_ptr)),
            (Tensor, "pin_memory", self._pin),
        ]
        for target, name, replacement in patches:
            self._stack.enter_context(mock.patch.object(target, name, replacement))
        self._stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        self._stack.callback(
            torch.__future__.set_swap_module_params_on_conversion,
            torch.__future__.get_swap_module_params_on_conversion(),
        )
        torch.__future__.set_swap_module_params_on_conversion(True)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()
        SimulatedDevice.current = None

    def _set_sync_mode(self, mode: str | int) -> None:
        self._sync_mode = {"default": 0, "warn": 1, "error": 2}.get(mode, mode)  # type: ignore[assignment,arg-type]

    def _making(self, make: Any) -> Any:
        """`torch.tensor` and `as_tensor`, which do not come by the dispatcher as a copy from the host."""

        def made(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Any:
            if device is None or torch.device(device).type != "cuda" or isinstance(data, DeviceTensor):
                return make(data, *args, **kwargs, **({} if device is None else {"device": device}))
            needs = kwargs.pop("requires_grad", False)
            return make(data, *args, **kwargs).to(torch.device(device)).requires_grad_(needs)

        return made

    def _tolist(self, own: Any) -> Any:
        def tolist(tensor: Tensor) -> Any:
            if not isinstance(tensor, DeviceTensor):
                return own(tensor)
            self.note("tolist")
            return [0] * tensor.numel() if self.is_meta else own(tensor.inner)

        return tolist

    def _data_ptr(self, own: Any) -> Any:
        def data_ptr(tensor: Tensor) -> int:
            inner = on_host(tensor)
            if not inner.is_meta:
                return own(inner)  # type: ignore[no-any-return]
            return inner.storage_offset() * inner.element_size()

        return data_ptr

    def _pin(self, tensor: Tensor) -> Tensor:
        with _disable_current_modes():
            copy = tensor.clone()
        self._pinned.add(copy.untyped_storage()._cdata)
        return copy

    def note(self, what: str) -> None:
        """Counts a wait of the host."""
        self.waits[what, _place()] += 1
        if self._sync_mode == 1:
            warnings.warn("called a synchronizing CUDA operation", stacklevel=2)
        elif self._sync_mode == 2:
            raise RuntimeError("called a synchronizing CUDA operation")

    @contextmanager
    def _pushed(self) -> Any:
        """Has operators inside of composite ones, where the mode is off, run on the device too."""
        if self in _get_current_dispatch_mode_stack():
            yield
            return
        TorchDispatchMode.__enter__(self)
        try:
            yield
        finally:
            TorchDispatchMode.__exit__(self, None, None, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """One operator."""
        name = func._schema.name.split("::")[1]
        if func.namespace == "peft_esft":
            from peft_esft.ops import grouped_mm

            with self._pushed():
                return getattr(grouped_mm, f"_{name}_op")(*args, **kwargs)
        found: list[DeviceTensor] = []
        host: list[Tensor] = []

        def unwrap(value: Any) -> Any:
            if isinstance(value, DeviceTensor):
                found.append(value)
                return value.inner
            if isinstance(value, Tensor) and value.device.type == "cpu" and value.dim() > 0:
                host.append(value)
            return value

        inner_args, inner_kwargs = tree_map(unwrap, args), tree_map(unwrap, kwargs)
        asked = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        is_asked_for = asked is not None and asked.type == "cuda"
        if is_asked_for:
            inner_kwargs["device"] = torch.device("meta" if self.is_meta else "cpu")
            inner_kwargs.pop("pin_memory", None)
        target = torch.device("cuda", asked.index or 0) if is_asked_for else self._device_of(name, args, found)
        if name == "record_stream":
            self.recorded.append(args[1])
            return None
        with _disable_current_modes():
            if found:
                self._check_devices(name, found, host)
            self._note_waits(func, name, args, kwargs, inner_args, found, host, asked)
            result = self._compute(func, name, inner_args, inner_kwargs, found or is_asked_for)
        if func is torch.ops.aten.detach.default and found:
            return self._wrap(result, args[0].device)
        if not is_asked_for and (not found or asked is not None):
            return result
        given = {id(tensor.inner): tensor for tensor in found}  # operators in place hand back what they were given

        def wrap(value: Any) -> Any:
            if not isinstance(value, Tensor) or isinstance(value, DeviceTensor):
                return value
            return given[id(value)] if id(value) in given else self._wrap(value, target)

        return tree_map(wrap, result)

    def _device_of(self, name: str, args: Any, found: list[DeviceTensor]) -> torch.device:
        if name == "copy_" and isinstance(args[0], DeviceTensor):
            return args[0].device
        own = [tensor for tensor in found if tensor.dim() > 0] or found
        return own[0].device if own else torch.device("cuda:0")

    def _check_devices(self, name: str, found: list[DeviceTensor], host: list[Tensor]) -> None:
        devices = {tensor.device for tensor in found if tensor.dim() > 0}
        if (len(devices) > 1 and name not in ("copy_", "_to_copy")) or (host and name not in _MIXING):
            everything = sorted({*map(str, devices), *("cpu" for _ in host)})
            raise RuntimeError(f"Expected all tensors to be on the same device: {name} {everything} at {_place()}")

    def _note_waits(
        self, func: Any, name: str, args: Any, kwargs: Any, inner: Any, found: Any, host: Any, asked: Any
    ) -> None:
        self.operators[name] += bool(found)
        if found and name in _WAITING:
            self.note(name)
        if found and name in _INDEXING:
            indices = [index for index in inner[1] if isinstance(index, Tensor)]
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices) or host:
                self.note(f"{name} by a mask or from the host")
        if found and name == "repeat_interleave" and func._overloadname == "Tensor" and not kwargs.get("output_size"):
            self.note("repeat_interleave without output_size")
        if found and name == "_to_copy" and asked is not None and asked.type == "cpu":
            self._note_copy("copy to the host", kwargs.get("non_blocking"))
        if not found and name == "_to_copy" and asked is not None and asked.type == "cuda":
            stream = torch.accelerator.current_stream(asked.index or 0).stream_id
            self.copies.append((args[0].untyped_storage()._cdata in self._pinned, stream))
            self._note_copy("copy from the host", kwargs.get("non_blocking"))
        if name == "copy_":
            to_device, from_device = (isinstance(tensor, DeviceTensor) for tensor in args[:2])
            if to_device != from_device and args[1].dim() > 0:
                what = "copy from the host" if to_device else "copy to the host"
                self._note_copy(what, kwargs.get("non_blocking") or args[2:])
        if name.startswith("grouped_mm_fallback"):
            self.note("transformers' own loop")
        if name == "_grouped_mm":
            self._check_grouped_mm(*inner[:2], kwargs.get("offs", inner[2] if len(inner) > 2 else None))

    def _note_copy(self, what: str, non_blocking: Any) -> None:
        if not non_blocking:
            self.note(what)

    def _check_grouped_mm(self, left: Tensor, right: Tensor, ends: Any) -> None:
        if self.capability < (8, 0) or left.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise RuntimeError(f"torch.grouped_mm has no kernel for sm{self.capability} and {left.dtype}")
        for operand in (left, right):
            rows, columns = operand.stride()[-2:]
            sizes = operand.shape[-2:]
            aligned = 16 // operand.element_size()
            if rows == 1 and columns >= max(1, sizes[0]):
                is_right = columns % aligned == 0
            else:
                is_right = columns == 1 and rows >= max(1, sizes[1]) and rows % aligned == 0
            if not is_right or (not self.is_meta and operand.data_ptr() % 16):
                raise RuntimeError(f"strides {operand.stride()} of {tuple(operand.shape)} do not suit at {_place()}")
        if on_host(ends).dtype != torch.int32 or left.dtype != right.dtype:
            raise RuntimeError(f"dtypes {left.dtype}, {right.dtype}, {ends.dtype} do not suit")
        if not (self.capability[0] in (9, 10) and left.dtype == torch.bfloat16):
            self.note("grouped_mm without a kernel")
        elif len(ends) >= 1024:
            raise RuntimeError(f"Can't process more than 1024 groups: {len(ends)} at {_place()}")
        self.groups.append(len(ends))

    def _compute(self, func: Any, name: str, args: Any, kwargs: Any, is_on_device: Any) -> Any:
        if not self.has_float64 and is_on_device and kwargs.get("dtype") == torch.float64:
            raise TypeError("Cannot convert a tensor to float64 dtype as the device doesn't support float64")
        if self.is_meta and name == "_local_scalar_dense" and args[0].is_meta:
            return 0
        if self.is_meta and name == "_grouped_mm":
            left, right = args[:2]
            groups = kwargs.get("offs", args[2] if len(args) > 2 else None)
            shape = (left.shape[0], right.shape[-1])
            return left.new_empty(shape if right.dim() == 3 else (len(groups), *shape))
        if name == "_conj":  # a view whose mark a wrapper does not carry
            return torch.conj_physical(args[0])
        if name in ("_softmax", "_log_softmax") and args[2]:  # from half to float, which the CPU does not have
            return func(args[0].float(), args[1], False)
        if name in ("_softmax_backward_data", "_log_softmax_backward_data") and args[3] == torch.float16:
            return func(args[0].float(), args[1].float(), args[2], torch.float32).half()
        if name == "histc" and not args[0].is_floating_point():  # which the CPU does not have
            return func(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
        return func(*args, **kwargs)

    def _wrap(self, inner: Tensor, device: torch.device) -> DeviceTensor:
        self.account(inner)
        return DeviceTensor(inner, device)

    def account(self, inner: Tensor) -> None:
        """Counts the memory of a tensor, until its storage is gone."""
        storage = inner.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // _ALLOCATION) * _ALLOCATION
        if key in self._storages:
            return
        self._storages.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        if size > max(self.largest, 2**20) and _place().startswith("peft_esft"):
            self.largest = size

        def free() -> None:
            self._storages.discard(key)
            self.live -= size

        weakref.finalize(storage, free)


def _place() -> str:
    """The innermost line of the package, or of the libraries around it."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        for package in ("peft_esft/", "transformers/", "accelerate/", "/peft/"):
            start = file.rfind(package)
            if start >= 0 and "/tests/" not in file:
                return f"{file[start:].lstrip('/')}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"
