"""Train the scenes model: `python -m vlm_attn.evals.scenes.train --out DIR`.

Three stages, each with a constant learning rate that falls to zero over the last fifth of its steps:

1. `tower`: tower, projector and word embeddings on patch labels. Every patch's projected feature is classified
   against the embeddings of the category words.
2. `align`: the same, and the feature is also pulled to the embedding of its word. Without an aligned projector
   the language model does not learn to answer yes/no questions in this budget.
3. `language`: captions and questions, the tower frozen (or until `--unfreeze` of the steps are done).

Batches are a function of seed, stage and step, so a resumed run goes on as if it had not stopped. To end a stage
early, resume it with `--steps` of about 1.25 times the steps done: the rate then falls from there. Only scenes of
the train split are learned from; the figures printed on the way are of validation scenes.

`torchrun --nproc-per-node N -m vlm_attn.evals.scenes.train ...` splits every batch over N processes. On a CPU that
others use too, one single-threaded process per core (`--threads 1`) is faster than one process with many threads.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import distributed, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from . import text, world

STAGES = ("tower", "align", "language")
# Scene indices of the stages do not overlap.
_FIRST_SCENE = {"tower": 0, "align": 40_000_000, "language": 80_000_000}


@dataclass(frozen=True)
class Settings:
    """All that decides the result, and is written into the checkpoint."""

    steps: tuple[int, int, int] = (1200, 350, 2400)
    batch: tuple[int, int, int] = (128, 128, 32)
    rate: tuple[float, float, float] = (2e-3, 1.5e-3, 1e-3)
    width: int = 192
    heads: int = 6
    tower_layers: int = 5
    layers: int = 6
    image_size: int = 112
    questions: int = 8
    unfreeze: float = 1.0  # share of the language steps with a frozen tower
    seed: int = 0


def build_model(settings: Settings) -> LlavaForConditionalGeneration:
    """Return the untrained model: a CLIP-type tower and a Llama-type language model of the same width."""
    tokens = text.vocabulary()
    width = settings.width
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        projection_dim=width,
        num_hidden_layers=settings.tower_layers,
        num_attention_heads=settings.heads,
        image_size=settings.image_size,
        patch_size=14,
    )
    language = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=width,
        intermediate_size=512 * width // 192,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=1024,
        pad_token_id=tokens.index("<pad>"),
        bos_token_id=tokens.index("<s>"),
        eos_token_id=tokens.index("</s>"),
        tie_word_embeddings=False,
    )
    torch.manual_seed(settings.seed)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=language,
            image_token_index=tokens.index("<image>"),
            image_seq_length=(settings.image_size // 14) ** 2,
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
            tie_word_embeddings=False,
        )
    )
    # Features are matched against embeddings, so these must not start near zero.
    nn.init.normal_(model.model.language_model.embed_tokens.weight, std=0.3)
    return model


# --- batches


def pixels(scene: world.Scene, size: int) -> np.ndarray:
    """Return the uint8 `[size, size, 3]` picture as the processor would cut it down."""
    return np.asarray(world.render(scene).resize((size, size), Image.Resampling.BILINEAR))


def patch_labels(scene: world.Scene, grid: int) -> np.ndarray:
    """Return int64 `[grid, grid]`: what a patch mostly shows, 0 or 1 + index in `CATEGORIES`.

    An object counts from a tenth of a patch on; the patch that shows most of an object always counts.
    """
    side = world.SIZE // grid
    owner = world.owners(scene).reshape(grid, side, grid, side)
    share = np.stack([(owner == i + 1).mean((1, 3)) for i in range(len(scene.objects))])
    for part in share:
        if part.max() > 0:
            part[np.unravel_index(part.argmax(), part.shape)] += 0.1
    index = np.array([world.CATEGORIES.index(o.category) + 1 for o in scene.objects])
    return np.where(share.max(0) >= 0.1, index[share.argmax(0)], 0)


class Coder:
    """Turns conversations into padded token batches."""

    def __init__(self, visual_tokens: int):
        self.tokenizer = text.build_tokenizer()
        self.visual_tokens = visual_tokens
        self._known: dict[str, list[int]] = {}

    def ids(self, piece: str) -> list[int]:
        """Token ids of a piece of text, without BOS."""
        if piece not in self._known:
            if len(self._known) > 50_000:
                self._known.clear()
            self._known[piece] = self.tokenizer(piece, add_special_tokens=False).input_ids
        return self._known[piece]

    def row(
        self, turns: list[tuple[str, str]], *, apart: bool = True, system: str = ""
    ) -> tuple[list[int], list[int], list[int], list[int]]:
        """Return ids, labels, positions and segments of one conversation about one picture.

        With `apart` every turn sees the picture and itself alone, at the positions of a first turn: many
        questions for the price of one picture, and no answer read off another. Otherwise it is one long
        conversation. Segment 0 is what all turns see.
        """
        ids = self.ids(f"<s>{system} USER:") + [self.tokenizer.image_token_id] * self.visual_tokens
        start = len(ids)
        labels, positions, segments = [-100] * start, list(range(start)), [0] * start
        for i, (prompt, answer) in enumerate(turns):
            lead = "USER: " if i and not apart else ""
            asked, said = self.ids(f"{lead}{prompt} ASSISTANT:"), self.ids(f"{answer}</s>")
            first = start if apart else len(ids)
            ids = ids + asked + said
            labels += [-100] * len(asked) + said
            positions += range(first, first + len(asked) + len(said))
            segments += [i + 1 if apart else 1] * (len(asked) + len(said))
        return ids, labels, positions, segments

    def batch(self, rows: list[tuple]) -> dict[str, torch.Tensor]:
        """Stack rows, padded on the right: four int64 tensors `[rows, length]`."""
        length = max(len(r[0]) for r in rows)
        out = {}
        for k, (name, fill) in enumerate((("input_ids", 0), ("labels", -100), ("position_ids", 0), ("segments", -1))):
            out[name] = torch.tensor([r[k] + [fill] * (length - len(r[k])) for r in rows])
        return out


def attention_mask(segments: torch.Tensor) -> torch.Tensor:
    """Return the bool mask `[B, 1, L, L]` of segments `[B, L]`: causal, own segment and segment 0 only."""
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    same = (segments[:, :, None] == segments[:, None, :]) | (segments[:, None, :] == 0)
    return (same & causal)[:, None]


class Batches(torch.utils.data.Dataset):
    """The batches of a stage by step, or the `part`-th of `parts` equal shares of each."""

    def __init__(self, stage: str, settings: Settings, part: int = 0, parts: int = 1):
        self.stage, self.settings, self.part, self.parts = stage, settings, part, parts
        self.size = settings.batch[STAGES.index(stage)]
        self.grid = settings.image_size // 14
        self.coder: Coder | None = None

    def __len__(self) -> int:
        return self.settings.steps[STAGES.index(self.stage)]

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        first = _FIRST_SCENE[self.stage] + self.settings.seed * 1_000_000_000 + step * self.size
        scenes = [world.scene("train", first + i) for i in range(self.part, self.size, self.parts)]
        out: dict[str, torch.Tensor] = {}
        out["pixels"] = torch.from_numpy(np.stack([pixels(s, self.settings.image_size) for s in scenes]))
        if self.stage != "language":
            out["patches"] = torch.from_numpy(np.stack([patch_labels(s, self.grid) for s in scenes]))
            return out
        self.coder = self.coder or Coder(self.grid**2)
        rows = []
        for s in scenes:
            draw = world.Draw("conversation", s.split, s.index)
            system = text.SYSTEM if draw.chance(0.1) else ""
            # A quarter are real conversations, so that later turns work too.
            turns = text.training_turns(s, self.settings.questions)
            rows.append(self.coder.row(turns, apart=draw.chance(0.75), system=system))
        return out | self.coder.batch(rows)


def normalise(images: torch.Tensor) -> torch.Tensor:
    """Return uint8 `[B, H, W, 3]` as the processor's float32 `[B, 3, H, W]`."""
    return images.permute(0, 3, 1, 2).float().div(255).sub(0.5).div(0.25)


