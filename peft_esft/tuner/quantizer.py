"""Defines `ESFTQuantizationConfig` and its quantiser, with which transformers loads and saves experts in few bits.

transformers' own registration of quantisers is used, so that such a model is saved and loaded like any other.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightRenaming
from transformers.quantizers.auto import AutoHfQuantizer, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..moe.containers import ExpertsContainer, find_experts
from ..moe.quantised_formats import ENCODERS, Loadable, form_of, is_dtype_of
from ..moe.stored_experts import install
from ..moe.stored_rows import KEPT, STORED, StoredRows
from ..moe.weights import StackedWeight, StoredWeight
from ..registration import QUANTIZATION, register_quantization
from .adapter_file import read_header
from .layers.offload import is_offloaded
from .quantization_checks import check_quantizable, matrices, not_finite
from .targets import resolve_target_experts


_DTYPES = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "I64": torch.int64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}


_MXFP4 = {
    f"{weight}_{own}": f"{STORED[weight]}.{name}"
    for weight in ("gate_up_proj", "down_proj")
    for own, name in (("blocks", "codes"), ("scales", "scales"))
}
"""What gpt-oss' checkpoints call the tensors of a weight."""


class ESFTQuantizationConfig(QuantizationConfigMixin):
    """Has `from_pretrained` bring fused experts to few bits while it loads them.

    Other quantisers of transformers leave fused experts in bf16. The experts are then only read: adapters train deltas
    in full precision over them.

    Args:
        bits: 4 (needs bitsandbytes, `pip install bitsandbytes`) or 8.
        keep: experts that stay in full precision, `{module path or layer index: expert ids}` as in `target_experts`.
            Those that an adapter trains are then free of the error of quantising.
        quant_type: of 4 bits, "nf4" or "fp4"; or "mxfp4" for a checkpoint of gpt-oss, whose experts are in that form
            and stay as they are. Its config has to be loaded without its own `quantization_config`, see
            docs/quantised.md.
        linears: for the other linear layers, such as attention's: bitsandbytes' config. None leaves them as they are.
        double_quant: quantise the scales of "nf4" or "fp4" too, as QLoRA does. It saves 0.37 bits per weight.

    Raises:
        ValueError: for other values.

    Example:
        >>> config = ESFTQuantizationConfig(bits=4, linears=BitsAndBytesConfig(load_in_4bit=True))
        >>> model = AutoModelForCausalLM.from_pretrained(name, quantization_config=config)
    """

    def __init__(
        self,
        bits: int = 4,
        keep: Mapping[str | int, list[int]] | None = None,
        quant_type: str = "nf4",
        linears: BitsAndBytesConfig | dict[str, Any] | None = None,
        double_quant: bool = False,
        **_: Any,
    ) -> None:
        self.quant_method: Any = QUANTIZATION
        self.bits, self.quant_type, self.double_quant = bits, quant_type, double_quant
        self.keep = _checked_keep(keep or {})
        self.linears = BitsAndBytesConfig.from_dict(linears) if isinstance(linears, dict) else linears
        form_of(bits, quant_type, double_quant)  # refuses unknown ones

    @property
    def format(self) -> Loadable:
        """The form that experts are brought to."""
        return form_of(self.bits, self.quant_type, self.double_quant)

    def to_dict(self) -> dict[str, Any]:
        """The config as it is written to `config.json`."""
        own = {name: copy.deepcopy(value) for name, value in vars(self).items() if name != "linears"}
        return own | ({} if self.linears is None else {"linears": self.linears.to_dict()})


def _checked_keep(keep: Any) -> dict[str, list[int]]:
    """A copy of `keep`, which may come from a file."""
    if not isinstance(keep, Mapping) or any(isinstance(ids, str | int) for ids in keep.values()):
        raise ValueError(f"keep is {keep!r}; expected {{module path or layer index: expert ids}}")
    return {str(key): [int(expert) for expert in ids] for key, ids in keep.items()}


