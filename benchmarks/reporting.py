"""Writes results of benchmarks as JSON and Markdown, with the versions that they were measured with."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


_clock = time.perf_counter
RESULTS = Path(__file__).parent / "results"
BLOCK = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", flags=re.DOTALL)
MISSING = "*Not run yet.*"


@dataclass(frozen=True)
class Times:
    """Seconds of each call, round by round."""

    seconds: dict[str, list[float]]

    def minima(self) -> dict[str, float]:
        return {name: min(own) for name, own in self.seconds.items()}

    def medians(self) -> dict[str, float]:
        return {name: statistics.median(own) for name, own in self.seconds.items()}

    def ratio(self, name: str, base: str) -> str:
        """The ratio of the minima, and in brackets the median of the ratios within a round."""
        pairs = zip(self.seconds[name], self.seconds[base], strict=True)
        median = statistics.median(own / other for own, other in pairs)
        return f"{min(self.seconds[name]) / min(self.seconds[base]):.2f} ({median:.2f})"


def host_waits(call: Callable[[], object]) -> int:
    """How often the host waits for a GPU in a call, as CUDA itself says."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in found)


def add_clock_arguments(parser: argparse.ArgumentParser) -> None:
    """`--busy`, for a machine that does other work at the same time."""
    parser.add_argument("--busy", action="store_true", help="one thread, and its CPU time instead of the wall's")


def set_clock(arguments: argparse.Namespace) -> None:
    """Follows `--busy`."""
    global _clock  # noqa: PLW0603
    if arguments.busy:
        torch.set_num_threads(1)
        _clock = time.process_time


def time_in_turns(calls: dict[str, Callable[[], object]], rounds: int, turn_round: bool = True) -> Times:
    """Times calls in turns after a warm-up of each, each round beginning with another one if `turn_round`."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for call in calls.values():
        call()
    for number in range(rounds):
        first = number % len(names) if turn_round else 0
        for name in names[first:] + names[:first]:
            started = _clock()
            calls[name]()
            seconds[name].append(_clock() - started)
    return Times(seconds)


def versions() -> dict[str, str]:
    """The versions that the figures depend on, and the machine's size."""
    packages = {name: version(name) for name in ("peft", "transformers", "accelerate")}
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        **packages,
        "threads": str(torch.get_num_threads()),
        "cores": str(os.cpu_count()),
        "clock": "wall" if _clock is time.perf_counter else "CPU",
    }


def write_results(name: str, title: str, setting: str, rows: list[dict[str, Any]], versions: dict[str, str]) -> None:
    """Writes `results/NAME.json` and `results/NAME.md`, and prints the latter."""
    RESULTS.mkdir(exist_ok=True)
    record = {"title": title, "setting": setting, "versions": versions, "rows": rows}
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    columns = list(rows[0])
    lines = [f"# {title}", "", setting, "", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(_cell(row[column]) for column in columns) + " |" for row in rows]
    lines += ["", ", ".join(f"{key} {value}" for key, value in versions.items())]
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def fill_tables(page: str, tables: Mapping[str, str]) -> str:
    """Puts tables between `<!-- table NAME -->` and `<!-- end -->`.

    Raises:
        KeyError: if the page asks for a table that there is not.
    """
    return BLOCK.sub(lambda found: f"{found[1]}{tables[found[2]] or MISSING}\n{found[3]}", page)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def peak_of(call: Callable[[], object]) -> int:
    """The most bytes that were allocated at once during a call, above what was allocated before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events), initial=0))
