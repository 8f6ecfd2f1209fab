"""Analyses which experts tasks use, and what training did to them.

May import `interchange`, `tuner`, `scoring`, `moe` and `ops`.

Begin with the file that is called like the measure; `report.py` puts them on one page.
"""

from .changes import ConflictReport, ExpertUse, SharedExpert, adapter_conflicts, expert_usage
from .dispersion import Dispersion, LayerDispersion, dispersion
from .evaluation import Evaluation, evaluate
from .forgetting import Forgetting, ForgettingPoint, forgetting
from .granularity import (
    Granularity,
    GranularityPoint,
    Groups,
    co_occurrence,
    count_pairs,
    granularity,
    group_experts,
    group_shares,
    random_groups,
    select_groups,
    similarity,
)
from .overlap import Overlap, overlap
from .report import report
from .routing_callback import LayerRouting, RoutingCallback
from .stability import StabilityReport, stability_report
from .tokens import TokenSpan, TokenView, token_view


__all__ = [
    "ConflictReport",
    "Dispersion",
    "Evaluation",
    "ExpertUse",
    "Forgetting",
    "ForgettingPoint",
    "Granularity",
    "GranularityPoint",
    "Groups",
    "LayerDispersion",
    "LayerRouting",
    "Overlap",
    "RoutingCallback",
    "SharedExpert",
    "StabilityReport",
    "TokenSpan",
    "TokenView",
    "adapter_conflicts",
    "co_occurrence",
    "count_pairs",
    "dispersion",
    "evaluate",
    "expert_usage",
    "forgetting",
    "granularity",
    "group_experts",
    "group_shares",
    "overlap",
    "random_groups",
    "report",
    "select_groups",
    "similarity",
    "stability_report",
    "token_view",
]
