# SPDX-License-Identifier: Apache-2.0
"""What the Triton tests share: where they run or why they cannot, what error is allowed, buffers full of NaN."""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# The interpreter's dot is wrong in bfloat16 (it computes on the bits).
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])

STRIDES = ["contiguous", "rows first", "every other key"]


@cache
def why_not() -> str | None:
    """Why no Triton kernel can run here; None = it can, under the interpreter where there is no device."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if DEVICE == "cuda":
        return None
    from vlm_attn.kernels import triton_segmented

    try:
        triton_segmented.combined(*(torch.zeros(1, 1, 1, 1, *size) for size in ((), (1,), ())), None)
    except Exception as error:
        if "0-dimensional arrays" not in str(error):
            raise
        return "this Triton's interpreter cannot run loops with this numpy (Triton 3.6 with numpy 2.4)"
    return None


needs_triton = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def poisoned_empty(*args: Any, **kwargs: Any) -> Tensor:
        made = empty(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned_empty)


def as_good(got: Tensor, wanted: Tensor, plain: Tensor, dtype: torch.dtype, summands: Tensor | None = None) -> None:
    """Error of ``got`` at most twice that of ``plain``, plus four roundings of the largest value, or of what is averaged."""
    assert got.shape == wanted.shape
    assert not got.isnan().any()
    infinite = wanted.isinf()
    assert torch.equal(got.isinf(), infinite)
    got, plain, wanted = (t.double().masked_fill(infinite, 0.0) for t in (got, plain, wanted))
    largest = (wanted if summands is None else summands.double()).abs().max().clamp_min(1e-6)
    allowed = 2 * (plain - wanted).abs().max() + 4 * torch.finfo(dtype).eps * largest
    error = (got - wanted).abs().max()
    assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"


def laid_out(tensor: Tensor, how: str) -> Tensor:
    """The same values in another memory layout."""
    if how == "rows first":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "every other key":
        return tensor.repeat_interleave(2, 2)[:, :, ::2]
    return tensor
