"""The golden routing of DeepSeek-V2-Lite as scores: what the analysis is tested on and its documentation shows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from peft_esft import ExpertScores
from peft_esft.analysis import count_pairs
from peft_esft.scoring.scores import ContainerScores, HalfCounts


FOLDER = Path(__file__).parent.parent / "data" / "deepseek_v2_lite_routing"
TASKS = ("intent", "translation")
NUM_LAYERS, NUM_EXPERTS = 26, 64


def container_path(layer):
    """Layer 0 of the model is dense, so the first row of the data is layer 1."""
    return f"model.layers.{layer + 1}.mlp.experts"


def load_scores(task):
    """Counts of all released tokens; the halves are of the whole samples of the token-level data."""
    record = json.loads((FOLDER / f"{task}.json").read_text())
    containers = {
        container_path(int(layer) - 1): ContainerScores(
            top_k=record["top_k"],
            num_tokens=record["num_tokens"],
            num_samples=1,
            selected_pairs=row["selected_pairs"],
            gate_weight_sum=row["gate_weight_sum"],
            token_share_sum=[0.0] * NUM_EXPERTS,
            gate_share_sum=[0.0] * NUM_EXPERTS,
            parameters_per_expert=3 * 2048 * 1408,
        )
        for layer, row in record["layers"].items()
    }
    return ExpertScores(
        containers, record["num_tokens"], 1, "token", model="DeepSeek-V2-Lite", halves=[load_halves(task)]
    )


def load_halves(task):
    """The samples of even and of odd number."""
    data = np.load(FOLDER / f"{task}.tokens.npz")
    lengths = data["sample_lengths"]
    half_of_token = np.repeat(np.arange(len(lengths)) % 2, lengths)
    pairs = {
        container_path(layer): [
            np.bincount(data["expert_ids"][layer][half_of_token == half].reshape(-1), minlength=NUM_EXPERTS).tolist()
            for half in (0, 1)
        ]
        for layer in range(NUM_LAYERS)
    }
    return HalfCounts([int((half_of_token == half).sum()) for half in (0, 1)], pairs)


def load_co_occurrence(tasks=TASKS):
    """Pairs of experts that share a token, pooled over the tasks."""
    total = {}
    for task in tasks:
        ids = np.load(FOLDER / f"{task}.tokens.npz")["expert_ids"]
        for layer in range(NUM_LAYERS):
            counts = count_pairs(torch.from_numpy(ids[layer].astype(np.int64)), NUM_EXPERTS)
            path = container_path(layer)
            total[path] = total[path] + counts if path in total else counts
    return total


def scores_of_counts(counts, top_k=1):
    """Scores that hold nothing but how often each expert was chosen."""
    containers = {
        path: ContainerScores(top_k, sum(row) // top_k, 1, row, [float(n) for n in row], [0.0], [0.0])
        for path, row in counts.items()
    }
    return ExpertScores(containers, sum(next(iter(counts.values()))), 1, "token")
