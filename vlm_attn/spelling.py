# SPDX-License-Identifier: Apache-2.0
"""A prompt's token ids as one string, so that a template is recognised by its characters and special tokens.

Token borders say little: `\\n` and `\\n\\n` are two tokens, ` blue` is another token than `blue`. In the string, a special
token is one character that no text has, and so is an image token; everything else is its text.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

#: Stands for a token of an image or a video.
VISUAL = "\U000f0000"
_SPECIAL, _OPAQUE, _END = (
    0xF0001,
    0x100000,
    0x10FFFF,
)  # private use planes: special tokens, tokens without text of their own


class Speller:
    """Spells token ids.

    Args:
        tokenizer: a tokenizer of transformers.
        special: ids that stand for no text, besides the tokenizer's special tokens.
    """

    def __init__(self, tokenizer: Any, special: Collection[int] = ()) -> None:
        self.tokenizer = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self.special = {*special, *tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
        # What a token adds to a text that has begun already: some tokenizers take off the text's first space.
        self.anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
        self.begun = self._decode(self.anchor)
        self.known: dict[int, str] = {}
        self.used = [_SPECIAL, _OPAQUE]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def spelled(self, token: int) -> str:
        """One token: its text, or the character that stands for it."""
        if token not in self.known:
            text = "" if token in self.special or token < 0 else self._decode([*self.anchor, token])
            own = text[len(self.begun) :] if text.startswith(self.begun) else ""
            if not own or "\ufffd" in own or any(ord(char) >= 0xF0000 for char in own):
                plane = 0 if token in self.special else 1
                own = chr(min(self.used[plane], _END if plane else _OPAQUE - 1))
                self.used[plane] += 1
            self.known[token] = own
        return self.known[token]

    def spell(self, ids: Sequence[int], visual: Sequence[bool] = ()) -> tuple[str, list[int]]:
        """A row of tokens.

        Args:
            ids: token ids.
            visual: which of them are image tokens; empty = none.

        Returns:
            The string, and where each token begins in it, with the string's length behind the last.
        """
        pieces, starts, length = [], [0], 0
        for place, token in enumerate(ids):
            piece = VISUAL if visual and visual[place] else self.spelled(token)
            pieces.append(piece)
            length += len(piece)
            starts.append(length)
        return "".join(pieces), starts


def is_special(char: str) -> bool:
    """Whether a character stands for a special token or an image token."""
    return 0xF0000 <= ord(char) < _OPAQUE


def is_text(text: str) -> bool:
    """Whether there is anything in it but special tokens and white space."""
    return any(not is_special(char) and not char.isspace() for char in text)
