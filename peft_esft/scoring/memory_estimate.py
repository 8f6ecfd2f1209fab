"""Estimates the memory and communication of training on several GPUs from a model's sizes, without running it.

All bytes are those of one GPU. The formulas and their errors against measurements are in docs/scaling.md.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn

from ..moe.containers import ExpertsContainer, find_experts


Method = Literal["ESFT", "LoRA", "full"]
Engine = Literal["one GPU", "offload", "FSDP2", "EP"]

TRAINED_BYTES = 16
"""Bytes of a trained parameter: fp32 value, gradient and AdamW's two moments."""
RESERVE = 0.9
"""The share of a GPU's memory that a plan may fill; the rest is for the allocator and the libraries."""
_GPUS = re.compile(r"(\d+)x(\d+(?:\.\d+)?)\s*(?:GB|G)?", re.IGNORECASE)
_TOP_K_FIELDS = "num_experts_per_tok top_k moe_top_k moe_topk moe_k top_k_experts experts_per_token"


@dataclass(frozen=True)
class ModelSizes:
    """The sizes of a model that the formulas need; numbers of parameters where nothing else is said.

    Attributes:
        total: the whole model.
        units: each decoder layer, which FSDP gathers as one.
        unit_experts: the routed experts of each decoder layer.
        expert: one routed expert.
        num_experts: number of experts in a layer that has some.
        top_k: number of experts for each token.
        hidden_size: width of the experts' input.
        intermediate_size: width inside an expert.
        vocab_size: number of logits for each token.
        lora_per_rank: LoRA factors of rank 1 on all matrices of the decoder layers.
    """

    total: int
    units: tuple[int, ...]
    unit_experts: tuple[int, ...]
    expert: int
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    lora_per_rank: int

    @property
    def experts(self) -> int:
        """Parameters of all routed experts."""
        return sum(self.unit_experts)

    @property
    def root(self) -> int:
        """Parameters outside the decoder layers."""
        return self.total - sum(self.units)

    @property
    def num_moe_layers(self) -> int:
        """Number of layers with routed experts."""
        return sum(experts > 0 for experts in self.unit_experts)

    @classmethod
    def of(cls, model: nn.Module) -> ModelSizes:
        """Counts the parameters of a model, which may be on the meta device.

        Raises:
            ValueError: if the model has no routed experts.
        """
        containers = find_experts(model)
        if not containers:
            raise ValueError(f"{type(model).__name__} has no experts container of a known kind; nothing to plan")
        first = next(iter(containers.values()))
        layers = _decoder_layers(model)
        config: Any = getattr(model, "config", None)
        text_config = config.get_text_config() if config is not None else None
        experts = {path: c.num_experts * c.parameters_per_expert for path, c in containers.items()}
        matrices = [p for layer in layers.values() for p in layer.parameters() if p.dim() > 1]
        return cls(
            total=_numel(model),
            units=tuple(map(_numel, layers.values())),
            unit_experts=tuple(
                sum(size for path, size in experts.items() if not layer or path.startswith(f"{layer}."))
                for layer in layers
            ),
            expert=first.parameters_per_expert,
            num_experts=first.num_experts,
            top_k=_top_k(first, text_config),
            hidden_size=first.hidden_size,
            intermediate_size=first.parameters_per_expert // (3 * first.hidden_size),
            vocab_size=getattr(text_config, "vocab_size", 0),
            # Fused experts are a stack of matrices, each of which has factors of its own.
            lora_per_rank=sum(p.shape[:-2].numel() * sum(p.shape[-2:]) for p in matrices),
        )


