"""Draws figures of the docs as a report has them, from the golden routing of the tests and from the embedded model.

python tools/draw_docs_figures.py
"""

from __future__ import annotations

import sys
from pathlib import Path

from peft_esft import score_experts
from peft_esft.analysis import dispersion, granularity, overlap
from peft_esft.analysis.drawing import PRINT, Plot, render
from peft_esft.analysis.report_figures import dispersion_plot, granularity_plot, overlap_plot, shares_plot


ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "figures"
sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT / "examples" / "tiny_moe")]

import golden  # noqa: E402
import tasks  # noqa: E402


def save(name: str, plot: Plot) -> None:
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{name}.svg").write_bytes(render(plot, PRINT)["svg"])
    print(plot.title)


def main() -> None:
    scores = {task: golden.load_scores(task) for task in golden.TASKS}
    save("dispersion", dispersion_plot({task: dispersion(found) for task, found in scores.items()}, 0.2))
    save("granularity", granularity_plot(granularity(scores, golden.load_co_occurrence())))
    model, tokenizer = tasks.load_base()
    domains = {
        domain: score_experts(
            model,
            tasks.batches([("", window) for window in windows], tokenizer),
            averaging="token",
            progress=False,
        )
        for domain, windows in tasks.load_general().items()
    }
    save("overlap", overlap_plot(overlap(domains)))
    verses = tasks.batches(tasks.load_task("verses", "train"), tokenizer)
    scores = score_experts(model, verses, max_tokens=32_768, progress=False)
    save("shares", shares_plot("verses", scores, "token", 0.2))


if __name__ == "__main__":
    main()
