# SPDX-License-Identifier: Apache-2.0
"""A model that sees, trained in seconds: it names the one object in a picture, of four.

For tests that need answers which depend on the picture, but not the bundled model's quality or size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from vlm_attn.evals.scenes import text, train, world

CATEGORIES = ("banana", "stop sign", "elephant", "broccoli")
PROMPT = "What is in the image?"
SETTINGS = train.Settings(width=48, heads=3, tower_layers=1, layers=2, image_size=56)
PICTURES, STEPS, BATCH, RATE = 600, 180, 32, 4e-3


def scene(index: int) -> world.Scene:
    """Scene `index` with one large object; training uses those from 1000 on."""
    draw = world.Draw("seeing", index)
    side = 110 + draw.below(40)
    margin = side // 2 + 2
    centre = (margin + draw.below(world.SIZE - 2 * margin), margin + draw.below(world.SIZE - 2 * margin))
    name, angle, flip = draw.choice(CATEGORIES), draw.choice((-8, 0, 8)), draw.chance(0.5)
    thing = world.SceneObject(name, centre, side, angle, flip, 1.0, "clear")
    return world.Scene("train", index, draw.choice(list(world.CONTEXTS)), (thing,))


def picture(index: int) -> tuple[Image.Image, str]:
    """Picture `index`, 224 x 224, and the category of its only object."""
    shown = scene(index)
    return world.render(shown), shown.objects[0].category


@dataclass(frozen=True)
class Seeing:
    """The trained model (in eval mode, float32), its processor, and the losses of both stages."""

    model: Any
    processor: Any
    losses: dict[str, list[float]]


def train_seeing_model(seed: int = 0) -> Seeing:
    """Train it: a few seconds on one core. First the tower on what every patch shows, then all of it on answers."""
    torch.manual_seed(seed)
    model = train.build_model(SETTINGS)
    coder = train.Coder(SETTINGS.visual_tokens)
    scenes = [scene(1000 + i) for i in range(PICTURES)]
    names = [s.objects[0].category for s in scenes]
    rows = coder.batch([coder.row([(PROMPT, name)]) for name in names])
    pictures = torch.from_numpy(np.stack([train.pixels(s, SETTINGS.image_size) for s in scenes]))
    patches = torch.from_numpy(np.stack([train.patch_labels(s, SETTINGS.image_size // 14) for s in scenes]))
    words = torch.tensor([coder.ids(w)[0] for w in (text.BACKGROUND, *world.CATEGORIES)])
    losses: dict[str, list[float]] = {"patches": [], "answers": []}
    for stage, seen in losses.items():
        optimizers = train.optimizers(model, RATE)
        for step in range(STEPS):
            some = torch.randint(PICTURES, (BATCH,))
            batch = {k: v[some] for k, v in rows.items()} | {"pixels": pictures[some], "patches": patches[some]}
            if stage == "patches":
                loss, _ = train.patch_loss(model, batch, words, pull=0.01)
            else:
                batch["pictures"] = torch.arange(BATCH)
                loss, _ = train.language_loss(model, batch, words[:0], SETTINGS)
            for group in (g for o in optimizers for g in o.param_groups):
                group["lr"] = RATE * train.rate_factor(step, STEPS, warmup=10)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            seen.append(loss.item())
    return Seeing(model.eval(), text.build_processor(SETTINGS.image_size), losses)
