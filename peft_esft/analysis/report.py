"""One page on the routing of tasks, or on what adapters train."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import log
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..scoring.preview import preview_selections
from ..scoring.scores import ExpertScores
from ..scoring.selection import DEFAULT_TOP_P
from .adapters import AdapterRecord, adapter_overlap_plot, adapters_of_model, read_adapter, selection_plot
from .dispersion import Dispersion, dispersion
from .drawing import Drawn, draw, import_matplotlib
from .figures import (
    dispersion_plot,
    granularity_plot,
    layers_plot,
    overlap_plot,
    overlap_profile_plot,
    shares_plot,
    stability_plot,
)
from .granularity import SIZES, granularity
from .overlap import check_same_model, overlap
from .page import Section, Table, render_page
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

    The page needs no network and no other file: figures, their SVG and PNG and their numbers as CSV are all in it, the
    latter three behind links. The same files are also written to a folder beside it, `<name>_files`.

    Args:
        scores_or_adapters: `ExpertScores`, a file of scores, an adapter's folder, a model with ESFT adapters, or
            several of these in a list or, with names for them, in a dict. Scores must be of one model.
        out: the page's file.
        share: of a layer's choices and gate mass that titles and marks speak of; also the threshold of the selections
            that the table counts.
        co_occurrence: from `analysis.co_occurrence`; adds what coarser experts would cost.
        title: of the page.

    Returns:
        The page's file.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if there is nothing to report on, or scores are of different models.

    Example:
        >>> report({"law": law_scores, "intent": intent_scores}, "routing.html")
    """
    import_matplotlib()
    tasks, adapters = _collect(scores_or_adapters)
    if not tasks and not adapters:
        raise ValueError("there is nothing to report on: no scores and no adapters")
    check_same_model(tasks)
    sections = [*_score_sections(tasks, share, co_occurrence), *_adapter_sections(adapters)]
    out = Path(out)
    _write_files(out.with_name(f"{out.stem}_files"), [drawn for section in sections for drawn in section.figures])
    from .. import __version__

    heading = title or ("Experts that tasks use" if tasks else "Experts that adapters train")
    page = render_page(heading, _lead(tasks, adapters), sections, f"Made by peft_esft {__version__}.")
    out.write_text(page, encoding="utf-8")
    return out


def _collect(subject: Any) -> tuple[dict[str, ExpertScores], dict[str, AdapterRecord]]:
    """Sorts what was given into scores and adapters, each with a name."""
    if isinstance(subject, Mapping):
        items: Iterable[tuple[str | None, Any]] = subject.items()
    elif isinstance(subject, Sequence) and not isinstance(subject, str):
        items = [(None, item) for item in subject]
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
            _add(adapters, name or Path(item).resolve().name, read_adapter(Path(item)))
        elif isinstance(item, str | Path):
            _add(tasks, name or Path(item).stem, ExpertScores.load(item))
        else:
            raise ValueError(f"a report is on scores or adapters, and {type(item).__name__} is neither")
    return tasks, adapters


def _add(table: dict[str, Any], name: str, item: Any) -> None:
    """Adds an item; names that are taken get a number."""
    number, unique = 2, name
    while unique in table:
        unique, number = f"{name} {number}", number + 1
    table[unique] = item


