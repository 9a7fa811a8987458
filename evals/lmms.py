# SPDX-License-Identifier: Apache-2.0
"""Patched models in lmms-eval (https://github.com/EvolvingLMMs-Lab/lmms-eval), which finds :func:`manifest` by its entry point.

lmms_eval --model vlm_attn --model_args pretrained=llava-hf/llava-1.5-7b-hf,method=var+gift,gift.alpha=4 --tasks pope

This module is imported by lmms-eval alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm

import vlm_attn
from vlm_attn.evals.models import load_model
from vlm_attn.evals.prompts import denoising, tokenized
from vlm_attn.evals.specs import BASELINE, parse_specs

MAX_NEW_TOKENS = 1024  # where a task sets none
PASSED_ON = ("max_new_tokens", "num_beams", "temperature", "top_p", "top_k")  # of a task's options, to generate()


def manifest() -> ModelManifest:
    """What lmms-eval's registry is told."""
    return ModelManifest(model_id="vlm_attn", chat_class_path=f"{__name__}.Patched")


class Patched(lmms):
    """A model of transformers with methods of this package.

    Args:
        pretrained: as ``vlm-attn --model`` takes it.
        method: ``baseline``, a method's name, or several joined by ``+``.
        preset: name or file of a preset with constants for the model.
        device: default: the process's own.
        dtype: as :func:`~vlm_attn.evals.models.load_model` takes it.
        batch_size: rows of one ``generate`` call.
        trust_remote_code: let the checkpoint run code of its own.
        params: ``gift.alpha=4``, ``gift.enhance_layers=[12,13]``.

    Raises:
        ValueError, TypeError, NotImplementedError: unknown names, values out of range, what ``patch`` refuses, a
            masked-diffusion model; before any task runs.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "scenes",
        method: str = BASELINE,
        preset: str | None = None,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        trust_remote_code: bool = False,
        **params: Any,
    ) -> None:
        super().__init__()
        texts = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in params.items()]
        (spec,) = parse_specs([method], texts, preset)
        self.batch_size = int(batch_size)
        self.accelerator = Accelerator()
        several = self.accelerator.num_processes > 1
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        device = str(self.accelerator.device) if several or device is None else device
        self.model, self.processor = load_model(pretrained, device, dtype, trust_remote_code)
        if not getattr(self.processor, "chat_template", None):
            raise ValueError(f"{pretrained}: its processor has no chat template, which lmms-eval's prompts need")
        if denoising(self.model, {}) is not None:
            raise NotImplementedError(f"{pretrained} is a masked-diffusion model: use vlm-attn eval")
        if spec.names:
            vlm_attn.patch(self.model, spec.build(self.model), processor=self.processor)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers in the order of the requests; those with the same options run in batches."""
        alike: dict[str, list[int]] = {}
        asked = [self._asked(request) for request in requests]
        for number, (_, pictures, options, _) in enumerate(asked):
            alike.setdefault(json.dumps([options, pictures], sort_keys=True, default=str), []).append(number)
        answers = [""] * len(asked)
        with tqdm(total=len(asked), disable=self.rank != 0, desc="vlm_attn") as bar:
            for numbers in alike.values():
                for first in range(0, len(numbers), self.batch_size):
                    batch = numbers[first : first + self.batch_size]
                    said = self._answer([asked[number] for number in batch])
                    for number, text in zip(batch, said, strict=True):
                        answers[number] = text
                        self.cache_hook.add_partial("generate_until", (asked[number][0], asked[number][2]), text)
                    bar.update(len(batch))
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> Any:
        """Not there: methods edit what is generated, not the rows of a given answer."""
        raise NotImplementedError("vlm_attn answers by generating: choose the task's generate_until form")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> Any:
        """Not there."""
        raise NotImplementedError("vlm_attn takes tasks of one round")

    def _asked(self, request: Any) -> tuple[str, bool, dict[str, Any], list[Any]]:
        """Prompt, whether it holds pictures, options and messages of a request.

        Raises:
            NotImplementedError: it holds video or sound.
        """
        _, messages_of, options, document, task, split = request.args
        messages = ChatMessages(messages=messages_of(self.task_dict[task][split][document]))
        pictures, *others = messages.extract_media()
        if any(others):
            raise NotImplementedError(f"task {task} has video or sound: vlm_attn takes pictures and text")
        chat = messages.to_hf_messages()
        text = self.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        return text, bool(pictures), options, chat

    @torch.inference_mode()
    def _answer(self, batch: Sequence[tuple[str, bool, dict[str, Any], list[Any]]]) -> list[str]:
        _, _, (options, *_), chats = zip(*batch, strict=True)
        inputs = tokenized(self.processor, chats).to(self.model.device, self.model.dtype)
        chosen = {"max_new_tokens": MAX_NEW_TOKENS} | {k: options[k] for k in PASSED_ON if k in options}
        sample = bool(options.get("do_sample", True)) and (chosen.get("temperature") or 0) > 0
        if not sample:  # settings of sampling would only cause warnings
            chosen |= {"temperature": None, "top_p": None, "top_k": None}
        pad = self.processor.tokenizer.pad_token_id
        output = self.model.generate(**inputs, **chosen, do_sample=sample, pad_token_id=pad)
        said = self.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        until = options.get("until") or []
        return [_before(text, [until] if isinstance(until, str) else until).strip() for text in said]


def _before(text: str, ends: Sequence[str]) -> str:
    """The text up to the first of some strings."""
    return text[: min((text.index(end) for end in ends if end and end in text), default=len(text))]