def kept_experts(config: ESFTQuantizationConfig, containers: Mapping[str, ExpertsContainer]) -> dict[str, list[int]]:
    return resolve_target_experts(config.keep, dict(containers))


class _Quantize(ConversionOps):
    """Quantises the weight of a layer's experts as soon as it is loaded, and puts it in its place."""

    def __init__(self, quantizer: ESFTQuantizer) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], *patterns: Any, **kwargs: Any) -> dict[str, Any]:
        full_layer_name, missing_keys = kwargs["full_layer_name"], kwargs["missing_keys"]
        quantizer, others = self.quantizer, {}
        for name, value in input_dict.items():
            path = name if name in quantizer.pending else full_layer_name
            if path not in quantizer.pending:
                others[name] = value
                continue
            container, weight, kept = quantizer.pending.pop(path)
            rows = (value[0] if isinstance(value, list) else value)[: weight.num_experts]
            quantizer.refusals += not_finite(path, rows)
            assert quantizer.encoder is not None  # others are not quantised here
            quantizer.place(container, weight, StoredRows.encoded(quantizer.encoder, rows, kept))
            if missing_keys is not None:
                missing_keys.discard(path)
        if others:
            operation: ConversionOps = quantizer.linears.get_quantize_ops()
            return operation.convert(others, *patterns, **kwargs)
        return {}


register_quantization(ESFTQuantizationConfig)


