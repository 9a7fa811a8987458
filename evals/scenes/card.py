# SPDX-License-Identifier: Apache-2.0
"""Every figure of the model card: `vlm-attn scenes card`.

Three parts, all on one split: POPE and CHAIR of the plain model by the same code as `vlm-attn eval`; where captions
go wrong and whether answers follow the picture; and how attention is spread.

Attention is read in one forward of the caption prompt with the first reference caption behind it, which names every
object (teacher forcing), so that the same words are looked at whatever the model would have said. A row that names an
object is the one in front of the object's word: it is the row that has to find it.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from vlm_attn.evals import chair, prompts, runner, specs, stats, tasks

from . import dataset, text, train, world

TAU = 20.0  # of the dimension rule, arXiv 2503.03321
COSINE = 0.9  # of the direction rule, arXiv 2512.22213


# --- answers


def quality(
    model: Any, processor: Any, split: str, *, limit: int | None = None, batch_size: int = 32, out: Path | None = None
) -> dict[str, Any]:
    """POPE and CHAIR of the plain model, and what false and missing objects have in common.

    Args:
        model: an unpatched model of the scenes world.
        processor: its processor.
        split: "validation" or "test".
        limit: number of scenes; default all 500.
        batch_size: rows of one `generate` call.
        out: folder of the samples; a stopped run goes on from there.

    Returns:
        `pope` and `chair` (metrics with intervals), `prompt`, `captions` (their number), `false_objects`, `named`,
        `by_sentence` and `exchanged`; for a model that also writes detailed captions all but `pope` again under
        `detailed`.
    """
    data = dataset(split)
    baseline = specs.parse_specs(["baseline"], [], None)
    styles = caption_styles(model)
    jobs = {"pope": tasks.pope_task(data, limit=limit)}
    for style, prompt in styles.items():
        tokens = 192 if style == "detailed" else 64
        jobs[style] = tasks.chair_task(data, limit=limit, max_new_tokens=tokens, prompt=prompt)
    records: dict[str, list[dict[str, Any]]] = {}
    metrics: dict[str, Any] = {}
    with TemporaryDirectory() as temporary:
        for name, task in jobs.items():
            folder = (out or Path(temporary)) / (task.name if len(styles) == 1 else name)
            found = runner.run(task, baseline, model, processor, model_name="scenes", batch_size=batch_size, out=folder)
            if found["status"] != "complete":
                raise KeyboardInterrupt
            metrics[name] = found["metrics"]["baseline"]
            records[name] = runner.read_records(folder / "samples.jsonl")
    found_in = {}
    for style in styles:
        captions = {r["image_id"]: {m["category"] for m in r["score"]["mentions"]} for r in records[style]}
        found_in[style] = {
            "prompt": styles[style],
            "chair": next(iter(metrics[style].values())),
            "captions": len(captions),
            **caption_errors(captions),
            "by_sentence": by_sentence(records[style]),
        }
        if len(found_in) == 1:
            found_in[style]["exchanged"] = exchanged(model, processor, captions, batch_size)
    first, *others = found_in
    return {
        "pope": {name: metrics["pope"][name] for name in ("random", "popular", "adversarial")},
        **found_in[first],
        **{style: found_in[style] for style in others},
    }


def caption_styles(model: Any) -> dict[str, str]:
    """The styles of captions a model was trained to write, and the prompt that asks for each; the first is short."""
    styles = getattr(model.config, "caption_prompts", None) or {"short": chair.PROMPT}
    return dict(sorted(styles.items(), key=lambda item: item[0] != "short"))  # a saved config sorts them by name


def by_sentence(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """CHAIR_I of the mentions in the first, second, ... sentence of captions, with intervals over captions.

    Args:
        records: of the CHAIR task: `answer`, and `score` with the mentions.
    """
    counts: list[list[tuple[int, int]]] = []  # per sentence and caption: hallucinated mentions, all mentions
    for number, record in enumerate(records):
        ends = [match.end() for match in re.finditer(r"[.!?](?:\s|$)", record["answer"])]
        for mention in record["score"]["mentions"]:
            place = sum(end <= mention["start"] for end in ends)
            while len(counts) <= place:
                counts.append([(0, 0)] * len(records))
            wrong, total = counts[place][number]
            counts[place][number] = (wrong + mention["hallucinated"], total + 1)
    return [
        {
            "sentence": place,
            "mentions": sum(total for _, total in pairs),
            "chair_i": stats.ratio([wrong for wrong, _ in pairs], [total for _, total in pairs]),
        }
        for place, pairs in enumerate(counts, 1)
    ]


def caption_errors(captions: dict[int, set[str]]) -> dict[str, Any]:
    """What false and missing objects of captions have in common.

    Args:
        captions: image id -> categories that its caption names.

    Returns:
        `false_objects`: their number, the share that are usual companions of the scene, and in how many captions they
        stand, split by whether the caption also misses an object; `named`: share of the objects that captions name,
        by kind of evidence.
    """
    false, seen = [], {kind: [0, 0] for kind in ("clear", "faint", "covered", "small")}
    captions_with = {"missing": [0, 0], "complete": [0, 0]}  # [with a false object, all]
    for image_id, named in captions.items():
        scene = world.scene_of(image_id)
        wrong = named - set(scene.categories)
        false += [c in world.CONTEXTS[scene.context] for c in wrong]
        kind = captions_with["missing" if set(scene.categories) - named else "complete"]
        kind[0] += bool(wrong)
        kind[1] += 1
        for thing in scene.objects:
            seen[thing.evidence][0] += thing.category in named
            seen[thing.evidence][1] += 1
    return {
        "false_objects": {
            "count": len(false),
            "companions": sum(false) / max(1, len(false)),
            "in_captions_that_miss_an_object": captions_with["missing"],
            "in_captions_that_miss_none": captions_with["complete"],
        },
        "named": {kind: {"share": n / max(1, total), "objects": total} for kind, (n, total) in seen.items()},
    }


def exchanged(model: Any, processor: Any, captions: dict[int, set[str]], batch_size: int = 32) -> dict[str, float]:
    """Do answers follow the picture? The same question with the scene's own picture and with the next scene's.

    Asked is an object of the scene that the next scene lacks; the caption needs no second run, because the prompt of
    all captions is the same.

    Returns:
        `yes_own`, `yes_other`: share of "yes" with the own and the other picture; `recall_own`, `recall_other`: share
        of a scene's objects that the caption of the own and of the other picture names.
    """
    ids = list(captions)
    yes = {"own": [0, 0], "other": [0, 0]}
    recall = {"own": [0, 0], "other": [0, 0]}
    asked: list[tuple[str, int, str]] = []
    for image_id, other_id in zip(ids, ids[1:] + ids[:1], strict=True):
        here, there = world.scene_of(image_id).categories, world.scene_of(other_id).categories
        for name, whose in (("own", image_id), ("other", other_id)):
            recall[name][0] += len(captions[whose] & set(here))
            recall[name][1] += len(here)
        left = [c for c in here if c not in there]
        if left:
            question = text.question(world.Draw("exchange", image_id).choice(left))
            asked += [("own", image_id, question), ("other", other_id, question)]
    for start in range(0, len(asked), batch_size):
        part = asked[start : start + batch_size]
        pictures = [world.render(world.scene_of(image_id)) for _, image_id, _ in part]
        answers, _ = prompts.generate(model, processor, pictures, [q for *_, q in part], 3)
        for (name, *_), answer in zip(part, answers, strict=True):
            yes[name][0] += answer.lower().startswith("yes")
            yes[name][1] += 1
    shares = {f"yes_{k}": n / max(1, total) for k, (n, total) in yes.items()}
    return shares | {f"recall_{k}": n / max(1, total) for k, (n, total) in recall.items()}


# --- attention


def touched(boxes: Sequence[Sequence[int]], grid: int) -> np.ndarray:
    """Return bool `[grid * grid]`: the patches that any of the boxes `[x, y, w, h]` touches."""
    out = np.zeros((grid, grid), bool)
    side = world.SIZE / grid
    for x, y, w, h in boxes:
        if w and h:
            last_row, last_column = int((y + h - 1) // side), int((x + w - 1) // side)
            out[int(y // side) : last_row + 1, int(x // side) : last_column + 1] = True
    return out.flatten()


@dataclass(frozen=True)
class _Row:
    """A caption prompt with a reference caption behind it: token ids, and the column where each category's name begins."""

    ids: list[int]
    columns: dict[str, int]
    answer: int  # the column where the caption begins


