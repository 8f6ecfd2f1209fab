"""Tiny models for PEFT's tests: real checkpoints on disk, and modules that are no transformers models."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from families import tiny_model
from listed import GatedMLP


FAMILIES = ["olmoe", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "glm4_moe", "gpt_oss"]
NUM_EXPERTS = 8


def write_checkpoint(family: str, folder: str) -> None:
    """Saves a tiny model of a family.

    Every one of its layers has experts, the first one included: PEFT's test of `layers_to_transform` asks for layer 0.
    """
    model = tiny_model(family)
    if hasattr(model.config, "first_k_dense_replace"):
        model.config.first_k_dense_replace = 0
        if getattr(model.config, "mlp_layer_types", None):
            model.config.mlp_layer_types = ["sparse"] * model.config.num_hidden_layers
        torch.manual_seed(0)
        model = type(model)(model.config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.75)
    model.save_pretrained(folder)


class FusedExperts(nn.Module):
    """Experts like those of transformers: the flags, the parameters and the call, and nothing else."""

    has_gate = True
    has_bias = False
    is_transposed = False
    is_concatenated = True
    has_post_expert_norm = False

    def __init__(self, size: int, num_experts: int = NUM_EXPERTS) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.gate_up_proj = nn.Parameter(0.7 * torch.randn(num_experts, 2 * size, size))
        self.down_proj = nn.Parameter(0.7 * torch.randn(num_experts, size, size))
        self.act_fn = nn.SiLU()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        output = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, choice = (top_k_index == expert).nonzero(as_tuple=True)
            gate, up = (hidden_states[token] @ self.gate_up_proj[expert].T).chunk(2, dim=-1)
            update = (self.act_fn(gate) * up) @ self.down_proj[expert].T
            output = output.index_add(0, token, update * top_k_weights[token, choice, None])
        return output


class FusedBlock(nn.Module):
    """A layer of fused experts and a dense one, named as PEFT's tests name the layers of theirs."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.router = nn.Linear(size, NUM_EXPERTS, bias=False)
        self.lin0 = FusedExperts(size)
        self.lin1 = nn.Linear(size, size)

    def forward(self, X: Tensor) -> Tensor:
        weights, chosen = self.router(X).softmax(dim=-1).topk(4, dim=-1)
        return self.lin1(X + self.lin0(X, chosen, weights))


class ListedBlock(nn.Module):
    """The same with experts in modules of their own, each called with its tokens."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.router = nn.Linear(size, NUM_EXPERTS, bias=False)
        self.lin0 = nn.ModuleList(GatedMLP(size, size) for _ in range(NUM_EXPERTS))
        self.lin1 = nn.Linear(size, size)
        with torch.no_grad():
            for parameter in self.lin0.parameters():
                parameter.normal_(std=0.75)

    def forward(self, X: Tensor) -> Tensor:
        weights, chosen = self.router(X).softmax(dim=-1).topk(4, dim=-1)
        output = torch.zeros_like(X)
        for expert in range(NUM_EXPERTS):
            token, choice = (chosen == expert).nonzero(as_tuple=True)
            if len(token):
                output = output.index_add(0, token, self.lin0[expert](X[token]) * weights[token, choice, None])
        return self.lin1(X + output)


BLOCKS: dict[str, type[nn.Module]] = {"fused": FusedBlock, "listed": ListedBlock}
"""A layer of each kind of experts: `forward(X [tokens, size])`, the experts at `lin0`, a `Linear` at `lin1`."""


class Toy(nn.Module):
    """A classifier of PEFT's inputs, with two layers of experts."""

    def __init__(self, kind: str = "fused", size: int = 8, num_layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(10, size)
        self.layers = nn.ModuleList(BLOCKS[kind](size) for _ in range(num_layers))
        self.head = nn.Linear(size, 2)
        nn.init.normal_(self.head.weight, std=1)  # PEFT's tests ask that a small random delta shows in the output
        self.dtype = torch.float32

    def forward(self, X: Tensor) -> Tensor:
        X = self.embed(X.to(self.dtype).sin())  # rows that differ go to different experts
        for layer in self.layers:
            X = layer(X)
        return self.head(X).log_softmax(dim=-1)


class ToyMLP(Toy):
    """The layers at the top of the model, under the names of PEFT's `MLP`."""

    def __init__(self, bias: bool = True, kind: str = "fused") -> None:
        super().__init__(kind)
        first, second = self.layers
        del self.layers
        self.router0, self.lin0 = first.router, first.lin0
        self.router1, self.experts1 = second.router, second.lin0
        self.lin1 = second.lin1

    def forward(self, X: Tensor) -> Tensor:
        X = self.embed(X.to(self.dtype).sin())
        for router, experts in ((self.router0, self.lin0), (self.router1, self.experts1)):
            weights, chosen = router(X).softmax(dim=-1).topk(4, dim=-1)
            X = X + experts(X, chosen, weights)
        return self.head(self.lin1(X)).log_softmax(dim=-1)


def mlp_of_experts() -> ToyMLP:
    """`ToyMLP` with experts under both names of PEFT's `MLP`; it is not called."""
    toy = ToyMLP()
    toy.lin1 = toy.experts1
    del toy.experts1
    return toy


def deep_toy(size: int = 8, kind: str = "fused") -> Toy:
    """The stand-in for PEFT's `DeepMLP`. Its size serves methods that need large layers; ours does not."""
    return Toy(kind, num_layers=3)


class FromPretrained:
    """Makes a toy a model that PEFT's tests can load, always with the same weights."""

    @classmethod
    def from_pretrained(cls, model_id: str, dtype: torch.dtype = torch.float32) -> nn.Module:
        torch.manual_seed(0)
        model = Toy(model_id).to(dtype)
        model.dtype = dtype
        return model


def on_modules(kind_of_class: type) -> Callable[..., object]:
    """`config_class(target_modules=[...])`, as PEFT's tests call every method's, for a config of experts."""

    def config(target_modules: list[str], **settings: object) -> object:
        for lora_only in ("init_lora_weights", "r"):
            settings.pop(lora_only, None)
        return kind_of_class(target_experts={path: [1, 3, 0] for path in target_modules}, **settings)

    return config
