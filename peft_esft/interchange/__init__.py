"""Converts adapters to and from other files: the original code's, merged checkpoints, smaller forms.

May import `tuner`, `scoring`, `moe` and `ops`.

Begin with `adapter.py`, an adapter's folder, and `base.py`, the base that it belongs to. Each function has a file.
"""

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
