# SPDX-License-Identifier: Apache-2.0
"""Profiles of heads, as `duo` and `razor` read them: gates trained on passkeys, echo and induction scores of a probe.

    vlm-attn calibrate MODEL --method duo --method razor -o preset.json

Duo (arXiv 2410.10819): a gate per KV head mixes full and streaming attention; only the gates are trained, so that the last
hidden states of passkeys that are repeated stay what full attention makes of them, at a price for every open gate. Deviations:
passkeys stand among random words, not in books; the learning rate is constant, the released one rises and falls; and whether
its price is on the mean of the gates or on their sum could not be seen.

Razor (arXiv 2407.15891): random words, four times over; a head's echo score is what a word pays its earlier copies, its
induction score what it pays the words behind those.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vlm_attn.attention import ROWS_AT_ONCE
from vlm_attn.branch import answered
from vlm_attn.call import Call
from vlm_attn.evals.coco import CocoDataset
from vlm_attn.evals.prompts import build_inputs
from vlm_attn.heads import Seen, View, first_columns, streams
from vlm_attn.kernels import attention_rows
from vlm_attn.patching import engine_of, patched
from vlm_attn.visual_token_ops import Duo
from vlm_attn.visual_token_ops.retrieval import Box, visual_retrieval_heads

PRICE = 0.05  # of an open gate, on the mean of the gates
RATE = 0.02
STEPS = 200  # the paper trains 2000, on texts of up to 32k
PASSKEYS, DIGITS = 10, 4  # how many there are, and of how many words
SINK, RECENT = 128, 256  # while training, where the text is long enough
PROBE, COPIES = 2500, 4  # random words, and how often they come


def words(model: Any, processor: Any) -> Tensor:
    """Ids of the vocabulary that are words: no special tokens."""
    tokenizer = processor.tokenizer
    size = model.get_input_embeddings().weight.shape[0]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return torch.tensor(sorted(i for i in tokenizer.get_vocab().values() if i < size and i not in special))


def room(model: Any) -> int:
    """Columns that the language model has positions for."""
    return int(model.config.get_text_config(decoder=True).max_position_embeddings)


# Duo


@dataclass(frozen=True, kw_only=True)
class _Gated(Duo):
    """Mixes full and streaming attention by gates that are being trained: ``[L, G]``, the only entry of ``trained``."""

    trained: list[Tensor] = field(default_factory=list)

    @property
    def neutral(self) -> bool:
        return False

    def sees(self, call: Call, view: View) -> Seen:
        gate = view.heads.own(self.trained[0][view.layer], 0)
        visible = streams(view, first_columns(call, self, view.key.device), self.sink, self.recent)
        return Seen(visible, plain=gate.repeat_interleave(view.group).to(view.query))


def passkeys(vocabulary: Tensor, length: int, generator: torch.Generator) -> tuple[list[int], int]:
    """Random words with passkeys among them, which are repeated at the end.

    Args:
        vocabulary: ids to draw from.
        length: number of words, the repetition counted.
        generator: of the draw.

    Returns:
        the ids, and how many of them, at the end, repeat the passkeys.

    Raises:
        ValueError: ``length`` has no room for the passkeys twice.
    """
    count = PASSKEYS * DIGITS
    if length < 3 * count:
        raise ValueError(
            f"{length} words have no room for {PASSKEYS} passkeys of {DIGITS} words: {3 * count} are needed"
        )

    def draw(n: int) -> Tensor:
        return vocabulary[torch.randint(len(vocabulary), (n,), generator=generator)]

    keys, filler = draw(count), draw(length - 2 * count)
    cuts = torch.randint(len(filler) + 1, (PASSKEYS,), generator=generator).sort().values.tolist()
    text, before = [], 0
    for number, cut in enumerate(cuts):
        text += [filler[before:cut], keys[number * DIGITS : (number + 1) * DIGITS]]
        before = cut
    return torch.cat([*text, filler[before:], keys]).tolist(), count


def train_gates(
    model: Any, processor: Any, dataset: CocoDataset, *, steps: int = STEPS, length: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """Gates of every KV head: pictures, and behind each a text with passkeys.

    Args:
        model: an unpatched model; its weights do not change.
        processor: its processor.
        dataset: the pictures.
        steps: number of texts, one after the other.
        length: words behind the picture; None = 1024, or half of what the model has positions for.
        seed: of the texts.

    Returns:
        ``gates [L][G]``, the ``sink`` and ``recent`` they were trained with, and ``loss``: the mean distance of the
        first and of the last tenth of the steps, with all gates of the first step open.

    Raises:
        ValueError: a length without room for the passkeys.
    """
    text = model.config.get_text_config(decoder=True)
    length = min(1024, room(model) // 2) if length is None else length
    sink, recent = min(SINK, length // 16), min(RECENT, length // 8)
    generator, vocabulary = torch.Generator().manual_seed(seed), words(model, processor)
    size = (text.num_hidden_layers, getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
    gates = torch.ones(size, device=model.device, requires_grad=True)
    method = _Gated(gates=((1.0,) * size[1],) * size[0], sink=sink, recent=recent, mode="mask", trained=[gates])
    optimiser = torch.optim.AdamW([gates], lr=RATE, weight_decay=0.0)
    frozen = [p for p in model.parameters() if p.requires_grad]
    distances: list[float] = []
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        with patched(model, method, processor=processor), torch.enable_grad():
            for step in range(steps):
                image = dataset.load_image(dataset.image_ids[step % len(dataset.image_ids)])
                ids, labels = passkeys(vocabulary, length, generator)
                prompt = dict(build_inputs(model, processor, [image], [""]))
                inputs = answered(prompt, torch.tensor([ids], device=model.device))
                options = {"output_hidden_states": True, "use_cache": False, "logits_to_keep": 1}
                with engine_of(model).aside(), torch.no_grad():
                    wanted = model(**inputs, **options).hidden_states[-1][:, -labels:].float()
                got = model(**inputs, **options).hidden_states[-1][:, -labels:].float()
                distance = (got - wanted).square().mean()
                optimiser.zero_grad()
                (distance + PRICE * gates.abs().mean()).backward()
                optimiser.step()
                with torch.no_grad():
                    gates.clamp_(0, 1)
                distances.append(float(distance.detach()))
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    tenth = max(1, steps // 10)
    return {
        "gates": [[round(gate, 4) for gate in row] for row in gates.detach().cpu().tolist()],
        "sink": sink,
        "recent": recent,
        "loss": (sum(distances[:tenth]) / tenth, sum(distances[-tenth:]) / tenth),
    }


# Razor


@dataclass(frozen=True, kw_only=True)
class _Probe(Duo):
    """Reads what every word pays its earlier copies, and the words behind them."""

    period: int = 1
    found: dict[int, Tensor] = field(default_factory=dict)

    @property
    def neutral(self) -> bool:
        return False

    def sees(self, call: Call, view: View) -> None:
        total = view.query.shape[2]
        sums = torch.zeros(2, view.query.shape[1], device=view.query.device)
        for part in torch.arange(self.period, total, device=view.query.device).split(ROWS_AT_ONCE):
            allowed = view.allowed[:, :, part[0] : part[-1] + 1]
            query = view.query[:, :, part[0] : part[-1] + 1]
            paid = attention_rows(query, view.key, mask=allowed, scale=view.scale, softcap=view.softcap)[0]  # [H, R, S]
            for times in range(1, -(-total // self.period)):
                for shift in range(2):
                    column = part - times * self.period
                    value = paid.gather(2, (column + shift).clamp_min(0)[None, :, None].expand(len(paid), -1, 1))
                    sums[shift] += (value[..., 0] * (column >= 0)).sum(-1)
        self.found[view.layer] = view.heads.all(sums / (total - self.period))


def copy_scores(model: Any, processor: Any, *, length: int | None = None, seed: int = 0) -> dict[str, Any]:
    """Echo and induction scores of every head, on random words that come four times.

    Args:
        model: an unpatched model.
        processor: its processor.
        length: words; None = 2500, or what four copies have room for.
        seed: of the words.

    Returns:
        ``echo`` and ``induction``, each ``[L][H]``: mean over the words of later copies of the attention to all earlier
        copies, and to the words behind those; 0 in layers without attention or with a sliding window. And ``length``.
    """
    text = model.config.get_text_config(decoder=True)
    length = min(PROBE, room(model) // COPIES) if length is None else length
    vocabulary = words(model, processor)
    drawn = vocabulary[torch.randint(len(vocabulary), (length,), generator=torch.Generator().manual_seed(seed))]
    ids = drawn.repeat(COPIES)[None].to(model.device)
    size = (text.num_hidden_layers, getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
    probe = _Probe(gates=((1.0,) * size[1],) * size[0], mode="mask", period=length)
    with patched(model, probe), torch.no_grad():
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    none = torch.zeros(2, text.num_attention_heads)
    scores = torch.stack([probe.found.get(layer, none).cpu() for layer in range(size[0])], 1)  # [2, L, H]
    echo, induction = ([[round(x, 4) for x in row] for row in table] for table in scores.tolist())
    return {"echo": echo, "induction": induction, "length": length}


# Which heads look at what they name


def visual_profile(
    model: Any, processor: Any, dataset: CocoDataset, *, limit: int, prompt: str, tokens: int = 64
) -> dict[str, Any]:
    """Visual retrieval heads over a model's own captions: at words that name an object of the picture, does a head look at it?

    Args:
        model: an unpatched model.
        processor: its processor.
        dataset: pictures with objects and their boxes.
        limit: number of pictures.
        prompt: what asks for a caption.
        tokens: length of a caption.

    Returns:
        ``score [L][H]``: share of the mentions at which the image token that a head looks at most lies in the object's box;
        ``mass [L][H]``: mean attention to the image then; ``mentions``, their number; ``chance``: mean share of the picture
        that the boxes cover.

    Raises:
        ValueError: no caption names an object that is there.
    """
    totals: list[Tensor] = []
    count, area = 0, 0.0
    for number in dataset.image_ids[:limit]:
        image = dataset.load_image(number)
        inputs = build_inputs(model, processor, [image], [prompt])
        with torch.inference_mode():
            out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        answer = out[0, inputs["input_ids"].shape[1] :].tolist()
        boxes: dict[str, Box] = {}
        for name, (x, y, w, h) in dataset.boxes(number):
            box = (x / image.width, y / image.height, (x + w) / image.width, (y + h) / image.height)
            boxes.setdefault(name, box)
        spoken = [processor.tokenizer.decode([token]).strip().lower() for token in answer]
        mentions = [(step, boxes[word]) for step, word in enumerate(spoken) if word in boxes]
        if not mentions:
            continue
        found = visual_retrieval_heads(model, inputs, answer, mentions)
        totals.append(torch.stack(found) * len(mentions))
        count += len(mentions)
        area += sum((right - left) * (low - high) for _, (left, high, right, low) in mentions)
    if not count:
        raise ValueError(f"none of {limit} captions names an object that is there, as one word: take more pictures")
    score, mass = (torch.stack(totals).sum(0) / count).tolist()
    return {"score": score, "mass": mass, "mentions": count, "chance": area / count}


# What calibrate takes


def duo(model: Any, processor: Any, dataset: CocoDataset, steps: int) -> tuple[dict[str, Any], str]:
    """Constants of `duo`, and why."""
    found = train_gates(model, processor, dataset, steps=steps)
    first, last = found.pop("loss")
    return found, (
        f"gates trained for {steps} steps (Adam, {RATE}; {PRICE} times their mean), streaming heads with a sink of "
        f"{found['sink']} and the latest {found['recent']} columns: distance of the passkeys' hidden states {first:.3g} at "
        f"first, {last:.3g} at last"
    )


def razor(model: Any, processor: Any, dataset: CocoDataset, steps: int) -> tuple[dict[str, Any], str]:
    """Constants of `razor`, and why."""
    found = copy_scores(model, processor)
    return (
        found,
        f"attention to earlier copies and to what follows them, of {found.pop('length')} random words, {COPIES} times",
    )


PROFILES = {"duo": duo, "razor": razor}