@register_quantizer(QUANTIZATION)
class ESFTQuantizer(HfQuantizer):
    """Loads experts in few bits, or quantises them while they are loaded; see `ESFTQuantizationConfig`.

    Attributes:
        linears: the quantiser for the other linear layers; None if there is none.
        pending: the experts' weights that are not there yet, by parameter name.
        is_adopted: the experts are in another package's form, which this config does not describe.
        dtypes: those of the tensors that a quantised checkpoint has to have, by their names.
    """

    requires_calibration = False
    is_adopted = False
    quantization_config: ESFTQuantizationConfig

    def __init__(
        self, quantization_config: ESFTQuantizationConfig, inner: HfQuantizer | None = None, **kwargs: Any
    ) -> None:
        super().__init__(quantization_config, **kwargs)
        linears = quantization_config.linears
        if inner is None and linears is not None:
            inner = AutoHfQuantizer.from_config(linears, pre_quantized=self.pre_quantized)
        self.linears: Any = inner
        self.encoder = ENCODERS.get(quantization_config.format.name)
        self.is_original = self.encoder is None and not self.pre_quantized
        self.pre_quantized |= self.is_original  # by someone else
        self.pending: dict[str, tuple[ExpertsContainer, StackedWeight, list[int]]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.refusals: list[str] = []  # raised at the end, as transformers only logs what a conversion raises

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if isinstance(device_map, dict) and "disk" in device_map.values() and not self.pre_quantized:
            raise ValueError(
                "experts cannot be quantised while they are loaded to the disk; leave 'disk' out of device_map"
            )
        if self.linears is not None:
            self.linears.validate_environment(*args, device_map=device_map, **kwargs)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if getattr(model.config, "distributed_config", None) is not None:
            raise NotImplementedError(
                "experts in few bits cannot be loaded with distributed_config. Load the model without it, attach the "
                "adapter, and shard the model with FSDP2 (torch's fully_shard, or accelerate)"
            )
        containers = find_experts(model)
        check_quantizable(model, containers, is_loading=True)
        kept = kept_experts(self.quantization_config, containers)
        if self.pre_quantized:
            _check_kept(checkpoint_files or (), kept, sum(len(matrices(containers[path])) for path in kept))
        if self.encoder is None:
            self._check_mxfp4(containers, kept)
        for path, container in containers.items():
            for weight in matrices(container):
                own = kept.get(path, [])
                if self.pre_quantized:
                    stored = _skeleton(self.quantization_config.format, container, weight, own)
                    self.place(container, weight, stored)
                    for name, parameter in stored.named_parameters():
                        self.dtypes[f"{path}.{STORED[weight.name]}.{name}"] = parameter.dtype
                else:
                    self.pending[f"{path}.{weight.name}"] = (container, weight, own)
        if self.linears is not None:
            self.linears._process_model_before_weight_loading(model, checkpoint_files=checkpoint_files, **kwargs)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.refusals:
            raise ValueError(self.refusals[0])
        if self.pending:
            raise ValueError(
                f"the checkpoint has no experts' weights {sorted(self.pending)[:3]}, so none were quantised"
            )
        if self.pre_quantized:
            for path, module in model.named_modules():
                if isinstance(module, StoredRows):
                    _check_loaded(path, module)
        if self.linears is not None:
            self.linears._process_model_after_weight_loading(model, **kwargs)
        return model

    def _check_mxfp4(self, containers: Mapping[str, ExpertsContainer], kept: Mapping[str, list[int]]) -> None:
        for path, container in containers.items():
            if type(container.module).__name__ != "GptOssExperts":
                raise NotImplementedError(
                    f"{path} ({type(container.module).__name__}) cannot be loaded in MXFP4, which is the form of "
                    "gpt-oss' experts. Use quant_type='nf4'"
                )
        if kept and self.is_original:
            raise ValueError(
                f"keep names experts of {next(iter(kept))}, but the checkpoint has them only in MXFP4, so it gains "
                "nothing to keep them in full precision. Leave keep out"
            )
        if self.linears is not None and self.is_original:
            raise NotImplementedError(
                "transformers does not quantise linear layers of a checkpoint whose experts are quantised already. "
                "Leave linears out"
            )

    def place(self, container: ExpertsContainer, weight: StackedWeight, stored: StoredRows) -> None:
        """Puts a weight into its module, which transformers then does not initialise."""
        place_weight(container, weight, stored)
        for place in container.places:
            # The parent's too: some models initialise the experts with it.
            place.module._is_hf_initialized = place.parent._is_hf_initialized = True

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        if param_name in self.pending:
            return True
        return self.linears is not None and self.linears.param_needs_quantization(model, param_name, **kwargs)

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        if param_name in self.pending:
            return 0.57 if self.quantization_config.bits == 4 else 1.01
        if self.linears is not None:
            size: float = self.linears.param_element_size(model, param_name, param)
            return size
        return param.element_size()

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        (name, *_) = converter.target_patterns
        if name in self.dtypes:
            wanted = self.dtypes[name]
            found = _DTYPES.get(param.get_dtype()) if hasattr(param, "get_dtype") else param.dtype
            own = name.rpartition(".")[2]
            if own != KEPT[1] and not is_dtype_of(self.quantization_config.format.name, own, found, wanted):
                # The loader would cast, and codes or scales be others than those that were saved.
                raise ValueError(f"{name} has dtype {found} in the checkpoint, and not {wanted}: it is damaged")
            return wanted
        inner: Any = self.linears or super()
        new: torch.dtype | None = inner.get_new_dtype(converter, param, dtype)
        return new

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype if self.linears is None else self.linears.update_dtype(dtype)

    def update_device_map(self, device_map: Any) -> Any:
        return device_map if self.linears is None else self.linears.update_device_map(device_map)

    def adjust_max_memory(self, max_memory: dict[str, int | str]) -> dict[str, int | str]:
        return max_memory if self.linears is None else self.linears.adjust_max_memory(max_memory)

    def get_load_operations(self) -> dict[str, Any]:
        return {} if self.linears is None else self.linears.get_load_operations()

    def get_weight_conversions(self) -> list[Any]:
        return [] if self.linears is None else self.linears.get_weight_conversions()

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        if self.encoder is None:
            weight_conversions = [*weight_conversions, *(WeightRenaming(own, name) for own, name in _MXFP4.items())]
        if self.linears is None:
            return weight_conversions
        return self.linears.update_weight_conversions(weight_conversions, model)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> Any:
        """Has the config that is saved name the experts that are in full precision now, merged ones too."""
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # transformers saves the adapter alone
        self.quantization_config.keep = {}
        for path, container in find_experts(model).items():
            if len(container.places) > 1:
                raise NotImplementedError(
                    f"{path} shares its weights with another module, and quantised weights that do cannot be saved. "
                    "Save the model before its experts are quantised"
                )
            if kept := _join_kept(container):
                self.quantization_config.keep[path] = kept
        return (None, {}) if self.linears is None else self.linears.get_state_dict_and_metadata(model)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return not self.is_adopted and (self.linears is None or self.linears.is_serializable(*args, **kwargs))

    @property
    def is_trainable(self) -> bool:
        return True


def _skeleton(format: Loadable, container: ExpertsContainer, weight: StackedWeight, kept: list[int]) -> StoredRows:
    """A weight without data, for the loader to fill."""
    parameter = weight.parameters(container.module)[0]
    shape = (weight.num_experts, *weight.shape(container.module))
    layout = format.layout(shape, parameter.dtype)
    tensors = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, shape) in layout.items()}
    stored = StoredRows(format, shape, parameter.dtype, tensors)
    if kept:
        stored.keep({expert: torch.empty(shape[1:], dtype=parameter.dtype, device="meta") for expert in kept})
    return stored


