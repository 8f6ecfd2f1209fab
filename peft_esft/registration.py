"""Registers the type ESFT with PEFT and the quantiser with transformers, and finds out which file PEFT loads.

The only file that touches PEFT's internals without a comment at each place.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple


NAME = "ESFT"
QUANTIZATION = "esft"
"""The `quant_method` of a checkpoint with experts in few bits."""


def after_import(name: str, call: Callable[[], object]) -> None:
    """Calls a function: now if a module is loaded, otherwise at the end of its import.

    This file imports PEFT in functions only, so that a program which never uses it waits neither for it nor for torch.
    """
    if name in sys.modules:
        call()
    else:
        sys.meta_path.insert(0, _Finder(name, call))


class _Finder(MetaPathFinder):
    """Finds a module where Python would, and calls a function after the module's own code has run."""

    def __init__(self, name: str, call: Callable[[], object]) -> None:
        self._name = name
        self._call = call
        self._is_searching = False

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`."""
        if fullname != self._name or self._is_searching:
            return None
        self._is_searching = True  # which asks this finder again
        try:
            spec = find_spec(fullname)
        finally:
            self._is_searching = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            sys.meta_path.remove(self)  # only now: programs also search a module to see whether it is installed
            self._call()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def announce_quantization(load: Callable[[], Any]) -> None:
    """Tells transformers of the quantisation of experts, whose code is loaded when a config of it is read.

    Args:
        load: imports the config's class and returns it.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(QUANTIZATION, _LateConfig(load))  # type: ignore[arg-type]


def register_quantization(config: type) -> None:
    """Registers the config of the quantisation with transformers, in place of what announced it."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, register_quantization_config

    AUTO_QUANTIZATION_CONFIG_MAPPING.pop(QUANTIZATION, None)
    register_quantization_config(QUANTIZATION)(config)


class _LateConfig:
    """Stands for a class of configs until transformers reads one from a checkpoint."""

    def __init__(self, load: Callable[[], Any]) -> None:
        self._load = load

    def from_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self._load().from_dict(*args, **kwargs)


def extend_peft_type() -> None:
    """Adds `PeftType.ESFT`, once.

    `register_peft_method` (peft/utils/peft_types.py) refuses a name that is not a member of this enum, and PEFT has no
    entry point for tuners from outside. A plain string in its place fails wherever PEFT or transformers reads
    `peft_type.value`. To be removed when PEFT registers outside types or ships ESFT itself.
    """
    from peft.utils import PeftType

    if NAME in PeftType.__members__:
        return
    member = str.__new__(PeftType, NAME)
    member._name_ = NAME
    member._value_ = NAME
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    # From Python 3.12 on, members are looked up in the class namespace; `EnumType.__setattr__` refuses to add one.
    type.__setattr__(PeftType, NAME, member)
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member


def register(config_cls: type, model_cls: type) -> None:
    """Registers the tuner with PEFT; does nothing if it is registered already.

    Raises:
        RuntimeError: if another ESFT is registered, for example PEFT's own or that of a second copy of this package.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    from peft.utils import PeftType, register_peft_method

    known = PEFT_TYPE_TO_TUNER_MAPPING.get(PeftType.ESFT)
    if known is None:
        register_peft_method(name=NAME.lower(), config_cls=config_cls, model_cls=model_cls)
        return
    if (known, PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType.ESFT)) != (model_cls, config_cls):
        raise RuntimeError(
            f"PEFT already knows an ESFT tuner, {known.__module__}.{known.__qualname__}. Two cannot work together: "
            "uninstall peft_esft if your PEFT ships its own, or start a new process if this package was imported "
            "twice."
        )


class Source(NamedTuple):
    """Where the weights come from that are being loaded.

    Attributes:
        name: a folder, or a name on the Hub.
        download: the arguments of its download.
        by_transformers: whether transformers loads them, and not PEFT.
        key_mapping: PEFT's argument of this name, with which the user renames the tensors.
    """

    name: str
    download: dict[str, Any]
    by_transformers: bool = False
    key_mapping: dict[str, str] | None = None


def source_of_weights() -> Source | None:
    """What is being loaded further up in the call.

    PEFT and transformers hand a tuner an adapter's tensors alone, and `PeftModel.load_adapter` reads no config for a
    name that exists. Which experts the tensors belong to is only known in the folder that they come from.

    Returns:
        None if the call does not come from one of the loaders.
    """
    frame = sys._getframe(1)
    while frame is not None:
        own, code = frame.f_locals, (frame.f_globals.get("__name__"), frame.f_code.co_qualname)
        if code == ("peft.peft_model", "PeftModel.load_adapter"):
            download = dict(own.get("hf_hub_download_kwargs", {}))
            return Source(str(own["model_id"]), download, key_mapping=own.get("key_mapping"))
        if code == ("peft.peft_model", "PeftModel.from_pretrained"):
            known = {name: own.get("kwargs", {}).get(name) for name in ("subfolder", "revision", "cache_dir", "token")}
            download = {name: value for name, value in known.items() if value is not None}
            return Source(str(own["model_id"]), download, key_mapping=own.get("key_mapping"))
        if code == ("transformers.integrations.peft", "PeftAdapterMixin.load_adapter"):
            load_config = own.get("load_config")
            if own.get("peft_model_id") is None or load_config is None or own.get("adapter_state_dict") is not None:
                return None
            return Source(str(own["peft_model_id"]), dict(load_config.download_kwargs), by_transformers=True)
        frame = frame.f_back  # type: ignore[assignment]
    return None
