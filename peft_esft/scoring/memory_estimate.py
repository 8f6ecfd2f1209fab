"""Estimates the memory and communication of training from a model's sizes, without running it.

All bytes are those of one GPU. The formulas and their errors against measurements are in docs/scaling.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any, Literal, cast, get_args

from .memory_size import bytes_of
from .model_sizes import ModelSizes


Method = Literal["ESFT", "LoRA", "LoRA attention", "full"]
Engine = Literal["one GPU", "offload", "DDP", "FSDP2", "EP"]
BaseFormat = Literal["fp32", "bf16", "int8", "nf4", "mxfp4"]
Optimizer = Literal["adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"]

BASE_FORMATS: tuple[BaseFormat, ...] = get_args(BaseFormat)
OPTIMIZERS: tuple[Optimizer, ...] = get_args(Optimizer)
RESERVE = 0.9
"""The share of a GPU's memory that a plan may fill; the rest is for the allocator and the libraries."""
PER_EXPERT_WEIGHT = {"nf4": 0.5 + 4 / 64, "mxfp4": 0.5 + 1 / 32}
"""Bytes of a weight with its part of the block's scale; int8 has a scale for each row."""
EIGHT_BIT_MOMENTS = 2 * (1 + 4 / 256)
"""Bytes of bitsandbytes' two moments of a weight, with a fp32 scale for each block of 256."""
QUANTISED = ("int8", "nf4", "mxfp4")
_GPUS = re.compile(r"(?:(\d+)\s*x\s*)?(.+)", re.IGNORECASE)


