"""Reads and overwrites single tensors in the files of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import parse_local_safetensors_file_metadata
from safetensors.torch import save_file
from torch import Tensor

from ..tuner.adapter_file import Header, read_header, read_pickled_header, read_tensor


INDEX_NAME = "model.safetensors.index.json"
_NAMES = (
    ("model.safetensors", INDEX_NAME),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
"""A single file, and the index of several, in the order in which transformers looks for them."""


class TensorFolder:
    """The tensors of some safetensors or pickled files.

    Attributes:
        files: the files.
        index_name: of the file that names them.
        has_index: whether there is one.
        entries: dtype and shape of all tensors, by key.

    Raises:
        ValueError: if a file is malformed, or two files hold the same key.
    """

    def __init__(self, files: Iterable[Path], index_name: str = INDEX_NAME, *, has_index: bool = False) -> None:
        self.files = list(files)
        self.index_name = index_name
        self.has_index = has_index
        self.entries: Header = {}
        for file in self.files:
            header = read_header(file) if file.suffix == ".safetensors" else read_pickled_header(file)
            for key, entry in header.items():
                if key in self.entries:
                    raise ValueError(f"{key} is in two files: {self.entries[key].file} and {file}")
                self.entries[key] = entry

    @classmethod
    def of_model(cls, folder: Path, variant: str | None = None) -> TensorFolder:
        """The files of a Hugging Face checkpoint, as transformers finds them; their names have the variant.

        Raises:
            FileNotFoundError: if there are none.
            ValueError: if the index is malformed or names a file outside the folder.
        """
        names = [[_named(name, variant) for name in pair] for pair in _NAMES]
        for single, index in names:
            if (folder / single).is_file():
                return cls([folder / single], index)
            if (folder / index).is_file():
                return cls([folder / name for name in _files_of_index(folder / index)], index, has_index=True)
        raise FileNotFoundError(
            f"{folder} has no weights: none of {', '.join(name for pair in names for name in pair)}"
        )

    @property
    def are_pickled(self) -> bool:
        """True for `.bin` files, which cannot be overwritten."""
        return any(file.suffix != ".safetensors" for file in self.files)

    def read(self, key: str) -> Tensor:
        """A tensor of a file that is mapped into memory. Only what is used of it is read from the disk."""
        return read_tensor(self.entries[key])

    def copy_to(self, folder: Path, copy: Any) -> TensorFolder:
        """Copies the files and their index.

        Args:
            folder: for the copies. Pickled files are written as safetensors files there.
            copy: a function of a file and its copy, such as `shutil.copyfile`.

        Returns:
            The copies.
        """
        names = {file.name: _as_safetensors(file.name) for file in self.files}
        for file in self.files:
            if file.suffix == ".safetensors":
                copy(file, folder / file.name)
            else:
                keys = [key for key, entry in self.entries.items() if entry.file == file]
                # Clones: tensors of one file may share memory, which safetensors refuses.
                write_tensors(folder / names[file.name], {key: self.read(key).clone() for key in keys})
        index_name = _as_safetensors(self.index_name)
        if self.has_index:
            content = json.loads((self.files[0].parent / self.index_name).read_text())
            content["weight_map"] = {key: names[name] for key, name in content["weight_map"].items()}
            _write_json(folder / index_name, content)
        return TensorFolder([folder / name for name in names.values()], index_name, has_index=self.has_index)

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

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Adds tensors to a checkpoint, in a file of their own that its index names."""
        (folder,) = {file.parent for file in self.files}
        weight_map = {key: entry.file.name for key, entry in self.entries.items()}
        if not self.has_index:
            # A single file of the usual name would be read alone.
            renamed = f"base-{self.files[0].name}"
            self.files[0].rename(folder / renamed)
            weight_map = dict.fromkeys(weight_map, renamed)
        added = f"added-{self.files[0].name}"
        write_tensors(folder / added, tensors)
        size = sum(entry.num_bytes for entry in self.entries.values()) + sum(t.nbytes for t in tensors.values())
        content = {"metadata": {"total_size": size}, "weight_map": weight_map | dict.fromkeys(tensors, added)}
        _write_json(folder / self.index_name, content)

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


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file as PEFT and transformers do."""
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file, metadata={"format": "pt"})


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _named(name: str, variant: str | None) -> str:
    """The name of a file with a variant: `model.fp16.safetensors`, `model.safetensors.index.fp16.json`."""
    return name if variant is None else str(Path(name).with_suffix(f".{variant}{Path(name).suffix}"))


def _as_safetensors(name: str) -> str:
    """The name of a safetensors file for what is in a pickled one."""
    if name.startswith("pytorch_model") and ".bin" in name:
        return f"model{name.removeprefix('pytorch_model')}".replace(".bin", ".safetensors")
    return name


def _files_of_index(index: Path) -> list[str]:
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is malformed: it has no object weight_map ({error})") from error
    for name in names:
        if not isinstance(name, str) or name in ("", ".", "..") or any(c in name for c in ("/", "\\", "\0")):
            raise ValueError(f"{index} names the file {str(name)[:200]!r}, which is not a plain file name")
    return sorted(names)


def _block_shape(shape: tuple[int, ...], num_blocks: int) -> tuple[int, ...]:
    """The shape of a block: `[E, ...]` has `E` blocks `[...]`, `[E * rows, ...]` has `E` blocks `[rows, ...]`."""
    if num_blocks == 1:
        return shape
    return shape[1:] if shape[0] == num_blocks else (shape[0] // num_blocks, *shape[1:])
