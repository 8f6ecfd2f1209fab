"""Writes a report: one page on the routing of tasks, or on what adapters train."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import log
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..scoring.preview import preview_selections
from ..scoring.scores import ExpertScores
from ..scoring.selection import DEFAULT_TOP_P
from .adapters import AdapterRecord, adapters_of_model, read_adapter
from .dispersion import SHARES, dispersion
from .drawing import import_matplotlib
from .granularity import SIZES, granularity
from .overlap import check_same_model, overlap
from .page import Section, write_page
from .report_figures import (
    adapter_overlap_plot,
    dispersion_plot,
    granularity_plot,
    layers_plot,
    overlap_plot,
    overlap_profile_plot,
    selection_plot,
    shares_plot,
    stability_plot,
)
from .stability import StabilityReport, stability_report


def report(
    scores_or_adapters: Any,
    out: str | Path = "report.html",
    *,
    share: float = DEFAULT_TOP_P["token"],
    co_occurrence: Mapping[str, Tensor] | None = None,
    title: str | None = None,
) -> Path:
    """Writes a page on the routing of tasks, or on what adapters train.

    The page needs no network and no other file. It holds the figures, and behind links their SVG, their PNG and their
    numbers as CSV. The files behind the links are also written to a folder beside the page, `<name>_files`.

    Args:
        scores_or_adapters: `ExpertScores`, a file of scores, an adapter's folder, a model with ESFT adapters, or
            several of these in a list, or in a dict that names them. Scores must be of one model.
        out: the page's file.
        share: the share of a layer's choices and gate mass that titles and marks are about. It is also the threshold
            of the selections that the table counts.
        co_occurrence: from `analysis.co_occurrence`; adds what coarser experts would cost.
        title: title of the page.

    Returns:
        The page's file.

    Files and folders without a name of their own are called after their file or folder, and after the folder around
    it too where two are called alike.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if there is nothing to report on, a file or folder is given twice, or scores are of different
            models.

    Example:
        >>> report({"law": law_scores, "intent": intent_scores}, "routing.html")
    """
    import_matplotlib()
    tasks, adapters = _collect(scores_or_adapters)
    if not tasks and not adapters:
        raise ValueError("there is nothing to report on; give scores or adapters")
    check_same_model(tasks)
    sections = _score_sections(tasks, share, co_occurrence) if tasks else []
    if adapters:
        sections.append(_adapter_section(adapters))
    out = Path(out)
    heading = title or ("Experts that tasks use" if tasks else "Experts that adapters train")
    write_page(out, heading, _lead(tasks, adapters), sections)
    return out


def _collect(subject: Any) -> tuple[dict[str, ExpertScores], dict[str, AdapterRecord]]:
    """Reads what a report was asked for, and sorts it into scores and adapters by name."""
    if isinstance(subject, Mapping):
        items: Iterable[tuple[str | None, Any]] = subject.items()
    elif isinstance(subject, Sequence) and not isinstance(subject, str):
        items = zip(_names_of_paths(subject), subject, strict=True)
    else:
        items = [(None, subject)]
    tasks: dict[str, ExpertScores] = {}
    adapters: dict[str, AdapterRecord] = {}
    for name, item in items:
        if isinstance(item, nn.Module):
            for adapter, record in adapters_of_model(item).items():
                _add(adapters, adapter if name is None else f"{name} {adapter}", record)
        elif isinstance(item, ExpertScores):
            _add(tasks, name or "task", item)
        elif isinstance(item, str | Path) and Path(item).is_dir():
            _add(adapters, name or _name_of_path(Path(item)), read_adapter(Path(item)))
        elif isinstance(item, str | Path):
            _add(tasks, name or _name_of_path(Path(item)), ExpertScores.load(item))
        else:
            raise ValueError(f"report takes scores and adapters, not {type(item).__name__}")
    return tasks, adapters


def _names_of_paths(items: Sequence[Any]) -> list[str | None]:
    """The names of files and folders, with the folder around them where two are called alike; None for other items.

    Raises:
        ValueError: if a file or folder is there twice.
    """
    paths = [Path(item).resolve() if isinstance(item, str | Path) else None for item in items]
    counts = Counter((_name_of_path(path), path.is_dir()) for path in paths if path)
    names: list[str | None] = []
    for path in paths:
        if path is not None and paths.count(path) > 1:
            raise ValueError(f"{path.name} is given twice; give each file and folder once")
        if path is None:
            names.append(None)
            continue
        name = _name_of_path(path)
        names.append(f"{path.parent.name}/{name}" if counts[name, path.is_dir()] > 1 else name)
    return names


def _name_of_path(path: Path) -> str:
    """The name of a folder, or of a file without its ending."""
    return path.resolve().name if path.is_dir() else path.stem


def _add(table: dict[str, Any], name: str, item: Any) -> None:
    """Adds an item. A name that is taken gets a number."""
    number, unique = 2, name
    while unique in table:
        unique, number = f"{name} {number}", number + 1
    table[unique] = item


def _score_sections(
    tasks: Mapping[str, ExpertScores], share: float, co_occurrence: Mapping[str, Tensor] | None
) -> list[Section]:
    stability = {
        name: stability_report(scores)
        for name, scores in tasks.items()
        if any(min(half.num_tokens) > 0 for half in scores.halves)
    }
    sections = [_dispersion_section(tasks, stability, share)]
    if len(tasks) > 1:
        result = overlap(tasks)
        figures = [overlap_plot(result), overlap_profile_plot(result)]
        sections.append(Section("Different tasks use different ones", figures=figures))
    grown = {name: found for name, found in stability.items() if len(found.points) > 1}
    if grown:
        sections.append(Section("Was the sample large enough?", figures=[stability_plot(grown)]))
    if co_occurrence is not None:
        sizes = [size for size in SIZES if all(matrix.shape[0] % size == 0 for matrix in co_occurrence.values())]
        plot = granularity_plot(granularity(tasks, co_occurrence, sizes=sizes, top_p=share))
        sections.append(Section("Finer experts cost less", figures=[plot]))
    return [*sections, _cost_section(tasks)]


def _dispersion_section(
    tasks: Mapping[str, ExpertScores], stability: Mapping[str, StabilityReport], share: float
) -> Section:
    by_token = {name: dispersion(scores) for name, scores in tasks.items()}
    by_gate = {
        name: dispersion(scores, metric="gate_share")
        for name, scores in tasks.items()
        if all(c.gate_weight_sum is not None for c in scores.containers.values())
    }
    top_k = max(c.top_k for scores in tasks.values() for c in scores.containers.values())
    shares = [f"{p:.0%}" for p in SHARES]
    table = [["task", "tokens", f"for {shares[0]}", *shares[1:], f"{share:.0%} of gate mass"]]
    table[0] += [f"share of top {top_k}", "Gini", "entropy (nats)", "halves agree on"]
    for name, result in by_token.items():
        table.append(
            [
                name,
                f"{tasks[name].num_tokens:,}",
                *(f"{result.experts_for(p):.1f}" for p in SHARES),
                f"{by_gate[name].experts_for(share):.1f}" if name in by_gate else "–",
                f"{result.top_share(top_k):.0%}",
                f"{result.gini:.2f}",
                f"{result.entropy:.2f}",
                f"{stability[name].points[-1].agreement:.0%}" if name in stability else "–",
            ]
        )
    uniform = next(iter(by_token.values()))
    needed = [f"{uniform.uniform_experts_for(p):.1f}" for p in (*SHARES, share)]
    top_share, entropy = top_k / uniform.num_experts, log(uniform.num_experts)
    table.append(["uniform", "", *needed, f"{top_share:.0%}", "0.00", f"{entropy:.2f}", ""])
    return Section(
        "One task uses few experts",
        "Whole experts that a layer needs to cover a share of its choices, mean over the layers.",
        table,
        [
            *(dispersion_plot(results, share) for results in (by_token, by_gate) if results),
            *(shares_plot(name, scores, "token", share) for name, scores in tasks.items()),
            layers_plot(by_token, share),
        ],
    )


def _cost_section(tasks: Mapping[str, ExpertScores]) -> Section:
    header = ["selection by token", "experts per layer", "parameters", "of the experts'", "MB in fp32", "MB in bf16"]
    rows = [
        [
            f"{name}, top_p {preview.top_p:g}",
            f"{preview.mean:.1f} ({preview.fewest} to {preview.most})",
            f"{preview.num_parameters:,}",
            f"{preview.share:.1%}",
            f"{preview.megabytes['fp32']:,.1f}",
            f"{preview.megabytes['bf16']:,.1f}",
        ]
        for name, scores in tasks.items()
        for preview in preview_selections(scores)
    ]
    return Section("What training them would cost", table=[header, *rows])


def _adapter_section(adapters: Mapping[str, AdapterRecord]) -> Section:
    header = ["adapter", "base", "layers", "experts per layer", "trained weights", "MB"]
    rows = [
        [
            name,
            _model_name(record.base) or "–",
            str(len(record.selection)),
            f"{record.mean_experts:.1f}" if record.selection else "–",
            f"{record.num_parameters:,}" if record.num_parameters is not None else "–",
            f"{record.megabytes:,.2f}" if record.megabytes is not None else "–",
        ]
        for name, record in adapters.items()
    ]
    shown = {name: record for name, record in adapters.items() if record.selection}
    figures = [selection_plot(name, record) for name, record in shown.items()]
    if len(shown) > 1:
        figures.append(adapter_overlap_plot(shown))
    return Section("Experts that are trained", table=[header, *rows], figures=figures)


def _lead(tasks: Mapping[str, ExpertScores], adapters: Mapping[str, AdapterRecord]) -> str:
    parts = []
    if tasks:
        first = next(iter(tasks.values()))
        shapes = sorted({(c.top_k, c.num_experts) for c in first.containers.values() if c.top_k})
        of = ", ".join(f"{top_k} of {count} experts for a token" for top_k, count in shapes)
        averaging = {scores.averaging for scores in tasks.values()}
        parts.append(
            f"{_model_name(first.model) or 'A model'}: {len(first.containers)} layers with experts, {of}. "
            f"Scores are means over {' and '.join(f'{name}s' for name in sorted(averaging))}."
        )
    if adapters:
        parts.append(f"{len(adapters)} adapter{'s' if len(adapters) > 1 else ''}.")
    return " ".join(parts)


def _model_name(name: str | None) -> str | None:
    """A name as on the Hub, or the last part of a folder's path, which keeps the rest of the path private."""
    return Path(name).name if name and (Path(name).is_absolute() or Path(name).is_dir()) else name
