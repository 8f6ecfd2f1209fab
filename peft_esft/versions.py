"""Checks that the installed PEFT, transformers and torch are recent enough."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version


# The lower bounds of pyproject.toml; `make test-oldest` runs the tests with them. What is missing one release before:
OLDEST = {
    "torch": "2.10",  # `torch.nn.functional.grouped_mm`
    "transformers": "5.20",  # `has_post_expert_norm` among the flags of experts classes
    "peft": "0.21",  # `layers_to_transform` on models without a head
}


def check_versions() -> None:
    """Refuses libraries that are too old, before something in them is missed in the middle of a run.

    Raises:
        ImportError: if one is missing or below `OLDEST`; it names all of them, and the command that helps.
    """
    found = {name: _installed(name) for name in OLDEST}
    wanting = {name: have for name, have in found.items() if have is None or _is_below(have, OLDEST[name])}
    if wanting:
        listed = ", ".join(f"{name} >= {OLDEST[name]} (found {have or 'none'})" for name, have in wanting.items())
        command = " ".join(f"'{name}>={OLDEST[name]}'" for name in wanting)
        raise ImportError(f"peft_esft needs {listed}. This would do: pip install --upgrade {command}")


def _is_below(have: str, oldest: str) -> bool:
    """Whether a release is older; builds on the way to a release count as it (vendors' torch is 2.10.0a0+...)."""
    return Version(Version(have).base_version) < Version(oldest)


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
