# SPDX-License-Identifier: Apache-2.0
"""MVP: multi-view multi-path reasoning ("Look, compare, decide", arXiv 2408.17150, COLING 2025), for closed questions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from vlm_attn.branch import Decoding, Run, one_row, with_processor
from vlm_attn.call import Call
from vlm_attn.chat import tokenizer_of
from vlm_attn.layout import Span
from vlm_attn.method import check_range
from vlm_attn.patching import spans

VIEWS = (
    "Go through this image part by part: name every object you can make out, with its shape, colour and texture.",
    "Describe the scene of this image as a whole: the place, what is going on, and the surroundings.",
    "Describe this image in details.",
)


@dataclass(frozen=True, kw_only=True)
class Mvp(Decoding):
    """Answer a closed question by how certain the model is of each answer, over three captions of the picture.

    Each view captions the picture from another prompt: part by part, as a whole, plainly. With each caption before the
    question, the K likeliest first tokens are followed to an answer.

    Overview:
        in short: answers closed questions by certainty, over three captions of the picture
        contrasts the next token with: nothing: scores closed answers over paths behind three captions of the picture
        formula: sum of `p` times certainty
        needs: a processor, an end token

    Equation:
        score(a) = sum_v weights[v] sum_k p_k c_k                 k: first tokens whose path answers a, in view v
        c_k      = p(likeliest) - p(second) where a is said       1 where the first token itself is the answer

    Attributes:
        answers: what may be answered; their first tokens must differ.
        paths: K, first tokens that are followed. Range 1..50; the released script uses 3.
        least: a first token that is no answer is followed from this probability on. Range 0..1.
        weights: of the three views.
        temperature: at which captions are sampled. Range (0, 10].
        max_tokens: of a path. Range 1..10000.
        caption_tokens: of a caption. Range 1..10000.
        top_p: captions are sampled from the likeliest tokens that make up this much probability. Range (0, 1].
        seed: of the captions.

    Needs ``patch(processor=)`` and an end token. ``generate`` returns the answer and ends; with sampling it draws among the
    answers by their scores. Other methods of the patch act on captions and paths too. Deviations: the wording of the first two
    views is ours; paths go on greedily; one that ends without an answer counts for none (in the released code for Yes); rows
    are taken one by one. Cost: three captions and up to ``3 (1 + K)`` short answers.
    """

    name: ClassVar[str] = "mvp"
    paper: ClassVar[str] = "MVP, arXiv 2408.17150"

    answers: tuple[str, ...] = ("Yes", "No")
    paths: int = 5
    least: float = 0.001
    weights: tuple[float, float, float] = (0.4, 0.4, 0.2)
    temperature: float = 0.7
    max_tokens: int = 50
    caption_tokens: int = 512
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "answers", tuple(self.answers))
        object.__setattr__(self, "weights", tuple(self.weights))
        if len(self.answers) < 2 or not all(isinstance(answer, str) and answer.strip() for answer in self.answers):
            raise ValueError(f'mvp: answers={self.answers!r} must be two or more words, such as ("Yes", "No")')
        if len(self.weights) != len(VIEWS) or min(self.weights) < 0 or sum(self.weights) == 0:
            raise ValueError(f"mvp: weights={self.weights!r} must be {len(VIEWS)} numbers >= 0, not all zero")
        check_range(self, "paths", 1, 50)
        check_range(self, "least", 0, 1)
        check_range(self, "temperature", 0, 10, open_low=True)
        check_range(self, "max_tokens", 1, 10000)
        check_range(self, "caption_tokens", 1, 10000)
        check_range(self, "top_p", 0, 1, open_low=True)

    def start(self, call: Call, processor: Any) -> None:
        """Tokenise the answers."""
        if processor is None:
            raise ValueError("mvp reads and writes words: patch(model, 'mvp', processor=processor)")
        tokenizer = tokenizer_of(processor)
        tokens = [tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in self.answers]
        if len({_word(tokenizer, ids[0]) for ids in tokens}) < len(tokens):
            raise ValueError(f"mvp: answers={self.answers!r} begin with the same token, so they cannot be told apart")
        call.memory(self)["answers"] = tokens

    def refuse(self, run: Run) -> None:
        """One answer at a time, and it must end."""
        super().refuse(run)
        if run.option("num_beams") not in (None, 1):
            raise NotImplementedError("mvp follows paths of its own: leave out num_beams=")
        if run.option("eos_token_id") is None:
            raise ValueError("mvp ends an answer with the end token: give eos_token_id=")

    @contextmanager
    def decoding(self, run: Run) -> Iterator[dict[str, Any]]:
        """Score the answers of every row, then let ``generate`` say the best."""
        self.refuse(run)
        memory, model = run.call.memory(self), run.model
        rest = [method for method in run.engine.methods if method is not self]
        devices = [model.device] if model.device.type == "cuda" else []
        with run.engine.aside(rest), torch.random.fork_rng(devices), torch.no_grad():
            memory["scores"] = torch.stack([self.scores(run, row) for row in range(run.call.prompt.batch)])
        end = run.option("eos_token_id")
        end = end if isinstance(end, int) else int(torch.as_tensor(end).flatten()[0])
        yield with_processor(run, Answer(memory["answers"], memory["scores"], end, run.call.prompt.length))

    def scores(self, run: Run, row: int) -> Tensor:
        """``[answers]``: the sum over views of weight times score."""
        inputs, prompt = one_row(run, row), run.call.prompt
        tokenizer = tokenizer_of(run.engine.processor)
        start, stop = (column - prompt.length + inputs["input_ids"].shape[1] for column in prompt.query[row])
        question = tokenizer.decode(inputs["input_ids"][0, start:stop], skip_special_tokens=True).strip().lower()

        def ask(text: str, **options: Any) -> tuple[Tensor, Tensor]:
            tokens = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            return generate(run, inputs, (start, stop), tokens, **options)

        torch.manual_seed(self.seed)
        total = torch.zeros(len(self.answers))
        for view, weight in zip(VIEWS, self.weights, strict=True):
            sampled = {"do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": self.top_p}
            caption, _ = ask(view, max_new_tokens=self.caption_tokens, **sampled)
            words = tokenizer.decode(caption, skip_special_tokens=True)
            text = f"Here is the caption of the image: {words} Question: {question}"
            likely, first = ask(text, max_new_tokens=1)[1][0].softmax(-1).topk(self.paths)
            for p, token in zip(likely.tolist(), first.tolist(), strict=True):
                tokens, logits = torch.tensor([token]), torch.zeros(1, 1)
                if self.said(run, [token]) is None and p >= self.least:
                    tokens, logits = ask(text, max_new_tokens=self.max_tokens, first=token)
                found = self.said(run, tokens.tolist())
                if found is not None:
                    place, answer = found
                    total[answer] += weight * p * (certainty(logits[place]) if place else 1.0)
        return total

    def said(self, run: Run, tokens: Sequence[int]) -> tuple[int, int] | None:
        """Where the first answer stands among tokens, and which it is."""
        tokenizer = tokenizer_of(run.engine.processor)
        names = [_word(tokenizer, ids[0]) for ids in run.call.memory(self)["answers"]]
        words = [_word(tokenizer, token) for token in tokens]
        return next(((place, names.index(word)) for place, word in enumerate(words) if word in names), None)


def certainty(logits: Tensor) -> float:
    """``p(top 1) - p(top 2)`` of ``[V]`` logits."""
    first, second = logits.softmax(-1).topk(2).values.tolist()
    return first - second


def generate(
    run: Run, inputs: dict[str, Tensor], question: Span, tokens: Tensor, *, first: int | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Tokens ``[n]`` and their raw logits ``[n, V]`` for one prompt with ``tokens`` ``[1, m]`` in the place of its question."""
    start, stop = question
    ids = inputs["input_ids"]
    new = {"input_ids": tokens.to(ids), "attention_mask": torch.ones_like(tokens)}
    asked = {
        name: torch.cat([value[:, :start], new.get(name, torch.zeros_like(tokens)).to(value), value[:, stop:]], 1)
        if value.shape == ids.shape
        else value
        for name, value in inputs.items()
    }
    length = asked["input_ids"].shape[1]
    if first is not None:
        options["logits_processor"] = LogitsProcessorList([Answer([[first]], torch.ones(1, 1), None, length)])
    ends = {name: run.option(name) for name in ("eos_token_id", "pad_token_id")}
    options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, **ends, **options}
    with spans(run.model, query=[(start, start + tokens.shape[1])]):
        out = run.model.generate(**asked, **options)
    return out.sequences[0, length:], torch.stack(out.logits)[:, 0].float()


