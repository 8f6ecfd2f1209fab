"""Joins PEFT's registry. The only file that touches how PEFT lists its types."""

from __future__ import annotations

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