def _check_kept(checkpoint_files: Iterable[str], kept: Mapping[str, list[int]], number: int) -> None:
    """Refuses a checkpoint with more weights of kept experts than its config names: the loader would drop them."""
    files = [Path(file) for file in checkpoint_files if file.endswith(".safetensors")]
    found = [name for file in files for name in read_header(file) if name.endswith(f".{KEPT[0]}")]
    if len(found) > number:
        raise ValueError(
            f"the checkpoint has experts in full precision ({found[-1]}) that its config does not name; it keeps "
            f"{dict(kept)}. The config is not the one that was saved with these weights"
        )


def _check_loaded(path: str, stored: StoredRows) -> None:
    """Refuses a weight that the checkpoint does not have, or whose scales are no numbers."""
    for name, parameter in stored.named_parameters():
        if parameter.is_meta:
            raise NotImplementedError(
                f"{path} was loaded to the disk, where quantised experts cannot be checked. Leave 'disk' out of "
                "device_map; the CPU's memory may take them"
            )
        if not (parameter.numel() == 0 or getattr(parameter, "_is_hf_initialized", False)):
            raise ValueError(f"the checkpoint has no {path}.{name}: it is not one of this config's quantised experts")
        if name == KEPT[0] and (ids := tuple(parameter.tolist())) != stored.kept_ids:
            raise ValueError(
                f"{path}.{name} is {list(ids)} in the checkpoint, and its config keeps {list(stored.kept_ids)}: the "
                "config is not the one that was saved with these weights"
            )
        if parameter.is_floating_point() and not parameter.isfinite().all():
            raise ValueError(f"{path}.{name} has values that are not finite: the checkpoint is damaged")
        if name == "scales" and parameter.dtype == torch.uint8 and (parameter == 255).any():
            raise ValueError(f"{path}.{name} has exponents that stand for no number: the checkpoint is damaged")
        if name == "scales" and (parameter < 0).any():
            raise ValueError(f"{path}.{name} has negative scales: the checkpoint is damaged")


def _join_kept(container: ExpertsContainer) -> list[int]:
    """Has all weights of a container keep the same experts in full precision, which changes no value."""
    weights = [w.stored(container.module) for w in container.weights if isinstance(w, StoredWeight)]
    ids = sorted({expert for stored in weights for expert in stored.kept_ids})
    for stored in weights:
        if list(stored.kept_ids) != ids:
            if is_offloaded(stored):
                raise NotImplementedError(
                    f"{container.path} is offloaded and has experts {ids} in full precision, not all in each weight, "
                    "which cannot be saved so. Save the model before it is offloaded"
                )
            store = stored()
            stored.keep({expert: store[expert] for expert in ids})
    return ids


def place_weight(container: ExpertsContainer, weight: StackedWeight, stored: StoredRows) -> None:
    for place in container.places:
        install(place.module, container.layout, weight.name, stored)
