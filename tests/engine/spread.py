# SPDX-License-Identifier: Apache-2.0
"""What two processes do at once in ``test_deployment``: data parallelism, and a model whose heads are spread over both."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import LlavaForConditionalGeneration
from transformers.distributed import DistributedConfig

import vlm_attn
from tests import tiny
from tests.helpers import ACTIVE, close, differ, generate, logits, margins, on, same

METHODS: dict[str, Any] = {
    **{name: ACTIVE[name] for name in ("gift", "head_guided", "vhr")},
    "var+gift": None,
    "vcd": {"seed": 0},
    "fastv": {"keep": 4, "layer": 2},
    "pyramid_drop": {"keep": 4, "layers": (1, 2)},
}


def work(rank: int, port: int, folder: Path) -> None:
    """One of the two processes; what became of every check is written to ``folder``."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ["WORLD_SIZE"] = "2"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    model, inputs = tiny.llava()
    x = inputs([[3, "image", 9], [1, "image", 6]], seed=1)
    spread = LlavaForConditionalGeneration.from_pretrained(
        folder, distributed_config=DistributedConfig(tp_size=2, tp_plan="auto")
    )
    tiny.finish(spread)
    checks: dict[str, Callable[[], None]] = {
        "ddp": lambda: data_parallel(model, x, rank),
        "plain": lambda: same(generate(spread, x), generate(model, x)),
        "saliency": lambda: maps(model, spread, x),
        **{name: (lambda name=name: whole(model, spread, x, name)) for name in METHODS},
    }
    results = {}
    for name, check in checks.items():
        try:
            check()
            results[name] = "same"
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"
    (folder / f"{rank}.json").write_text(json.dumps(results), encoding="utf-8")
    dist.destroy_process_group()


def whole(model: Any, spread: Any, x: Any, name: str) -> None:
    """The spread model says what the model says that is whole."""

    def applied(which: Any) -> Any:
        if "+" in name:
            return vlm_attn.patched(which, [vlm_attn.methods()[n].cls(**ACTIVE[n]) for n in name.split("+")])
        return vlm_attn.patched(which, name, **METHODS[name])

    plain = generate(model, x)
    with applied(model), margins() as margin:
        wanted = generate(model, x)
    margin.smooth = True  # some choose nothing
    margin.check()
    with applied(spread):
        same(generate(spread, x), wanted)
    if name != "vcd":  # it acts on the logits behind these
        differ(wanted[1][0], plain[1][0])


def maps(model: Any, spread: Any, x: Any) -> None:
    """The saliency map is that of all heads."""
    with on(model, "gift"):
        wanted = vlm_attn.saliency(model, x)
    with on(spread, "gift"):
        got = vlm_attn.saliency(spread, x)
    for one, other in zip(got, wanted, strict=True):
        close(one, other)


def data_parallel(model: Any, x: Any, rank: int) -> None:
    """Patched before it is wrapped, and through the wrapper; every process has prompts of its own."""
    mine = {name: value[rank : rank + 1] for name, value in x.items()}
    with on(model, "gift"):
        wanted, run = logits(model, mine), generate(model, mine)
        wrapped = DistributedDataParallel(model)
        assert torch.equal(logits(wrapped, mine), wanted)
        same(generate(wrapped.module, mine), run, 0.0)
        assert vlm_attn.is_patched(wrapped)
    plain = logits(wrapped, mine)
    with on(wrapped, "gift"):
        assert torch.equal(logits(wrapped, mine), wanted)
    assert torch.equal(logits(wrapped, mine), plain)
    differ(plain, wanted)
