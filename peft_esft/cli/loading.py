"""Loads the model, the tokenizer and the adapters that a command was given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


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


def load_tokenizer(base: str, folders: Sequence[str]) -> PreTrainedTokenizerBase:
    """The base's tokenizer, or an adapter's if that alone has a chat template: the one it was trained with."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    for folder in folders:
        if tokenizer.chat_template is None and (Path(folder) / "tokenizer_config.json").is_file():
            tokenizer.chat_template = AutoTokenizer.from_pretrained(folder).chat_template
    return tokenizer


def load_base(name: str, dtype: str, device_map: str | None, **settings: Any) -> PreTrainedModel:
    """The base in eval mode, on the GPU if there is one and nothing else is said."""
    device = device_map or ("cuda" if torch.cuda.is_available() else None)
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, device_map=device, **settings).eval()