def _row(processor: Any, scene: world.Scene, prompt: str, visual_tokens: int) -> _Row:
    tokenizer, image = processor.tokenizer, processor.image_token
    asked = prompts.chat_prompt(processor, prompt).replace(image, image * visual_tokens)
    said = world.captions(scene)[0]
    # As the model was taught to write: the scenes model's tokenizer knows no capitals.
    said = said[0].upper() + said[1:] + tokenizer.eos_token
    found = tokenizer(asked + said, return_offsets_mapping=True)
    # A token ends behind the first letter of the name: a space in front of it may belong to the token.
    names = "|".join(sorted(map(re.escape, world.CATEGORIES), key=len, reverse=True))  # "hot dog" before "dog"
    begin = {
        match.group().lower(): len(asked) + match.start() for match in re.finditer(rf"\b(?:{names})\b", said, re.I)
    }
    ends = [high for _, high in found["offset_mapping"]]
    columns = {c: next(i for i, end in enumerate(ends) if end > begin[c]) for c in scene.categories}
    return _Row(found["input_ids"], columns, next(i for i, end in enumerate(ends) if end > len(asked)))


@torch.inference_mode()
def attention(
    model: Any, processor: Any, split: str, *, limit: int | None = None, batch_size: int = 25
) -> dict[str, Any]:
    """How the language model's attention is spread over the prompt, and which heads look where they name.

    Args:
        model: an unpatched model of the scenes world; it runs with eager attention meanwhile.
        processor: its processor.
        split: "validation" or "test".
        limit: number of scenes; default all 500.
        batch_size: scenes of one forward.

    Returns:
        `layers`: per layer the mean mass on BOS and on the image, in the rows that name an object and in all text rows
        behind the image, in the former also on the rest of the prompt behind the image, and what both sink detectors find;
        `chance`: the mean share of the patches that the named object's boxes touch; `heads`: `[layers][heads]` share of rows
        whose strongest visual key lies in a box of the object named; `exchanged`: the same with the boxes of another
        scene's object, what heads with a favourite place would score; `top`: the ten best heads with intervals. A caption's
        order is random, so no row can know which of the remaining objects comes next: `top` and `chance_remaining` also
        count any object not yet named.
    """
    config = model.config.get_text_config()
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    grid = model.config.vision_config.image_size // model.config.vision_config.patch_size
    prompt = next(iter(caption_styles(model).values()))
    count = min(limit or 500, world.SPLITS[split] or 500)
    scenes = [world.scene(split, i) for i in range(count)]
    hits = np.zeros((count, layers, heads))
    others = np.zeros((count, layers, heads))
    rest = np.zeros((count, layers, heads))
    rows = np.zeros(count)  # named objects per scene
    chance = chance_rest = 0.0
    mass = {
        key: np.zeros(layers) for key in ("bos_naming", "visual_naming", "question_naming", "bos_text", "visual_text")
    }
    text_rows = 0
    states = _States(layers)
    before = config._attn_implementation
    model.set_attn_implementation({"text_config": "eager"})
    handles = [layer.register_forward_hook(states.hook(i)) for i, layer in enumerate(model.model.language_model.layers)]
    try:
        for start in range(0, count, batch_size):
            part = scenes[start : start + batch_size]
            words = [_row(processor, s, prompt, grid**2) for s in part]
            length = max(len(row.ids) for row in words)
            ids = torch.tensor([row.ids + [0] * (length - len(row.ids)) for row in words])
            pictures = torch.from_numpy(
                np.stack([train.pixels(s, model.config.vision_config.image_size) for s in part])
            )
            sizes = torch.tensor([len(row.ids) for row in words])
            states.seen = torch.arange(length) < sizes[:, None]
            maps = model(
                input_ids=ids.to(model.device),
                attention_mask=states.seen.long().to(model.device),
                pixel_values=train.normalise(pictures).to(model.device),
                output_attentions=True,
            ).attentions
            maps = torch.stack(maps).float().cpu()  # [layers, B, heads, L, L]
            visual = ids[0] == model.config.image_token_id  # the same columns in every row: padding is on the right
            last_visual = int(visual.nonzero().max())
            asked = states.seen & (torch.arange(length) > last_visual)
            on_image = maps[..., visual].sum(-1).mean(2)  # [layers, B, L]
            on_bos = maps[..., 0].mean(2)
            mass["bos_text"] += on_bos[:, asked].sum(1).numpy()
            mass["visual_text"] += on_image[:, asked].sum(1).numpy()
            text_rows += int(asked.sum())
            for i, s in enumerate(part):
                other = scenes[(start + i + 1) % count]
                columns = words[i].columns
                patches = {
                    c: touched([b for o, b in zip(s.objects, s.boxes, strict=True) if o.category == c], grid)
                    for c in s.categories
                }
                for place, (name, boxes) in enumerate(patches.items()):
                    if not boxes.any():
                        continue  # nothing of it can be seen
                    row = columns[name] - 1
                    remaining = np.any([patches[c] for c in patches if columns[c] > row], axis=0)
                    strongest = maps[:, i, :, row, visual].argmax(-1).numpy()
                    thing = other.categories[place % len(other.categories)]
                    elsewhere = [b for o, b in zip(other.objects, other.boxes, strict=True) if o.category == thing]
                    hits[start + i] += boxes[strongest]
                    rest[start + i] += remaining[strongest]
                    others[start + i] += touched(elsewhere, grid)[strongest]
                    rows[start + i] += 1
                    chance += boxes.mean()
                    chance_rest += remaining.mean()
                    mass["bos_naming"] += on_bos[:, i, row].numpy()
                    mass["visual_naming"] += on_image[:, i, row].numpy()
                    question = maps[:, i, :, row, last_visual + 1 : words[i].answer]
                    mass["question_naming"] += question.sum(-1).mean(1).numpy()
    finally:
        for handle in handles:
            handle.remove()
        model.set_attn_implementation({"text_config": before})
    named = rows.sum()
    share, elsewhere_share = hits.sum(0) / named, others.sum(0) / named
    best = sorted(np.ndindex(layers, heads), key=lambda lh: -share[lh])[:10]
    return {
        "scenes": count,
        "objects_named": int(named),
        "layers": [
            {
                **{key: float(mass[key][i] / (named if "naming" in key else text_rows)) for key in mass},
                **states.layer(i),
            }
            for i in range(layers)
        ],
        **states.summary(),
        "chance": chance / named,
        "chance_remaining": chance_rest / named,
        "heads": share.tolist(),
        "exchanged": elsewhere_share.tolist(),
        "top": [
            {
                "layer": i,
                "head": h,
                "hits": stats.ratio(hits[:, i, h].tolist(), rows.tolist()),
                "remaining": stats.ratio(rest[:, i, h].tolist(), rows.tolist()),
                "exchanged": float(elsewhere_share[i, h]),
            }
            for i, h in best
        ],
    }


