"""Finds the folder of a base or an adapter: one on this machine, or a repository of the Hub in its cache."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download

from ..registration import QUANTIZATION
from ..tuner.adapter_file import is_hub_name, read_json


_NOT_READ = ["*/*", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx"]
_OTHER_VARIANTS = ["model.safetensors", "model-*-of-?????.safetensors"]


def local_folder(
    name: str | Path, revision: str | None = None, *, variant: str | None = None, pickled: bool = False
) -> Path:
    """The folder that holds a model or an adapter. What the Hub's cache lacks is downloaded if that is possible.

    Args:
        name: of a folder, or of a repository on the Hub.
        revision: of the repository.
        variant: of the weights, if it is not the usual one.
        pickled: download `.bin` files too.

    Raises:
        NotADirectoryError: if it is neither.
        FileNotFoundError: if the cache does not have the repository and it cannot be downloaded.
        ValueError: if a revision of a folder is asked for.
    """
    if Path(name).is_dir():
        if revision is not None:
            raise ValueError(f"{name} is a folder and has no revisions; leave out revision={revision!r}")
        return Path(name)
    if not is_hub_name(str(name)):
        raise NotADirectoryError(f"{name} is neither a folder nor the name of a repository on the Hub")
    ignored = [*_NOT_READ, *([] if pickled else ["*.bin"]), *(_OTHER_VARIANTS if variant else [])]
    try:
        return Path(snapshot_download(str(name), revision=revision, ignore_patterns=ignored))
    except OSError as error:
        at = "" if revision is None else f" at revision {revision}"
        raise FileNotFoundError(
            f"{name} is not a folder, and no repository of that name{at} is in the cache or can be downloaded: {error}"
        ) from error


def is_quantised(folder: Path) -> bool:
    """True for a checkpoint that `save_pretrained` wrote of a model with quantised experts."""
    file = folder / "config.json"
    content = read_json(file) if file.is_file() else {}
    quantisation = content.get("quantization_config") if isinstance(content, dict) else None
    return isinstance(quantisation, dict) and quantisation.get("quant_method") == QUANTIZATION
