# SPDX-License-Identifier: Apache-2.0
"""Train the scenes model: `python -m vlm_attn.evals.scenes.train --out DIR`.

Three stages, each with a constant learning rate that falls to zero over the last fifth of its steps:

1. `tower`: tower, projector and word embeddings on patch labels. Every patch's projected feature is classified
   against the embeddings of the category words.
2. `align`: the same, and the feature is also pulled to the embedding of its word. Without an aligned projector
   the language model does not learn to answer yes/no questions in this budget.
3. `language`: captions and questions, the tower frozen (or until `--unfreeze` of the steps are done).

Variants of the language stage: `--mask` says who may attend to whom (causal; mma: image tokens also see the question
behind them; prefix-lm: the whole prompt sees itself; vision-block: the image sees itself; full: all see all, for
masked diffusion), `--objective masked-diffusion` trains to fill in masked answers instead of the next token, and
`--start MODEL` begins from a finished model (`scenes` is the bundled one). Where image tokens see the question every
turn is a row of its own.

Batches are a function of seed, stage and step, so a resumed run goes on as if it had not stopped. To end a stage
early, resume it with `--steps` of about 1.25 times the steps done: the rate then falls from there. Only scenes of
the train split are learned from; the figures printed on the way are of validation scenes.

`torchrun --nproc-per-node N -m vlm_attn.evals.scenes.train ...` splits every batch over N processes. On a CPU that
others use too, one single-threaded process per core (`--threads 1`) is faster than one process with many threads.

`vlm-attn scenes train --language smollm2` trains `scenes-smol` instead; its `--help` has the options.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from PIL import Image
from torch import distributed, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from vlm_attn import host
from vlm_attn.kernels import Group, masks

from . import model_path, text, world

STAGES = ("tower", "align", "language")
# Scene indices of the stages do not overlap.
_FIRST_SCENE = {"tower": 0, "align": 40_000_000, "language": 80_000_000}
MASKS = {
    "causal": masks.causal,
    "mma": masks.modality_mutual,
    "prefix-lm": masks.prefix_lm,
    "vision-block": masks.vision_block,
    "full": masks.full,  # masked-diffusion only: next tokens would be in sight
}
OBJECTIVES = ("ar", "masked-diffusion")


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
    mask: str = "causal"
    objective: str = "ar"
    one_turn: bool = False  # every turn a row of its own; always so where the mask lets the image see the question
    canvas: int = 32  # masked-diffusion: longest answer, filled up with end tokens

    def __post_init__(self):
        for name, known in (("mask", MASKS), ("objective", OBJECTIVES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}: there are {', '.join(known)}")
        if self.mask == "full" and self.objective == "ar":
            raise ValueError("mask='full' shows the next tokens: it goes with objective='masked-diffusion' only")
        if self.mask in ("mma", "prefix-lm", "full"):  # keys and values of the image then hold one question
            object.__setattr__(self, "one_turn", True)

    @property
    def visual_tokens(self) -> int:
        """Number of image tokens."""
        return (self.image_size // 14) ** 2


def build_model(settings: Settings) -> LlavaForConditionalGeneration:
    """Return the untrained model: a CLIP-type tower and a Llama-type language model of the same width."""
    diffusion = settings.objective == "masked-diffusion"
    tokens = text.vocabulary(mask_token=diffusion)
    width = settings.width
    # So that a finished folder says how it has to be run.
    trained: dict[str, Any] = {"trained_mask": settings.mask} if settings.mask != "causal" else {}
    if diffusion:
        trained |= {"trained_objective": settings.objective, "mask_token_id": tokens.index("<mask>")}
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
            image_seq_length=settings.visual_tokens,
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
            tie_word_embeddings=False,
            **trained,
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


@dataclass
class Row:
    """A conversation about one picture as token columns; all lists have one entry per column."""

    ids: list[int]
    labels: list[int]  # the id where the model is to learn it, else -100
    positions: list[int]
    segments: list[int]  # a column sees its own segment and segment 0
    groups: list[int]  # of `vlm_attn.kernels.Group`


class Coder:
    """Turns conversations into padded token batches.

    Args:
        visual_tokens: image tokens of a picture.
        mask_token: whether the vocabulary has a mask token, which masked-diffusion training needs.
    """

    def __init__(self, visual_tokens: int, mask_token: bool = False):
        self.tokenizer = text.build_tokenizer(mask_token)
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
        self,
        turns: Sequence[tuple[str, str | None]],
        *,
        apart: bool = True,
        system: str = "",
        lengths: Sequence[int] | None = None,
    ) -> Row:
        """Return one conversation.

        With `apart` every turn sees the picture and itself alone, at the positions of a first turn: many
        questions for the price of one picture, and no answer read off another. Otherwise it is one long
        conversation. Segment 0 is what all turns see; a single turn is segment 0 altogether.

        Args:
            turns: (prompt, answer); an answer of None is left open, as for generating.
            apart: see above.
            system: text in front of the picture.
            lengths: of the answers, which are filled up with end tokens.
        """
        ids = self.ids(f"<s>{system} USER:") + [self.tokenizer.image_token_id] * self.visual_tokens
        start = len(ids)
        first_turn = [int(Group.SYSTEM)] * (start - self.visual_tokens) + [int(Group.VISUAL)] * self.visual_tokens
        out = Row(ids, [-100] * start, list(range(start)), [0] * start, first_turn)
        for i, (prompt, answer) in enumerate(turns):
            lead = self.ids("USER:") if i and not apart else []
            asked, role = self.ids(prompt), self.ids("ASSISTANT:")
            said = [] if answer is None else self.ids(f"{answer}</s>")
            if lengths is not None:
                said = said + [self.tokenizer.eos_token_id] * (lengths[i] - len(said))
            # The question of a later turn stands behind an answer: to the picture it is text like any other.
            question = Group.SYSTEM if i and not apart else Group.QUERY
            size = len(lead) + len(asked) + len(role)
            first = start if apart else len(out.ids)
            out.ids += lead + asked + role + said
            out.labels += [-100] * size + said
            out.positions += range(first, first + size + len(said))
            out.segments += [0 if len(turns) == 1 else i + 1 if apart else 1] * (size + len(said))
            out.groups += [int(Group.SYSTEM)] * len(lead) + [int(question)] * len(asked)
            out.groups += [int(Group.ROLE)] * len(role) + [int(Group.GENERATED)] * len(said)
        return out

    def batch(self, rows: Sequence[Row], left: bool = False) -> dict[str, torch.Tensor]:
        """Stack rows, padded on the right or on the left: five int64 tensors `[rows, length]`."""
        length = max(len(r.ids) for r in rows)
        fills = {"ids": 0, "labels": -100, "positions": 0, "segments": -1, "groups": int(Group.PAD)}
        out = {}
        for name, fill in fills.items():
            pads = [[fill] * (length - len(r.ids)) for r in rows]
            lists = [getattr(r, name) for r in rows]
            out[name] = torch.tensor([p + x if left else x + p for p, x in zip(pads, lists, strict=True)])
        return out


def attention_mask(
    segments: torch.Tensor, groups: torch.Tensor, mask: str = "causal", objective: str = "ar"
) -> torch.Tensor:
    """Return who sees whom as bool `[B, 1, L, L]`.

    Args:
        segments: `[B, L]`, see `Row`.
        groups: `[B, L]`, see `Row`.
        mask: a key of `MASKS`.
        objective: with "masked-diffusion" the rows of an answer also see the rest of it.
    """
    rule = MASKS[mask]
    if objective == "masked-diffusion":
        rule = rule | masks.pairs([Group.GENERATED], [Group.GENERATED])
    same = (segments[:, :, None] == segments[:, None, :]) | (segments[:, None, :] == 0)
    seen = masks.materialise(rule, groups) & same[:, None]
    # Padding on the left would see nothing at all, and give NaN: it sees itself.
    return seen | torch.eye(seen.shape[-1], dtype=torch.bool, device=seen.device)


def hide(row: Row, mask_token: int, draw: world.Draw) -> tuple[list[int], list[float]]:
    """Mask answers for masked-diffusion training: LLaDA's forward process (arXiv 2502.09992), turn by turn.

    Every turn draws a ratio t from U(0, 1) and masks each token of its answer with this probability. A masked token
    counts 1 / t, over the length of the answer: in the mean over draws every answer counts 1 per token.

    Returns:
        ids with masks, and the weights of all columns (0 where nothing is masked).
    """
    ids, weights = list(row.ids), [0.0] * len(row.ids)
    answers: dict[int, list[int]] = {}
    for column, label in enumerate(row.labels):
        if label != -100:
            answers.setdefault(row.segments[column], []).append(column)
    for columns in answers.values():
        ratio = draw.uniform(1e-3, 1.0)
        for column in columns:
            if draw.chance(ratio):
                ids[column], weights[column] = mask_token, 1.0 / (ratio * len(columns))
    return ids, weights


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
        settings = self.settings
        first = _FIRST_SCENE[self.stage] + settings.seed * 1_000_000_000 + step * self.size
        scenes = [world.scene("train", first + i) for i in range(self.part, self.size, self.parts)]
        out: dict[str, torch.Tensor] = {}
        out["pixels"] = torch.from_numpy(np.stack([pixels(s, settings.image_size) for s in scenes]))
        if self.stage != "language":
            out["patches"] = torch.from_numpy(np.stack([patch_labels(s, self.grid) for s in scenes]))
            return out
        diffusion = settings.objective == "masked-diffusion"
        self.coder = self.coder or Coder(settings.visual_tokens, diffusion)
        rows: list[Row] = []
        pictures: list[int] = []
        hidden: list[tuple[list[int], list[float]]] = []
        for i, s in enumerate(scenes):
            draw = world.Draw("conversation", s.split, s.index)
            system = text.SYSTEM if draw.chance(0.1) else ""
            # A quarter are real conversations, so that later turns work too.
            apart = draw.chance(0.75) or diffusion
            turns = text.training_turns(s, settings.questions)
            for part in [[turn] for turn in turns] if settings.one_turn else [turns]:
                lengths = [self._length(answer, draw) for _, answer in part] if diffusion else None
                rows.append(self.coder.row(part, apart=apart, system=system, lengths=lengths))
                pictures.append(i)
                if diffusion:
                    hidden.append(hide(rows[-1], self.coder.tokenizer.mask_token_id, draw))
        batch = self.coder.batch(rows)
        if diffusion:
            length = batch["ids"].shape[1]
            batch["ids"] = torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in hidden])
            batch["weights"] = torch.tensor([w + [0.0] * (length - len(w)) for _, w in hidden])
        return out | batch | {"pictures": torch.tensor(pictures)}

    def _length(self, answer: str, draw: world.Draw) -> int:
        """A power of two that holds the answer and is at most the canvas: so that any canvas can be asked for."""
        assert self.coder is not None
        size = len(self.coder.ids(f"{answer}</s>"))
        lengths = [2**k for k in range(12) if size <= 2**k <= self.settings.canvas]
        return draw.choice(lengths) if lengths else size


def normalise(images: torch.Tensor) -> torch.Tensor:
    """Return uint8 `[B, H, W, 3]` as the processor's float32 `[B, 3, H, W]`."""
    return images.permute(0, 3, 1, 2).float().div(255).sub(0.5).div(0.25)


