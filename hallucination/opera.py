# SPDX-License-Identifier: Apache-2.0
"""OPERA: over-trust penalty and retrospection-allocation (arXiv 2311.17911, CVPR 2024), a beam search of its own."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.generation import GenerateBeamDecoderOnlyOutput

from vlm_attn.branch import Decoding, Run, Stream, encoded_once, one_row
from vlm_attn.method import check_range

WINDOW = 512  # newest steps whose columns are counted


@dataclass(frozen=True, kw_only=True)
class Opera(Decoding):
    """Beam search that avoids tokens which lean on one earlier token of the answer, and takes steps back when it happens.

    Each of a beam's likeliest tokens is run one step ahead. Of its attention in the last layer (the largest over heads, made to
    sum to 1) the part on the answer is followed: a column that stays high over the steps is an over-trusted token.

    Overview:
        in short: a beam search that avoids leaning on one token, and goes back
        contrasts the next token with: nothing: a beam search that avoids tokens which lean on one earlier token of the
            answer, and goes back
        formula: logit minus the highest column product of attention
        needs: no other method beside it

    Equation:
        phi   = max_c prod_t scale w[t, c]                        w: attention on the answer's column c, rows t from c on
        l'    = l - weight factor phi                             of every candidate token, run one step ahead
        l'    = l + weight w(image)                               while the answer has at most warmup tokens

    Attributes:
        beams: beams, where ``generate`` is not told ``num_beams``. Range 2..50.
        candidates: tokens per beam that are looked at. Range 2..50.
        scale: factor on the attention before columns are multiplied up. Range (0, 1000].
        weight: of the penalty. Range 0..1000.
        factor: on the column product, as in the released code. Range 0..1.
        warmup: up to this length of the answer, attention to the image is rewarded instead, and the search does not go back
            to what leans on it. Range 0..10000.
        threshold: steps that may lean on one column; with more, the search goes back to the token behind it. Range 1..10000.

    Deviations: penalties are float32. The released code computes column products in float16, where they overflow to
    infinity or vanish: its penalty is a ban or nothing, ours grows with the product. The best beam, by the tokens it chose,
    decides on going back, and its token is given up (the released code asks all beams, by most of their candidates); once a
    place has been gone back to ``candidates`` times, the search goes on from where it is; rows of a batch are searched one
    by one. With ``output_scores`` and ``output_logits`` row r of step t is what the t-th token of answer r was chosen by,
    along its own beam: log probabilities of the candidates, -inf for the others; and the model's logits before it. Cost:
    ``candidates`` forwards per beam and token.
    """

    name: ClassVar[str] = "opera"
    paper: ClassVar[str] = "OPERA, arXiv 2311.17911"
    alone: ClassVar[bool] = True
    beam_search: ClassVar[bool] = True

    beams: int = 5
    candidates: int = 5
    scale: float = 50.0
    weight: float = 1.0
    factor: float = 1e-7
    warmup: int = 10
    threshold: int = 15

    def __post_init__(self) -> None:
        for name, low, high in (("beams", 2, 50), ("candidates", 2, 50), ("warmup", 0, 10000), ("threshold", 1, 10000)):
            check_range(self, name, low, high)
        check_range(self, "scale", 0, 1000, open_low=True)
        check_range(self, "weight", 0, 1000)
        check_range(self, "factor", 0, 1)

    def refuse(self, run: Run) -> None:
        """It is a beam search, and nothing else."""
        super().refuse(run)
        for name in ("do_sample", "prompt_lookup_num_tokens", "streamer"):
            if run.options.get(name):
                raise NotImplementedError(f"opera is a beam search: leave out {name}=")
        if run.option("output_hidden_states"):
            raise NotImplementedError(
                "opera runs candidates side by side and goes back: leave out output_hidden_states="
            )

    @contextmanager
    def decoding(self, run: Run) -> Iterator[dict[str, Any]]:
        """Put the search in the place of the host's."""
        self.refuse(run)
        given = run.option("num_beams")
        beams = given if given is not None and given > 1 else self.beams
        with encoded_once(run.model):
            yield {"num_beams": beams, "do_sample": False, "custom_generate": partial(self.generate, run)}

    def generate(
        self,
        run: Run,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **_: Any,
    ) -> Any:
        """The host's decoding function: ``[B * beams, L]`` ids to sequences."""
        beams, wanted = generation_config.num_beams, generation_config.num_return_sequences
        found: list[Answer] = []
        for row in range(run.call.prompt.batch):
            ids = input_ids[row * beams : row * beams + 1]
            search = Search(self, run, row, ids, beams, generation_config, logits_processor, stopping_criteria)
            found += search.run()[:wanted]
        pad = generation_config.pad_token_id
        if pad is None:
            pad = int(torch.as_tensor(generation_config.eos_token_id or 0).flatten()[0])
        answers = torch.nn.utils.rnn.pad_sequence(
            [answer.tokens for answer in found], batch_first=True, padding_value=pad
        )
        prompts = input_ids[::beams].repeat_interleave(wanted, 0)
        sequences = torch.cat([prompts, answers.to(prompts)], 1)
        if not generation_config.return_dict_in_generate:
            return sequences
        said: dict[str, Any] = {}
        for number, name in enumerate(("logits", "scores")):
            if getattr(generation_config, f"output_{name}"):
                after = torch.full_like(found[0].said[0][number], -torch.inf).index_fill(
                    0, answers.new_tensor(pad), 0.0
                )
                rows = [[step[number] for step in answer.said] for answer in found]
                rows = [row + [after] * (answers.shape[1] - len(row)) for row in rows]
                said[name] = tuple(torch.stack(step) for step in zip(*rows, strict=True))
        scores = torch.tensor([answer.score for answer in found], device=sequences.device)
        return GenerateBeamDecoderOnlyOutput(sequences=sequences, sequences_scores=scores, **said)  # type: ignore[arg-type]

    def penalty(self, trust: Tensor, image: Tensor, length: int) -> Tensor:
        """``[n]`` highest log column products, ``[n]`` attention on the image, to what is taken off each candidate's logit."""
        return self.weight * (
            -image if length <= self.warmup else self.factor * trust.double().exp().clamp_max(1e30).float()
        )

    def place_behind(self, columns: list[int]) -> int | None:
        """Where to go back to: behind the column that more than ``threshold`` of the newest steps lean on most; never into the
        warm-up, as in the released code."""
        counts = Counter(column for column in columns[-WINDOW:] if column >= 0)
        column, times = counts.most_common(1)[0] if counts else (-1, 0)
        return column + 1 if times > self.threshold and column >= self.warmup else None


