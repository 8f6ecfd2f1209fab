"""Memory and communication of training on several GPUs, on paper: counted on the model, never run.

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
"""Of a trained parameter: fp32 value, gradient and AdamW's two moments."""
RESERVE = 0.9
"""The share of a GPU's memory that a plan may fill; the rest is the allocator's and the libraries'."""
_GPUS = re.compile(r"(\d+)x(\d+(?:\.\d+)?)\s*(?:GB|G)?", re.IGNORECASE)
_TOP_K_FIELDS = (
    "num_experts_per_tok",
    "top_k",
    "moe_top_k",
    "moe_topk",
    "moe_k",
    "top_k_experts",
    "experts_per_token",
)


@dataclass(frozen=True)
class ModelSizes:
    """What the formulas need of a model; numbers of parameters where nothing else is said.

    Attributes:
        total: all.
        units: of each decoder layer, which FSDP gathers as one.
        unit_experts: of the routed experts in each decoder layer.
        expert: of one routed expert.
        num_experts: in each layer that has some.
        top_k: experts for each token.
        hidden_size: width of the experts' input.
        intermediate_size: width inside an expert.
        vocab_size: logits for each token.
        lora_per_rank: of LoRA factors of rank 1 on all matrices of the decoder layers.
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
        """Layers with routed experts."""
        return sum(experts > 0 for experts in self.unit_experts)

    @classmethod
    def of(cls, model: nn.Module) -> ModelSizes:
        """Counts a model, which may be on the meta device.

        Raises:
            ValueError: if it has no routed experts.
        """
        containers = find_experts(model)
        if not containers:
            raise ValueError(f"{type(model).__name__} has no experts container of a known kind; nothing to plan")
        first = next(iter(containers.values()))
        units = _decoder_layers(model)
        config: Any = getattr(model, "config", None)
        text_config = config.get_text_config() if config is not None else None
        return cls(
            total=_numel(model),
            units=tuple(_numel(unit) for unit in units.values()),
            unit_experts=tuple(
                sum(c.num_experts * c.parameters_per_expert for c in _containers_below(path, containers))
                for path in units
            ),
            expert=first.parameters_per_expert,
            num_experts=first.num_experts,
            top_k=_top_k(first, text_config),
            hidden_size=first.hidden_size,
            intermediate_size=first.parameters_per_expert // (3 * first.hidden_size),
            vocab_size=getattr(text_config, "vocab_size", 0),
            lora_per_rank=sum(_lora_per_rank(unit) for unit in units.values()),
        )


@dataclass(frozen=True)
class Setup:
    """What is trained on what.

    Attributes:
        gpus: how many.
        memory: bytes of each.
        tokens: that one GPU sees in a step, in one forward pass.
        share: of the routed experts' parameters that ESFT trains.
        rank: of LoRA.
        element: bytes of a weight of the base.

    Raises:
        ValueError: if a number is below 1, or the share no share.
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
        """From "8x80GB" (10^9 bytes).

        Raises:
            ValueError: if it is of no such form or no memory, or a setting is out of range.
        """
        match = _GPUS.fullmatch(gpus.strip())
        if match is None or int(match[1]) == 0 or float(match[2]) == 0:
            raise ValueError(f"--gpus is {gpus!r}; expected NUMBERxMEMORY, for example 8x80GB")
        return cls(gpus=int(match[1]), memory=float(match[2]) * 1e9, **settings)


