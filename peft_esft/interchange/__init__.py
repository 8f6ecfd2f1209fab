"""Adapters to and from other files: the original code's, merged checkpoints, smaller forms."""

from .compact import compact
from .diff import diff_adapters, format_diff
from .merging import merge_checkpoint
from .official import export_official, import_official
from .selections import expert_cfg_from_selection, read_expert_cfg, selection_from_expert_cfg


__all__ = [
    "compact",
    "diff_adapters",
    "expert_cfg_from_selection",
    "export_official",
    "format_diff",
    "import_official",
    "merge_checkpoint",
    "read_expert_cfg",
    "selection_from_expert_cfg",
]
