"""Defines the options that say how a command loads the base model."""

from __future__ import annotations

import argparse


DTYPES = ["auto", "float32", "bfloat16", "float16", "float64"]


def add_base_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `loading.load_base` reads beside `model`."""
    add = parser.add_argument
    add("--bits", type=int, help="store the base's experts in so many bits, as `train --bits` does")
    add("--dtype", choices=DTYPES, default="auto", help="dtype to load the model in (default: %(default)s)")
    add("--device-map", help="passed to transformers, for example auto (default: the GPU if there is one)")
