"""The grouped products, in every dtype that a base can have."""

from __future__ import annotations

import pytest
import torch

from peft_esft.ops.grouped_mm import grouped_mm, grouped_outer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("width", "out"), [(16, 24), (12, 20), (5, 7)])
@pytest.mark.parametrize("is_flipped", [False, True])
@pytest.mark.parametrize("is_known", [False, True])
def test_products_in_every_dtype_and_alignment(dtype, width, out, is_flipped, is_known):
    rows = torch.randn(10, width).to(dtype)
    matrices = torch.randn(3, width, out).to(dtype)
    stored = matrices.transpose(1, 2).contiguous() if is_flipped else matrices
    ends = [4, 4, 9]
    result = grouped_mm(
        rows,
        None,
        stored[:1],
        stored[1:],
        torch.tensor(ends, dtype=torch.int32),
        ends if is_known else None,
        is_flipped,
    )
    gradient = torch.randn(10, out).to(dtype)
    bounds = [0, *ends]
    outer = grouped_outer(
        rows, gradient, torch.tensor(bounds, dtype=torch.int32), bounds if is_known else None, torch.float32
    )

    groups = [slice(start, end) for start, end in zip(bounds, ends, strict=False)]
    expected = torch.cat(
        [rows[group].double() @ matrix.double() for group, matrix in zip(groups, matrices, strict=True)]
    )
    expected_outer = torch.stack([rows[group].double().T @ gradient[group].double() for group in groups])
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-6, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    assert result.dtype == dtype
    assert (result[:9].double() - expected).abs().max() <= tolerance * expected.abs().max()
    assert not result[9:].any()
    assert outer.dtype == torch.float32
    assert (outer.double() - expected_outer).abs().max() <= tolerance * expected_outer.abs().max()
    assert not outer[1].any()
