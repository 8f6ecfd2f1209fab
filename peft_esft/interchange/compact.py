"""Writes an adapter in a smaller form, for inference."""

from __future__ import annotations

import copy
from pathlib import Path

from torch import nn

from ..ops.encodings import FORMS, encode
from ..tuner.adapter_file import DELTA_KEY
from .adapter import AdapterFolder, write_adapter
from .base import Base
from .folders import new_folder


def compact(
    adapter_dir: str | Path,
    out_dir: str | Path,
    form: str = "rows",
    *,
    base: nn.Module | str | Path | None = None,
) -> Path:
    """Writes an adapter in a smaller form. The loaders of PEFT and transformers recognise every form.

    | form | bytes for a weight | what it holds |
    |---|---|---|
    | "rows" | 2 on a half-precision base | the effective weights: lossless, bit for bit |
    | "int8" | 1 | deltas of 8 bits with a scale for each row |
    | "int4" | 0.5 | deltas of 4 bits with a scale for each row |
    | "int1" | 0.125 | the signs of the deltas with a scale for each row |

    Scales add 2 bytes for each row, which is 2 / (width of the row) bytes for a weight.

    Args:
        adapter_dir: an adapter with deltas of full rank.
        out_dir: folder for the new adapter; must not exist, or be empty.
        form: see above.
        base: the base model, or its folder, which the adapter is checked against. Only "rows" needs it; None then
            means the folder that the adapter's config names. For the other forms None means that only two things are
            checked: each container of the selection has weights, and all weights are finite.

    Returns:
        `out_dir`. The new adapter cannot be trained further: keep the original.

    Raises:
        ValueError: if the form is unknown, or the adapter has a rank, is not stored as deltas, is not complete or does
            not fit the base.
        FileExistsError: if `out_dir` holds something.
    """
    if form not in FORMS[1:]:
        raise ValueError(f"form is {form!r}; it is one of {', '.join(FORMS[1:])}")
    adapter = AdapterFolder(adapter_dir)
    if adapter.config.rank is not None or adapter.config.storage != "delta":
        kind = f"rank {adapter.config.rank}" if adapter.config.rank is not None else adapter.config.storage
        raise ValueError(
            f"{adapter_dir} is stored with {kind}; compact needs an adapter with fp32 deltas of full rank"
        )
    if base is None and form == "rows":
        base = adapter.config.base_model_name_or_path
        if base is None or not Path(base).is_dir():
            raise ValueError(f"form 'rows' needs the base's weights, and {base!r} is not a folder; give base=...")
    if base is None:
        adapter.check_alone()
    else:
        resolved = Base(base)
        adapter = adapter.fitted_to(resolved)
        changes = adapter.changes(resolved)
    if form == "rows":
        tensors = {f"{change.key}_rows": change.effective(resolved) for change in changes}
    else:
        deltas = {key: adapter.files.read(key) for key in adapter.files.entries if DELTA_KEY in key}
        tensors = {f"{key}{suffix}": tensor for key, d in deltas.items() for suffix, tensor in encode(form, d).items()}
    tensors |= {key: adapter.files.read(key) for key in adapter.other_tensors()}
    config = copy.deepcopy(adapter.config)
    config.storage = form
    with new_folder(out_dir) as folder:
        write_adapter(folder, config, tensors)
    return Path(out_dir)