class _States:
    """What both sink detectors need of the residual states: read by hooks, batch by batch.

    The dimension rule looks at block inputs, |x_d| / RMS(x) over all dimensions d; the direction rule at block outputs,
    the cosine with BOS.
    """

    def __init__(self, layers: int):
        self.layers = layers
        self.seen = torch.zeros(0)  # [B, L] bool: no padding
        self.largest = [0.0] * layers
        self.massive = [0] * layers
        self.dims: list[set[int]] = [set() for _ in range(layers)]
        self.cosine = [-1.0] * layers
        self.aligned = [0] * layers
        self.norm = np.zeros(layers)
        self.tokens = self.rows = 0

    def hook(self, layer: int) -> Callable[..., None]:
        """For `register_forward_hook` of decoder layer `layer`."""

        def read(module: Any, args: Any, output: Any) -> None:
            seen = self.seen.to(args[0].device)
            x = args[0].float()
            ratio = x.abs() / x.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
            massive = (ratio >= TAU) & seen[..., None]
            self.largest[layer] = max(self.largest[layer], float(ratio[seen].max()))
            self.massive[layer] += int(massive.any(-1).sum())
            self.dims[layer] |= set(massive.any(1).any(0).nonzero().flatten().tolist())
            y = (output[0] if isinstance(output, tuple) else output).float()
            cosine = torch.cosine_similarity(y, y[:, :1], dim=-1).abs()[:, 1:][seen[:, 1:]]
            self.cosine[layer] = max(self.cosine[layer], float(cosine.max()))
            self.aligned[layer] += int((cosine > COSINE).sum())
            self.norm[layer] += float(y[:, 0].norm(dim=-1).sum())
            if layer == 0:
                self.tokens += int(seen.sum())
                self.rows += len(y)

        return read

    def layer(self, i: int) -> dict[str, Any]:
        """Of one layer."""
        return {
            "largest_ratio": self.largest[i],
            "massive_tokens": self.massive[i],
            "massive_dims": sorted(self.dims[i]),
            "largest_cosine": self.cosine[i],
            "aligned_tokens": self.aligned[i],
            "bos_norm": float(self.norm[i] / self.rows),
        }

    def summary(self) -> dict[str, Any]:
        """The thresholds, and the band of layers in which BOS is large, where the direction rule applies."""
        steps = np.diff(self.norm)  # from layer l to l + 1
        first = int(steps.argmax()) + 1 if len(steps) else 0
        later = steps[first:]
        last = first + int(later.argmin()) if len(later) else first  # the largest fall comes behind it
        return {
            "tau": TAU,
            "cosine": COSINE,
            "tokens": self.tokens,
            "bos_band": [first, last],
        }