# --- losses


def patch_loss(
    model: LlavaForConditionalGeneration, batch: dict[str, torch.Tensor], classes: torch.Tensor, pull: float
) -> tuple[torch.Tensor, dict[str, float]]:
    """Cross-entropy of patches against the word embeddings of `classes`, plus `pull` x squared distance."""
    features = image_features(model, batch["pixels"]).float().flatten(0, 1)
    words = model.model.language_model.embed_tokens.weight[classes].float()
    logits, wanted = features @ words.T / 3, batch["patches"].flatten()
    loss = F.cross_entropy(logits, wanted)
    if pull:
        loss = loss + pull * (features - words[wanted]).pow(2).mean()
    found = (logits.argmax(-1) == wanted)[wanted > 0]
    return loss, {"patches_right": found.float().mean().item()}


def image_features(model: LlavaForConditionalGeneration, images: torch.Tensor) -> torch.Tensor:
    """Return what the language model gets of uint8 pictures `[B, H, W, 3]`: `[B, tokens, width]`."""
    hidden = model.model.vision_tower(pixel_values=normalise(images)).last_hidden_state[:, 1:]
    return model.model.multi_modal_projector(hidden)


def embeddings(
    model: LlavaForConditionalGeneration, ids: torch.Tensor, features: torch.Tensor, pictures: torch.Tensor
) -> torch.Tensor:
    """Return the input of the language model `[B, L, width]`; `pictures` `[B]` says which features a row gets."""
    out = model.model.language_model.embed_tokens(ids)
    out[ids == model.config.image_token_id] = features[pictures].flatten(0, 1).to(out.dtype)
    return out


