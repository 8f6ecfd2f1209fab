"""The oracle: a dense model in which only the selected experts' rows are trained.

It shares nothing with the package but the model: the rows are leaves of their own, put into the model's own forward
by `torch.func.functional_call`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from peft_esft import ESFTConfig, find_experts

from families import VOCABULARY


SELECTION = [5, 1, 6]


def select_in_all(model: torch.nn.Module, experts: Sequence[int] = SELECTION) -> dict[str, list[int]]:
    """The same experts of every container."""
    return {path: list(experts) for path in find_experts(model)}


def config_for(model: torch.nn.Module, experts: Sequence[int] = SELECTION, **settings: object) -> ESFTConfig:
    return ESFTConfig(target_experts=select_in_all(model, experts), **settings)


def random_tokens(rows: int = 2, length: int = 12, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


class DenseOracle:
    """A copy of `model` whose selected rows are trained; everything else is frozen.

    Attributes:
        rows: the leaves, keyed by the names that the deltas have in an ESFT model. With `additive` they are fp32
            changes of the rows instead of the rows themselves, rounded once to the model's dtype.
    """

    def __init__(self, model: PreTrainedModel, selection: dict[str, list[int]], additive: bool = False) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.selection = selection
        self.additive = additive
        self.rows: dict[tuple[str, str], Tensor] = {}
        for path, container in find_experts(self.model).items():
            for name in container.weight_names if path in selection else ():
                rows = getattr(container.module, name)[selection[path]]
                leaf = torch.zeros_like(rows, dtype=torch.float32) if additive else rows.clone()
                self.rows[path, name] = leaf.requires_grad_()

    def weights(self) -> dict[str, Tensor]:
        """The dense weights, by parameter name, as functions of the leaves."""
        dense = {}
        for (path, name), rows in self.rows.items():
            weight = self.model.get_parameter(f"{path}.{name}")
            ids = torch.tensor(self.selection[path])
            effective = (weight[ids].float() + rows).to(weight.dtype) if self.additive else rows
            dense[f"{path}.{name}"] = weight.index_copy(0, ids, effective)
        return dense

    def __call__(self, **inputs: Tensor) -> Tensor:
        return torch.func.functional_call(self.model, self.weights(), kwargs=inputs)[0]


def task_loss(output: Tensor) -> Tensor:
    """A scalar that depends on every entry of a model's output."""
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(output.shape, generator=generator)
    return (output.float() * direction).mean()


def deltas_of(model: torch.nn.Module, adapter_name: str = "default") -> dict[tuple[str, str], torch.nn.Parameter]:
    """The deltas of a wrapped model, keyed like `DenseOracle.rows`."""
    found = {}
    for name, parameter in model.named_parameters():
        if ".esft_" in name and name.endswith(f".{adapter_name}"):
            path, _, leaf = name.removesuffix(f".{adapter_name}").rpartition(".esft_")
            found[path.removeprefix("base_model.model."), leaf] = parameter
    return found
