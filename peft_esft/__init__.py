"""Expert-Specialized Fine-Tuning (ESFT) for PEFT: train only the experts that a task uses.

Importing the package registers the tuner type `ESFT` with PEFT.
"""

from .versions import check_versions


check_versions()  # before anything of PEFT or transformers is imported

from .registration import extend_peft_type, register  # noqa: E402


extend_peft_type()  # before the config, which names the new member

from .moe.architectures import register_experts  # noqa: E402
from .moe.containers import ExpertsContainer, find_experts  # noqa: E402
from .scoring.batches import text_batches  # noqa: E402
from .scoring.measure import score_experts  # noqa: E402
from .scoring.scores import ExpertScores  # noqa: E402
from .scoring.selection import random_experts, select_experts  # noqa: E402
from .tuner.config import ESFTConfig  # noqa: E402
from .tuner.hotswap import hotswap_adapter  # noqa: E402
from .tuner.hub import push_to_hub  # noqa: E402
from .tuner.layers.layer import ESFTLayer  # noqa: E402
from .tuner.model import ESFTModel  # noqa: E402
from .tuner.pool import AdapterPool, PoolStatistics  # noqa: E402
from .tuner.quantization import ESFTQuantizationConfig, adopt_quantized_experts, quantize_experts  # noqa: E402


register(ESFTConfig, ESFTModel)

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