def _score_sections(
    tasks: Mapping[str, ExpertScores], share: float, co_occurrence: Mapping[str, Tensor] | None
) -> list[Section]:
    if not tasks:
        return []
    by_token = {name: dispersion(scores) for name, scores in tasks.items()}
    by_gate = {
        name: dispersion(scores, metric="gate_share")
        for name, scores in tasks.items()
        if all(c.gate_weight_sum is not None for c in scores.containers.values())
    }
    stability = _stability(tasks)
    plots = [dispersion_plot(by_token, share), *([dispersion_plot(by_gate, share)] if by_gate else [])]
    plots += [shares_plot(name, scores, "token", share) for name, scores in tasks.items()]
    plots.append(layers_plot(by_token, share))
    sections = [
        Section(
            "One task uses few experts",
            "Whole experts that a layer needs to cover a share of its choices, mean over the layers.",
            _dispersion_table(tasks, by_token, by_gate, stability, share),
            [draw(plot) for plot in plots],
        )
    ]
    if len(tasks) > 1:
        result = overlap(tasks)
        sections.append(
            Section(
                "Different tasks use different ones",
                figures=[draw(overlap_plot(result)), draw(overlap_profile_plot(result))],
            )
        )
    grown = {name: found for name, found in stability.items() if len(found.points) > 1}
    if grown:
        sections.append(Section("Was the sample large enough?", figures=[draw(stability_plot(grown))]))
    if co_occurrence is not None:
        sizes = [size for size in SIZES if all(matrix.shape[0] % size == 0 for matrix in co_occurrence.values())]
        plot = granularity_plot(granularity(tasks, co_occurrence, sizes=sizes, top_p=share))
        sections.append(Section("Finer experts cost less", figures=[draw(plot)]))
    sections.append(_cost_section(tasks))
    return sections


def _stability(tasks: Mapping[str, ExpertScores]) -> dict[str, StabilityReport]:
    return {
        name: stability_report(scores)
        for name, scores in tasks.items()
        if any(min(half.num_tokens) > 0 for half in scores.halves)
    }


def _dispersion_table(
    tasks: Mapping[str, ExpertScores],
    by_token: Mapping[str, Dispersion],
    by_gate: Mapping[str, Dispersion],
    stability: Mapping[str, StabilityReport],
    share: float,
) -> Table:
    top_k = max(c.top_k for scores in tasks.values() for c in scores.containers.values())
    header = ["task", "tokens", "for 10%", "20%", "50%", "90%", f"{share:.0%} of gate mass"]
    header += [f"share of top {top_k}", "Gini", "entropy (nats)", "halves agree on"]
    rows = []
    for name, result in by_token.items():
        rows.append(
            [
                name,
                f"{tasks[name].num_tokens:,}",
                *(f"{result.experts_for(p):.1f}" for p in (0.1, 0.2, 0.5, 0.9)),
                f"{by_gate[name].experts_for(share):.1f}" if name in by_gate else "–",
                f"{result.top_share(top_k):.0%}",
                f"{result.gini:.2f}",
                f"{result.entropy:.2f}",
                f"{stability[name].points[-1].agreement:.0%}" if name in stability else "–",
            ]
        )
    uniform = next(iter(by_token.values()))
    shares = [f"{uniform.uniform_experts_for(p):.1f}" for p in (0.1, 0.2, 0.5, 0.9, share)]
    rows.append(
        ["uniform", "", *shares, f"{top_k / uniform.num_experts:.0%}", "0.00", f"{log(uniform.num_experts):.2f}", ""]
    )
    return Table(header, rows)


def _cost_section(tasks: Mapping[str, ExpertScores]) -> Section:
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
    header = ["selection by token", "experts a layer", "parameters", "of the experts'", "MB in fp32", "MB in bf16"]
    return Section("What training them would cost", table=Table(header, rows))


def _adapter_sections(adapters: Mapping[str, AdapterRecord]) -> list[Section]:
    if not adapters:
        return []
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
    table = Table(["adapter", "base", "layers", "experts a layer", "trained weights", "MB"], rows)
    drawn = {name: record for name, record in adapters.items() if record.selection}
    plots = [selection_plot(name, record) for name, record in drawn.items()]
    plots += [adapter_overlap_plot(drawn)] if len(drawn) > 1 else []
    return [Section("Experts that are trained", table=table, figures=[draw(plot) for plot in plots])]


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
    """A name as on the Hub, or the last part of a folder's path: where it lies is nobody's business."""
    return Path(name).name if name and (Path(name).is_absolute() or Path(name).is_dir()) else name


def _write_files(folder: Path, figures: Sequence[Drawn]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for drawn in figures:
        for ending, content in drawn.files.items():
            (folder / f"{drawn.plot.name}.{ending}").write_bytes(content)