def language_loss(
    model: LlavaForConditionalGeneration, batch: dict[str, torch.Tensor], yes_no: torch.Tensor, settings: Settings
) -> tuple[torch.Tensor, dict[str, float]]:
    """Loss of the answers; reports the share of right yes/no answers.

    "ar": mean cross-entropy of the next token. "masked-diffusion": cross-entropy of the masked tokens at their own
    place, weighted as `hide` says, mean over the answers.
    """
    hidden = model.model.language_model(
        inputs_embeds=embeddings(model, batch["ids"], image_features(model, batch["pixels"]), batch["pictures"]),
        attention_mask=attention_mask(batch["segments"], batch["groups"], settings.mask, settings.objective),
        position_ids=batch["positions"],
        use_cache=False,
    ).last_hidden_state
    if settings.objective == "ar":
        wanted, hidden = batch["labels"][:, 1:], hidden[:, :-1]
        learned = wanted != -100
        logits, wanted = model.lm_head(hidden[learned]).float(), wanted[learned]
        loss = F.cross_entropy(logits, wanted)
    else:
        learned = batch["weights"] > 0
        logits, wanted = model.lm_head(hidden[learned]).float(), batch["labels"][learned]
        # The first answer token of every turn is one that follows a column without a label.
        answers = ((batch["labels"] != -100) & (batch["labels"].roll(1, 1) == -100)).sum()
        loss = (F.cross_entropy(logits, wanted, reduction="none") * batch["weights"][learned]).sum() / answers
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
def greedy(
    model: LlavaForConditionalGeneration,
    coder: Coder,
    images: torch.Tensor,
    asked: Sequence[tuple[int, str]],
    *,
    mask: str = "causal",
    max_new_tokens: int = 48,
) -> list[list[int]]:
    """Greedy answers under any of `MASKS`: the prompt runs with the mask, what is generated sees all before it.

    transformers' own `generate` cannot be given a mask of the prompt; for "causal" this says the same.

    Args:
        model: the model.
        coder: of its tokens.
        images: uint8 `[n, H, W, 3]`.
        asked: (index of the picture, prompt).
        mask: the mask the model was trained with.
        max_new_tokens: length limit.

    Returns:
        Per prompt the generated ids up to the end token, which is left out.
    """
    device = next(model.parameters()).device
    batch = coder.batch([coder.row([(prompt, None)]) for _, prompt in asked], left=True)
    batch = {k: v.to(device) for k, v in batch.items()}
    pictures = torch.tensor([i for i, _ in asked], device=device)
    seen = (batch["groups"] != Group.PAD).long()
    positions, end = batch["positions"], coder.tokenizer.eos_token_id
    out = model.model.language_model(
        inputs_embeds=embeddings(model, batch["ids"], image_features(model, images.to(device)), pictures),
        attention_mask=attention_mask(batch["segments"], batch["groups"], mask),
        position_ids=positions,
        use_cache=True,
    )
    tokens: list[torch.Tensor] = []
    going = torch.ones(len(asked), dtype=torch.bool, device=device)
    while True:
        token = model.lm_head(out.last_hidden_state[:, -1]).argmax(-1)
        tokens.append(token.where(going, end))
        going = going & (token != end)
        if len(tokens) == max_new_tokens or not going.any():
            break
        seen = F.pad(seen, (0, 1), value=1)
        positions = positions[:, -1:] + 1
        out = model.model.language_model(
            input_ids=token[:, None],
            attention_mask=seen,
            position_ids=positions,
            use_cache=True,
            **host.with_cache({}, host.cache_of(out)),
        )
    said = torch.stack(tokens, 1).tolist()
    return [row[: row.index(end)] if end in row else row for row in said]


