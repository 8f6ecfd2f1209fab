"""Folders of safetensors files: headers read and checked by themselves, tensors read, written and replaced one by one.

Nothing here maps a file into memory or holds more than the tensors that are asked for.

Source of the format: https://github.com/huggingface/safetensors (README, "Format").
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


MAX_HEADER_BYTES = 100_000_000  # the format's own limit
CHUNK_BYTES = 1 << 22  # what is looked at in one step
INDEX_NAME = "model.safetensors.index.json"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies.

    Attributes:
        file: the file that holds it.
        dtype: its dtype.
        shape: its shape.
        offset: of its first byte in the file.
    """

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The tensors of a file, from its header alone.

    Raises:
        ValueError: if it is no well-formed safetensors file: a header too long or no JSON object of tensors, an
            unknown dtype, a range that does not fit the shape or the file, or ranges that overlap.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise ValueError(f"{file} is no safetensors file: its header would have {length:,} of {size:,} bytes")
        try:
            header = json.loads(stream.read(length))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is no safetensors file: its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise ValueError(f"{file} is no safetensors file: its header is a {type(header).__name__}, not an object")
    header.pop("__metadata__", None)
    entries = {key: _entry(file, key, value, 8 + length) for key, value in header.items()}
    end = 8 + length
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
        if entry.offset != end:
            raise ValueError(
                f"{file}: {key} begins at byte {entry.offset:,}, not at {end:,} where the one before ends"
            )
        end += entry.num_bytes
    if end != size:
        raise ValueError(f"{file} has {size:,} bytes, but its header describes {end:,}: it is cut short or damaged")
    return entries


def _entry(file: Path, key: str, value: Any, start: int) -> TensorEntry:
    try:
        name, shape, (first, last) = value["dtype"], value["shape"], value["data_offsets"]
        numbers = [*shape, first, last]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: the header's entry of {key!r} is malformed: {str(value)[:200]}") from error
    if any(not isinstance(number, int) or isinstance(number, bool) or number < 0 for number in numbers):
        raise ValueError(f"{file}: {key!r} has the shape {str(shape)[:200]} and the range [{first}, {last}]")
    if not isinstance(name, str) or name not in DTYPES:
        raise ValueError(f"{file}: {key!r} has the dtype {str(name)[:40]!r}; readable are {', '.join(DTYPES)}")
    entry = TensorEntry(file, DTYPES[name], tuple(shape), start + first)
    if entry.num_bytes != last - first:
        raise ValueError(f"{file}: {key!r} {name} {list(shape)} takes {entry.num_bytes:,} bytes, not {last - first:,}")
    return entry


