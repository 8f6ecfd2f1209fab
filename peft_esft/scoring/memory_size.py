"""Reads amounts of memory such as "24GB"."""

from __future__ import annotations

import operator

from accelerate.utils import convert_file_size_to_int


def bytes_of(name: str, size: int | str) -> int:
    """A size in bytes.

    Args:
        name: of the setting, for the error.
        size: a number of bytes, or a text with a unit such as "8GB" or "512MiB"; "gb" are bytes too.

    Raises:
        ValueError: if it is something else, or less than one byte. A text without a unit is likely to have lost it.
    """
    try:
        number = convert_file_size_to_int(size.upper()) if isinstance(size, str) else operator.index(size)
    except (ValueError, TypeError):
        number = 0
    if number < 1 or isinstance(size, bool):
        raise ValueError(f'{name} is {size!r}; expected a number of bytes, or a text such as "8GB" or "512MiB"')
    return number
