"""Expert-Specialized Fine-Tuning (ESFT) for PEFT: train only the experts that a task uses.

Importing the package registers the tuner type `ESFT` with PEFT, and the quantisation of experts with transformers: at
once if these are loaded, otherwise as soon as they are.
The import itself loads neither PEFT nor torch; a name below loads what it needs when it is used first.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .versions import check_versions


check_versions()  # before anything of PEFT or transformers is imported

from .registration import after_import, announce_quantization, extend_peft_type, register  # noqa: E402


if TYPE_CHECKING:
    from .moe.architectures import register_experts
    from .moe.containers import ExpertsContainer, find_experts
    from .scoring.batches import text_batches
    from .scoring.measure import score_experts
    from .scoring.scores import ExpertScores
    from .scoring.selection import random_experts, select_experts
    from .tuner.config import ESFTConfig
    from .tuner.hotswap import hotswap_adapter
    from .tuner.hub import push_to_hub
    from .tuner.layers.layer import ESFTLayer
    from .tuner.model import ESFTModel
    from .tuner.pool import AdapterPool, PoolStatistics
    from .tuner.quantization import adopt_quantized_experts, quantize_experts
    from .tuner.quantizer import ESFTQuantizationConfig

_HOMES = {
    "AdapterPool": "tuner.pool",
    "ESFTConfig": "tuner.config",
    "ESFTLayer": "tuner.layers.layer",
    "ESFTModel": "tuner.model",
    "ESFTQuantizationConfig": "tuner.quantizer",
    "ExpertScores": "scoring.scores",
    "ExpertsContainer": "moe.containers",
    "PoolStatistics": "tuner.pool",
    "adopt_quantized_experts": "tuner.quantization",
    "find_experts": "moe.containers",
    "hotswap_adapter": "tuner.hotswap",
    "push_to_hub": "tuner.hub",
    "quantize_experts": "tuner.quantization",
    "random_experts": "scoring.selection",
    "register_experts": "moe.architectures",
    "score_experts": "scoring.measure",
    "select_experts": "scoring.selection",
    "text_batches": "scoring.batches",
}
"""The modules of the public names."""

__version__ = "0.1.0.dev0"

__all__ = [
    "AdapterPool",
    "ESFTConfig",
    "ESFTLayer",
    "ESFTModel",
    "ESFTQuantizationConfig",
    "ExpertScores",
    "ExpertsContainer",
    "PoolStatistics",
    "adopt_quantized_experts",
    "find_experts",
    "hotswap_adapter",
    "push_to_hub",
    "quantize_experts",
    "random_experts",
    "register_experts",
    "score_experts",
    "select_experts",
    "text_batches",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register() -> None:
    extend_peft_type()  # before the config, which names the new member
    from .tuner.config import ESFTConfig
    from .tuner.model import ESFTModel

    register(ESFTConfig, ESFTModel)


after_import("peft", _register)
# Without it transformers would give a checkpoint with experts in few bits random ones.
after_import(
    "transformers.quantizers.auto", lambda: announce_quantization(lambda: __getattr__("ESFTQuantizationConfig"))
)
