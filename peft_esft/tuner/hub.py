"""Uploads an adapter to the Hub with its card."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftModel

from .adapter_file import is_hub_name
from .config import ESFTConfig
from .model_card import CARD_NAME, write_card


def push_to_hub(
    model: PeftModel,
    repo_id: str,
    adapter_name: str | None = None,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    **kwargs: Any,
) -> CommitInfo:
    """Uploads one adapter, with the card that `save_pretrained` writes, to the top of a repository.

    `PeftModel.push_to_hub` (transformers' `PushToHubMixin`) uploads the same weights, but replaces the card that was
    saved by a form to be filled in, and leaves no place for a tuner to change that.

    Args:
        model: with the adapter.
        repo_id: name of the repository, which is created if there is none. What people wrote into its card stays.
        adapter_name: the adapter; None means the only one.
        private: whether a new repository is private.
        token: of the Hub; None means that of `hf auth login`.
        **kwargs: see `huggingface_hub.HfApi.upload_folder`, for example `commit_message` or `create_pr`.

    Returns:
        What the Hub says of the commit.

    Raises:
        ValueError: if there is no such adapter, it is not ESFT's, or its base has a name that the Hub refuses, such as
            a folder of this machine. Nothing is uploaded then.

    Example:
        >>> push_to_hub(model, "someone/law")
    """
    name, config = _adapter_of(model, adapter_name)
    base = config.base_model_name_or_path or model.get_base_model().__dict__.get("name_or_path")
    if not is_hub_name(base):
        raise ValueError(
            f"the base is called {base!r}, which is not the name of a model on the Hub, so nobody could load the "
            f"adapter. Set model.peft_config[{name!r}].base_model_name_or_path to its name there"
        )
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as temporary:
        model.save_pretrained(temporary, selected_adapters=[name])
        folder = Path(temporary) / ("" if name == "default" else name)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        try:
            written = api.hf_hub_download(repo_id, CARD_NAME, revision=kwargs.get("revision"))
            (folder / CARD_NAME).write_bytes(Path(written).read_bytes())
        except EntryNotFoundError:
            pass
        write_card(folder, config.to_dict(), config.adapted_experts, name=repo_id)
        kwargs.setdefault("commit_message", "Upload ESFT adapter")
        return api.upload_folder(repo_id=repo_id, folder_path=folder, **kwargs)


def _adapter_of(model: PeftModel, adapter_name: str | None) -> tuple[str, ESFTConfig]:
    names = list(model.peft_config)
    if adapter_name is None and len(names) > 1:
        raise ValueError(f"the model has the adapters {names}; say which one to upload with adapter_name")
    name = names[0] if adapter_name is None else adapter_name
    if name not in names:
        raise ValueError(f"there is no adapter {name!r}; there are {names}")
    config = model.peft_config[name]
    if not isinstance(config, ESFTConfig):
        raise ValueError(f"adapter {name!r} is of type {config.peft_type}, not ESFT")
    return name, config
