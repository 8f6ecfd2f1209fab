"""All that the plugin uses of vLLM beyond its documented API, and the check that it is what the plugin was made for.

vLLM's plugin system, `LoRARequest`, `worker_extension_cls` and `collective_rpc` are documented. The names imported
here are not, nor are these members:

- of `RoutedExperts`: `layer_name`, `global_num_experts`, `moe_config`, `quant_method`, `w13_weight`, `w2_weight`;
- of its `moe_config`: `moe_parallel_config`, `moe_backend`, `is_lora_enabled`, and the two sizes in `plain_shapes`;
- of its `quant_method`: `unquantized_backend`, `is_monolithic`, `process_weights_after_loading`,
  `moe_kernel.fused_experts`, and of that for the CPU `_use_zentorch`, `_padded_intermediate_size` and `isa`.

`manager.py` stands in for the LoRA manager of vLLM's model runners, whose methods `check` compares.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
import vllm
from torch import Tensor, nn
from vllm._custom_ops import cpu_prepack_moe_weight
from vllm.config import get_current_vllm_config as get_current_vllm_config
from vllm.exceptions import LoRAAdapterNotFoundError as LoRAAdapterNotFoundError
from vllm.lora.utils import get_adapter_absolute_path as get_adapter_absolute_path
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.model_executor.custom_op import op_registry_oot as op_registry_oot
from vllm.model_executor.layers.fused_moe import fused_moe as fused_moe
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.models.transformers.moe import TransformersRoutedExperts
from vllm.platforms import current_platform as current_platform
from vllm.v1.engine.input_processor import InputProcessor as InputProcessor
from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin as LoRAModelRunnerMixin


SUPPORTED = ((0, 31), (0, 33))
"""The first supported version of vLLM, and the first that nobody has looked at. 0.32 is what the tests run on."""

EXPERTS_CLASSES = (RoutedExperts, TransformersRoutedExperts)
WARMUP_PATH = "/not/a/real/path"
"""The path of the adapters that vLLM makes up while it warms up and captures CUDA graphs."""

_SIGNATURES: dict[Callable[..., object], str] = {
    RoutedExperts.__init__: "self layer_name params_dtype moe_config quant_config",
    RoutedExperts.forward_modular: "self x topk_weights topk_ids",
    LoRAModelRunnerMixin.load_lora_model: "self model vllm_config device",
    InputProcessor._validate_lora: "self lora_request",
    fused_moe.get_moe_configs: "E N dtype",
}


def check(manager: type) -> None:
    """Checks that this vLLM has what the plugin needs.

    Args:
        manager: the class that takes the place of vLLM's LoRA manager.

    Raises:
        RuntimeError: naming what is different.
    """
    version = tuple(int(part) for part in vllm.__version__.split(".")[:2])
    if not SUPPORTED[0] <= version < SUPPORTED[1]:
        raise RuntimeError("the version is outside of that range")
    for function, names in _SIGNATURES.items():
        found = " ".join(list(inspect.signature(function).parameters)[: len(names.split())])
        if found != names:
            raise RuntimeError(f"{function.__qualname__} takes ({found}) in place of ({names})")
    called = {name for name in dir(LRUCacheWorkerLoRAManager) if not name.startswith("_")} - {"create_lora_manager"}
    if missing := called - set(dir(manager)):
        raise RuntimeError(f"LoRA managers have new methods: {', '.join(sorted(missing))}")


def experts_of(model: nn.Module) -> dict[str, RoutedExperts]:
    """The modules of routed experts by their layer names."""
    return {module.layer_name: module for module in model.modules() if isinstance(module, RoutedExperts)}


def plain_shapes(layer: RoutedExperts) -> tuple[tuple[int, int], tuple[int, int]]:
    """The shapes `[2I, H]` and `[H, I]` of one expert's weights on this rank, without a kernel's padding."""
    hidden, inner = layer.moe_config.hidden_dim_unpadded, layer.moe_config.intermediate_size_per_partition_unpadded
    return (2 * inner, hidden), (hidden, inner)


def to_kernel(layer: RoutedExperts, w13: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
    """Converts plain rows `[n, 2I, H]` and `[n, H, I]` to the layout in which this layer's kernel keeps its weights.

    All conversions treat each expert by itself, so rows may be converted without the rest of the weight.

    Raises:
        NotImplementedError: for weights that are quantised or kept for another kernel.
    """
    backend = getattr(getattr(layer.quant_method, "unquantized_backend", None), "name", None)
    if backend not in ("TRITON", "CPU"):
        kind = f"kept for the kernels of {backend}: start vLLM with --moe-backend triton" if backend else "quantised"
        raise NotImplementedError(f"ESFT adapters cannot change {layer.layer_name}: its weights are {kind}")
    kernel = layer.quant_method.moe_kernel.fused_experts
    if backend == "TRITON" or kernel._use_zentorch:
        return w13, w2
    missing = kernel._padded_intermediate_size(layer.moe_config) - w2.shape[2]
    halves = [nn.functional.pad(half, (0, 0, 0, missing)) for half in w13.chunk(2, 1)]
    padded = torch.cat(halves, 1), nn.functional.pad(w2, (0, missing))
    return tuple(cpu_prepack_moe_weight(weight.contiguous(), kernel.isa) for weight in padded)
