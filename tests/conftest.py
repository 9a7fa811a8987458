# SPDX-License-Identifier: Apache-2.0
"""What every test shares: one thread, no network, and a reason where a test needs what this machine has not."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported: its kernels then run, slowly, on a CPU

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` say why they did not run."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def seeing_model():
    """A tiny model that really sees, trained in seconds: see `tests/seeing.py`."""
    from .seeing import train_seeing_model

    return train_seeing_model()


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real CLIP of open_clip, of two layers with random weights, saved to a file: ``architecture:weights``."""
    open_clip = pytest.importorskip("open_clip")
    from vlm_attn.clip import load

    tower = {"image_size": 12, "patch_size": 4, "layers": 2, "width": 32, "head_width": 8}
    words = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
    folder = tmp_path_factory.mktemp("clip")
    (folder / "tiny-test.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": tower, "text_cfg": words}))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    torch.save(open_clip.create_model("tiny-test").state_dict(), folder / "weights.pt")
    yield f"tiny-test:{folder / 'weights.pt'}"
    load.cache_clear()
