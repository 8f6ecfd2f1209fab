"""Gives transformers' linear layers in GGUF blocks a gradient for their input, for any number of rows."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn


def give_gradients(model: nn.Module) -> None:
    """Changes the class of each `GgufLinear` of a model to one whose input has a gradient.

    For up to 8 rows transformers uses a kernel that has no gradient. Without this, training on so few tokens would use
    a part of the gradient, and no error would say so.
    """
    for module in model.modules():
        if type(module).__name__ == "GgufLinear":
            module.__class__ = _class_with_gradient()


@functools.cache
def _class_with_gradient() -> Any:
    from transformers.integrations.gguf.utils import GgufLinear

    class GgufLinearWithGradient(GgufLinear):
        """Computes with the dequantised matrix where a gradient is wanted, and elsewhere as transformers does."""

        def __reduce__(self) -> tuple[Any, ...]:
            # The class is made on demand, and cannot be found by its name.
            return _new_linear, (), self.__dict__

        def forward(self, x: Tensor) -> Tensor:
            if not (torch.is_grad_enabled() and x.requires_grad):
                return super().forward(x)
            rows = x.reshape(-1, self.in_features)
            permutation: Any = self.input_permutation
            rows = rows if permutation is None else rows.index_select(1, permutation)
            output: Tensor = _Product.apply(rows, self)
            if self.bias is not None:
                output = output + self.bias
            return output.reshape(*x.shape[:-1], self.out_features).to(x.dtype)

    return GgufLinearWithGradient


def _new_linear() -> nn.Module:
    own = _class_with_gradient()
    linear: nn.Module = own.__new__(own)
    return linear


class _Product(torch.autograd.Function):
    """`rows @ weight.T`. The weight is dequantised a part at a time, and again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, linear: Any) -> Tensor:
        ctx.linear = linear
        # What transformers does with many rows.
        result: Tensor = linear._unpack_matmul(rows)
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        from transformers.integrations.gguf.kernels import DEQUANT_CHUNK_ELEMS, dequantize_blocks

        (grad,), linear = grad_outputs, ctx.linear
        result = grad.new_zeros(grad.shape[0], linear.in_features)
        at_once = max(1, DEQUANT_CHUNK_ELEMS // linear.in_features)
        for blocks, part in zip(linear.weight.data.split(at_once), grad.split(at_once, dim=1), strict=True):
            matrix = dequantize_blocks(blocks, linear.ggml_type, len(blocks), linear.in_features, grad.dtype)
            result += part @ matrix
        return result, None