# --- the card


def measure(
    model: Any, processor: Any, split: str, *, limit: int | None = None, batch_size: int = 32, out: Path | None = None
) -> dict[str, Any]:
    """All figures of the card, as they go into its JSON file; arguments as of `quality`.

    Raises `ValueError` for a variant: without its mask or decoder its figures would mean nothing.
    """
    for name, usual in (("trained_mask", "causal"), ("trained_objective", "ar")):
        if (trained := getattr(model.config, name, usual)) != usual:
            raise ValueError(f"model with {name} {trained!r}: the card is of causal next-token models")
    return {
        "schema_version": 1,
        "card": "scenes",
        "world": world.WORLD_VERSION,
        "split": split,
        "weights": runner.weights_hash(model),
        "versions": runner.versions(),
        "quality": quality(model, processor, split, limit=limit, batch_size=batch_size, out=out),
        "attention": attention(model, processor, split, limit=limit),
    }


def markdown(card: dict[str, Any]) -> str:
    """The figures as the part of the card that stands between the marks of its split."""
    quality, found = card["quality"], card["attention"]

    def cell(metric: dict[str, float | None], factor: float = 1.0) -> str:
        ends = [metric["low"], metric["high"]]
        shown = "" if None in ends else " ({:.1f}-{:.1f})".format(*(factor * e for e in ends if e is not None))
        return f"{factor * (metric['value'] or 0):.1f}{shown}"

    lines = [
        f"{quality['captions']} {card['split']} scenes, greedy, in percent with 95 % bootstrap intervals over scenes.",
        "",
        "| POPE | accuracy | precision | recall | says yes |",
        "|---|---|---|---|---|",
    ]
    for name, m in quality["pope"].items():
        values = (f"{m[key]['value']:.1f}" for key in ("precision", "recall", "yes_ratio"))
        lines.append(f"| {name} | {cell(m['accuracy'])} | {' | '.join(values)} |")
    styles = {"short": quality} | {name: quality[name] for name in ("detailed",) if name in quality}
    rows = [["CHAIR_S", "CHAIR_I", "recall", "tokens per caption"]]
    for measured in styles.values():
        m = measured["chair"]
        rows.append([cell(m["chair_s"]), cell(m["chair_i"]), cell(m["recall"]), f"{m['length']['value']:.1f}"])
    if len(styles) > 1:
        rows = [[first, *row] for first, row in zip(["captions", *styles], rows, strict=True)]
    lines += ["", f"| {' | '.join(rows[0])} |", "|---" * len(rows[0]) + "|"]
    lines += [*(f"| {' | '.join(row)} |" for row in rows[1:]), ""]
    if "detailed" in styles:
        lines += [
            "Detailed captions by sentence (the first one names no object):",
            "",
            "| sentence | objects named | CHAIR_I |",
            "|---|---|---|",
            *(
                f"| {m['sentence']} | {m['mentions']} | {cell(m['chair_i'], 100)} |"
                for m in styles["detailed"]["by_sentence"]
            ),
            "",
            f'The short captions were asked for with "{quality["prompt"]}", the detailed ones with '
            f'"{styles["detailed"]["prompt"]}" Of the short ones:',
            "",
        ]
    false, named, other = quality["false_objects"], quality["named"], quality["exchanged"]
    missing, complete = false["in_captions_that_miss_an_object"], false["in_captions_that_miss_none"]
    kinds = ", ".join(f"{v['share']:.0%} of the {v['objects']} {kind}" for kind, v in named.items())
    lines += [
        f"- Of {false['count']} false objects in captions {false['companions']:.0%} are usual companions of the scene.",
        f"- Both causes apart: {missing[0]} of the {missing[1]} captions that miss an object name a false one, and "
        f"{complete[0]} of the {complete[1]} that miss none.",
        f"- Captions name {kinds} objects.",
        f"- Exchanged pictures: asked for an object that is there it says yes in {other['yes_own']:.0%}, with the next "
        f"scene's picture, which lacks it, in {other['yes_other']:.0%}. Captions name {other['recall_own']:.0%} of the "
        f"objects, the next scene's caption {other['recall_other']:.0%}.",
        "",
        f"Attention, {found['scenes']} scenes, {found['objects_named']} objects, reference captions teacher-forced. "
        "Mean mass over heads, in the rows in front of an object's word and in all text rows behind the image; the "
        "largest \\|x_d\\| / RMS of a block's input, and the largest cosine of a token with BOS at its output:",
        "",
    ]
    masses = {
        "bos_naming": "BOS, naming",
        "visual_naming": "image, naming",
        "question_naming": "prompt behind it, naming",
        "bos_text": "BOS, text",
        "visual_text": "image, text",
    }
    masses = {key: name for key, name in masses.items() if key in found["layers"][0]}  # older files lack the prompt's
    lines.append(f"| layer | {' | '.join(masses.values())} | largest ratio | largest cosine |")
    lines.append("|---" * (len(masses) + 3) + "|")
    for i, layer in enumerate(found["layers"]):
        cells = [layer[key] for key in masses]
        shown = " | ".join(f"{100 * c:.1f}" for c in cells)
        lines.append(f"| {i} | {shown} | {layer['largest_ratio']:.1f} | {layer['largest_cosine']:.2f} |")
    massive = sum(layer["massive_tokens"] for layer in found["layers"])
    band = range(found["bos_band"][0], found["bos_band"][1] + 1)
    aligned = sum(found["layers"][i]["aligned_tokens"] for i in band)
    rule = f"the dimension rule (ratio >= {found['tau']:g}) finds "
    rule += f"{massive} sinks, counted in every layer they are in" if massive else "no sink tokens in any layer"
    direction = (
        f"the direction rule (cosine with BOS > {found['cosine']:g}, layers {band[0]}-{band[-1]}, where BOS is large) "
        f"finds {aligned or 'none'}"
    )
    lines += [
        "",
        f"Sinks: of {found['tokens']} tokens {rule}; {direction}.",
        "",
        "The ten heads that look where they name: share of rows whose strongest visual key lies in a patch that the "
        f"named object's box touches (chance, the mean share of such patches: {100 * found['chance']:.1f}). Captions name "
        "objects in random order, so no row can know which of the remaining ones is next: the second column counts any "
        f"object not yet named (chance {100 * found['chance_remaining']:.1f}). The last one holds the same attention "
        "against an object of the next scene.",
        "",
        "| layer.head | in the box of the object named | of any object still to come | of the next scene's |",
        "|---|---|---|---|",
    ]
    for head in found["top"]:
        hits, rest = cell(head["hits"], 100), cell(head["remaining"], 100)
        lines.append(f"| {head['layer']}.{head['head']} | {hits} | {rest} | {100 * head['exchanged']:.1f} |")
    return "\n".join(line if line.startswith("|") else _wrapped(line) for line in lines)


def _wrapped(line: str) -> str:
    indent = "  " if line.startswith("- ") else ""
    return textwrap.fill(line, 118, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False)


def _marked(split: str) -> tuple[str, re.Pattern[str]]:
    mark = f"<!-- figures: {split} -->"
    return mark, re.compile(re.escape(mark) + r"\n.*?(?=<!-- end -->)", re.DOTALL)


def check_readme(path: Path, split: str) -> None:
    """Raise unless a card has `<!-- figures: SPLIT -->` and behind it `<!-- end -->`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it has no such marks.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    mark, pattern = _marked(split)
    if not pattern.search(path.read_text(encoding="utf-8")):
        raise ValueError(f"{path}: has no marks {mark} and <!-- end -->")


def write_readme(path: Path, card: dict[str, Any]) -> None:
    """Put the figures between the marks of their split; see `check_readme` for what it raises."""
    check_readme(path, card["split"])
    mark, pattern = _marked(card["split"])
    content = path.read_text(encoding="utf-8")
    path.write_text(pattern.sub(lambda _: f"{mark}\n\n{markdown(card)}\n\n", content, count=1), encoding="utf-8")
