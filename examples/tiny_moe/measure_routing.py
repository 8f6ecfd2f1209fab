"""Measures how concentrated an embedded model's routing is, and writes `routing.md` or `routing_deepseek.md`.

    python examples/tiny_moe/measure_routing.py --cache ~/.cache/peft_esft_tiny_moe [--base deepseek]

Two disjoint samples of held-out text for each domain: the experts that take 20 % of a domain's choices, and how many
of the six most used experts two samples share, within a domain and between domains. Means over the layers.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from peft_esft import score_experts, select_experts

from corpus import PRETRAINING_DOMAINS, is_held_out, load_domain
from tasks import BASES, FOLDER, load_base


ROWS, LENGTH = 64, 256  # of one sample: 16,384 tokens
TOP = 6


def two_samples(documents: dict[str, str], tokenizer) -> list[list[dict[str, Tensor]]]:
    """Batches of two samples that share no text."""
    ids: list[int] = []
    for name, text in documents.items():
        if is_held_out(name):
            ids += tokenizer(text)["input_ids"]
    stream = torch.tensor(ids)
    rows = stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    return [[{"input_ids": part} for part in sample.split(16)] for sample in (rows[:ROWS], rows[ROWS : 2 * ROWS])]


def shared_top(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """Of the six most used experts of each layer, how many are the same; mean over the layers."""
    common = [
        len(set(first[path].topk(TOP).indices.tolist()) & set(second[path].topk(TOP).indices.tolist()))
        for path in first
    ]
    return sum(common) / len(common)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--base", choices=BASES, default="olmoe")
    arguments = parser.parse_args()
    model, tokenizer = load_base(arguments.base)
    name = {"olmoe": "routing.md", "deepseek": "routing_deepseek.md"}[arguments.base]
    domains = [*PRETRAINING_DOMAINS, "french"]
    shares: dict[str, list[dict[str, Tensor]]] = {}
    lines = [
        f"# Routing of the embedded {type(model).__name__}",
        "",
        f"Two samples of {ROWS * LENGTH:,} tokens of held-out text for each domain; means over the layers. French is",
        "not in the pretraining data. Uniform routing over 64 experts would need 12.8, 32 and 57.6 of them, and two",
        "independent choices of six would share 0.56.",
        "",
        "| domain | experts for 20 % of choices | for 50 % | for 90 % | top-6 shared by two samples |",
        "|---|---|---|---|---|",
    ]
    for domain in domains:
        samples = two_samples(load_domain(domain, arguments.cache), tokenizer)
        shares[domain] = [
            score_experts(model, sample, averaging="token", progress=False).token() for sample in samples
        ]
        needed = []
        for share in (0.2, 0.5, 0.9):
            chosen = select_experts(shares[domain][0], top_p=share)
            needed.append(sum(map(len, chosen.values())) / len(chosen))
        lines.append(
            f"| {domain} | {needed[0]:.1f} | {needed[1]:.1f} | {needed[2]:.1f} | {shared_top(*shares[domain]):.2f} |"
        )
    lines += ["", "Top-6 experts shared between domains (first sample of one, second of the other):", ""]
    lines += ["| | " + " | ".join(domains) + " |", "|---" * (len(domains) + 1) + "|"]
    for one in domains:
        cells = [f"{shared_top(shares[one][0], shares[other][1]):.2f}" for other in domains]
        lines.append(f"| {one} | " + " | ".join(cells) + " |")
    (FOLDER / name).write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