# --- losses


def patch_loss(
    model: LlavaForConditionalGeneration, batch: dict[str, torch.Tensor], classes: torch.Tensor, pull: float
) -> tuple[torch.Tensor, dict[str, float]]:
    """Cross-entropy of patches against the word embeddings of `classes`, plus `pull` x squared distance."""
    hidden = model.model.vision_tower(pixel_values=normalise(batch["pixels"])).last_hidden_state[:, 1:]
    features = model.model.multi_modal_projector(hidden).float().flatten(0, 1)
    words = model.model.language_model.embed_tokens.weight[classes].float()
    logits, wanted = features @ words.T / 3, batch["patches"].flatten()
    loss = F.cross_entropy(logits, wanted)
    if pull:
        loss = loss + pull * (features - words[wanted]).pow(2).mean()
    found = (logits.argmax(-1) == wanted)[wanted > 0]
    return loss, {"patches_right": found.float().mean().item()}


def language_loss(
    model: LlavaForConditionalGeneration, batch: dict[str, torch.Tensor], yes_no: torch.Tensor
) -> tuple[torch.Tensor, dict[str, float]]:
    """Next-token loss of the answers; reports the share of right yes/no answers."""
    output = model(
        input_ids=batch["input_ids"],
        pixel_values=normalise(batch["pixels"]),
        attention_mask=attention_mask(batch["segments"]),
        position_ids=batch["position_ids"],
        use_cache=False,
    )
    logits, wanted = output.logits[:, :-1].float(), batch["labels"][:, 1:]
    loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=-100)
    asked = torch.isin(wanted, yes_no)
    right = (logits[asked].argmax(-1) == wanted[asked]).float().mean().item()
    return loss, {"yes_no_right": right}


