"""Reads and overwrites single tensors in safetensors files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import parse_local_safetensors_file_metadata
from torch import Tensor

from ..tuner.adapter_file import Header, read_header, read_tensor


INDEX_NAME = "model.safetensors.index.json"


class TensorFolder:
    """The tensors of some safetensors files.

    Attributes:
        files: the files.
        entries: dtype and shape of all tensors, by key.

    Raises:
        ValueError: if a file is malformed, or two files hold the same key.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.files = list(files)
        self.entries: Header = {}
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
        for name in names:
            if not isinstance(name, str) or name in ("", ".", "..") or any(c in name for c in ("/", "\\", "\0")):
                raise ValueError(f"{index} names the file {str(name)[:200]!r}, which is not a plain file name")
        return cls([folder / name for name in sorted(names)])

    def read(self, key: str) -> Tensor:
        """A tensor of a file that is mapped into memory. Only what is used of it is read from the disk."""
        return read_tensor(self.entries[key])

    def overwrite(self, key: str, folder: Path, tensor: Tensor, num_blocks: int = 1, block: int = 0) -> None:
        """Writes a tensor over one of the equal blocks of another, in the copy of its file that is in `folder`."""
        entry = self.entries[key]
        file, shape = folder / entry.file.name, _block_shape(entry.shape, num_blocks)
        if tensor.dtype != entry.dtype or tuple(tensor.shape) != shape:
            raise ValueError(f"{file}: {entry.dtype} {list(shape)} cannot hold {tensor.dtype} {list(tensor.shape)}")
        data: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        with file.open("r+b") as stream:
            stream.seek(self._offsets[key] + block * data.nbytes)
            stream.write(memoryview(data))

    @cached_property
    def _offsets(self) -> dict[str, int]:
        """The position of the first byte of each tensor in its file."""
        offsets = {}
        for file in self.files:
            with file.open("rb") as stream:
                start = 8 + int.from_bytes(stream.read(8), "little")  # offsets are counted from the header's end
            for key, tensor in parse_local_safetensors_file_metadata(file).tensors.items():
                offsets[key] = start + tensor.data_offsets[0]
        return offsets


def _block_shape(shape: tuple[int, ...], num_blocks: int) -> tuple[int, ...]:
    """The shape of a block: `[E, ...]` has `E` blocks `[...]`, `[E * rows, ...]` has `E` blocks `[rows, ...]`."""
    if num_blocks == 1:
        return shape
    return shape[1:] if shape[0] == num_blocks else (shape[0] // num_blocks, *shape[1:])