class Answer(LogitsProcessor):
    """Leaves only given answers, then the end; with no end token, what follows is free.

    Args:
        answers: their tokens.
        scores: ``[B, answers]``; a row of zeros leaves the choice to the model.
        end: the end token.
        prompt: columns before the first generated token.
    """

    def __init__(self, answers: Sequence[Sequence[int]], scores: Tensor, end: int | None, prompt: int) -> None:
        self.answers, self.scores, self.end, self.prompt = answers, scores, end, prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``[R, L]`` tokens so far, ``[R, V]`` logits of the next."""
        done = input_ids.shape[1] - self.prompt
        if self.end is None and done >= max(map(len, self.answers)):
            return scores
        allowed = torch.full_like(scores, -torch.inf)
        for row, said in enumerate(input_ids[:, self.prompt :].tolist()):
            mine = self.scores[row * len(self.scores) // len(scores)].log()
            for tokens, score in zip(self.answers, mine.tolist(), strict=True):
                if tokens[:done] == said:
                    token = tokens[done] if done < len(tokens) else self.end
                    known = score if mine.isfinite().any() else float(scores[row, token])
                    allowed[row, token] = 0.0 if done else known
            if not allowed[row].isfinite().any():
                allowed[row, self.end] = 0.0
        return allowed


def _word(tokenizer: Any, token: int) -> str:
    return tokenizer.decode([token]).strip(" \n.,!").lower()
