"""Saves adapters so that a killed process loses nothing, and finds the last complete checkpoint."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from peft.utils.constants import CONFIG_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from .interchange.adapter import AdapterFolder
from .interchange.folders import PREVIOUS_SUFFIX, new_folder
from .moe.weights import is_spread
from .tuner.layers.layer import PREFIX
from .tuner.model_card import CARD_NAME


__all__ = ["PREVIOUS_SUFFIX", "adapter_weights", "last_complete_checkpoint", "save_adapter"]

_ADAPTER_MARKS = (f".{PREFIX}", ".modules_to_save.")
"""What PEFT puts into the names of an adapter's weights."""
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def save_adapter(model: Any, folder: str | os.PathLike[str], **kwargs: Any) -> None:
    """Saves adapters. At any time the folder holds the old adapters or the new ones, never a part of them.

    PEFT's `save_pretrained` writes one file after another into the folder. If the process is killed in between, the
    folder holds neither the old adapter nor the new one. This function writes all files to a folder beside it, which
    it then renames. Just before, it renames an existing folder to `FOLDER.previous`, which it deletes afterwards. A
    process that is killed in between leaves the old adapter there. Other files in the folder stay: checkpoints, a
    tokenizer, a card that you wrote, adapters that you do not save now.

    Call it on every process if `torch.distributed` is initialised. Sharded weights are gathered tensor by tensor on
    the host of the first process, which writes the file. The base is not gathered.

    Args:
        model: a `PeftModel`, as it is or prepared by DDP, FSDP2, expert parallelism or DeepSpeed.
        folder: the folder to create or renew. It must not hold the working directory, which would be moved away.
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
            if target.exists() and not target.is_dir():
                raise ValueError(f"{target} is a file; an adapter is saved to a folder")
            with new_folder(target, replace=True) as partial:
                if (target / CARD_NAME).is_file():
                    shutil.copy2(target / CARD_NAME, partial)  # saving rewrites only the project's part of the card
                model.save_pretrained(partial, **kwargs)
    finally:
        for config, mode in modes:
            config.inference_mode = mode
        if processes > 1:
            dist.barrier()


def adapter_weights(model: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """Gathers the weights of all adapters on the host, from the processes that hold parts of them.

    The base's weights are not gathered.

    Args:
        model: a `PeftModel`. Every process has to call this function at the same time.
        keep: False on processes that take part in the gathering and do not need the result.

    Returns:
        Tensors by their name in `model.state_dict()`, as `save_pretrained(state_dict=...)` takes them. Empty if `keep`
        is False.
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


def last_complete_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """Finds the newest complete checkpoint of a `Trainer`, for `resume_from_checkpoint`.

    `resume_from_checkpoint=True` takes the checkpoint with the highest number, even if the process was killed while it
    wrote that checkpoint. `Trainer` writes `trainer_state.json` last. A checkpoint is complete if that file and the
    weights of its adapters or models are complete.

    Args:
        output_dir: the `output_dir` of the `TrainingArguments`.

    Returns:
        The folder. None if there is no complete checkpoint; training then starts from the beginning.
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
        # Headers say how long the files have to be.
        for config in checkpoint.rglob(CONFIG_NAME):
            if json.loads(config.read_text()).get("peft_type") == "ESFT":
                AdapterFolder(config.parent)
        for weights in checkpoint.rglob("*.safetensors"):  # also LoRA's, and those of whole models
            safe_open(weights, "pt")
    except (OSError, ValueError, AttributeError, SafetensorError):  # a config may be JSON, and not an object
        return False
    return True
