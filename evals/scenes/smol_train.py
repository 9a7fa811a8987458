# SPDX-License-Identifier: Apache-2.0
"""Train `scenes-smol`: `vlm-attn scenes train --language smollm2 --out DIR --minutes 90`.

The tower of the bundled `scenes` model stays frozen, and so do the weights of SmolLM2-135M-Instruct. Two stages:

1. `align`: a two-layer projector, on patch labels. Every patch's projected feature is classified against the mean
   embedding of its category's word, and pulled to it.
2. `language`: the projector and low-rank adapters of all linear layers, on captions of two styles and yes/no questions
   (`detailed`, where the causes of hallucination are written down). Every turn sees the image and itself alone, so that
   one image serves several.

Batches are a function of seed and step. With `--steps` a resumed run goes on as if it had not stopped; with `--minutes`
the learning rate follows the time spent, which a resumed run counts on from where it stood. A checkpoint is written
every few minutes, when the run is stopped, and at the end. A finished run writes `adapter.safetensors`, which the package
ships, and `model/`, an ordinary Hugging Face folder; `--export` does so for a checkpoint, also while a run goes on.

Low-rank adapters, LoRA (arXiv 2106.09685): W + s b a, with s = 2. Query, key and value share one a, and so do gate and up,
because they read the same input. The layers are run by this file and not by transformers: with the sum W + s b a made once
a step, a step takes three quarters of the time on a CPU. A test holds both to the same numbers.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from . import detailed, model_path, smol, text, world
from .smol import PARTS, SCALE
from .train import normalise, patch_labels, pixels, save

YES_NO_WEIGHT = 3.0  # a yes/no answer has two tokens, a caption up to a hundred
_FIRST_SCENE = {"align": 300_000_000, "language": 400_000_000}  # apart from the `scenes` model's own


@dataclass(frozen=True)
class Settings:
    """All that decides the result beside the budget; written into the checkpoint."""

    rank: int = 24
    batch: int = 4
    rate: float = 5e-4
    warmup: int = 40  # steps
    align_steps: int = 300
    align_batch: int = 48
    align_rate: float = 2e-3
    questions: tuple[int, int] = (6, 3)  # beside a short and a detailed caption
    seed: int = 0


# --- the trained parts


class Projector(nn.Module):
    """Linear, GELU, linear: the projector of LLaVA-1.5 with its weight names."""

    def __init__(self, inside: int, outside: int):
        super().__init__()
        self.linear_1 = nn.Linear(inside, outside)
        self.linear_2 = nn.Linear(outside, outside)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`[..., inside]` to `[..., outside]`."""
        return self.linear_2(F.gelu(self.linear_1(features)))


class Adapters(nn.Module):
    """The low-rank factors of every layer and part: `a` is `[rank, in]`, `b` is `[out, rank]` and starts at zero."""

    def __init__(self, language: Any, rank: int):
        super().__init__()
        self.a, self.b = nn.ParameterDict(), nn.ParameterDict()
        for i, layer in enumerate(language.model.layers):
            for part, names in PARTS.items():
                weights = [layer.get_submodule(name).weight for name in names]
                inside, outside = weights[0].shape[1], sum(len(w) for w in weights)
                self.a[f"{i}_{part}"] = nn.Parameter(torch.randn(rank, inside) / math.sqrt(inside))
                self.b[f"{i}_{part}"] = nn.Parameter(torch.zeros(outside, rank))


