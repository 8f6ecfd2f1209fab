"""Models whose experts are modules of their own, as older checkpoints' remote code has them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from families import tiny_model


class GatedMLP(nn.Module):
    """`down(silu(gate(x)) * up(x))`."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class ChoosingGate(nn.Module):
    """A router that returns the ids of the chosen experts, their weights and an auxiliary loss."""

    def __init__(self, weight: Tensor, top_k: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())
        self.top_k = top_k

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, None]:
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        scores = nn.functional.linear(rows.float(), self.weight.float()).softmax(-1)
        topk_weight, topk_idx = scores.topk(self.top_k, dim=-1, sorted=False)
        return topk_idx, topk_weight, None


class ListedMoE(nn.Module):
    """A layer of experts in a `ModuleList`, each called with its tokens, as in DeepSeek-V2's first code."""

    def __init__(self, fused: nn.Module, choosing: bool) -> None:
        super().__init__()
        experts = fused.experts
        width, hidden_size = experts.down_proj.shape[2], experts.down_proj.shape[1]
        self.experts = nn.ModuleList(GatedMLP(hidden_size, width) for _ in range(experts.num_experts))
        self.top_k = fused.gate.top_k
        if choosing:
            self.gate: nn.Module = ChoosingGate(fused.gate.weight, self.top_k)
        else:
            self.gate = nn.Linear(hidden_size, experts.num_experts, bias=False)
            self.gate.weight.data.copy_(fused.gate.weight)
        self.shared_experts = fused.shared_experts
        for number, expert in enumerate(self.experts):
            expert.gate_proj.weight.data.copy_(experts.gate_up_proj[number, :width])
            expert.up_proj.weight.data.copy_(experts.gate_up_proj[number, width:])
            expert.down_proj.weight.data.copy_(experts.down_proj[number])

    def forward(self, hidden_states: Tensor) -> Tensor:
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        if isinstance(self.gate, ChoosingGate):
            index, weights, _ = self.gate(rows)
        else:
            weights, index = self.gate(rows.float()).softmax(-1).topk(self.top_k, dim=-1)
        output = torch.zeros_like(rows)
        for number in range(len(self.experts)):
            tokens, places = (index == number).nonzero(as_tuple=True)
            if len(tokens):
                expert_output = self.experts[number](rows[tokens]) * weights[tokens, places, None].to(rows.dtype)
                output = output.index_add(0, tokens, expert_output)
        return output.view_as(hidden_states) + self.shared_experts(hidden_states)


def listed_model(dtype: torch.dtype = torch.float32, choosing: bool = True) -> PreTrainedModel:
    """`tiny_model("deepseek_v2")` with its experts in modules of their own: the same function.

    Args:
        dtype: of the weights.
        choosing: the router returns its choice; else only logits, and the layer chooses.
    """
    model = tiny_model("deepseek_v2", dtype)
    for layer in model.model.layers:
        if hasattr(layer.mlp, "experts"):
            layer.mlp = ListedMoE(layer.mlp, choosing).to(dtype)
    return model.eval()