@torch.no_grad()
def quick_check(model: LlavaForConditionalGeneration, settings: Settings, scenes: int = 100) -> dict[str, float]:
    """Look at the first validation scenes: POPE-like accuracy, caption recall, and where captions go wrong.

    Quick, and with own questions; the figures to publish come from `vlm-attn eval`. `named_...` is the share of
    objects that captions name, by kind of evidence; `companions` the share of false objects that are usual
    companions of the scene.
    """
    coder = Coder(settings.visual_tokens)
    model.eval()
    todo = [world.scene("validation", i) for i in range(scenes)]
    yes, no = (coder.ids(w)[0] for w in ("yes", "no"))
    right: dict[str, list[bool]] = {"random": [], "companions": []}
    seen: dict[str, list[bool]] = {"clear": [], "small": [], "faint": [], "covered": []}
    said_yes, found, named, objects = [], 0, 0, 0
    false: list[bool] = []  # for every false object: is it a companion?
    for start in range(0, scenes, 50):
        part = todo[start : start + 50]
        asked: list[tuple[int, str]] = []
        kinds = []
        for i, s in enumerate(part):
            draw = world.Draw("check", s.split, s.index)
            present = s.categories
            absent = [c for c in world.CATEGORIES if c not in present]
            near = [c for c in world.CONTEXTS[s.context] if c not in present] or absent
            for _ in range(3):
                kinds += [("both", yes), ("random", no), ("companions", no)]
                asked += [(i, text.question(draw.choice(from_these))) for from_these in (present, absent, near)]
        images = torch.from_numpy(np.stack([pixels(s, settings.image_size) for s in part]))
        answers = greedy(model, coder, images, asked, mask=settings.mask, max_new_tokens=1)
        for (kind, wanted), answer in zip(kinds, answers, strict=True):
            for k in right if kind == "both" else (kind,):
                right[k].append(answer == [wanted])
            said_yes += [answer == [yes]] * (2 if kind == "both" else 1)
        captions = greedy(
            model, coder, images, [(i, text.CAPTION_PROMPTS[0]) for i in range(len(part))], mask=settings.mask
        )
        for s, tokens in zip(part, captions, strict=True):
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
                    loss, figures = language_loss(model, batch, yes_no, settings)
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
                looks = check_every and stage == "language" and settings.objective == "ar"
                if looks and step % check_every == 0:
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
    text.build_processor(settings.image_size, mask_token=settings.objective == "masked-diffusion").save_pretrained(path)