class _Adapted(torch.autograd.Function):
    """x (W + s b a)^T, given the sum, with gradients for x, a and b."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, summed: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, summed, a, b)
        return F.linear(x, summed)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, summed, a, b = ctx.saved_tensors
        g, x = gradients[0].flatten(0, -2), x.flatten(0, -2)
        inner = g @ (SCALE * b).to(g.dtype)
        return (
            (g @ summed).view(*gradients[0].shape[:-1], -1),
            None,
            (inner.T @ x).to(a.dtype),
            (SCALE * (g.T @ (x @ a.to(x.dtype).T))).to(b.dtype),
        )


class Runner:
    """The layers of a frozen `LlamaForCausalLM` with adapters, in `dtype`.

    Args:
        language: the model.
        dtype: of matrix products; states between layers are float32.
    """

    def __init__(self, language: Any, dtype: torch.dtype = torch.bfloat16):
        self.language, self.dtype = language, dtype
        self.heads = language.config.num_attention_heads
        self.kv_heads = language.config.num_key_value_heads
        self.frozen = [
            {
                part: torch.cat([layer.get_submodule(n).weight for n in names]).detach().to(dtype)
                for part, names in PARTS.items()
            }
            for layer in language.model.layers
        ]

    def __call__(
        self, adapters: Adapters, states: torch.Tensor, seen: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Return the last hidden states.

        Args:
            adapters: the adapters.
            states: `[B, L, width]` float32, the embeddings.
            seen: `[B, 1, L, L]` bool: who sees whom.
            positions: `[B, L]`.
        """
        model, dtype = self.language.model, self.dtype
        size, length, width = states.shape
        cos, sin = (t[:, None].to(dtype) for t in model.rotary_emb(states, positions))
        # The query heads of one key head stand below one another: written out, attention over these short and
        # arbitrarily masked rows takes half the time of the fused kernel on a CPU.
        share = self.heads // self.kv_heads
        bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)
        bias = bias.repeat(1, self.kv_heads, share, 1).flatten(0, 1)  # [B * KV heads, share * L, L]

        def norm(x: torch.Tensor, by: Any) -> torch.Tensor:
            return F.rms_norm(x, (width,), by.weight, by.variance_epsilon).to(dtype)

        for i, layer in enumerate(model.layers):

            def linear(x: torch.Tensor, part: str, i: int = i) -> torch.Tensor:
                a, b = adapters.a[f"{i}_{part}"], adapters.b[f"{i}_{part}"]
                with torch.no_grad():
                    summed = torch.addmm(self.frozen[i][part], b.to(dtype), a.to(dtype), alpha=SCALE)
                return _Adapted.apply(x, summed, a, b)

            heads = linear(norm(states, layer.input_layernorm), "qkv").view(size, length, -1, layer.self_attn.head_dim)
            heads = heads.transpose(1, 2)
            turned, value = heads[:, : self.heads + self.kv_heads], heads[:, self.heads + self.kv_heads :]
            one, two = turned.chunk(2, -1)
            turned = turned * cos + torch.cat([-two, one], -1) * sin
            head_dim = turned.shape[-1]
            query = turned[:, : self.heads].reshape(-1, share * length, head_dim)
            key, value = (t.reshape(-1, length, head_dim) for t in (turned[:, self.heads :], value))
            scores = torch.baddbmm(bias, query, key.mT, alpha=head_dim**-0.5)
            mixed = torch.bmm(scores.softmax(-1), value).view(size, self.heads, length, head_dim)
            states = states + linear(mixed.transpose(1, 2).flatten(2), "o")
            gate, up = linear(norm(states, layer.post_attention_layernorm), "gate_up").chunk(2, -1)
            states = states + linear(F.silu(gate) * up, "down")
        return norm(states, model.norm)


# --- batches


class Coder:
    """Conversations about one image as columns of tokens; see `train.Coder`."""

    def __init__(self, tokenizer: Any, visual_tokens: int):
        self.tokenizer, self.visual_tokens = tokenizer, visual_tokens
        self.image = tokenizer.convert_tokens_to_ids(smol.IMAGE_TOKEN)
        self.yes_no = [self.ids(word)[0] for word in ("Yes", "No")]

    def ids(self, piece: str) -> list[int]:
        """Token ids of a piece of text."""
        return self.tokenizer(piece, add_special_tokens=False).input_ids

    def batch(self, conversations: Sequence[Sequence[tuple[str, str]]]) -> dict[str, torch.Tensor]:
        """Return ids, labels, positions, segments and weights `[B, L]`, padded on the right.

        A column sees its own segment and segment 0, the image; positions are those of a first turn.
        """
        columns: dict[str, list[list[float]]] = {k: [] for k in ("ids", "labels", "positions", "segments", "weights")}
        for turns in conversations:
            ids = self.ids(smol.USER) + [self.image] * self.visual_tokens
            start = len(ids)
            row: dict[str, list[float]] = {
                "ids": list(ids),
                "labels": [-100] * start,
                "positions": list(range(start)),
                "segments": [0] * start,
                "weights": [0.0] * start,
            }
            for number, (prompt, answer) in enumerate(turns, 1):
                asked, said = self.ids(f"\n{prompt}{smol.ASSISTANT}"), self.ids(f"{answer}{smol.END}")
                size = len(asked) + len(said)
                row["ids"] += asked + said
                row["labels"] += [-100] * len(asked) + said
                row["positions"] += range(start, start + size)
                row["segments"] += [number] * size
                row["weights"] += [YES_NO_WEIGHT if answer in ("Yes", "No") else 1.0] * size
            for name, cells in row.items():
                columns[name].append(cells)
        length = max(len(row) for row in columns["ids"])
        fills = {"ids": 0, "labels": -100, "positions": 0, "segments": -1, "weights": 0.0}
        return {
            name: torch.tensor([row + [fills[name]] * (length - len(row)) for row in rows])
            for name, rows in columns.items()
        }


