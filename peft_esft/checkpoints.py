"""Adapters and checkpoints on disk that survive a process that is killed while it writes them."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from peft.utils.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from .interchange.adapter import AdapterFolder
from .moe.weights import is_spread
from .tuner.layers.layer import PREFIX
from .tuner.model_card import CARD_NAME


PREVIOUS_SUFFIX = ".previous"
_PARTIAL_SUFFIX = ".partial"
_ADAPTER_MARKS = (f".{PREFIX}", ".modules_to_save.")
"""What PEFT puts into the names of an adapter's weights."""
_WEIGHTS = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def save_adapter(model: Any, folder: str | os.PathLike[str], **kwargs: Any) -> None:
    """Saves adapters so that whoever looks finds the old ones or the new ones, never a part of them.

    PEFT's `save_pretrained` writes file by file into the folder: killed between weights and config, it leaves neither
    the old adapter nor the new one. Here all files go to a folder beside it, which is then renamed. A folder that
    exists is moved to `FOLDER.previous` just before and deleted just after: a process killed exactly between leaves
    the old adapter there. Whatever else is in the folder stays: checkpoints, a tokenizer, a card that you wrote,
    adapters that are not saved now.

    Where `torch.distributed` is initialised, call it on every process: sharded weights are gathered tensor by tensor
    on the host of the first process, which writes the file. The base is not gathered.

    Args:
        model: a `PeftModel`, as it is or prepared by DDP, FSDP2, expert parallelism or DeepSpeed.
        folder: is created, or renewed; not the working directory or one around it, which would be lost to the process.
        **kwargs: see `peft.PeftModel.save_pretrained`.

    Raises:
        ValueError: if the folder holds the working directory, or is a file.
    """
    if isinstance(model, DistributedDataParallel) or hasattr(model, "zero_optimization"):
        model = model.module  # DeepSpeed's engine is known by that method
    target = Path(folder).resolve()
    if Path.cwd().is_relative_to(target):
        raise ValueError(f"{target} is the working directory, or around it, and cannot be replaced; name another")
    processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    is_writer = kwargs.pop("is_main_process", processes == 1 or dist.get_rank() == 0)
    if any(map(is_spread, model.parameters())):
        kwargs["state_dict"] = adapter_weights(model, keep=is_writer)
    # PEFT sets this of each config while it is written, and leaves it so after an error.
    modes = [(config, config.inference_mode) for config in model.peft_config.values()]
    try:
        if is_writer:
            _replace(target, lambda partial: model.save_pretrained(partial, **kwargs))
    finally:
        for config, mode in modes:
            config.inference_mode = mode
        if processes > 1:
            dist.barrier()


def adapter_weights(model: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """The weights of all adapters on the host, gathered from the processes that hold parts; the base's stay put.

    Args:
        model: a `PeftModel`; every process calls this at the same time.
        keep: False on processes that take part in the gathering but have no use for the result.

    Returns:
        Tensors by their name in `model.state_dict()`, as `save_pretrained(state_dict=...)` takes them; empty unless
        `keep`.
    """
    gathered = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        if any(mark in key for mark in _ADAPTER_MARKS):
            whole = _gather(tensor.detach() if isinstance(tensor, DTensor) else tensor)
            if keep:
                gathered[key] = whole.cpu()
    return gathered


def _gather(tensor: Tensor) -> Tensor:
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    if is_spread(tensor):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor.detach()


def _replace(target: Path, write: Callable[[Path], None]) -> None:
    """Puts a new folder in the place of another, or of nothing; what else was in the old one is in the new one too."""
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file; an adapter is saved to a folder")
    partial, previous = (target.with_name(target.name + suffix) for suffix in (_PARTIAL_SUFFIX, PREVIOUS_SUFFIX))
    if previous.exists() and partial.exists() and not target.exists():
        os.rename(previous, target)  # a process was killed between the two renames below
    shutil.rmtree(partial, ignore_errors=True)
    if target.exists() and _holds_adapter(previous):
        _discard(previous, partial)  # a process was killed before it did
    has_moved = False
    try:
        if (target / CARD_NAME).is_file():
            partial.mkdir(parents=True)
            shutil.copy2(target / CARD_NAME, partial)  # is read, and only the project's part of it written anew
        write(partial)
        for path in [*partial.rglob("*"), partial]:
            _flush(path)
        if target.exists():
            _keep_others(target, partial)
            has_moved = True
            os.rename(target, previous)
        os.rename(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if has_moved and previous.exists() and not target.exists():
            os.rename(previous, target)
        raise
    _flush(target.parent)
    if has_moved or _holds_adapter(previous):  # the latter of a process that was killed
        _discard(previous, partial)


def _discard(previous: Path, partial: Path) -> None:
    """Deletes a folder under the other's name: what a process killed meanwhile leaves is not taken for a user's."""
    os.rename(previous, partial)
    shutil.rmtree(partial, ignore_errors=True)


def _keep_others(old: Path, new: Path) -> None:
    """Has in `new` whatever is in `old` and was not written anew: the same files, linked, so that it takes no time."""
    replaced = _WEIGHTS if (new / CONFIG_NAME).exists() else ()
    for path in old.iterdir():
        place = new / path.name
        if path.is_dir() and not path.is_symlink():
            if place.is_dir():
                _keep_others(path, place)
            else:
                shutil.copytree(path, place, symlinks=True, copy_function=_link)
        elif not place.exists() and path.name not in replaced:
            _link(path, place)


def _link(source: str | Path, place: str | Path) -> None:
    try:
        os.link(source, place, follow_symlinks=False)
    except (OSError, NotImplementedError):  # not every file system has links
        shutil.copy2(source, place, follow_symlinks=False)


def last_complete_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The newest checkpoint of a `Trainer` that was written to the end, for `resume_from_checkpoint`.

    `resume_from_checkpoint=True` takes the one with the highest number, also if the process was killed while it was
    written. `Trainer` writes `trainer_state.json` last; where it is whole, and the adapter's weights are where there
    is one, so is the checkpoint.

    Args:
        output_dir: of the `TrainingArguments`.

    Returns:
        The folder, or None if there is no whole checkpoint: training then starts from the beginning.
    """
    folder = Path(output_dir)
    if not folder.is_dir():
        return None
    numbered = {int(match[1]): path for path in folder.iterdir() if (match := _CHECKPOINT.fullmatch(path.name))}
    for _, path in sorted(numbered.items(), reverse=True):
        if _is_complete(path):
            return str(path)
    return None


def _is_complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
        for config in checkpoint.rglob(CONFIG_NAME):
            AdapterFolder(config.parent)  # reads the headers, which say how long the files have to be
    except (OSError, ValueError):
        return False
    return True


def _holds_adapter(folder: Path) -> bool:
    return (folder / CONFIG_NAME).is_file() or any(folder.glob(f"*/{CONFIG_NAME}"))


def _flush(path: Path) -> None:
    """Asks the system to write a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
