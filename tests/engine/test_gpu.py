# SPDX-License-Identifier: Apache-2.0
"""The engine on a CUDA device: the same answers as on the CPU."""

import pytest
import torch

import vlm_attn
from tests import tiny

pytestmark = pytest.mark.gpu

METHODS = {
    "gift": {"saliency_layers": 1, "enhance_layers": (0, 2, 3), "alpha": 3.0, "query_words": "all"},
    "var": {"sink_dims": (3, 7), "tau": 1.5, "rho": 0.1, "visual_floor": 0.02},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_cuda_equals_cpu(family, method):
    model, make = tiny.FAMILIES[family]()
    inputs = make([[3, "image", 7], [1, "image", 4, "image", 6]])
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    vlm_attn.patch(model, method, **METHODS[method])
    here = model.generate(**inputs, **options)
    there = model.cuda().generate(**{name: value.cuda() for name, value in inputs.items()}, **options)
    assert torch.equal(here.sequences, there.sequences.cpu())
    for a, b in zip(here.logits, there.logits, strict=True):
        assert torch.allclose(a, b.cpu(), rtol=1e-3, atol=1e-3 * float(a.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_is_finite(method, dtype):
    model, make = tiny.llava()
    inputs = {name: value.cuda() for name, value in make([[3, "image", 7], [1, "image", 6]]).items()}
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    vlm_attn.patch(model.to("cuda", dtype), method, **METHODS[method])
    done = model.generate(**inputs, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)
    assert all(step.isfinite().all() for step in done.logits)


@pytest.mark.parametrize("method", METHODS)
def test_compiled_decode_with_a_static_cache(method):
    model, make = tiny.llava()
    inputs = {name: value.cuda() for name, value in make([[3, "image", 7]]).items()}
    vlm_attn.patch(model.cuda(), method, **METHODS[method])
    plain = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    compiled = model.generate(**inputs, max_new_tokens=6, do_sample=False, cache_implementation="static")
    assert torch.equal(plain, compiled)
