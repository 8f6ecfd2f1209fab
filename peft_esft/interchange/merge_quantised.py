"""Merges an adapter into a checkpoint whose experts `peft_esft` keeps in few bits."""

from __future__ import annotations

import shutil
from pathlib import Path

import transformers
from peft import PeftModel

from .adapter import AdapterFolder
from .folders import new_folder


def merge_quantised(folder: Path, adapter_dir: str | Path, out_dir: str | Path, variant: str | None = None) -> None:
    """Writes a quantised checkpoint with an adapter merged into it.

    Nothing is quantised again: the adapter's experts are kept in full precision, as the config's `keep` then says, and
    the codes of all others stay as they are. The model is loaded for it, in few bits.

    Raises:
        ValueError: if the adapter does not fit, or merged weights are not finite.
        NotImplementedError: if the adapter has more than experts' weights.
        FileExistsError: if `out_dir` holds something.
    """
    adapter = AdapterFolder(adapter_dir)
    if others := adapter.other_tensors():
        raise NotImplementedError(
            f"the adapter has {others[0]}, but only experts can be merged into a quantised checkpoint. Merge into "
            "the checkpoint that it was made from, or use merge_and_unload().save_pretrained(...)"
        )
    config = transformers.AutoConfig.from_pretrained(folder)
    name = (config.architectures or ["AutoModelForCausalLM"])[0]
    model_class = getattr(transformers, name, transformers.AutoModelForCausalLM)
    with new_folder(out_dir) as target:
        model = model_class.from_pretrained(folder, variant=variant)
        merged = PeftModel.from_pretrained(model, str(adapter.folder)).merge_and_unload(safe_merge=True)
        merged.save_pretrained(target, variant=variant)
        for file in folder.iterdir():
            is_weights = file.suffix in (".safetensors", ".bin") or ".index." in file.name
            if file.is_file() and not is_weights and not (target / file.name).exists():
                shutil.copyfile(file, target / file.name)