@dataclass(frozen=True)
class Setup:
    """The hardware and the settings of a training run.

    Attributes:
        gpus: number of GPUs.
        memory: bytes of each GPU.
        tokens: tokens that one GPU sees in a step, in one forward pass.
        share: share of the routed experts' parameters that ESFT trains.
        rank: rank of LoRA.
        element: bytes of a weight of the base.

    Raises:
        ValueError: if a number is below 1, or the share is not above 0 and at most 1.
    """

    gpus: int
    memory: float
    tokens: int = 4096
    share: float = 0.1
    rank: int = 16
    element: int = 2

    def __post_init__(self) -> None:
        for name in ("gpus", "tokens", "rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it is at least 1")
        if not 0 < self.share <= 1:
            raise ValueError(f"share is {self.share}; it is a share of the experts, above 0 and at most 1")

    @classmethod
    def parse(cls, gpus: str, **settings: Any) -> Setup:
        """Reads GPUs from "8x80GB" (10^9 bytes).

        Raises:
            ValueError: if the text has another form, or a number or setting is out of range.
        """
        match = _GPUS.fullmatch(gpus.strip())
        if match is None or int(match[1]) == 0 or float(match[2]) == 0:
            raise ValueError(f"--gpus is {gpus!r}; expected NUMBERxMEMORY, for example 8x80GB")
        return cls(gpus=int(match[1]), memory=float(match[2]) * 1e9, **settings)


@dataclass(frozen=True)
class Estimate:
    """The bytes of one GPU with one method on one engine.

    Attributes:
        method: what is trained.
        engine: how the model is spread over the GPUs.
        base: frozen weights on the GPU.
        state: values, gradients and optimizer state of the trained parameters.
        gathered: weights and gradients of the layers at work that belong to other GPUs.
        activations: activations with gradient checkpointing.
        sent: bytes sent to other GPUs in a step; with offload, bytes read from the host.
    """

    method: Method
    engine: Engine
    base: float
    state: float
    gathered: float
    activations: float
    sent: float

    @property
    def total(self) -> float:
        """Bytes that the GPU has to hold at once."""
        return self.base + self.state + self.gathered + self.activations

    def fits(self, setup: Setup) -> bool:
        """True if the GPU holds them."""
        return self.total <= RESERVE * setup.memory


def num_trained(sizes: ModelSizes, setup: Setup, method: Method) -> float:
    """The number of trained parameters."""
    return {"ESFT": setup.share * sizes.experts, "LoRA": setup.rank * sizes.lora_per_rank, "full": sizes.total}[method]


def estimate(sizes: ModelSizes, setup: Setup, method: Method, engine: Engine) -> Estimate:
    """Estimates the bytes that one GPU holds and sends."""
    element, is_full = setup.element, method == "full"
    parts = 1 if engine in ("one GPU", "offload") else setup.gpus
    trained = num_trained(sizes, setup, method)
    gathered = sent = 0.0
    if engine == "FSDP2":
        # A trained weight of the base is gathered in the base's dtype, its gradient likewise; a delta in fp32.
        deltas = 0 if is_full else trained
        weights = element * (sizes.root + 2 * max(sizes.units)) * (2 if is_full else 1)
        gathered = weights + 2 * (4 + 4) * deltas / max(1, len(sizes.units))
        passes = 2 * (element * sizes.total + 4 * deltas) - element * sizes.root
        sent = (parts - 1) / parts * (passes + 4 * trained)
    elif engine == "EP":
        dense = [unit - experts for unit, experts in zip(sizes.units, sizes.unit_experts, strict=True)]
        gathered = element * (sizes.root + 2 * max(dense)) * (2 if is_full else 1)
        gradients = 4 * (sizes.total - sizes.experts) if is_full else 0
        passes = element * (2 * sum(dense) + sizes.root) + gradients
        # Each pair of token and expert goes there and back, in the forward pass, its repetition and the backward pass.
        pairs = setup.tokens * sizes.top_k * sizes.num_moe_layers
        sent = (parts - 1) / parts * (passes + 2 * 3 * pairs * sizes.hidden_size * element)
    elif engine == "offload":
        gathered = element * 2.0 * max(sizes.units)
        sent = 2.0 * element * sizes.total
    frozen = 0 if is_full or engine == "offload" else element * sizes.total
    state = TRAINED_BYTES * trained / parts
    return Estimate(method, engine, frozen / parts, state, gathered, activation_bytes(sizes, setup), sent)


