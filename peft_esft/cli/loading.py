"""Loads the model, the tokenizer and the adapters that a command was given."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..registration import QUANTIZATION
from ..tuner.quantizer import ESFTQuantizationConfig


def names_of(adapters: Sequence[str]) -> dict[str, str]:
    """Names for adapters: that of their folder, or NAME in "NAME=FOLDER".

    Raises:
        ValueError: if two adapters would have one name.
    """
    names: dict[str, str] = {}
    for text in adapters:
        name, sign, folder = text.partition("=")
        if not sign or Path(text).exists():
            name, folder = Path(text).resolve().name.replace(".", "_"), text
        if name in names:
            raise ValueError(f"two adapters are called {name!r}; name one of them: NAME={folder}")
        names[name] = folder
    return names


def load_tokenizer(base: str, folders: Sequence[str] = (), **settings: Any) -> PreTrainedTokenizerBase:
    """The base's tokenizer, which can pad.

    Without a chat template it gets that of the first adapter that has one, with which it was trained. The settings are
    those of `from_pretrained`.
    """
    tokenizer = AutoTokenizer.from_pretrained(base, **settings)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    for folder in folders:
        if tokenizer.chat_template is None and (Path(folder) / "tokenizer_config.json").is_file():
            tokenizer.chat_template = AutoTokenizer.from_pretrained(folder).chat_template
    return tokenizer


def load_base(options: argparse.Namespace) -> PreTrainedModel:
    """The base in eval mode, on the GPU if there is one and nothing else is said.

    Args:
        options: `model`, and those of `base_options`.
    """
    device = options.device_map or ("cuda" if torch.cuda.is_available() else None)
    settings = {"dtype": options.dtype, "device_map": device, **quantization_of(options.model, options.bits)}
    return AutoModelForCausalLM.from_pretrained(options.model, **settings).eval()


def quantization_of(name: str, bits: int | None, **settings: Any) -> dict[str, Any]:
    """What `from_pretrained` is given so that the experts are in so many bits; nothing for None.

    Experts that the checkpoint has in MXFP4 (gpt-oss) stay as they are.

    Args:
        name: folder or Hub name of the model.
        bits: 4 or 8.
        **settings: for reading the model's config, for example `revision`.

    Raises:
        ValueError: if the checkpoint has its experts in another number of bits, which transformers would keep.
    """
    if bits is None:
        return {}
    config = AutoConfig.from_pretrained(name, **settings)
    own = getattr(config, "quantization_config", None) or {}
    if own.get("quant_method") == QUANTIZATION:
        if own.get("bits") == bits:
            return {}
        raise ValueError(
            f"{name} has its experts in {own.get('bits')} bits, which --bits {bits} cannot change. Leave --bits out, "
            "or use the checkpoint that it was made from"
        )
    if bits == 4 and own.get("quant_method") == "mxfp4":
        del config.quantization_config  # transformers would take it instead of the one that is given
        return {"config": config, "quantization_config": ESFTQuantizationConfig(quant_type="mxfp4")}
    return {"quantization_config": ESFTQuantizationConfig(bits)}