def who_sees(segments: torch.Tensor) -> torch.Tensor:
    """Return bool `[B, 1, L, L]`: causal, the own segment and segment 0."""
    same = (segments[:, :, None] == segments[:, None, :]) | (segments[:, None, :] == 0)
    return torch.ones_like(same).tril()[:, None] & same[:, None]


class Trainer:
    """The parts of a run, on one device.

    Args:
        language: `LlamaForCausalLM` and its tokenizer.
        settings: what decides the result.
        tower: a finished `LlavaForConditionalGeneration` whose tower is taken; default: the bundled `scenes` model.
    """

    def __init__(self, language: tuple[Any, Any], settings: Settings, tower: Any = None):
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        self.device = torch.device(accelerator.type if accelerator else "cpu")
        self.settings = settings
        self.language = language[0].to(self.device).requires_grad_(False)
        source: Any = tower or LlavaForConditionalGeneration.from_pretrained(model_path(), dtype=torch.float32)
        self.tower = source.model.vision_tower.to(self.device).eval().requires_grad_(False)
        self.image_size = source.config.vision_config.image_size
        self.grid = self.image_size // source.config.vision_config.patch_size
        self.coder = Coder(language[1], self.grid**2)
        torch.manual_seed(settings.seed)
        width = self.language.config.hidden_size
        self.projector = Projector(source.config.vision_config.hidden_size, width).to(self.device)
        self.adapters = Adapters(self.language, settings.rank).to(self.device)
        self.runner = Runner(self.language)
        self.embeddings = self.language.model.embed_tokens.weight
        words = (text.BACKGROUND, *world.CATEGORIES)
        self.words = torch.stack([self.embeddings[self.coder.ids(f" {w}")].mean(0) for w in words])
        self.stage, self.step, self.seconds = "align", 0, 0.0
        self._begin("align")

    def _begin(self, stage: str) -> None:
        self.stage, self.step, self.seconds = stage, 0, 0.0
        trained = list(self.projector.parameters())
        if stage == "language":
            trained += list(self.adapters.parameters())
        self.trained = trained
        self.optimizer = torch.optim.AdamW(trained, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "stage": self.stage,
            "step": self.step,
            "seconds": self.seconds,
            "settings": asdict(self.settings),
            "projector": self.projector.state_dict(),
            "adapters": self.adapters.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; `ValueError` when its settings were others."""
        for name, value in asdict(self.settings).items():
            if state["settings"][name] != value:
                raise ValueError(f"{name}={value!r}, but the checkpoint to resume has {state['settings'][name]!r}")
        self._begin(state["stage"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.projector.load_state_dict(state["projector"])
        self.adapters.load_state_dict(state["adapters"])
        self.optimizer.load_state_dict(state["optimizer"])

    def load_adapter(self, path: Path) -> None:
        """Begin the language stage with a finished projector and adapters.

        Raises:
            FileNotFoundError: no such file.
            ValueError: they are of another model or rank.
        """
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        weights = load_file(path)
        try:
            for part in (self.projector, self.adapters):
                name = "projector." if part is self.projector else "adapters."
                part.load_state_dict({k.removeprefix(name): w for k, w in weights.items() if k.startswith(name)})
        except RuntimeError as error:
            raise ValueError(f"{path} is of another model or rank: {error}") from error
        self._begin("language")

    def features(self, scenes: Sequence[world.Scene]) -> torch.Tensor:
        """What the language model gets of some scenes: `[B, tokens, width]`."""
        images = torch.from_numpy(np.stack([pixels(s, self.image_size) for s in scenes])).to(self.device)
        with torch.no_grad():
            hidden = self.tower(pixel_values=normalise(images)).last_hidden_state[:, 1:]
        return self.projector(hidden)

    def align_loss(self) -> tuple[torch.Tensor, dict[str, float]]:
        """Cross-entropy of patches against the words by cosine, and the squared distance to them."""
        size = self.settings.align_batch
        first = _FIRST_SCENE["align"] + self.settings.seed * 1_000_000_000 + self.step * size
        scenes = [world.scene("train", first + i) for i in range(size)]
        features = self.features(scenes)
        wanted = torch.from_numpy(np.stack([patch_labels(s, self.grid) for s in scenes])).flatten(1).to(self.device)
        middle = self.words.mean(0)
        logits = 12 * F.normalize(features - middle, dim=-1) @ F.normalize(self.words - middle, dim=1).T
        weight = torch.where(wanted == 0, 0.2, 1.0)  # most patches are background
        loss = (F.cross_entropy(logits.transpose(1, 2), wanted, reduction="none") * weight).mean()
        loss = loss + 10 * (features - self.words[wanted]).square().mean() / self.words.var()
        right = (logits.argmax(-1) == wanted)[wanted > 0].float().mean()
        return loss, {"patches_right": right.item()}

    def language_loss(self) -> tuple[torch.Tensor, dict[str, float]]:
        """Weighted mean cross-entropy of the answers; reports the share of right yes/no answers."""
        size = self.settings.batch
        first = _FIRST_SCENE["language"] + self.settings.seed * 1_000_000_000 + self.step * size
        scenes = [world.scene("train", first + i) for i in range(size)]
        turns = [detailed.training_turns(s, self.settings.questions) for s in scenes]
        batch = {k: v.to(self.device) for k, v in self.coder.batch(turns).items()}
        states = self.embeddings[batch["ids"]]
        states[batch["ids"] == self.coder.image] = self.features(scenes).flatten(0, 1)
        hidden = self.runner(self.adapters, states, who_sees(batch["segments"]), batch["positions"])
        wanted, weights = batch["labels"][:, 1:], batch["weights"][:, 1:]
        learned = wanted != -100
        wanted, weights = wanted[learned], weights[learned]
        logits = F.linear(hidden[:, :-1][learned], self.embeddings.to(hidden.dtype)).float()
        losses = F.cross_entropy(logits, wanted, reduction="none")
        yes_no = torch.tensor(self.coder.yes_no, device=self.device)
        asked = torch.isin(wanted, yes_no)
        right = logits[asked][:, yes_no].argmax(-1) == (wanted[asked] == yes_no[1])
        caption = losses[weights == 1].mean().item()
        figures = {"yes_no_right": right.float().mean().item(), "caption_loss": caption, "columns": states.shape[1]}
        return (losses * weights).sum() / weights.sum(), figures

    def train_step(self, done: float) -> dict[str, float]:
        """One step; `done` is the share of the stage's budget that is spent, which sets the learning rate."""
        settings = self.settings
        if self.stage == "align":
            (loss, figures), rate = self.align_loss(), settings.align_rate * min(1.0, 5 * (1 - done))
        else:
            (loss, figures), rate = self.language_loss(), settings.rate * min(1.0, 2 * (1 - done))
            rate *= min(1.0, (self.step + 1) / settings.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return {"loss": loss.item(), **figures}

    def run(
        self,
        folder: Path,
        *,
        steps: int | None = None,
        minutes: float | None = None,
        stop_at: int | None = None,
        save_minutes: float = 4.0,
        log_every: int = 20,
    ) -> None:
        """Train what is left of both stages and keep `folder/checkpoint.pt` and `folder/log.jsonl`.

        Args:
            folder: where they go.
            steps: budget of the language stage; or
            minutes: the same as time.
            stop_at: leave after that many language steps, as an interruption would.
            save_minutes: between checkpoints.
            log_every: steps between lines of the log, which hold means.

        Raises:
            ValueError: not exactly one budget.
        """
        if (steps is None) == (minutes is None):
            raise ValueError("give one budget for the language stage: --steps or --minutes")
        folder.mkdir(parents=True, exist_ok=True)
        saved = last = time.monotonic()
        kept: list[dict[str, float]] = []
        try:
            while True:
                if self.stage == "align" and self.step >= self.settings.align_steps:
                    self._begin("language")
                    kept = []
                if self.stage == "align":
                    done = self.step / self.settings.align_steps
                else:
                    done = self.step / steps if steps is not None else self.seconds / (60 * (minutes or 0.0) + 1e-9)
                    if done >= 1 or self.step == stop_at:
                        break
                kept.append(self.train_step(done))
                now = time.monotonic()
                self.seconds += now - last
                last = now
                if self.step % log_every == 0:
                    means = {k: float(np.mean([f[k] for f in kept])) for k in kept[0]}
                    line = {"stage": self.stage, "step": self.step, "seconds": self.seconds, **means}
                    with open(folder / "log.jsonl", "a") as log:
                        log.write(
                            json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()}) + "\n"
                        )
                    kept = []
                if now - saved > 60 * save_minutes:
                    save(folder / "checkpoint.pt", self.state())
                    saved = last = time.monotonic()
        finally:
            save(folder / "checkpoint.pt", self.state())