@dataclass(frozen=True)
class Setup:
    """The hardware and the settings of a training run.

    Attributes:
        gpus: number of GPUs.
        memory: bytes of each GPU.
        tokens: tokens that one GPU sees in one forward pass.
        share: share of the routed experts' parameters that ESFT trains.
        rank: rank of ESFT's deltas; None for full rank.
        base: form of the frozen weights. Of the quantised forms, only experts are in it, the rest is in bf16. Full
            fine-tuning has weights, gradients and AdamW's moments in "bf16" or "fp32".
        optim: the optimizer, by its name in transformers' `TrainingArguments`. "adamw_torch" is also what
            `torch.optim.AdamW` does by itself: on a GPU it computes on all weights at once (`foreach`).
        lora_rank: rank of LoRA, for comparison.
        engine: the only engine to think of; None for all that suit the number of GPUs.
        accumulates: gradients of earlier forward passes are kept, as with gradient_accumulation_steps above 1.

    Raises:
        ValueError: if a number is below 1, the share is not above 0 and at most 1, or a name is not known.
    """

    gpus: int = 1
    memory: float = 80e9
    tokens: int = 4096
    share: float = 0.1
    rank: int | None = None
    base: BaseFormat = "bf16"
    optim: Optimizer = "adamw_torch"
    lora_rank: int = 16
    engine: Engine | None = None
    accumulates: bool = False

    def __post_init__(self) -> None:
        for name in ("gpus", "tokens", "rank", "lora_rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it is at least 1")
        if not 0 < self.share <= 1:
            raise ValueError(f"share is {self.share}; expected a share of the experts, above 0 and at most 1")
        for name, known in (("base", BASE_FORMATS), ("optim", OPTIMIZERS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it is one of {', '.join(known)}")

    @classmethod
    def parse(cls, gpus: str, sizes: ModelSizes | None = None, **settings: Any) -> Setup:
        """Reads GPUs from "24GB" or "8x80GB"; the settings are the other attributes.

        With `sizes`, the base is in the form that they record, unless the settings name another one.

        Raises:
            ValueError: if the text has another form, or a number or setting is out of range.
        """
        match = _GPUS.fullmatch(gpus.strip())
        try:
            if match is None or (match[1] is not None and int(match[1]) == 0):
                raise ValueError
            memory = bytes_of("memory", match[2])
        except ValueError:
            raise ValueError(f"{gpus!r} is not an amount of GPU memory; expected for example 24GB or 8x80GB") from None
        return cls(gpus=int(match[1] or 1), memory=memory, **{"base": cls.base_of(sizes)} | settings)

    @staticmethod
    def base_of(sizes: ModelSizes | None) -> BaseFormat:
        """The form of the base that a model has, as far as it is known; "bf16" otherwise. Scales count as fp32."""
        form = "" if sizes is None else (sizes.stored_as or "").removesuffix(" double")
        return cast(BaseFormat, form) if form in QUANTISED else "bf16"

    @property
    def hardware(self) -> str:
        """The GPUs in the form that `parse` reads."""
        memory = f"{self.memory / 1e9:g}GB"
        return memory if self.gpus == 1 else f"{self.gpus}x{memory}"

    @property
    def element(self) -> int:
        """Bytes of a weight that is not quantised."""
        return 4 if self.base == "fp32" else 2


@dataclass(frozen=True)
class Estimate:
    """The bytes of one GPU with one method on one engine.

    Attributes:
        method: what is trained.
        engine: how the model is spread over the GPUs.
        setup: the settings.
        trained: number of trained parameters.
        base: frozen weights on the GPU.
        state: values, gradients and moments of the trained parameters.
        gathered: weights and gradients of the layers at work that belong to other GPUs.
        activations: what forward and backward passes add at their peak, with gradient checkpointing. While the loss
            is computed there are no gradients yet; their room is counted as free.
        copies: what the optimizer's step adds.
        sent: bytes sent to other GPUs in a step; with offload, bytes read from the host.
    """

    method: Method
    engine: Engine
    setup: Setup
    trained: float
    base: float
    state: float
    gathered: float
    activations: float
    copies: float
    sent: float

    @property
    def total(self) -> float:
        """Bytes that the GPU has to hold at once: the optimizer's step comes after the backward pass."""
        return self.base + self.state + max(self.gathered + self.activations, self.copies)

    @property
    def fits(self) -> bool:
        """True if the GPU holds them."""
        return self.total <= RESERVE * self.setup.memory


def num_trained(sizes: ModelSizes, setup: Setup, method: Method) -> float:
    """The number of trained parameters."""
    if method == "ESFT":
        per_weight = 1.0 if setup.rank is None else setup.rank * sizes.expert_per_rank / sizes.expert
        return setup.share * sizes.experts * per_weight
    if method == "full":
        return sizes.total
    return setup.lora_rank * (sizes.lora_per_rank if method == "LoRA" else sizes.attention_per_rank)


def base_bytes(sizes: ModelSizes, base: BaseFormat) -> float:
    """Bytes of all weights in a form."""
    return _bytes_of(sizes, base, sizes.total, sizes.experts)


def _bytes_of(sizes: ModelSizes, base: BaseFormat, total: float, experts: float) -> float:
    """Bytes of a number of weights in a form, of which some are experts'."""
    element = 4 if base == "fp32" else 2
    if base == "int8":
        scales = (2 * sizes.intermediate_size + sizes.hidden_size) / sizes.expert
        per_weight = 1 + 4 * scales
    else:
        per_weight = PER_EXPERT_WEIGHT.get(base, element)
    return per_weight * experts + element * (total - experts)


def estimate(sizes: ModelSizes, setup: Setup, method: Method = "ESFT", engine: Engine = "one GPU") -> Estimate:
    """Estimates the bytes that one GPU holds and sends."""
    element, is_full = setup.element, method == "full"
    parts = setup.gpus if engine in ("FSDP2", "EP") else 1
    trained = num_trained(sizes, setup, method)
    width = element if is_full else 4  # ESFT's deltas and LoRA's factors are in fp32
    gradients = width * trained / parts
    gathered = sent = 0.0
    if engine == "FSDP2":
        # A trained weight of the base is gathered in the base's dtype, its gradient likewise; a delta in fp32.
        deltas = 0 if is_full else trained
        units = zip(sizes.units, sizes.unit_experts, strict=True)
        largest = max(_bytes_of(sizes, setup.base, *unit) for unit in units)
        weights = (element * sizes.root + 2 * largest) * (2 if is_full else 1)
        gathered = weights + 2 * (4 + 4) * deltas / max(1, len(sizes.units))
        passes = 2 * (base_bytes(sizes, setup.base) + 4 * deltas) - element * sizes.root
        sent = (parts - 1) / parts * (passes + width * trained)
    elif engine == "EP":
        dense = [unit - experts for unit, experts in zip(sizes.units, sizes.unit_experts, strict=True)]
        gathered = element * (sizes.root + 2 * max(dense)) * (2 if is_full else 1)
        of_dense = width * (sizes.total - sizes.experts) if is_full else 0
        passes = element * (2 * sum(dense) + sizes.root) + of_dense
        # Each pair of token and expert goes there and back, in the forward pass, its repetition and the backward pass.
        pairs = setup.tokens * sizes.top_k * sizes.num_moe_layers
        sent = (parts - 1) / parts * (passes + 2 * 3 * pairs * sizes.hidden_size * element)
    elif engine == "DDP":
        sent = 2 * (setup.gpus - 1) / setup.gpus * width * trained
    elif engine == "offload":
        gathered = element * 2.0 * max(sizes.units)
        sent = 2.0 * element * sizes.total
    # DDP sums gradients in buckets of its own.
    per_weight = (3 if engine == "DDP" else 2) * width + _moment_bytes(setup.optim, width)
    return Estimate(
        method,
        engine,
        setup,
        trained,
        base=0 if is_full or engine == "offload" else base_bytes(sizes, setup.base) / parts,
        state=per_weight * trained / parts,
        gathered=gathered,
        activations=_activations(sizes, setup, method, gradients),
        copies=width * trained / parts if setup.optim == "adamw_torch" else 0,
        sent=sent,
    )


def _moment_bytes(optim: Optimizer, width: int) -> float:
    """Bytes on the GPU of both moments of a weight; those of paged optimizers may leave it for the host."""
    if optim.startswith("paged"):
        return 0
    return EIGHT_BIT_MOMENTS if optim == "adamw_8bit" else 2 * width


def _activations(sizes: ModelSizes, setup: Setup, method: Method, gradients: float) -> float:
    """The peak of the passes beyond weights and state: of the loss, or of one layer's work, beside layers' inputs."""
    free = 0 if setup.accumulates else gradients
    inputs = setup.tokens * len(sizes.units) * sizes.hidden_size * setup.element
    # In the model's dtype and in fp32 for the loss, each with its gradient.
    logits = setup.tokens * sizes.vocab_size * (2 * setup.element + 4 + 4)
    # Rows of the pairs, gathered and between the projections, with their gradients; and what attention keeps.
    rows = sizes.top_k * (2 * sizes.hidden_size + 4 * sizes.intermediate_size)
    layer: float = setup.tokens * (rows + 12 * sizes.hidden_size) * setup.element
    # Scores of one sequence, their softmax, and the gradients of both.
    layer += 4 * sizes.scored_heads * setup.tokens**2 * setup.element
    layer += _weights_of_a_layer(sizes, setup, method)
    return max(inputs + logits - free, inputs + layer - free, layer)


def _weights_of_a_layer(sizes: ModelSizes, setup: Setup, method: Method) -> float:
    """Bytes of the weights that are made anew for one layer from trained parameters."""
    experts = max(sizes.unit_experts) * setup.element
    if method == "ESFT":
        # Those of the down projection, a third: the others are freed before the peak. Of low rank all of them, with
        # the product of the factors, and the gradient of both.
        return setup.share * experts * (1 / 3 if setup.rank is None else 2)
    # PEFT adds the product to the whole weight, of which the larger one is two thirds of the experts.
    return 2 * 2 / 3 * experts if method == "LoRA" else 0


def plan(sizes: ModelSizes, setup: Setup, optims: Sequence[Optimizer] = ()) -> list[Estimate]:
    """Estimates all methods on all engines that suit the number of GPUs.

    Args:
        sizes: of the model.
        setup: the hardware and settings. ESFT is planned at full rank and at `setup.rank`, if there is one, and on
            all forms of base.
        optims: optimizers of ESFT; the others have the first one. Empty means that of the setup.
    """
    optims = tuple(optims) or (setup.optim,)
    bases = (setup.base, *_few_bits(sizes))
    estimates = []
    for engine in _engines(sizes, setup):
        for rank, base, optim in product(dict.fromkeys((None, setup.rank)), dict.fromkeys(bases), optims):
            own = replace(setup, rank=rank, base=base, optim=optim)
            estimates += [estimate(sizes, own, "ESFT", engine)] if _is_tried(own, engine) else []
        plain = replace(setup, rank=None, optim=optims[0])
        if not _is_tried(plain, engine):
            continue
        estimates += [estimate(sizes, plain, method, engine) for method in ("LoRA", "LoRA attention")]
        if engine != "offload":
            precisions: tuple[BaseFormat, ...] = ("bf16", "fp32")
            estimates += [estimate(sizes, replace(plain, base=base), "full", engine) for base in precisions]
    return estimates


def recommended(estimates: Iterable[Estimate]) -> Estimate | None:
    """The estimate for ESFT that is best among those that fit; None if none fits.

    Offload comes last, then few bits, then low rank; of the rest it is the one that sends least.
    """

    def order(own: Estimate) -> tuple[Any, ...]:
        base = BASE_FORMATS.index(own.setup.base)
        return own.engine == "offload", base, own.setup.rank is not None, own.sent

    return min((e for e in estimates if e.method == "ESFT" and e.fits), key=order, default=None)


def most_experts(sizes: ModelSizes, setup: Setup, engine: Engine = "one GPU") -> int:
    """The most experts of each layer that can be trained; 0 if not even one can."""
    fitting, failing = 0, sizes.num_experts + 1
    while failing - fitting > 1:
        middle = (fitting + failing) // 2
        fits = estimate(sizes, replace(setup, share=middle / sizes.num_experts), "ESFT", engine).fits
        fitting, failing = (middle, failing) if fits else (fitting, middle)
    return fitting


def what_would_fit(sizes: ModelSizes, setup: Setup) -> list[Estimate]:
    """Estimates of ESFT that fit, with as few changes as possible: share, bits, optimizer, rank, tokens, offload.

    Returns:
        The estimates; none if nothing fits.
    """
    bases = [base for base in _few_bits(sizes) if BASE_FORMATS.index(base) > BASE_FORMATS.index(setup.base)]
    ways = product(
        _engines(sizes, setup),
        (setup.base, *bases),
        dict.fromkeys((setup.optim, "adamw_8bit")),
        dict.fromkeys((setup.rank, setup.rank or setup.lora_rank)),
        dict.fromkeys((setup.tokens, max(1, setup.tokens // 4))),
    )
    found: dict[int, list[Estimate]] = {}
    for engine, base, optim, rank, tokens in ways:
        own = replace(setup, base=base, optim=optim, rank=rank, tokens=tokens)
        most = most_experts(sizes, own, engine) if _is_tried(own, engine) else 0
        if most:
            own = replace(own, share=min(setup.share, most / sizes.num_experts))
            changed = [name for name in asdict(own) if getattr(own, name) != getattr(setup, name)]
            changes = len(changed) + (engine == "offload")
            found.setdefault(changes, []).append(estimate(sizes, own, "ESFT", engine))
    return found[min(found)] if found else []


def _few_bits(sizes: ModelSizes) -> tuple[BaseFormat, ...]:
    """The forms in few bits that a base can have; MXFP4 only where the checkpoint is in it."""
    stored: tuple[BaseFormat, ...] = ("mxfp4",) if sizes.stored_as == "mxfp4" else ()
    return ("int8", "nf4", *stored)


def fits_on_gpus(sizes: ModelSizes, setup: Setup) -> bool:
    """True if ESFT fits on some engine but offload, whose steps are slow."""
    engines = [engine for engine in _engines(sizes, setup) if engine != "offload" and _is_tried(setup, engine)]
    return any(estimate(sizes, setup, "ESFT", engine).fits for engine in engines)


def describe(own: Estimate, sizes: ModelSizes) -> str:
    """Writes an estimate of ESFT as one line."""
    rank = "full rank" if own.setup.rank is None else f"rank {own.setup.rank}"
    experts = round(own.setup.share * sizes.num_experts, 1)
    return (
        f"{own.engine}, {own.setup.base} base, {own.setup.optim}, {rank}, {experts:g} of {sizes.num_experts} experts "
        f"a layer, {own.setup.tokens} tokens: {own.total / 1e9:.3g} GB"
    )


def _engines(sizes: ModelSizes, setup: Setup) -> tuple[Engine, ...]:
    if setup.engine is not None:
        return (setup.engine,)
    if setup.gpus == 1:
        return ("one GPU", "offload")
    return ("DDP", "FSDP2", "EP") if sizes.num_experts % setup.gpus == 0 else ("DDP", "FSDP2")


def _is_tried(setup: Setup, engine: Engine) -> bool:
    """False for bases in few bits under EP or offload, and for bitsandbytes' optimizers on spread weights."""
    if engine in ("EP", "offload") and setup.base in QUANTISED:
        return False
    return engine in ("one GPU", "DDP") or setup.optim.startswith("adamw_torch")
