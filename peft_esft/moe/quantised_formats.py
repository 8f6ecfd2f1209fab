"""Encodes and decodes the forms in which experts are kept in few bits.

A weight `[E, out, in]` is kept as a few tensors by name, each with the experts on its first dimension. A matrix is
what the package that a form comes from dequantises it to, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


_SCALES_IN_GROUP = 256
"""bitsandbytes' number for double quantisation."""

Tensors = Mapping[str, Tensor]
Experts = slice | Tensor
"""Some experts: a slice, or their ids in an int64 tensor `[n]`."""
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


class Format(Protocol):
    """A form in which experts are kept."""

    @property
    def name(self) -> str:
        """What the form is called in configs, fingerprints and messages."""

    def decode(self, tensors: Tensors, experts: Experts, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The matrices of some experts, a new tensor `[n, *shape]` of a dtype."""


class Loadable(Format, Protocol):
    """A form that a checkpoint can have its experts in."""

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
        """Dtype and shape of each tensor.

        Args:
            shape: of the weight, `[E, out, in]`.
            dtype: of the matrices.

        Raises:
            ValueError: if such a weight cannot be kept in the form.
        """


class Encoder(Loadable, Protocol):
    """A form that experts in full precision can be brought to."""

    def encode(self, matrix: Tensor) -> dict[str, Tensor]:
        """The tensors of one expert, without the dimension of the experts."""


@dataclass(frozen=True)
class FourBit:
    """NF4 or FP4 of bitsandbytes: two codes in a byte, a fp32 scale for each block.

    Every expert is encoded by itself, so no block has weights of two.

    Attributes:
        quant_type: "nf4" or "fp4".
        blocksize: weights in a block.
        double: the scales are quantised too, as the double quantisation of QLoRA (arXiv 2305.14314, section 3) does:
            a code in a byte for each scale, a fp32 scale for 256 of these, and their mean for each expert.
    """

    quant_type: str = "nf4"
    blocksize: int = 64
    double: bool = False

    @property
    def name(self) -> str:
        return f"{self.quant_type} double" if self.double else self.quant_type

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
        bitsandbytes()  # now, and not in the first forward pass
        if dtype == torch.float64:
            raise ValueError("bitsandbytes has no 4 bits of float64; load the model with dtype=torch.bfloat16")
        weights = math.prod(shape[1:])
        blocks = -(-weights // self.blocksize)
        codes: Layout = {"codes": (torch.uint8, (shape[0], -(-weights // 2)))}
        if not self.double:
            return codes | {"scales": (torch.float32, (shape[0], blocks))}
        return codes | {
            "scale_codes": (torch.uint8, (shape[0], blocks)),
            "scales": (torch.float32, (shape[0], -(-blocks // _SCALES_IN_GROUP))),
            "offsets": (torch.float32, (shape[0], 1)),
        }

    def encode(self, matrix: Tensor) -> dict[str, Tensor]:
        codes, state = bitsandbytes().functional.quantize_4bit(
            matrix.contiguous(),
            blocksize=self.blocksize,
            quant_type=self.quant_type,
            compress_statistics=self.double,
        )
        tensors = {"codes": codes.flatten()}
        if not self.double:
            return tensors | {"scales": state.absmax}
        return tensors | {
            "scale_codes": state.absmax,
            "scales": state.state2.absmax,
            "offsets": state.offset.reshape(1),
        }

    def decode(self, tensors: Tensors, experts: Experts, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        codes, scales = tensors["codes"][experts], self._scales(tensors, experts)
        if math.prod(shape) % self.blocksize:
            # The last block of each expert is not full.
            pairs = zip(codes, scales, strict=True)
            return torch.stack([self._decode(*own, shape, dtype) for own in pairs])
        return self._decode(codes, scales, (len(codes), *shape), dtype)

    def _scales(self, tensors: Tensors, experts: Experts) -> Tensor:
        """The scales of the blocks of some experts, fp32 `[n, blocks]`."""
        scales = tensors["scales"][experts]
        if not self.double:
            return scales
        dequantize = bitsandbytes().functional.dequantize_blockwise
        parts = zip(tensors["scale_codes"][experts], scales, tensors["offsets"][experts], strict=True)
        # One by one, as a group of scales is of one expert.
        own = [dequantize(codes, absmax=s, blocksize=_SCALES_IN_GROUP) + offset for codes, s, offset in parts]
        return torch.stack(own)

    def _decode(self, codes: Tensor, scales: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        # bitsandbytes' kernel for the CPU takes each row to begin with a block of its own, and reads wrong scales
        # where rows are no multiple of a block. A single row has no such places.
        width = shape[-1] if shape[-1] % self.blocksize == 0 else math.prod(shape)
        rows = [math.prod(shape) // width, width]
        # The operator and not `functional.dequantize_4bit`: that one wants a state object, made anew in each call.
        matrices: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
            codes.reshape(-1, 1), scales.reshape(-1), self.blocksize, self.quant_type, rows, dtype
        )
        return matrices.view(shape)


@dataclass(frozen=True)
class Int8:
    """Eight bits: a signed code for each weight, and a fp32 scale for each row `[in]`.

    A scale has a value of the dtype that the weights had, and is read in that of the matrices. The product of code
    and scale is rounded once, to that dtype; the product of fp32 numbers takes 20 times as long.
    """

    name: str = "int8"

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
        return {"codes": (torch.int8, tuple(shape)), "scales": (torch.float32, (*shape[:-1], 1))}

    def encode(self, matrix: Tensor) -> dict[str, Tensor]:
        wide = matrix.float()
        scales = (wide.abs().amax(-1, keepdim=True) / 127).to(matrix.dtype)
        codes = torch.where(scales > 0, wide / scales, 0.0).round_().clamp_(-127, 127)
        return {"codes": codes.to(torch.int8), "scales": scales.float()}

    def decode(self, tensors: Tensors, experts: Experts, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return tensors["codes"][experts].to(dtype).mul_(tensors["scales"][experts].to(dtype))


@dataclass(frozen=True)
class BlockFP8:
    """fp8 of transformers' `FP8Experts`: codes in float8, a scale for each block of a matrix.

    Attributes:
        block_size: rows and columns of a block.
        name: what the form is called.
    """

    block_size: tuple[int, int]
    name: str = "fp8"

    def decode(self, tensors: Tensors, experts: Experts, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        # transformers has no public function for it. This one is what its backward pass uses.
        from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

        pairs = zip(tensors["codes"][experts], tensors["scales"][experts], strict=True)
        return torch.stack([_dequantize_fp8_weight(*own, list(self.block_size), dtype) for own in pairs])


@dataclass(frozen=True)
class MXFP4:
    """MXFP4 of gpt-oss' checkpoints: two 4-bit floats in a byte, and the exponent of a power of two for 32 of them.

    The weights are `[E, in, out]`. The codes, "blocks" in the checkpoint, are `[E, out, in / 32, 16]`.
    """

    name: str = "mxfp4"

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
        experts, width, out = shape
        if width % 32:
            raise ValueError(f"MXFP4 has blocks of 32 weights, and the matrices have {width} inputs: not a multiple")
        blocks = (experts, out, width // 32)
        return {"codes": (torch.uint8, (*blocks, 16)), "scales": (torch.uint8, blocks)}

    def decode(self, tensors: Tensors, experts: Experts, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        codes, scales = tensors["codes"][experts], tensors["scales"][experts]
        matrices: Tensor = convert_moe_packed_tensors(codes, scales, dtype=dtype)
        return matrices


@dataclass(frozen=True)
class Gguf:
    """Blocks of a GGUF file, as transformers' `GgufExperts` keeps them: `[E, out, bytes of a row]`.

    Attributes:
        ggml_type: ggml's number of the type, which says what a block has.
    """

    ggml_type: int

    @property
    def name(self) -> str:
        from transformers.integrations.gguf.dequant import GGML_NAME

        return f"gguf {GGML_NAME[self.ggml_type]}"

    def decode(self, tensors: Tensors, experts: Experts, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        from transformers.integrations.gguf.dequant import dequantize

        # One after the other: an intermediate result has up to 8 bytes for each weight.
        own = [dequantize(blocks, self.ggml_type, dtype) for blocks in tensors["codes"][experts]]
        return torch.stack(own).view(-1, *shape)


ENCODERS: dict[str, Encoder] = {
    form.name: form
    for form in (FourBit("nf4"), FourBit("fp4"), FourBit("nf4", double=True), FourBit("fp4", double=True), Int8())
}
"""The forms that `quantize_experts` can bring experts to."""


def is_dtype_of(form: str, name: str, found: torch.dtype | None, wanted: torch.dtype) -> bool:
    """True if a tensor of a file or state dict has the dtype of its form.

    The scales of int8 may be in half precision too, as they were in earlier files: a cast to fp32 changes no value.
    """
    is_earlier = form == "int8" and name == "scales" and found in (torch.bfloat16, torch.float16)
    return found == wanted or is_earlier


def form_of(bits: int, quant_type: str, double_quant: bool = False) -> Loadable:
    """The form for a number of bits.

    Args:
        bits: 4 or 8.
        quant_type: "nf4", "fp4" or "mxfp4", of 4 bits.
        double_quant: scales in 8 bits, of "nf4" and "fp4".

    Raises:
        ValueError: if there is none.
    """
    known = ("nf4", "fp4", "mxfp4")
    if bits not in (4, 8) or quant_type not in known or (bits, quant_type) == (8, "mxfp4"):
        raise ValueError(
            f"experts cannot be quantised with {bits=} and {quant_type=}: bits is 4 or 8, quant_type is one of {known}"
        )
    if double_quant not in (False, True) or (double_quant and (bits == 8 or quant_type == "mxfp4")):
        raise ValueError(
            f"{double_quant=} with {bits=} and {quant_type=}: only the scales of 'nf4' and 'fp4' in 4 bits can be "
            "quantised. Leave double_quant out"
        )
    if bits == 8:
        return ENCODERS["int8"]
    return MXFP4() if quant_type == "mxfp4" else ENCODERS[FourBit(quant_type, double=double_quant).name]


def bitsandbytes() -> Any:
    """The package, which is optional. Importing it registers the operators that decode."""
    try:
        import bitsandbytes.functional
    except ImportError as error:
        raise ImportError(
            "experts in 4 bits need bitsandbytes: pip install bitsandbytes. Experts in 8 bits (bits=8) need "
            "nothing else"
        ) from error
    return bitsandbytes