def load_weights(model: LlavaForConditionalGeneration, path: Path) -> None:
    """Put the weights of a finished model into `model`; rows of a larger vocabulary stay as they are.

    Raises `FileNotFoundError` when there is no model, `ValueError` when its shapes are others.
    """
    if not (path / "config.json").exists():
        raise FileNotFoundError(f"{path}: no finished model there (no config.json)")
    given = LlavaForConditionalGeneration.from_pretrained(path).state_dict()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            old = given.get(name)
            if old is None or old.shape[1:] != tensor.shape[1:] or len(old) > len(tensor):
                raise ValueError(f"{path}: {name} does not fit {list(tensor.shape)}")
            tensor[: len(old)] = old.to(tensor)


def check_settings(settings: Settings, earlier: dict[str, Any]) -> None:
    """Raise `ValueError` when a checkpoint's settings differ in more than steps and rates."""
    for name, value in asdict(settings).items():
        before = earlier.get(name, getattr(Settings, name))  # checkpoints of before a setting existed
        if name not in ("steps", "rate", "unfreeze") and before != value:
            raise ValueError(f"{name}={value!r}, but the checkpoint to resume was made with {before!r}")


def train(
    settings: Settings,
    folder: Path,
    stages: Sequence[str] = STAGES,
    *,
    resume: bool = False,
    start: Path | None = None,
    **run: Any,
) -> LlavaForConditionalGeneration:
    """Run stages one after the other and return the model; `resume` goes on from `folder/checkpoint.pt`.

    Args:
        settings: all that decides the result.
        folder: of checkpoint and log.
        stages: in order, some of `STAGES`.
        resume: go on where the checkpoint stands, with the same settings but for steps and rates.
        start: a finished model whose weights the first stage begins with. Without it and without `resume`, a first
            stage other than "tower" starts from the checkpoint, at its own step 0.
        **run: see `run_stage`.

    Raises:
        FileNotFoundError: a checkpoint or model is needed and missing.
        ValueError: the checkpoint to resume was made with other settings, or `start` has other shapes.
    """
    stages = tuple(stages)
    if resume and start is not None:
        raise ValueError("resume and start exclude each other: the checkpoint has weights of its own")
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    device = torch.device(accelerator.type, torch.accelerator.current_device_index()) if accelerator else "cpu"
    model = build_model(settings).to(device)  # type: ignore[arg-type]
    state = None
    if start is not None:
        load_weights(model, start)
    elif resume or stages[0] != STAGES[0]:
        if not (folder / "checkpoint.pt").exists():
            raise FileNotFoundError(f"{folder / 'checkpoint.pt'}: no checkpoint to go on from")
        state = torch.load(folder / "checkpoint.pt", map_location=device, weights_only=True)
        if resume:
            check_settings(settings, state["settings"])
        model.load_state_dict(state["model"])
    if resume and state is not None and state["stage"] in stages:
        stages = stages[stages.index(state["stage"]) :]
    for i, stage in enumerate(stages):
        going_on = state if resume and i == 0 and state is not None and state["stage"] == stage else None
        run_stage(stage, model, settings, folder, resume=going_on, **run)
    return model


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"Error: {message}\n")  # one line, without the usage


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Command line entry; `arguments` and the program's name default to the process's."""
    default = Settings()
    parser = _Parser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--out", type=Path, help="folder of checkpoint, log and finished model")
    action.add_argument("--look", type=Path, metavar="MODEL", help="do not train: look at a finished model")
    parser.add_argument("--stage", choices=("all", *STAGES), nargs="+", default=["all"])
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument(
        "--start", metavar="MODEL", help="begin with a finished model's weights; scenes: the bundled one"
    )
    for name, kind in (("steps", int), ("batch", int), ("rate", float)):
        parser.add_argument(
            f"--{name}",
            type=kind,
            nargs=3,
            default=getattr(default, name),
            metavar=("TOWER", "ALIGN", "LANGUAGE"),
        )
    parser.add_argument("--unfreeze", type=float, default=default.unfreeze, help="share of language steps")
    parser.add_argument("--mask", choices=tuple(MASKS), default=default.mask, help="who may attend to whom")
    parser.add_argument("--objective", choices=OBJECTIVES, default=default.objective)
    parser.add_argument("--one-turn", action="store_true", help="every turn a row of its own")
    parser.add_argument("--questions", type=int, default=default.questions, help="yes/no questions beside a caption")
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--threads", type=int, default=0, help="torch threads (default: torch's own)")
    parser.add_argument("--check-every", type=int, default=500, help="language steps between looks; 0 for none")
    parser.add_argument("--log-every", type=int, default=50, help="steps between lines of log.jsonl")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw scenes")
    a = parser.parse_args(arguments)
    together = "WORLD_SIZE" in os.environ
    if together:
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill saves a checkpoint, like Ctrl-C
    if a.threads:
        torch.set_num_threads(a.threads)
    if a.look:
        if not (a.look / "config.json").exists():
            raise FileNotFoundError(f"{a.look}: no finished model there (no config.json)")
        finished = LlavaForConditionalGeneration.from_pretrained(a.look)
        mask = getattr(finished.config, "trained_mask", default.mask)
        print(json.dumps(quick_check(finished, replace(default, mask=mask), scenes=500), indent=1))
        return
    settings = Settings(
        tuple(a.steps),
        tuple(a.batch),
        tuple(a.rate),
        unfreeze=a.unfreeze,
        seed=a.seed,
        mask=a.mask,
        objective=a.objective,
        one_turn=a.one_turn,
        questions=a.questions,
    )
    stages = STAGES if "all" in a.stage else tuple(a.stage)
    start = None if a.start is None else model_path() if a.start == "scenes" else Path(a.start)
    model = train(
        settings,
        a.out,
        stages,
        resume=a.resume,
        start=start,
        check_every=a.check_every,
        log_every=a.log_every,
        workers=a.workers,
    )
    if stages[-1] == "language" and not (together and distributed.get_rank()):
        export(model, settings, a.out / "model")


if __name__ == "__main__":
    main()