@dataclass(frozen=True)
class Estimate:
    """Bytes of one GPU.

    Attributes:
        method: what is trained.
        engine: how it is spread.
        base: frozen weights that it holds.
        state: values, gradients and optimizer state of what it trains.
        gathered: weights and gradients of layers at work, beyond its own part.
        activations: with gradient checkpointing.
        sent: to other GPUs in a step; with offload, read from the host.
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
        """True if the GPU holds it."""
        return self.total <= RESERVE * setup.memory


def num_trained(sizes: ModelSizes, setup: Setup, method: Method) -> float:
    """Trained parameters."""
    return {"ESFT": setup.share * sizes.experts, "LoRA": setup.rank * sizes.lora_per_rank, "full": sizes.total}[method]


def estimate(sizes: ModelSizes, setup: Setup, method: Method, engine: Engine) -> Estimate:
    """What one GPU holds and sends."""
    element, parts = setup.element, 1 if engine in ("one GPU", "offload") else setup.gpus
    trained = num_trained(sizes, setup, method)
    frozen = 0 if method == "full" else element * sizes.total
    # A trained weight of the base is gathered in the base's dtype, its gradient likewise; a delta in fp32.
    trained_layer = trained / max(1, len(sizes.units)) if method != "full" else 0
    exchanged = (parts - 1) / parts
    if engine == "FSDP2":
        layers = element * (sizes.root + 2 * max(sizes.units)) + 2 * (4 + 4) * trained_layer
        if method == "full":
            layers *= 2
        passes = 2 * (element * sizes.total + (4 * trained if method != "full" else 0)) - element * sizes.root
        sent = exchanged * (passes + 4 * trained)
    elif engine == "EP":
        dense = [unit - experts for unit, experts in zip(sizes.units, sizes.unit_experts, strict=True)]
        layers = element * (sizes.root + 2 * max(dense)) * (2 if method == "full" else 1)
        gradients = 4 * (sizes.total - sizes.experts) if method == "full" else 0
        passes = element * (2 * sum(dense) + sizes.root) + gradients
        sent = exchanged * (passes + all_to_all_bytes(sizes, setup))
    elif engine == "offload":
        layers = element * 2 * max(sizes.units)
        sent = 2 * element * sizes.total
    else:
        layers = sent = 0.0
    return Estimate(
        method=method,
        engine=engine,
        base=0.0 if engine == "offload" else frozen / parts,
        state=TRAINED_BYTES * trained / parts,
        gathered=layers,
        activations=activation_bytes(sizes, setup),
        sent=sent,
    )


def all_to_all_bytes(sizes: ModelSizes, setup: Setup) -> float:
    """What expert parallelism exchanges in a step: each pair there and back, forward, repeated and backward."""
    passes = 3
    pairs = setup.tokens * sizes.top_k
    return 2.0 * passes * sizes.num_moe_layers * pairs * sizes.hidden_size * setup.element


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
    """All methods on all engines that fit the number of GPUs."""
    engines: tuple[Engine, ...] = ("one GPU", "offload")
    if setup.gpus > 1:
        engines = ("FSDP2", "EP") if sizes.num_experts % setup.gpus == 0 else ("FSDP2",)
    methods = get_args(Method)
    return [
        estimate(sizes, setup, method, engine)
        for engine in engines
        for method in methods
        if not (engine == "offload" and method == "full")
    ]


def recommended(estimates: Sequence[Estimate], setup: Setup) -> Estimate | None:
    """The engine for ESFT that sends least among those that fit; None if none does."""
    fitting = [e for e in estimates if e.method == "ESFT" and e.fits(setup)]
    return min(fitting, key=lambda e: e.sent, default=None)


def format_plan(name: str, sizes: ModelSizes, setup: Setup, estimates: Sequence[Estimate]) -> str:
    """The plan as a table in plain text."""
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
        parts = "".join(
            f"{value / 1e9:>{width}.1f}"
            for value, width in ((e.base, 8), (e.state, 8), (e.gathered, 10), (e.activations, 13), (e.total, 12))
        )
        lines.append(
            f"{e.engine:<8} {e.method:<6}{parts}  {'yes' if e.fits(setup) else 'no':<4} {e.sent / 1e9:>11.1f}"
        )
    best = recommended(estimates, setup)
    if best is None:
        least = min((e for e in estimates if e.method == "ESFT"), key=lambda e: e.total)
        lines.append(
            f"\nESFT does not fit: {least.engine} needs {least.total / 1e9:.0f} GB on each GPU. Take more GPUs."
        )
    else:
        lines.append(f"\nrecommended for ESFT: {best.engine}")
    return "\n".join(lines)


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _decoder_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that FSDP gathers as one, by path, none inside another."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if type(module).__name__ in names and not any(path.startswith(f"{outer}.") for outer in layers):
            layers[path] = module
    return layers or {"": model}


def _containers_below(path: str, containers: dict[str, ExpertsContainer]) -> list[ExpertsContainer]:
    return [container for name, container in containers.items() if not path or name.startswith(f"{path}.")]


def _top_k(container: ExpertsContainer, config: Any) -> int:
    parent = container.places[0].parent
    for source in (config, parent, *parent.children()):
        for field in _TOP_K_FIELDS:
            value = getattr(source, field, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    raise ValueError(f"how many experts {container.path} chooses for a token is not known")


def _lora_per_rank(module: nn.Module) -> int:
    """The factors of all matrices: of linear layers and, expert by expert, of fused ones."""
    return sum(
        parameter.shape[:-2].numel() * (parameter.shape[-2] + parameter.shape[-1])
        for parameter in module.parameters()
        if parameter.dim() > 1
    )
