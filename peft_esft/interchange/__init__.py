"""Converts adapters to and from other files: those of the original code, merged checkpoints, smaller forms."""

from .compact import compact
from .diff import diff_adapters, format_diff
from .expert_cfg import expert_cfg_from_selection, read_expert_cfg, selection_from_expert_cfg
from .merge_checkpoint import merge_checkpoint
from .official import export_official, import_official


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
