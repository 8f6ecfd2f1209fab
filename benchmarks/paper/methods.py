"""The ways to train that are compared: each makes, of a copy of the base, the model to train."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from peft_esft import ESFTConfig, ExpertScores, find_experts, random_experts, select_experts
from peft_esft.analysis import select_groups


RANK = 8
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj", "kv_a_proj_with_mqa", "kv_b_proj"]
# As parameters: of modules, PEFT takes any name that ends so for the routed experts'.
DENSE_WEIGHTS = [
    f"{module}.{name}_proj.weight" for module in ("mlp", "shared_experts") for name in ("gate", "up", "down")
]
EXPERT_WEIGHTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@dataclass(frozen=True)
class Choice:
    """What a method may choose experts by.

    Attributes:
        scores: of the task's training data, on the model that is trained.
        seed: for random experts.
        top_p: None means the paper's.
        groups: of a simulated coarse model, whose groups are trained whole.
    """

    scores: ExpertScores
    seed: int = 0
    top_p: float | None = None
    groups: dict[str, list[list[int]]] | None = None

    def select(self, metric: str) -> dict[str, list[int]]:
        """Experts to train, by container."""
        default = {"token": 0.2, "gate": 0.1}[metric]
        top_p = default if self.top_p is None else self.top_p
        if self.groups is not None:
            return select_groups(self.scores, self.groups, top_p=top_p, metric=metric)
        return select_experts(self.scores, top_p=top_p, metric=metric)


Method = Callable[[PreTrainedModel, Choice], nn.Module]


def base(model: PreTrainedModel, choice: Choice) -> nn.Module:
    return model.requires_grad_(False)


def full(model: PreTrainedModel, choice: Choice) -> nn.Module:
    return model.requires_grad_(True)


def lora_all(model: PreTrainedModel, choice: Choice) -> nn.Module:
    """LoRA on attention, routers and experts, shared and dense ones too: every matrix of the layers."""
    matrices = [*EXPERT_WEIGHTS, *DENSE_WEIGHTS, "mlp.gate.weight"]
    return _lora(model, target_modules=ATTENTION, target_parameters=matrices)


def lora_experts(model: PreTrainedModel, choice: Choice) -> nn.Module:
    """LoRA on all experts, which PEFT reaches through `target_parameters`."""
    return _lora(model, target_modules=[], target_parameters=EXPERT_WEIGHTS)


def esft_token(model: PreTrainedModel, choice: Choice) -> nn.Module:
    return _esft(model, choice.select("token"))


def esft_gate(model: PreTrainedModel, choice: Choice) -> nn.Module:
    return _esft(model, choice.select("gate"))


def random(model: PreTrainedModel, choice: Choice) -> nn.Module:
    """As many experts of each layer as ESFT-Token, drawn at random."""
    num_experts = {path: container.num_experts for path, container in find_experts(model).items()}
    return _esft(model, random_experts(choice.select("token"), num_experts, seed=choice.seed))


def hot_lora(model: PreTrainedModel, choice: Choice) -> nn.Module:
    """LoRA on ESFT-Token's experts alone."""
    return _esft(model, choice.select("token"), rank=RANK)


def esft_shared(model: PreTrainedModel, choice: Choice) -> nn.Module:
    """ESFT-Token's experts and the shared ones."""
    return _esft(model, choice.select("token"), train_shared_experts=True)


def shared(model: PreTrainedModel, choice: Choice) -> nn.Module:
    """The shared experts alone."""
    return _esft(model, None, train_shared_experts=True)


def esft_specialise(model: PreTrainedModel, choice: Choice) -> nn.Module:
    """ESFT-Token's experts, the shared ones, and everything that is no expert: the paper's preset."""
    return _esft(model, choice.select("token"), train_shared_experts=True, train_non_expert_modules=True)


def esft_non_expert(model: PreTrainedModel, choice: Choice) -> nn.Module:
    """ESFT-Token's experts and everything that is no expert."""
    return _esft(model, choice.select("token"), train_non_expert_modules=True)


def non_expert(model: PreTrainedModel, choice: Choice) -> nn.Module:
    """Everything that is no expert: embeddings, attention, norms and routers."""
    return _esft(model, None, train_non_expert_modules=True)


METHODS: dict[str, Method] = {
    method.__name__: method
    for method in (
        base, full, lora_all, lora_experts, esft_token, esft_gate, random, hot_lora, esft_non_expert, non_expert,
        esft_shared, shared, esft_specialise,
    )
}  # fmt: skip


def trained_experts(model: nn.Module) -> dict[str, list[int]] | None:
    """The experts that an ESFT adapter trains; None for other methods."""
    config = getattr(model, "peft_config", {}).get("default")
    return config.target_experts if isinstance(config, ESFTConfig) else None


def _esft(model: PreTrainedModel, selection: dict[str, list[int]] | None, **options: object) -> nn.Module:
    return get_peft_model(model, ESFTConfig(target_experts=selection, task_type="CAUSAL_LM", **options))


def _lora(model: PreTrainedModel, **targets: object) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on `target_parameters` and compiling, which is not done here
        return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, task_type="CAUSAL_LM", **targets))
