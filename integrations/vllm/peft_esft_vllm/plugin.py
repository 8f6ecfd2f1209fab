"""The entry point: vLLM calls `register` in each of its processes.

Behind the E experts of each layer lie `max_loras` slots of rows. An adapter in slot s has its effective rows there.
Row s of the layer's table `[max_loras + 1, E]` says which rows stand for the base's experts; row 0 is the identity.
Between router and kernel each token's expert ids go through its adapter's row of the table. Names, scheduling, prefix
caching and the HTTP endpoints are those of vLLM's LoRA adapters.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import __version__
from .settings import Settings, settings_of


def register() -> None:
    """Puts ESFT's parts in place; they do nothing in an engine without `additional_config={"esft": ...}`.

    Raises:
        RuntimeError: if this vLLM is none that the plugin was made for.
    """
    try:
        from . import internals
        from .manager import ESFTManager

        internals.check(ESFTManager)
    except (ImportError, AttributeError, RuntimeError) as error:
        raise RuntimeError(
            f"peft-esft-vllm {__version__} was made for vLLM 0.31 and 0.32 and does not work with this one: {error}. "
            "Install a version of both that fit, or set VLLM_PLUGINS to start vLLM without this plugin"
        ) from error
    if "RoutedExperts" not in internals.op_registry_oot:
        for base in internals.EXPERTS_CLASSES:  # vLLM looks a class up by its name
            base.register_oot(type(f"ESFT{base.__name__}", (_ESFTExperts, base), {}))
        _replace_manager(internals.LoRAModelRunnerMixin, ESFTManager)
        _check_requests_early(internals.InputProcessor, internals.get_adapter_absolute_path)
        _look_up_base_experts(internals.fused_moe)


class _ESFTExperts:
    """Routed experts with slots, mixed into vLLM's classes.

    Attributes:
        esft_width: rows of one slot.
        esft_table: `[max_loras + 1, E]`, int32; None without ESFT.
        esft_token_slots: `[max tokens]`, int32, the manager's.
    """

    def __init__(
        self, layer_name: str, params_dtype: torch.dtype, moe_config: Any, quant_config: Any, *args: Any, **kwargs: Any
    ) -> None:
        from . import internals

        vllm_config = internals.get_current_vllm_config()
        settings = settings_of(vllm_config)
        if settings is not None:
            _refuse_unsupported(vllm_config, moe_config, quant_config)
            moe_config.is_lora_enabled = False  # vLLM's kernels need to know nothing of adapters
            if internals.current_platform.is_cuda_alike():
                moe_config.moe_backend = "triton"  # other kernels route by themselves or keep rows in another order
        super().__init__(layer_name, params_dtype, moe_config, quant_config, *args, **kwargs)
        self.esft_table = None
        if settings is not None:
            if self.quant_method.is_monolithic:
                raise NotImplementedError(f"{layer_name}: its kernel routes tokens itself. Use --moe-backend triton")
            self._esft_extend(settings, vllm_config.lora_config.max_loras)

    def _esft_extend(self, settings: Settings, slots: int) -> None:
        """Has the weights extended after they are loaded, just before they are converted for the kernel."""
        self.esft_width = settings.width(self.layer_name)
        rows, finish = slots * self.esft_width, self.quant_method.process_weights_after_loading
        _extended[self.global_num_experts + rows] = self.global_num_experts

        def extend_and_finish(layer: Any) -> None:
            if layer.w13_weight.shape[0] != layer.global_num_experts:
                raise NotImplementedError("the base's weights cannot be loaded again beside ESFT's slots")
            for weight in (layer.w13_weight, layer.w2_weight):
                weight.data = torch.cat([weight.data, weight.data.new_zeros(rows, *weight.shape[1:])])
            finish(layer)

        self.quant_method.process_weights_after_loading = extend_and_finish

    def forward_modular(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.esft_table is not None:  # fixed addresses, and no shape depends on values: CUDA graphs can hold it
            topk_ids = self.esft_table[self.esft_token_slots[: len(topk_ids), None], topk_ids].to(topk_ids.dtype)
        return super().forward_modular(x, topk_weights, topk_ids, *args, **kwargs)


_extended: dict[int, int] = {}
"""Number of experts with slots to number of experts without."""


def _refuse_unsupported(vllm_config: Any, moe_config: Any, quant_config: Any) -> None:
    """Raises NotImplementedError or ValueError for an engine that ESFT adapters would not work in."""
    if vllm_config.lora_config is None:
        raise ValueError("additional_config has 'esft', but adapters are off. Start vLLM with --enable-lora")
    parallel = moe_config.moe_parallel_config
    ways = {"expert": parallel.use_ep, "data": parallel.dp_size > 1, "sequence": parallel.is_sequence_parallel}
    ways["pipeline"] = vllm_config.parallel_config.pipeline_parallel_size > 1
    if way := next((name for name, used in ways.items() if used), None):
        raise NotImplementedError(f"ESFT cannot be served with {way} parallelism; --tensor-parallel-size may be set")
    if quant_config is not None:
        raise NotImplementedError(
            "ESFT cannot be served on a quantised base. Leave it unquantised, or merge (peft-esft merge) and quantise"
        )


def _replace_manager(mixin: type, manager: type) -> None:
    """Has model runners manage adapters with ESFT's manager in place of vLLM's."""
    original = mixin.load_lora_model

    def load_lora_model(self: Any, model: Any, vllm_config: Any, device: torch.device) -> Any:
        if settings_of(vllm_config) is None:
            return original(self, model, vllm_config, device)
        self.lora_manager = manager(model, vllm_config, device)
        return model

    mixin.load_lora_model = load_lora_model


def _check_requests_early(processor: type, absolute: Any) -> None:
    """Has a request with a wrong adapter refused before it is scheduled: an error in a step would end the engine."""
    original = processor._validate_lora

    def validate_lora(self: Any, lora_request: Any) -> None:
        original(self, lora_request)
        settings = settings_of(self.vllm_config)
        if settings is None or lora_request is None:
            return
        number, path = lora_request.lora_int_id, lora_request.lora_path
        checked = vars(self).setdefault("_esft_checked", {})
        if number not in checked:
            settings.check(Path(absolute(path)))
            checked[number] = path
        if checked[number] != path:
            raise ValueError(f"adapter number {number} is {checked[number]}; give {path} a number of its own")

    processor._validate_lora = validate_lora


def _look_up_base_experts(fused_moe: Any) -> None:
    """Has tuned Triton configurations looked up by the base's number of experts: none exist for that with slots."""
    original = fused_moe.get_moe_configs

    def get_moe_configs(E: int, N: int, dtype: str | None, *args: Any) -> Any:
        return original(_extended.get(E, E), N, dtype, *args)

    fused_moe.get_moe_configs = get_moe_configs
