"""What the weights of an adapter are called in its file, and which tensors a config calls for; see docs/format.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..ops.encodings import stored_layout
from .tensor_files import TensorEntry


if TYPE_CHECKING:
    from .config import ESFTConfig


Header = dict[str, TensorEntry]
KEY_PREFIX = "base_model.model."
MARK = ".esft_"


def expected_layout(
    config: ESFTConfig, shape: tuple[int, ...], dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of an adapter's tensors for one weight `[n, ...]`, by suffix."""
    if config.rank is None:
        return stored_layout(config.storage, shape, dtype)
    if len(shape) != 3:
        return {}
    wide = torch.promote_types(dtype, torch.float32)
    return {"_A": (wide, (shape[0], config.rank, shape[2])), "_B": (wide, (*shape[:2], config.rank))}


def fits(entry: TensorEntry, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    """True if a stored tensor has the shape, and the dtype or at least one of its kind."""
    return entry.shape == shape and (
        entry.dtype == dtype or (entry.dtype.is_floating_point and dtype.is_floating_point)
    )
