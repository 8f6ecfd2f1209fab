"""The comparisons that there are, one for each embedded model: what is run, and where its results are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from continued import CONTINUED
from plan import ABLATION, CORE, FURTHER, SHARED, Plan, Protocol, plan, plan_with_shared_experts
from reporting import RESULTS


@dataclass(frozen=True)
class Comparison:
    """One embedded model's runs.

    Attributes:
        base: a key of `tasks.BASES`.
        protocol: their sizes.
        plan: what they are.
        methods: those whose training time is measured.
        folder: of the results.
        prefix: of the names of tables and figures.
    """

    base: str
    protocol: Protocol
    plan: Plan
    methods: tuple[str, ...]
    folder: Path
    prefix: str


COMPARISONS = {
    "olmoe": Comparison("olmoe", Protocol(), plan, (*CORE, *FURTHER, *ABLATION), RESULTS / "paper", ""),
    "deepseek": Comparison(
        "deepseek",
        Protocol(tasks=("verses", "french"), continued=tuple(CONTINUED)),
        plan_with_shared_experts,
        (*CORE, "esft_gate", *SHARED),
        RESULTS / "paper_deepseek",
        "deepseek_",
    ),
}