@dataclass(frozen=True)
class Answer:
    """An answer.

    Attributes:
        score: by length.
        tokens: ``[n]``.
        said: per token the logits before it and the candidates' log probabilities, ``[V]`` each.
    """

    score: float
    tokens: Tensor
    said: list[tuple[Tensor, Tensor]]


# What a beam's newest token was chosen by, and the same of the tokens before it.
Said = tuple[Any, Tensor, Tensor] | None


@dataclass
class Beams:
    """Running beams after ``n`` tokens.

    Attributes:
        tokens: ``[W, n]``.
        score: ``[W]`` sum of log probabilities.
        product: ``[W, n]`` log of every column's product ``prod_t scale * w[t, c]``.
        columns: ``[W, n]`` the highest column at every step, -1 during the warm-up.
        said: per beam, what its tokens were chosen by.
        ended: answers that have ended.
    """

    tokens: Tensor
    score: Tensor
    product: Tensor
    columns: Tensor
    said: list[Said]
    ended: list[Answer] = field(default_factory=list)


class Search:
    """The beam search of one prompt."""

    def __init__(
        self,
        method: Opera,
        run: Run,
        row: int,
        ids: Tensor,
        beams: int,
        config: Any,
        processors: Any,
        criteria: Callable[..., Tensor],
    ) -> None:
        self.method, self.ids, self.beams, self.config = method, ids, beams, config
        self.processors, self.criteria = processors, criteria
        inputs = one_row(run, row)
        self.stream = Stream(run.engine, run.model, inputs, self.see)
        self.seen = torch.empty(0)  # [R, S] the last layer's attention in the last row of the newest forward
        self.visual = run.call.prompt.visual[row, -inputs["input_ids"].shape[1] :]
        self.last = len(run.engine.text_model.layers) - 1  # type: ignore[arg-type]
        self.back: defaultdict[int, list[int]] = defaultdict(list)  # place -> tokens that were given up there
        self.times: Counter[int] = Counter()  # place -> how often it was gone back to

    def run(self) -> list[Answer]:
        """Answers, best first."""
        device, count = self.ids.device, self.beams
        empty = torch.empty(count, 0, device=device)
        score = torch.tensor([0.0] + [-1e9] * (count - 1), device=device)
        state = Beams(empty.long(), score, empty, empty.long(), [None] * count)
        history: list[Beams] = []
        logits = self.ahead(state.tokens)[0]
        while True:
            n = state.tokens.shape[1]
            history[n:] = [state]
            state, logits, over = self.step(state, logits)
            if over:
                by_length = (state.score / self.length(n + 1)).tolist()
                running = map(Answer, by_length, state.tokens, map(unrolled, state.said))
                ended = state.ended + ([] if len(state.ended) >= count else list(running))
                return sorted(ended, key=lambda answer: -answer.score)
            place = self.method.place_behind(state.columns[0].tolist())
            if place is not None and self.times[place] < self.method.candidates:
                self.times[place] += 1
                self.back = defaultdict(list, {at: given_up for at, given_up in self.back.items() if at <= place})
                self.back[place].append(int(state.tokens[0, place]))
                state = history[place]
                logits = self.ahead(state.tokens)[0]

    def ahead(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Run ``[W, n]`` or ``[W * N, n]`` tokens: logits ``[.., V]``, and the last one's attention ``[.., S]``."""
        times = self.beams * self.method.candidates // len(tokens)
        ids = torch.cat([self.ids.expand(len(tokens), -1), tokens], 1).repeat_interleave(times, 0)
        logits = self.stream.logits(ids)[::times]
        attention = self.seen[::times]
        return logits, attention / attention.sum(-1, keepdim=True)

    def see(self, layer: int, out: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        """Keep the last layer's attention, the largest over heads."""
        if layer == self.last:
            self.seen = attend()[:, :, 0].amax(1)
        return out

    def length(self, tokens: int) -> float:
        """What a score is divided by."""
        return float(tokens**self.config.length_penalty)

    def step(self, state: Beams, logits: Tensor) -> tuple[Beams, Tensor, bool]:
        """One token more: the new beams, the logits behind them, and whether the search is over."""
        n, each, count = state.tokens.shape[1], self.method.candidates, self.beams
        log_p = self.processors(torch.cat([self.ids.expand(count, -1), state.tokens], 1), logits.log_softmax(-1))
        if self.back[n]:
            log_p[:, self.back[n]] = -torch.inf
        value, candidate = log_p.topk(each)
        tokens = torch.cat([state.tokens.repeat_interleave(each, 0), candidate.view(-1, 1)], 1)
        after, attention = self.ahead(tokens)
        image = attention[:, : len(self.visual)] @ self.visual.to(attention)
        product = column_products(state.product.repeat_interleave(each, 0), attention[:, -n - 1 :], self.method.scale)
        trust, column = product.max(-1)
        penalty = self.method.penalty(trust, image, n + 1).view(count, each)
        value = (value - penalty).log_softmax(-1)
        said: list[Said] = [None] * count
        if self.config.output_scores or self.config.output_logits:  # else a vocabulary per token is too much to keep
            said = list(
                zip(state.said, logits, torch.full_like(log_p, -torch.inf).scatter(1, candidate, value), strict=True)
            )
        score = (value + state.score[:, None]).flatten()

        score, kept = score.topk(2 * count)
        stops = self.criteria(torch.cat([self.ids.expand(2 * count, -1), tokens[kept]], 1), None)
        ended = [*state.ended]
        ended += [
            Answer(float(score[i]) / self.length(n + 1), tokens[kept[i]], unrolled(said[int(kept[i]) // each]))
            for i in range(count)
            if stops[i] and score[i] > -1e8
        ]
        ended = sorted(ended, key=lambda answer: -answer.score)[:count]
        best = (score - 1e9 * stops).topk(count).indices
        rows = kept[best]
        column = column if n + 1 > self.method.warmup else torch.full_like(column, -1)
        columns = torch.cat([state.columns.repeat_interleave(each, 0), column[:, None]], 1)
        parents = [said[row // each] for row in rows.tolist()]
        new = Beams(tokens[rows], score[best], product[rows], columns[rows], parents, ended)
        hopeless = len(ended) == count and float(new.score[0]) / self.length(n + 1) <= ended[-1].score
        early = len(ended) == count and self.config.early_stopping is True
        return new, after[rows], bool(stops.all()) or hopeless or early


def unrolled(said: Said) -> list[tuple[Tensor, Tensor]]:
    """What a beam's tokens were chosen by, the first token's first."""
    steps = []
    while said is not None:
        said, logits, scores = said
        steps.append((logits, scores))
    return steps[::-1]


def column_products(product: Tensor, attention: Tensor, scale: float) -> Tensor:
    """``log prod_{t >= c} scale * w[t, c]`` after one row more.

    Args:
        product: ``[R, n]`` the logs so far.
        attention: ``[R, n + 1]`` the new row's attention to the answer, itself the last.
        scale: factor on it.

    Returns:
        ``[R, n + 1]``.
    """
    return torch.nn.functional.pad(product, (0, 1)) + (scale * attention).log()