def export(state: dict[str, Any], folder: Path, language: tuple[Any, Any]) -> None:
    """Write `folder/adapter.safetensors`, which the package ships, and `folder/model`, an ordinary Hugging Face folder.

    Args:
        state: a checkpoint.
        folder: where they go.
        language: `LlamaForCausalLM` and tokenizer, without adapters; its weights are changed.
    """
    parts = {f"{part}.{name}": w for part in ("projector", "adapters") for name, w in state[part].items()}
    weights = {name: w.half().cpu().contiguous() for name, w in parts.items()}
    folder.mkdir(parents=True, exist_ok=True)
    facts = {k: json.dumps(state[k]) for k in ("stage", "step", "seconds", "settings")}
    save_file(weights, folder / "adapter.safetensors", facts)
    (folder / "adapter.safetensors").chmod(0o644)
    smol.write(*smol.assemble(*language, weights), folder / "model")


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Command line entry; `arguments` and the program's name default to the process's."""
    default = Settings()
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--language", choices=("smollm2",), default="smollm2")
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoint, log and adapter")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument(
        "--start",
        type=Path,
        metavar="FILE",
        help="begin the language stage with an adapter.safetensors; scenes-smol: the bundled one",
    )
    parser.add_argument("--export", action="store_true", help="write the checkpoint's adapter and model, and stop")
    parser.add_argument("--steps", type=int, help="budget of the language stage in steps")
    parser.add_argument("--minutes", type=float, help="the same in minutes")
    parser.add_argument("--batch", type=int, default=default.batch, help="scenes of a step")
    parser.add_argument("--rate", type=float, default=default.rate)
    parser.add_argument("--align-steps", type=int, default=default.align_steps)
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--threads", type=int, default=0, help="torch threads (default: torch's own)")
    a = parser.parse_args(arguments)
    if a.threads:
        torch.set_num_threads(a.threads)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill saves a checkpoint, like Ctrl-C
    settings = Settings(batch=a.batch, rate=a.rate, align_steps=a.align_steps, seed=a.seed)
    checkpoint = a.out / "checkpoint.pt"
    if (a.export or a.resume) and not checkpoint.exists():
        raise FileNotFoundError(f"{checkpoint}: no checkpoint to go on from")
    if not a.export and (a.steps is None) == (a.minutes is None):
        raise ValueError("give one budget for the language stage: --steps or --minutes")
    language = smol.from_wheel()
    if a.export:
        export(torch.load(checkpoint, map_location="cpu", weights_only=True), a.out, language)
        return
    trainer = Trainer(language, settings)
    if a.resume:
        trainer.load_state(torch.load(checkpoint, map_location=trainer.device, weights_only=True))
    elif a.start:
        trainer.load_adapter(smol.ADAPTER if str(a.start) == smol.NAME else a.start)
    trainer.run(a.out, steps=a.steps, minutes=a.minutes)
    trainer.language.cpu()
    export(trainer.state(), a.out, language)


if __name__ == "__main__":
    main()