class TensorFolder:
    """The tensors of all safetensors files of a checkpoint.

    Args:
        files: the files.

    Attributes:
        files: the same.
        entries: all tensors, by key.

    Raises:
        ValueError: if a file is malformed, or two hold the same key.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.files = list(files)
        self.entries: dict[str, TensorEntry] = {}
        for file in self.files:
            for key, entry in read_header(file).items():
                if key in self.entries:
                    raise ValueError(f"{key} is in two files: {self.entries[key].file} and {file}")
                self.entries[key] = entry

    @classmethod
    def of_model(cls, folder: Path) -> TensorFolder:
        """The files of a Hugging Face checkpoint: those that its index names, or the only one.

        Raises:
            FileNotFoundError: if there are none.
            ValueError: if the index is malformed or names a file outside the folder.
        """
        index = folder / INDEX_NAME
        if not index.exists():
            if not (folder / "model.safetensors").exists():
                raise FileNotFoundError(f"{folder} has neither model.safetensors nor {INDEX_NAME}")
            return cls([folder / "model.safetensors"])
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is malformed: it has no object weight_map ({error})") from error
        return cls([folder / plain_file_name(name, index) for name in sorted(names, key=str)])

    def read(self, key: str) -> Tensor:
        """One tensor."""
        entry = self.entries[key]
        return self._read(entry, entry.offset, entry.shape)

    def read_blocks(self, key: str, num_blocks: int, blocks: Sequence[int]) -> Tensor:
        """Some of the equal blocks that a tensor consists of, `[len(blocks), ...]`, reading nothing else."""
        entry = self.entries[key]
        size = entry.num_bytes // num_blocks
        shape = block_shape(entry.shape, num_blocks)
        return torch.stack([self._read(entry, entry.offset + block * size, shape) for block in blocks])

    def _read(self, entry: TensorEntry, offset: int, shape: Sequence[int]) -> Tensor:
        data = torch.empty(math.prod(shape) * entry.dtype.itemsize, dtype=torch.uint8)
        buffer: Any = data.numpy()
        with entry.file.open("rb") as stream:
            stream.seek(offset)
            if stream.readinto(buffer) != data.numel():
                raise ValueError(f"{entry.file} is cut short")
        return data.view(entry.dtype).reshape(tuple(shape))


def find_not_finite(entries: Mapping[str, TensorEntry]) -> str | None:
    """The key of the first tensor that holds a NaN or an infinity; None if there is none. Reads in small chunks."""
    buffer = torch.empty(CHUNK_BYTES, dtype=torch.uint8)
    data: Any = buffer.numpy()
    window = memoryview(data)
    for key, entry in entries.items():
        if not entry.dtype.is_floating_point:
            continue
        with entry.file.open("rb", buffering=0) as stream:
            stream.seek(entry.offset)
            for start in range(0, entry.num_bytes, CHUNK_BYTES):
                size = min(CHUNK_BYTES, entry.num_bytes - start)
                if stream.readinto(window[:size]) != size:
                    raise ValueError(f"{entry.file} is cut short")
                if not is_finite(buffer[:size].view(entry.dtype)):
                    return key
    return None


def is_finite(values: Tensor) -> bool:
    """True if no value is a NaN or an infinity."""
    values = values.float() if values.dtype.itemsize == 1 else values  # 8-bit floats have no sum
    # A sum is quicker than looking at each, and not finite if one of them is not; but it may also overflow.
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())


def block_shape(shape: Sequence[int], num_blocks: int) -> tuple[int, ...]:
    """The shape of one of the equal blocks of a tensor.

    `[E, ...]` has `E` blocks `[...]`, `[E * rows, ...]` has `E` blocks `[rows, ...]`. One block is the tensor itself.
    """
    if num_blocks == 1:
        return tuple(shape)
    if shape[0] == num_blocks:
        return tuple(shape[1:])
    return (shape[0] // num_blocks, *shape[1:])


def overwrite(entry: TensorEntry, file: Path, tensor: Tensor, num_blocks: int = 1, block: int = 0) -> None:
    """Writes a tensor over one of the equal blocks of another, which lies in `file` as `entry` says.

    Raises:
        ValueError: if it does not fit.
    """
    size, shape = entry.num_bytes // num_blocks, block_shape(entry.shape, num_blocks)
    if tensor.dtype != entry.dtype or tuple(tensor.shape) != shape:
        raise ValueError(f"{file}: {entry.dtype} {list(shape)} cannot hold {tensor.dtype} {list(tensor.shape)}")
    with file.open("r+b") as stream:
        stream.seek(entry.offset + block * size)
        stream.write(as_bytes(tensor))


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, as they lie in a file."""
    data: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(data)


def write_tensors(
    file: Path,
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensors: Iterable[tuple[str, Tensor]],
) -> None:
    """Writes a safetensors file tensor by tensor, without ever holding more than one.

    Args:
        file: is created.
        layout: dtype and shape of each tensor, by key.
        tensors: keys and tensors, in any order, each once.

    Raises:
        ValueError: if a tensor is missing, repeated or not as the layout says. The file is then incomplete.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets, end = {}, 0
    # The widest dtypes first keeps every tensor aligned.
    for key, (dtype, shape) in sorted(layout.items(), key=lambda item: -item[1][0].itemsize):
        offsets[key], end = end, end + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offsets[key], end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    remaining = set(layout)
    with file.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        stream.truncate(8 + len(encoded) + end)
        for key, tensor in tensors:
            if key not in remaining or layout[key] != (tensor.dtype, tuple(tensor.shape)):
                raise ValueError(f"{file}: unexpected tensor {key} {tensor.dtype} {list(tensor.shape)}")
            remaining.remove(key)
            stream.seek(8 + len(encoded) + offsets[key])
            stream.write(as_bytes(tensor))
    if remaining:
        raise ValueError(f"{file}: no tensor was given for {sorted(remaining)[:4]}")


def plain_file_name(name: Any, source: Path) -> str:
    """Refuses file names that lead out of the folder in which they are named.

    Raises:
        ValueError: naming the file that holds the name.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or any(c in name for c in ("/", "\\", "\0")):
        raise ValueError(f"{source} names the file {str(name)[:200]!r}, which is not a plain file name")
    return name


def sorted_tensor_files(folder: Path) -> list[Path]:
    """All safetensors files of a folder.

    Raises:
        FileNotFoundError: if there are none.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no *.safetensors file")
    return files


def iter_other_files(folder: Path) -> Iterator[Path]:
    """The small files of a checkpoint: configuration, tokenizer, code; no weights."""
    for file in sorted(folder.iterdir()):
        if file.is_file() and not file.name.endswith(WEIGHT_SUFFIXES):
            yield file
