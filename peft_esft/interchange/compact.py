"""Smaller files of an adapter, for inference."""

from __future__ import annotations

import copy
from pathlib import Path

from torch import Tensor, nn

from ..ops.encodings import FORMS, encode
from ..tuner.adapter_file import DELTA_KEY
from .adapter import AdapterFolder, Change, write_adapter
from .base import Base
from .folders import new_folder


def compact(
    adapter_dir: str | Path,
    out_dir: str | Path,
    form: str = "rows",
    *,
    base: nn.Module | str | Path | None = None,
) -> Path:
    """Writes an adapter in a smaller form. PEFT's and transformers' loaders read every form without being told.

    | form | bytes for a weight | what it holds |
    |---|---|---|
    | "rows" | 2 on a half-precision base | the effective weights: lossless, bit for bit |
    | "int8" | 1 | deltas of 8 bits with a scale for each row |
    | "int4" | 0.5 | deltas of 4 bits with a scale for each row |
    | "int1" | 0.125 | the signs of the deltas with a scale for each row |

    Scales add 2 bytes for each row, which is 2 / (width of the row) bytes for a weight.

    Args:
        adapter_dir: an adapter with deltas of full rank.
        out_dir: for the new one; must not exist, or be empty.
        form: see above.
        base: the base model, or its folder, which the adapter is checked against. "rows" needs it; None means the
            folder that the adapter's config names. The others do without: then no more is checked than that each
            container of the selection has weights, and that all are finite.

    Returns:
        `out_dir`. What it holds cannot be trained further: keep the original.

    Raises:
        ValueError: if the form is unknown, the adapter has a rank, is not stored as deltas, is not whole or does not
            fit the base.
        FileExistsError: if `out_dir` holds something.
    """
    if form not in FORMS[1:]:
        raise ValueError(f"form is {form!r}; it is one of {', '.join(FORMS[1:])}")
    adapter = AdapterFolder(adapter_dir)
    if adapter.config.rank is not None or adapter.config.storage != "delta":
        kind = f"rank {adapter.config.rank}" if adapter.config.rank is not None else adapter.config.storage
        raise ValueError(f"{adapter_dir} is stored with {kind}; compact needs fp32 deltas of full rank")
    config = copy.deepcopy(adapter.config)
    config.storage = form
    if form == "rows" or base is not None:
        resolved = base if isinstance(base, Base) else Base(_base_of(adapter) if base is None else base)
        changes = adapter.changes(resolved)
    else:
        adapter.check_alone()
    if form == "rows":
        tensors = {f"{change.name}_rows": change.effective(_rows_of(resolved, change)) for change in changes}
    else:
        deltas = {key: adapter.files.read(key) for key in adapter.files.entries if DELTA_KEY in key}
        tensors = {f"{key}{suffix}": tensor for key, d in deltas.items() for suffix, tensor in encode(form, d).items()}
    tensors |= {key: adapter.files.read(key) for key in adapter.other_tensors()}
    with new_folder(out_dir) as folder:
        write_adapter(folder, config, tensors)
    return Path(out_dir)


def _rows_of(base: Base, change: Change) -> Tensor:
    return base.rows(change.container, change.weight, change.expert_ids).cpu()


def _base_of(adapter: AdapterFolder) -> str:
    name = adapter.config.base_model_name_or_path
    if name is None or not Path(name).is_dir():
        raise ValueError(f"form 'rows' needs the base's weights, and {name!r} is no folder: give base=...")
    return name
