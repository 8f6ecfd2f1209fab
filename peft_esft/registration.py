"""What peft_esft needs of PEFT and PEFT gives no way to: its registry of types, and what a call of it loads.

The only file that touches PEFT's internals without a comment at each place.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, register_peft_method


NAME = "ESFT"


def extend_peft_type() -> None:
    """Adds `PeftType.ESFT`, once.

    `register_peft_method` (peft/utils/peft_types.py) refuses a name that is not a member of this enum, and PEFT has no
    entry point for tuners from outside. A plain string in its place fails wherever PEFT or transformers reads
    `peft_type.value`. To be removed when PEFT registers outside types or ships ESFT itself.
    """
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
