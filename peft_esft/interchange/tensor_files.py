"""Folders of safetensors files: tensors read, written and replaced one by one.

Reading is done by safetensors, which maps files into memory; no more than the tensors that are asked for are copied.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import parse_local_safetensors_file_metadata
from safetensors import safe_open
from torch import Tensor

from ..tuner.adapter_file import Header, read_header, read_tensor


INDEX_NAME = "model.safetensors.index.json"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")


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
        self.entries: Header = {}
        self._offsets: dict[Path, dict[str, int]] = {}
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
        return read_tensor(self.entries[key], key)

    def read_blocks(self, key: str, num_blocks: int, blocks: Sequence[int]) -> Tensor:
        """Some of the equal blocks that a tensor consists of, `[len(blocks), ...]`, reading nothing else."""
        entry = self.entries[key]
        if num_blocks == 1:
            return torch.stack([self.read(key) for _ in blocks])
        rows = entry.shape[0] // num_blocks
        with safe_open(entry.file, "pt") as opened:
            part = opened.get_slice(key)
            read = [part[block * rows : (block + 1) * rows] for block in blocks]
        return torch.stack([block.reshape(block_shape(entry.shape, num_blocks)) for block in read])

    def overwrite(self, key: str, folder: Path, tensor: Tensor, num_blocks: int = 1, block: int = 0) -> None:
        """Writes a tensor over one of the equal blocks of another, in the copy of its file that is in `folder`.

        Raises:
            ValueError: if it does not fit.
        """
        entry = self.entries[key]
        file, size = folder / entry.file.name, entry.num_bytes // num_blocks
        shape = block_shape(entry.shape, num_blocks)
        if tensor.dtype != entry.dtype or tuple(tensor.shape) != shape:
            raise ValueError(f"{file}: {entry.dtype} {list(shape)} cannot hold {tensor.dtype} {list(tensor.shape)}")
        data: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        with file.open("r+b") as stream:
            stream.seek(self._offset(key) + block * size)
            stream.write(memoryview(data))

    def _offset(self, key: str) -> int:
        """Where a tensor begins in its file."""
        file = self.entries[key].file
        if file not in self._offsets:
            with file.open("rb") as stream:
                start = 8 + int.from_bytes(stream.read(8), "little")  # offsets are counted from behind the header
            tensors = parse_local_safetensors_file_metadata(file).tensors
            self._offsets[file] = {name: start + info.data_offsets[0] for name, info in tensors.items()}
        return self._offsets[file][key]


def block_shape(shape: Sequence[int], num_blocks: int) -> tuple[int, ...]:
    """The shape of one of the equal blocks of a tensor.

    `[E, ...]` has `E` blocks `[...]`, `[E * rows, ...]` has `E` blocks `[rows, ...]`. One block is the tensor itself.
    """
    if num_blocks == 1:
        return tuple(shape)
    if shape[0] == num_blocks:
        return tuple(shape[1:])
    return (shape[0] // num_blocks, *shape[1:])


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