def activation_bytes(sizes: ModelSizes, setup: Setup) -> float:
    """Activations with gradient checkpointing: the layers' inputs, and the larger of logits and one layer's work."""
    inputs = len(sizes.units) * sizes.hidden_size * setup.element
    # Rows of the pairs, gathered and between the projections, with their gradients; and what attention keeps.
    rows = sizes.top_k * (2 * sizes.hidden_size + 4 * sizes.intermediate_size)
    layer = (rows + 12 * sizes.hidden_size) * setup.element
    # In the base's dtype, in fp32 for the loss, and their gradient; freed before the layers' backward pass.
    logits = sizes.vocab_size * (setup.element + 4 + 4)
    return float(setup.tokens * (inputs + max(layer, logits)))


def plan(sizes: ModelSizes, setup: Setup) -> list[Estimate]:
    """Estimates all methods on all engines that suit the number of GPUs."""
    engines: tuple[Engine, ...] = ("one GPU", "offload")
    if setup.gpus > 1:
        engines = ("FSDP2", "EP") if sizes.num_experts % setup.gpus == 0 else ("FSDP2",)
    pairs = [(engine, method) for engine in engines for method in get_args(Method)]
    return [
        estimate(sizes, setup, method, engine) for engine, method in pairs if (engine, method) != ("offload", "full")
    ]


def recommended(estimates: Sequence[Estimate], setup: Setup) -> Estimate | None:
    """The estimate for ESFT that sends least among those that fit; None if none fits."""
    fitting = [e for e in estimates if e.method == "ESFT" and e.fits(setup)]
    return min(fitting, key=lambda e: e.sent, default=None)


def format_plan(name: str, sizes: ModelSizes, setup: Setup, estimates: Sequence[Estimate]) -> str:
    """Writes a plan as a table in plain text."""
    trained = num_trained(sizes, setup, "ESFT")
    lines = [
        f"{name}: {sizes.total / 1e9:.1f} G parameters, {sizes.experts / sizes.total:.0%} in routed experts "
        f"({sizes.num_moe_layers} layers of {sizes.num_experts}, {sizes.top_k} for each token)",
        f"{setup.gpus} x {setup.memory / 1e9:g} GB, {setup.tokens} tokens on each, gradient checkpointing; ESFT of "
        f"{setup.share:.0%} of the experts ({trained / 1e9:.2f} G), LoRA of rank {setup.rank}",
        "",
        "engine   method      base   state  gathered  activations    total GB  fits   sent GB a step",
    ]
    for e in estimates:
        base, state, gathered, activations, total, sent = (
            value / 1e9 for value in (e.base, e.state, e.gathered, e.activations, e.total, e.sent)
        )
        lines.append(
            f"{e.engine:<8} {e.method:<6}{base:>8.1f}{state:>8.1f}{gathered:>10.1f}{activations:>13.1f}{total:>12.1f}"
            f"  {'yes' if e.fits(setup) else 'no':<4} {sent:>11.1f}"
        )
    best = recommended(estimates, setup)
    least = min((e for e in estimates if e.method == "ESFT"), key=lambda e: e.total)
    needs = f"ESFT does not fit: {least.engine} needs {least.total / 1e9:.0f} GB on each GPU. Take more GPUs."
    return "\n".join([*lines, "", f"recommended for ESFT: {best.engine}" if best else needs])


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _decoder_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that FSDP gathers as one, by path. No module is inside another one."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if type(module).__name__ in names and not any(path.startswith(f"{outer}.") for outer in layers):
            layers[path] = module
    return layers or {"": model}


def _top_k(container: ExpertsContainer, config: Any) -> int:
    parent = container.places[0].parent
    for source in (config, parent, *parent.children()):
        for field in _TOP_K_FIELDS.split():
            value = getattr(source, field, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    raise ValueError(f"how many experts {container.path} chooses for a token is not known")
