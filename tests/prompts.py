# SPDX-License-Identifier: Apache-2.0
"""Prompts of every form: what is asked, in which conversation, and which text is the question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

Q = "What colour is it?"
ODD = {
    "plain": Q,
    "one-word": "cat",
    "number": "7",
    "chinese": "图中有几只狗？",
    "arabic": "ما لون الكلب؟",
    "emoji": "Is 😀 or 👩‍👩‍👧 in it? 🐶",
    "accents": "Où est la clé ? Ça va à Århus",
    "code": "def f(x):\n    return x[0] // 2  # <b>\n\nprint(f([3]))",
    "json": '{"type": "text", "text": "blue"}',
    "leading-newline": "\nWhat is it?",
    "leading-newlines": "\n\nWhat is it?",
    "leading-space": "  What is it?",
    "trailing-space": "What is it? ",
    "trailing-newline": "What is it?\n",
    "inner-newlines": "First line.\n\nSecond line?",
    "quoted-user": "He said: USER: hello. Why?",
    "quoted-assistant": "He said: ASSISTANT: hello. Why?",
    "quoted-roles": "user\nassistant\nmodel User: Assistant: [INST] system",
    "quoted-answer": "Is it blue or red? Answer: blue",
    "punctuation": "?!... (what) -- [is] <it>",
    "equal-to-first": "red",
    "long": "Describe this image in detail, and say where every dog is. " * 6 + "Thanks",
}
ANSWERS = {
    "one-word": "blue",
    "newline-end": "It is blue.\n",
    "code": "```\nx = 1\n```",
    "quoting": "You said: What colour is it?",
    "chinese": "蓝色。",
    "number": "3",
}


@dataclass(frozen=True)
class Case:
    """One prompt.

    Attributes:
        chat: messages; contents are lists of parts.
        question: the last user text; where texts stand on both sides of an image, the one after it.
        joined: the question where a template puts all images first.
        options: for ``apply_chat_template``.
        needs: what a checkpoint must have: ``system``, ``video``, ``thinking``.
    """

    chat: Sequence[dict[str, Any]]
    question: str
    joined: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    needs: str = ""


def image(number: int = 0, size: tuple[int, int] = (40, 40)) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


IMAGE, VIDEO = {"type": "image"}, {"type": "video"}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": [text(part) if isinstance(part, str) else part for part in parts]}


def assistant(words: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [text(words)]}


def system(words: str) -> dict[str, Any]:
    return {"role": "system", "content": [text(words)]}


FIRST = (user(IMAGE, "What is there?"), assistant("A dog."))
RULES = system("You answer briefly.\n\nBe kind. USER")
CASES: dict[str, Case] = {
    **{f"image then {name}": Case([user(IMAGE, words)], words) for name, words in ODD.items()},
    **{f"second turn, {name}": Case([*FIRST, user(words)], words) for name, words in ODD.items()},
    **{
        f"after the answer {name}": Case([user(IMAGE, "What is there?"), assistant(words), user(Q)], Q)
        for name, words in ANSWERS.items()
    },
    "text then image": Case([user(Q, IMAGE)], Q),
    "text of two lines then image": Case([user("Look.\n\nWhat is it?", IMAGE)], "Look.\n\nWhat is it?"),
    "text then two images": Case([user(Q, IMAGE, IMAGE)], Q),
    "image between texts": Case([user("Look at this: ", IMAGE, Q)], Q, "Look at this: " + Q),
    "two images": Case([user(IMAGE, IMAGE, Q)], Q),
    "three images": Case([user(IMAGE, IMAGE, IMAGE, Q)], Q),
    "image, text, image, text": Case([user(IMAGE, "This.", IMAGE, Q)], Q, "This." + Q),
    "image, text, image": Case([user(IMAGE, Q, IMAGE)], Q),
    "two texts": Case([user(IMAGE, "Look well. ", Q)], "Look well. " + Q, "Look well. " + Q),
    "system": Case([RULES, user(IMAGE, Q)], Q, needs="system"),
    "system, second turn": Case([RULES, *FIRST, user(Q)], Q, needs="system"),
    "system, text then image": Case([RULES, user(Q, IMAGE)], Q, needs="system"),
    "image in the second turn": Case([user("Hello."), assistant("Hi!"), user(IMAGE, Q)], Q),
    "image in both turns": Case([*FIRST, user(IMAGE, Q)], Q),
    "text then image in the second turn": Case([*FIRST, user(Q, IMAGE)], Q),
    "three turns": Case([*FIRST, user("And this?"), assistant("Two cats."), user(Q)], Q),
    "three turns, image in the middle": Case(
        [user("Hello."), assistant("Hi!"), user(IMAGE, "And?"), assistant("It is."), user(Q)], Q
    ),
    "three turns, images everywhere": Case([*FIRST, user(IMAGE, "And this?"), assistant("A cat."), user(IMAGE, Q)], Q),
    "same question twice": Case([user(IMAGE, Q), assistant("blue"), user(Q)], Q),
    "thinking": Case([user(IMAGE, Q)], Q, options={"enable_thinking": True}, needs="thinking"),
    "no thinking": Case([user(IMAGE, Q)], Q, options={"enable_thinking": False}, needs="thinking"),
    "thinking, second turn": Case([*FIRST, user(Q)], Q, options={"enable_thinking": True}, needs="thinking"),
    "no thinking, second turn": Case([*FIRST, user(Q)], Q, options={"enable_thinking": False}, needs="thinking"),
    "begun answer": Case([user(IMAGE, Q), assistant("It is")], Q, options={"continue_final_message": True}),
    "begun answer, second turn": Case(
        [*FIRST, user(Q), assistant("Sure: ")], Q, options={"continue_final_message": True}
    ),
    "begun answer of two lines": Case(
        [user(IMAGE, Q), assistant("Yes.\n\nIt")], Q, options={"continue_final_message": True}
    ),
    "no answer asked for": Case([user(IMAGE, Q)], Q, options={"add_generation_prompt": False}),
    "video": Case([user(VIDEO, Q)], Q, needs="video"),
    "video, second turn": Case([user(VIDEO, "What?"), assistant("A dog."), user(Q)], Q, needs="video"),
    "text then video": Case([user(Q, VIDEO)], Q, needs="video"),
    "image and video": Case([user(IMAGE, VIDEO, Q)], Q, needs="video"),
}


def filled(
    chat: Sequence[dict[str, Any]], system: str = "parts", size: tuple[int, int] = (40, 40)
) -> list[dict[str, Any]]:
    """The messages with images and videos in them; a system message as text where the template wants it so."""
    number, messages = 0, []
    for message in chat:
        content: list[dict[str, Any]] = []
        for part in message["content"]:
            number += 1
            if part["type"] == "image":
                part = {"type": "image", "image": image(number, size)}
            elif part["type"] == "video":
                part = {"type": "video", "video": np.stack([np.asarray(image(number + i)) for i in range(4)])}
            content.append(part)
        as_text = message["role"] == "system" and system == "text"
        messages.append({"role": message["role"], "content": content[0]["text"] if as_text else content})
    return messages


def tokenized(processor: Any, chats: Sequence[Sequence[dict[str, Any]]], **options: Any) -> dict[str, Any]:
    """A left-padded batch."""
    options.setdefault("add_generation_prompt", not options.get("continue_final_message", False))
    settings: dict[str, Any] = {"padding": True}
    videos = [
        part["type"] == "video" for chat in chats for turn in chat for part in turn["content"] if isinstance(part, dict)
    ]
    if any(videos):
        told = {"fps": 2.0, "total_num_frames": 4, "duration": 2.0, "frames_indices": [0, 1, 2, 3]}
        settings |= {"do_sample_frames": False, "video_metadata": [[told]]}
    return dict(
        processor.apply_chat_template(
            list(chats), tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs=settings, **options
        )
    )