def share_gradients(model: nn.Module) -> None:
    """Average the gradients over all processes."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def optimizers(model: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the transformer layers where torch has it (2.9), AdamW for all else."""
    named = list(model.named_parameters())
    inner = [p for n, p in named if p.ndim == 2 and ".layers." in n] if hasattr(torch.optim, "Muon") else []
    chosen = {id(p) for p in inner}
    rest = [p for _, p in named if id(p) not in chosen]
    out: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.95), weight_decay=0.02)]
    if inner:
        muon = torch.optim.Muon(inner, lr=rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
        out.append(muon)
    return out


def rate_factor(step: int, steps: int, warmup: int = 100) -> float:
    """Warm up, stay, and fall to zero over the last fifth."""
    return min(1.0, (step + 1) / warmup, (steps - step) / (0.2 * steps))


# --- a quick look on the way


@torch.no_grad()
def quick_check(model: LlavaForConditionalGeneration, settings: Settings, scenes: int = 100) -> dict[str, float]:
    """Look at the first validation scenes: POPE-like accuracy, caption recall, and where captions go wrong.

    Quick, and with own questions; the figures to publish come from `vlm-attn eval`. `named_...` is the share of
    objects that captions name, by kind of evidence; `companions` the share of false objects that are usual
    companions of the scene.
    """
    coder = Coder((settings.image_size // 14) ** 2)
    model.eval()
    device = next(model.parameters()).device
    todo = [world.scene("validation", i) for i in range(scenes)]
    yes, no = (coder.ids(w)[0] for w in ("yes", "no"))
    right: dict[str, list[bool]] = {"random": [], "companions": []}
    seen: dict[str, list[bool]] = {"clear": [], "small": [], "faint": [], "covered": []}
    said_yes, found, named, objects = [], 0, 0, 0
    false: list[bool] = []  # for every false object: is it a companion?
    for start in range(0, scenes, 50):
        part = todo[start : start + 50]
        rows, kinds = [], []
        for s in part:
            draw = world.Draw("check", s.split, s.index)
            present = s.categories
            absent = [c for c in world.CATEGORIES if c not in present]
            near = [c for c in world.CONTEXTS[s.context] if c not in present] or absent
            for _ in range(3):
                kinds += [("both", yes), ("random", no), ("companions", no)]
                asked = (draw.choice(present), draw.choice(absent), draw.choice(near))
                rows.append(coder.row([(text.question(c), "no") for c in asked]))
        # Three rows per picture: the picture is repeated, which keeps rows short.
        images = torch.from_numpy(np.stack([pixels(s, settings.image_size) for s in part])).to(device)
        batch = {k: v.to(device) for k, v in coder.batch(rows).items()}
        repeated = normalise(images).repeat_interleave(3, 0)
        logits = model(
            input_ids=batch["input_ids"],
            pixel_values=repeated,
            attention_mask=attention_mask(batch["segments"]),
            position_ids=batch["position_ids"],
        ).logits[:, :-1]
        at = batch["labels"][:, 1:] == no
        answers = (logits[at][:, yes] > logits[at][:, no]).tolist()
        for (kind, wanted), answer in zip(kinds, answers, strict=True):
            for k in right if kind == "both" else (kind,):
                right[k].append(answer == (wanted == yes))
            said_yes += [answer] * (2 if kind == "both" else 1)
        prompt = coder.row([(text.CAPTION_PROMPTS[0], "")])[0][:-1]
        ids = torch.tensor([prompt] * len(part), device=device)
        out = model.generate(  # type: ignore[misc]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=normalise(images),
            max_new_tokens=48,
            do_sample=False,
            pad_token_id=0,
        )
        for s, tokens in zip(part, out[:, ids.shape[1] :].tolist(), strict=True):
            words = {coder.tokenizer.decode([t]) for t in tokens} & set(world.CATEGORIES)
            objects += len(s.categories)
            named += len(words)
            found += len(words & set(s.categories))
            false += [c in world.CONTEXTS[s.context] for c in words - set(s.categories)]
            for o in s.objects:
                seen[o.evidence].append(o.category in words)
    model.train()
    return {
        "pope_random": float(np.mean(right["random"])),
        "pope_companions": float(np.mean(right["companions"])),
        "yes": float(np.mean(said_yes)),
        "recall": found / objects,
        "chair_i": len(false) / max(named, 1),
        "companions": sum(false) / max(len(false), 1),
        **{f"named_{kind}": sum(v) / max(len(v), 1) for kind, v in seen.items()},
    }


# --- the run


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint so that a crash leaves the old or the new one, never half of one."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def run_stage(
    stage: str,
    model: LlavaForConditionalGeneration,
    settings: Settings,
    folder: Path,
    *,
    resume: dict[str, Any] | None = None,
    workers: int = 1,
    stop_at: int | None = None,
    save_minutes: float = 4.0,
    check_every: int = 0,
    log_every: int = 50,
) -> None:
    """Train one stage in place and write `folder/checkpoint.pt` (every `save_minutes`, and at the end).

    `resume`: a checkpoint of this stage. `stop_at` leaves after that many steps, as an interruption would.
    """
    from tqdm import tqdm

    number = STAGES.index(stage)
    steps, rate = settings.steps[number], settings.rate[number]
    device = next(model.parameters()).device
    coder = Coder(1)
    classes = [coder.ids(w)[0] for w in (text.BACKGROUND, *world.CATEGORIES)]
    class_ids = torch.tensor(classes, device=device)
    yes_no = torch.tensor([coder.ids(w)[0] for w in ("yes", "no")], device=device)
    tuned = optimizers(model, rate)
    together = distributed.is_available() and distributed.is_initialized()
    part, parts = (distributed.get_rank(), distributed.get_world_size()) if together else (0, 1)
    first = 0
    if resume is not None:
        first = resume["step"]
        for optimizer, state in zip(tuned, resume["optimizers"], strict=True):
            optimizer.load_state_dict(state)
    last = min(steps, stop_at or steps)
    loader = torch.utils.data.DataLoader(
        Batches(stage, settings, part, parts),
        batch_size=None,
        sampler=range(first, last),
        num_workers=workers,
        prefetch_factor=6 if workers else None,
    )
    model.train()
    saved = time.monotonic()

    def checkpoint(step: int) -> None:
        if part:
            return
        state = {"stage": stage, "step": step, "settings": asdict(settings), "model": model.state_dict()}
        save(folder / "checkpoint.pt", state | {"optimizers": [o.state_dict() for o in tuned]})

    bar = tqdm(loader, initial=first, total=steps, desc=stage, mininterval=5, disable=part > 0)
    step, seconds = first, time.monotonic()
    try:
        for batch in bar:
            batch = {k: v.to(device) for k, v in batch.items()}
            frozen = stage == "language" and step < settings.unfreeze * steps
            model.model.vision_tower.requires_grad_(not frozen)
            for optimizer in tuned:
                for group in optimizer.param_groups:
                    group["lr"] = rate * rate_factor(step, steps)
            with torch.autocast(device.type, dtype=torch.bfloat16):
                if stage == "language":
                    loss, figures = language_loss(model, batch, yes_no)
                else:
                    loss, figures = patch_loss(model, batch, class_ids, 0.01 if stage == "align" else 0.0)
            loss.backward()
            if together:
                share_gradients(model)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in tuned:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step += 1
            if step % log_every == 0 and part == 0:
                figures |= {"loss": loss.item(), "seconds": time.monotonic() - seconds}
                bar.set_postfix({k: f"{v:.3f}" for k, v in figures.items() if k != "seconds"}, refresh=False)
                if check_every and stage == "language" and step % check_every == 0:
                    figures |= quick_check(model, settings)
                with open(folder / "log.jsonl", "a") as log:
                    log.write(json.dumps({"stage": stage, "step": step} | figures) + "\n")
            if time.monotonic() - saved > 60 * save_minutes:
                checkpoint(step)
                saved = time.monotonic()
    finally:
        model.model.vision_tower.requires_grad_(True)
        checkpoint(step)


def export(model: LlavaForConditionalGeneration, settings: Settings, path: Path) -> None:
    """Write an ordinary Hugging Face folder: weights, config, processor, tokenizer, chat template.

    The weights are stored in bfloat16, half the size; the config says float32, which is what they load as.
    """
    model.generation_config.max_new_tokens = 64
    copy = build_model(settings)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = model.generation_config
    copy.bfloat16().save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        part["dtype"] = "float32"
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (path / "model.safetensors").chmod(0o644)
    text.build_processor(settings.image_size).save_pretrained(path)


def train(
    settings: Settings,
    folder: Path,
    stages: Sequence[str] = STAGES,
    *,
    resume: bool = False,
    **run: Any,
) -> LlavaForConditionalGeneration:
    """Run stages one after the other and return the model; `resume` goes on from `folder/checkpoint.pt`.

    Without `resume`, a first stage other than "tower" starts from the checkpoint too, at its own step 0.
    Raises `FileNotFoundError` when a checkpoint is needed and missing.
    """
    stages = tuple(stages)
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    device = torch.device(accelerator.type, torch.accelerator.current_device_index()) if accelerator else "cpu"
    model = build_model(settings).to(device)  # type: ignore[arg-type]
    state = None
    if resume or stages[0] != STAGES[0]:
        state = torch.load(folder / "checkpoint.pt", map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
    if resume and state is not None and state["stage"] in stages:
        stages = stages[stages.index(state["stage"]) :]
    for i, stage in enumerate(stages):
        going_on = state if resume and i == 0 and state is not None and state["stage"] == stage else None
        run_stage(stage, model, settings, folder, resume=going_on, **run)
    return model


def main() -> None:
    """Command line entry."""
    default = Settings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--out", type=Path, help="folder of checkpoint, log and finished model")
    action.add_argument("--look", type=Path, metavar="MODEL", help="do not train: look at a finished model")
    parser.add_argument("--stage", choices=("all", *STAGES), nargs="+", default=["all"])
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    for name, kind in (("steps", int), ("batch", int), ("rate", float)):
        parser.add_argument(
            f"--{name}",
            type=kind,
            nargs=3,
            default=getattr(default, name),
            metavar=("TOWER", "ALIGN", "LANGUAGE"),
        )
    parser.add_argument("--unfreeze", type=float, default=default.unfreeze, help="share of language steps")
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--threads", type=int, default=0, help="torch threads (default: torch's own)")
    parser.add_argument("--check-every", type=int, default=500, help="language steps between looks; 0 for none")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw scenes")
    a = parser.parse_args()
    together = "WORLD_SIZE" in os.environ
    if together:
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill saves a checkpoint, like Ctrl-C
    if a.threads:
        torch.set_num_threads(a.threads)
    if a.look:
        finished = LlavaForConditionalGeneration.from_pretrained(a.look)
        print(json.dumps(quick_check(finished, default, scenes=500), indent=1))
        return
    settings = Settings(tuple(a.steps), tuple(a.batch), tuple(a.rate), unfreeze=a.unfreeze, seed=a.seed)
    stages = STAGES if "all" in a.stage else tuple(a.stage)
    model = train(settings, a.out, stages, resume=a.resume, check_every=a.check_every, workers=a.workers)
    if stages[-1] == "language" and not (together and distributed.get_rank()):
        export(model, settings, a.out / "model")


if __name__ == "__main__":
    main()
