# SPDX-License-Identifier: Apache-2.0
"""Inputs that look like a prompt and are something else: what is refused, and what is said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vlm_attn.call import Call, PromptMask
from vlm_attn.heads import HeadMethod
from vlm_attn.kernels import Group
from vlm_attn.method import Method
from vlm_attn.reduction import Reducer

PACKED = "cu_seq_lens_q", "cu_seq_lens_k"  # where samples end that lie one after the other in a row
IGNORED = -100  # label of a token that no loss is asked for


def check_packed(inputs: Mapping[str, Any], size: tuple[int, int], shown: Tensor | None, visual: Tensor) -> None:
    """Refuse rows that hold several samples one after the other.

    Args:
        inputs: the model's inputs.
        size: rows and columns of the prompt.
        shown: ``[B, P]`` mask of what is no padding, None = all.
        visual: ``[B, P]`` bool, image tokens.

    Raises:
        ValueError: positions that begin again, sample boundaries, a 4-D mask that hides an image from the last row.
    """
    found = [name for name in PACKED if isinstance(inputs.get(name), Tensor) and inputs[name].numel() > size[0] + 1]
    positions = inputs.get("position_ids")
    if isinstance(positions, Tensor) and positions.shape[-1] == size[1] and restarts(positions, shown).any():
        found.append("position_ids")
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[-1] == size[1]:
        last = mask[:, :, -1] if mask.dtype == torch.bool else mask[:, :, -1] > torch.finfo(mask.dtype).min / 2
        if (visual & ~last.any(1)).any():
            found.append("attention_mask")
    if found:
        raise ValueError(
            f"{', '.join(found)}: a row holds several samples one after the other (packing), and what is an image, a question "
            "or an answer is known for one prompt in each row. Give each sample a row of its own, padded on the left"
        )


def restarts(positions: Tensor, shown: Tensor | None) -> Tensor:
    """``[B, P - 1]`` bool: whether positions begin again behind a column.

    Args:
        positions: ``[B, P]``, or ``[n, B, P]`` (M-RoPE, text or time first).
        shown: ``[B, P]``, zero on padding; None = none.
    """
    several = positions.ndim == 3
    positions = positions[0] if several else positions
    back = positions[:, 1:] < positions[:, :-1]
    if not several:
        back = back | (positions[:, 1:] == 0)
    if shown is not None:
        there = shown.to(back.device) != 0
        back = back & there[:, 1:] & there[:, :-1]
    return back


def check_labels(labels: Tensor, call: Call) -> str:
    """Refuse a loss over what the model was shown or what is not there; say of which rows it is.

    Args:
        labels: ``[B, P]``, -100 where no loss is asked for.
        call: the call, laid out.

    Returns:
        What is to be said once.

    Raises:
        ValueError: a mask lets rows see the answer, a loss is asked of rows that are taken away.
    """
    prompt, methods = call.prompt, call.methods
    if labels.shape == prompt.group.shape:
        asked = (labels != IGNORED).to(prompt.group.device)
        mask = next((m for m in methods if m.mask is not None), None)
        if mask is not None and mask.mask is not None:
            columns = torch.arange(prompt.length, device=asked.device)
            seen = PromptMask(mask.mask, prompt.group).rows(columns, prompt.length)[:, 0]
            rows = (prompt.group != Group.PAD)[..., None]
            if (seen & rows & (columns > columns[:, None]) & asked[:, None]).any():
                raise ValueError(
                    f"labels: with {mask.name}, rows of the prompt see later ones, and the answer whose loss is asked for is "
                    "among them: the model would have read it. Run the prompt without it, then the answer's tokens on its cache"
                )
        reducer = next((m for m in methods if isinstance(m, Reducer)), None)
        if reducer is not None and (prompt.visual[:, :-1] & asked[:, 1:]).any():
            raise ValueError(
                f"labels: {reducer.name} takes image tokens away, and a loss is asked of some of these rows: set the labels of "
                f"image tokens, and of the token behind each, to {IGNORED}"
            )
    said = "; ".join(f"{m.name}: {rows_of(m)}" for m in methods)
    return (
        f"labels in a forward of a patched model. Rows that are edited, and whose loss is not the plain model's: {said}. To "
        "score an answer as generate() edits it, run the prompt, then the answer's tokens on its cache"
    )


def rows_of(method: Method) -> str:
    """Which rows of a forward a method changes, in words."""
    if isinstance(method, Reducer):
        return "those that see fewer image tokens"
    if method.edited_rows == "last":
        return "the last one alone"
    if method.edited_rows == "none" or method.mask is not None or isinstance(method, HeadMethod):
        return "all"
    return "those of the text behind the first image"


def check_checkpointing(model: nn.Module, text_model: nn.Module, names: str) -> None:
    """Refuse gradient checkpointing: it runs layers again in the backward pass, when the call and its decisions are gone.

    Raises:
        NotImplementedError: it is on, and gradients are wanted.
    """
    if not (torch.is_grad_enabled() and text_model.training):
        return
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise NotImplementedError(
            f"gradient checkpointing runs layers again in the backward pass, where what {names} decided is gone: switch it off "
            "(model.gradient_checkpointing_disable()), or unpatch the model"
        )


def check_prefix(names: str, mask: PromptMask, call: Call) -> None:
    """Refuse columns that the plain model has put into a cache, where a method's mask would have let them see later ones.

    Raises:
        ValueError: it would.
    """
    columns = torch.arange(call.first, device=mask.group.device)
    later = torch.arange(call.prompt.length, device=mask.group.device) >= call.first
    rows = (mask.group[:, : call.first] != Group.PAD)[..., None]
    if (mask.rows(columns, call.prompt.length)[:, 0] & rows & later).any():
        raise ValueError(
            f"{names}: the {call.first} columns of the cache were read by the plain model, and the mask lets them see what "
            "comes later: pass no cache"
        )
