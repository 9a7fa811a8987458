# SPDX-License-Identifier: Apache-2.0
"""Attention kernels side by side, in one run: editing decode steps and masked prompts against what PyTorch has.

Random tensors of real shapes. Every column of a case is first compared with float64; a column that is off by more than
twice plain PyTorch's error in the same dtype prints its error and no figure, and one that does not run here its reason.
Timed rounds run all columns in a shuffled order over rotating buffers, so that no column finds the others' keys in a
cache; on CUDA every column runs as a CUDA graph where it can be captured.

Columns that are not ours: SDPA (on CUDA its flash backend), the host's eager attention with a map per head, FlexAttention
with its log-sum-exp and the same mask or score function, the same on its FLASH backend, ``varlen_attn``, and, for column
sums, the package flash-colsum where it is installed. FlexAttention's GIFT is told the biases beforehand, which a decode
step would have to find first.
"""

from __future__ import annotations

import inspect
import random
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vlm_attn.evals.bench.shared import clock_on, record, summary
from vlm_attn.evals.runner import write_json
from vlm_attn.hallucination import Gift, Var
from vlm_attn.kernels import (
    Edit,
    Group,
    Pattern,
    attention_rows,
    edited_attention,
    masked_attention,
    masks,
    one_hot_segments,
    probe,
)

QKV = tuple[Tensor, Tensor, Tensor]
Run = Callable[[int], Any]  # runs once on the buffers of this number


def ceilings(device: str, dtype: torch.dtype) -> dict[str, float]:
    """What this device reaches now: bytes per second of a copy (read and written), operations per second of a product."""
    size = (256 if device == "cuda" else 64) * 2**20
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    side = 8192 if device == "cuda" else 1024
    one, two = torch.randn(2, side, side, device=device, dtype=dtype).unbind(0)
    copy = statistics.median(timed({"copy": lambda _: target.copy_(source)}, 1, 10, device, False)["copy"])
    product = statistics.median(timed({"product": lambda _: one @ two}, 1, 10, device, False)["product"])
    return {"copy_bytes_per_second": 2 * size / copy, "matmul_flops_per_second": 2 * side**3 / product}


def timed(
    columns: dict[str, Run], buffers: int, repeats: int, device: str, graph: bool, seed: int = 0
) -> dict[str, list[float]]:
    """Seconds of one run of every column, ``repeats`` times, in a shuffled order."""
    runs: dict[str, Callable[[], Any]] = {}
    for name, column in columns.items():
        _all(column, buffers)  # compiles and warms up
        runs[name] = _graphed(column, buffers) if graph else partial(_all, column, buffers)
    times: dict[str, list[float]] = {name: [] for name in columns}
    order, shuffle = list(columns), random.Random(seed)
    for _ in range(repeats):
        shuffle.shuffle(order)
        for name in order:
            times[name].append(_once(runs[name], device) / buffers)
    return times


def _all(column: Run, buffers: int) -> None:
    for index in range(buffers):
        column(index)


def _graphed(column: Run, buffers: int) -> Callable[[], Any]:
    """All buffers as one CUDA graph; as they are where a column cannot be captured."""
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            _all(column, buffers)
    except RuntimeError:
        torch.cuda.synchronize()
        return partial(_all, column, buffers)
    return graph.replay


def _once(run: Callable[[], Any], device: str) -> float:
    if device != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def wrong(got: Tensor, wanted: Tensor, plain: Tensor) -> str | None:
    """Why a column must not show a figure: its error is more than twice plain PyTorch's, plus four roundings of 1, which is
    the size of the random values."""
    if not bool(got.isfinite().all()):
        return "not finite"
    error, usual = ((t.double() - wanted).abs().max() for t in (got, plain))
    allowed = 2 * usual + 4 * torch.finfo(plain.dtype).eps
    return None if bool(error <= allowed) else f"error {float(error):.1e}, allowed {float(allowed):.1e}"


def _tensors(
    buffers: int, batch: int, heads: tuple[int, int], rows: int, length: int, dim: int, options: dict[str, Any]
) -> list[QKV]:
    return [
        (
            torch.randn(batch, heads[0], rows, dim, **options),
            torch.randn(batch, heads[1], length, dim, **options),
            torch.randn(batch, heads[1], length, dim, **options),
        )
        for _ in range(buffers)
    ]


def decode_case(
    batch: int, heads: tuple[int, int], length: int, dim: int, device: str, dtype: torch.dtype, repeats: int, flex: bool
) -> dict[str, Any]:
    """One decoding step, of which ``length // 2`` keys are the image."""
    size = 2 * batch * heads[1] * length * dim * torch.finfo(dtype).bits // 8  # bytes of K and V
    buffers = max(1, min(8, (2**28 if device == "cuda" else 2**24) // size))
    inputs = _tensors(buffers, batch, heads, 1, length, dim, {"device": device, "dtype": dtype})
    scale = dim**-0.5
    columns_of_keys = torch.arange(length, device=device)
    visual = (columns_of_keys >= 16) & (columns_of_keys < 16 + length // 2)
    visual_ids = visual + 2 * (columns_of_keys >= length - 32)
    sinks = columns_of_keys % 97 == 0
    sink_ids = torch.where(sinks, torch.where(visual, 3, 2), visual.int())
    saliency = torch.rand(batch, length, device=device)
    expanded = visual_ids.expand(batch, -1)
    # As in a compiled model: a policy is then one kernel, or a few. FlexAttention is compiled as well.
    policy = torch.compile if device == "cuda" else lambda function: function
    gift = Edit(
        one_hot_segments(expanded, 3, twin_of=1, log_weight=4.0 * saliency), policy(Gift().reweigh), partition=3
    )
    edits = {
        "ours plain": Edit(torch.ones(batch, length, 1, device=device), torch.ones_like, partition=1),
        "ours gift": gift,
        "ours var": Edit(
            one_hot_segments(sink_ids.expand(batch, -1), 4), policy(Var().reweigh), conserves=True, partition=4
        ),
        "flex gift": gift,
        "flex flash gift": gift,
    }

    def ours(edit: Edit) -> Run:
        return lambda i: edited_attention(*inputs[i], [edit], scale=scale)

    def eager(i: int) -> Tensor:
        """The host's eager attention: repeated heads, a map per head, softmax in float32."""
        query, key, value = inputs[i]
        ratio = heads[0] // heads[1]
        maps = torch.softmax((query @ key.repeat_interleave(ratio, 1).mT).float() * scale, -1).to(query.dtype)
        return maps @ value.repeat_interleave(ratio, 1)

    columns: dict[str, Run] = {"sdpa": _sdpa(inputs, scale, heads, device), "eager": eager}
    columns |= {name: ours(edit) for name, edit in edits.items() if name.startswith("ours")}
    if flex:
        biases = [_bias(query, key, gift, scale) for query, key, _ in inputs]
        for name, options in flex_columns(device).items():
            columns[name] = _flex(inputs, scale, heads, None, options)
            columns[f"{name} gift"] = _flex(inputs, scale, heads, None, options, biases)
    failures: dict[str, str] = {}
    if device == "cuda":
        _offer(columns, failures, "varlen", lambda: _varlen(inputs, scale, False, [length] * batch))
    for name in list(columns):
        query, key, value = inputs[0]
        edit = [edits[name]] if name in edits else []
        exact = edited_attention(query.double(), key.double(), value.double(), edit, scale=scale, backend="reference")
        plain = edited_attention(query, key, value, edit, scale=scale, backend="grouped")
        failures |= _failed(columns, name, exact, plain)
    times = timed(columns, buffers, repeats, device, device == "cuda")
    return _row({"batch": batch, "heads": heads, "keys": length, "dim": dim}, times, failures, "sdpa", size, None)


def _bias(query: Tensor, key: Tensor, edit: Edit, scale: float) -> Tensor:
    """What an edit adds to the logits of one step, ``[B, H, S]``."""
    segments = edit.over(key.shape[2])[:, None]
    weight = edit.policy(attention_rows(query, key, scale=scale, backend="eager") @ segments)
    return (weight @ segments.mT).log()[:, :, 0].to(query.dtype)


def _offer(columns: dict[str, Run], failures: dict[str, str], name: str, build: Callable[[], Run]) -> None:
    """A column of another library, or why there is none."""
    try:
        columns[name] = build()
    except Exception as error:  # not installed, or nothing for this device or shape
        failures[name] = f"{type(error).__name__}: {error}"


def _failed(
    columns: dict[str, Run], name: str, exact: Tensor, plain: Tensor, rows: slice = slice(None)
) -> dict[str, str]:
    """Run a column once and take it out where it is wrong or does not run here."""
    try:
        reason = wrong(columns[name](0)[:, :, rows], exact, plain)
    except Exception as error:  # another library's backend: any reason not to run is a result
        reason = f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
    if reason is None:
        return {}
    del columns[name]
    return {name: reason}


def flex_columns(device: str) -> dict[str, dict[str, Any]]:
    """FlexAttention as it is and, on CUDA, on the backend of FlashAttention's kernels: name and options of the kernel."""
    return {"flex": {}, "flex flash": {"BACKEND": "FLASH"}} if device == "cuda" else {"flex": {}}


def _flex(
    inputs: list[QKV],
    scale: float,
    heads: tuple[int, int],
    block_mask: Any,
    options: dict[str, Any],
    biases: list[Tensor] | None = None,
) -> Run:
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    given: dict[str, Any] = {
        "scale": scale,
        "enable_gqa": heads[0] != heads[1],
        "block_mask": block_mask,
        "return_aux": AuxRequest(lse=inputs[0][0].is_cuda),  # on a CPU it has no log-sum-exp
    }
    if options:
        given["kernel_options"] = options

    def run(i: int) -> Tensor:
        if biases is None:
            return compiled(*inputs[i], **given)[0]
        bias = biases[i]
        return compiled(*inputs[i], score_mod=lambda s, b, h, q, k: s + bias[b, h, k], **given)[0]

    return run


def _sdpa(inputs: list[QKV], scale: float, heads: tuple[int, int], device: str, causal: bool = False) -> Run:
    """SDPA without a mask: on CUDA its flash backend and no other."""
    gqa = heads[0] != heads[1]

    def run(i: int) -> Tensor:
        return scaled_dot_product_attention(*inputs[i], is_causal=causal, scale=scale, enable_gqa=gqa)

    if device != "cuda":
        return run
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def flash(i: int) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return run(i)

    return flash


def _varlen(inputs: list[QKV], scale: float, causal: bool, lengths: list[int]) -> Run:
    """``varlen_attn`` of prompts of these lengths one behind the other, rows of the batch as well; on copies in its layout.

    Raises:
        ImportError: this PyTorch has none.
    """
    from torch.nn.attention.varlen import varlen_attn

    def packed(tensor: Tensor) -> Tensor:
        return tensor.transpose(1, 2).flatten(0, 1).contiguous()

    query, device = inputs[0][0], inputs[0][0].device
    rows = [1] * len(lengths) if query.shape[2] == 1 else lengths
    ends = [torch.tensor([0, *n], device=device).cumsum(0).to(torch.int32) for n in (rows, lengths)]
    options: dict[str, Any] = {"scale": scale}
    if causal:  # named one way and then the other
        names = inspect.signature(varlen_attn).parameters
        options |= {"is_causal": True} if "is_causal" in names else {"window_size": (-1, 0)}
    given = [[packed(tensor) for tensor in buffer] for buffer in inputs]
    ratio = query.shape[1] // inputs[0][1].shape[1]
    if ratio > 1 and "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = True

    def run(i: int) -> Tensor:
        (q, k, v), (q_ends, k_ends) = given[i], ends
        out: Any = varlen_attn(q, k, v, q_ends, k_ends, max(rows), max(lengths), **options)
        return out.unflatten(0, (len(query), -1)).transpose(1, 2)

    return run


def prefill_case(
    batch: int,
    heads: tuple[int, int],
    length: int,
    visual: int,
    dim: int,
    device: str,
    dtype: torch.dtype,
    repeats: int,
    flex: bool,
) -> dict[str, Any]:
    """A prompt with ``visual`` image tokens, under several masks; four prompts packed into the same row; column sums.

    "ours sums" is one call for a causal forward with log weights, group masses and the column sums of the question's rows.
    Masks are laid out beforehand, ours as FlexAttention's: a model does it once for all layers.
    """
    inputs = _tensors(1, batch, heads, length, length, dim, {"device": device, "dtype": dtype})
    query, key, value = inputs[0]
    scale, gqa = dim**-0.5, heads[0] != heads[1]
    group = torch.full((batch, length), int(Group.SYSTEM), dtype=torch.uint8, device=device)
    group[:, 16 : 16 + visual] = int(Group.VISUAL)
    group[:, -64:] = int(Group.QUERY)
    window = masks.named(f"sliding:{max(64, length // 8)}")
    lengths = [length - 3 * (length // 4), *[length // 4] * 3]
    ends = torch.tensor([0, *lengths], device=device).cumsum(0)
    document = masks.documents(ends).expand(batch, -1)
    matrix = masks.materialise(masks.modality_mutual, group)
    question = group == int(Group.QUERY)
    extras = {
        "log_weight": torch.rand(batch, length, device=device),
        "segments": one_hot_segments(group == int(Group.VISUAL), 2),
        "summed": question,
    }
    # What a column's name ends in says what it must compute.
    means: dict[str, tuple[masks.Mask, dict[str, Any]]] = {
        "causal": (masks.causal, {}),
        "mutual": (masks.modality_mutual, {}),
        "window": (window, {}),
        "packed": (masks.causal, {"document": document}),
        "sums": (masks.causal, extras),
    }

    def ours(name: str) -> Run:
        mask, options = means[name]
        pattern = Pattern.of(mask, group, length, length, document=options.get("document"))
        rest = {key: value for key, value in options.items() if key != "document"}
        return lambda i: pattern.attend(*inputs[i], scale=scale, **rest).out

    def eager(i: int) -> Tensor:
        """The host's eager attention under the mutual mask."""
        query, key, value = inputs[i]
        logits = (query @ key.repeat_interleave(heads[0] // heads[1], 1).mT) * scale
        maps = torch.softmax(logits.masked_fill(~matrix, torch.finfo(dtype).min).float(), -1).to(dtype)
        return maps @ value.repeat_interleave(heads[0] // heads[1], 1)

    columns: dict[str, Run] = {
        "sdpa causal": _sdpa(inputs, scale, heads, device, causal=True),
        "sdpa mutual": lambda i: scaled_dot_product_attention(
            *inputs[i], attn_mask=matrix, scale=scale, enable_gqa=gqa
        ),
    }
    holds_maps = device == "cuda" or length <= 4096  # without Triton all rows' attention is held at once
    columns |= {f"ours {name}": ours(name) for name in means if name != "sums" or holds_maps}
    if length <= 4096:
        columns["eager mutual"] = eager
    failures: dict[str, str] = {}
    if flex:
        from torch.nn.attention.flex_attention import create_block_mask

        def mutual(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (k <= q) | ((group[b, q] == int(Group.VISUAL)) & (group[b, k] == int(Group.QUERY)))

        blocks = create_block_mask(mutual, batch, None, length, length, device)
        for name, options in flex_columns(device).items():
            columns[f"{name} mutual"] = _flex(inputs, scale, heads, blocks, options)
    if device == "cuda":
        _offer(columns, failures, "varlen causal", lambda: _varlen(inputs, scale, True, [length] * batch))
        _offer(columns, failures, "varlen packed", lambda: _varlen(inputs, scale, True, lengths * batch))
    rows = min(64, length)  # enough rows to see a mistake, few enough for float64
    for name in list(columns):
        mask, options = means[name.split()[-1]]
        weight = {key: options[key] for key in options if key in ("document", "log_weight")}
        for first in (0, 16 + visual // 2, length - rows):
            start = min(first, length - rows)
            part = query[:, :, start : start + rows]
            where: dict[str, Any] = {"first": start, "scale": scale, "backend": "reference", **weight}
            exact: Any = masked_attention(part.double(), key.double(), value.double(), mask, group, **where)
            plain: Any = masked_attention(part, key, value, mask, group, **where)
            if name in columns:
                failures |= _failed(columns, name, exact, plain, slice(start, start + rows))
    if holds_maps:
        _column_sums(columns, failures, inputs, scale)
    times = timed(columns, 1, repeats, device, device == "cuda")
    operations = 4 * batch * heads[0] * dim * length * (length + 1) // 2
    hidden = {name: 1 - _share(mask, group, options.get("document")) for name, (mask, options) in means.items()}
    shape = {"batch": batch, "heads": heads, "keys": length, "visual": visual, "dim": dim}
    shape |= {"hidden_share": {name: round(share, 3) for name, share in hidden.items() if name != "sums"}}
    return _row(shape, times, failures, "sdpa causal", None, operations)


def _share(mask: masks.Mask, group: Tensor, document: Tensor | None) -> float:
    """What share of the matrix a mask shows, counted in parts: the matrix of a long prompt is large."""
    length = group.shape[1]
    parts = [range(first, min(first + 1024, length)) for first in range(0, length, 1024)]
    shown = sum(int(masks.materialise(mask, group, document=document, rows=rows).sum()) for rows in parts)
    return shown / (len(group) * length * length)


def _column_sums(columns: dict[str, Run], failures: dict[str, str], inputs: list[QKV], scale: float) -> None:
    """Sums over all rows of a causal prompt: ours for every head, flash-colsum's for their mean, where it is installed."""
    query, key, _ = inputs[0]
    (batch, heads, length, _), grouped = query.shape, query.shape[1] != key.shape[1]
    last = torch.arange(length, device=query.device)[None]
    columns["column sums"] = lambda i: probe(*inputs[i][:2], last=last, scale=scale)
    found = columns["column sums"](0).column_sum.double()
    if abs(float(found.sum()) / (batch * heads * length) - 1) > 1e-4:  # every row's attention adds up to one
        failures["column sums"] = f"rows add up to {float(found.sum()) / (batch * heads * length):.4f}"
        del columns["column sums"]
    if grouped or batch > 1 or not query.is_cuda:
        failures["flash-colsum"] = "takes CUDA tensors of batch 1 without grouped heads only"
        return
    try:
        from flash_colsum import flash_colsum

        mean = flash_colsum(query, key, scale=scale, is_causal=True).double()
    except Exception as error:  # not installed, or nothing for this device
        failures["flash-colsum"] = f"{type(error).__name__}: {error} (pip install flash-colsum)"
        return
    wanted = found.mean(1) / length
    # Four roundings of the inputs' precision, in which it may keep what it adds up.
    if not bool(((mean - wanted).abs() <= 4 * torch.finfo(query.dtype).eps * wanted).all()):
        failures["flash-colsum"] = f"differs from ours by up to {float((mean / wanted - 1).abs().max()):.1%}"
        return
    columns["flash-colsum"] = lambda i: flash_colsum(*inputs[i][:2], scale=scale, is_causal=True)


def _row(
    shape: dict[str, Any],
    times: dict[str, list[float]],
    failures: dict[str, str],
    base: str,
    size: int | None,
    operations: int | None,
) -> dict[str, Any]:
    figures = {}
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(seconds, times[base], strict=True)] if base in times else []
        median = statistics.median(seconds)
        figures[name] = {
            "seconds": summary(seconds),
            f"ratio_to_{base.replace(' ', '_')}": summary(ratios) if ratios else None,
            "bytes_per_second": size / median if size else None,
            "causal_flops_per_second": operations / median
            if operations and name.split()[-1] not in ("window", "packed")
            else None,
        }
    return {"shape": shape, "kv_bytes": size, "columns": figures, "no_figure": failures}


def cases(device: str, small: bool) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
    """Shapes of the decode cases (batch, heads, keys, dim) and the prefill cases (batch, heads, tokens, visual, dim)."""
    if small:
        return [(1, (4, 2), 96, 16)], [(1, (2, 1), 128, 48, 16)]
    if device != "cuda":
        return (
            [
                (batch, heads, length, 64)
                for heads in ((12, 12), (28, 4))
                for batch, length in ((1, 700), (1, 4096), (4, 700))
            ],
            [(1, heads, length, 576, 64) for heads in ((12, 12), (28, 4)) for length in (700, 1024)],
        )
    both = ((32, 32), (28, 4))
    return (
        [
            (batch, heads, 1024 * n, 128)
            for heads in both
            for batch in (1, 8, 32)
            for n in (1, 4, 8, 32)
            if batch * n <= 512
        ],
        [
            (1, heads, 1024 * n, visual, 128)
            for heads in both
            for n, visual in ((1, 576), (4, 2880), (8, 4096), (16, 4096))
        ],
    )


def measure(
    *,
    device: str,
    dtype: torch.dtype,
    repeats: int,
    small: bool,
    flex: bool,
    seed: int,
    done: Callable[[str, dict[str, Any]], None],
    batch: Sequence[int] = (),
    keys: Sequence[int] = (),
) -> dict[str, Any]:
    """Measure everything, or the cases of these batches and numbers of keys; see :func:`kernels` for the parameters.

    ``done(kind, result)`` hears of every case.

    Returns:
        The result as it is written to JSON.

    Raises:
        ValueError: there is no such case.
    """
    chosen = [
        [shape for shape in shapes if (not batch or shape[0] in batch) and (not keys or shape[2] in keys)]
        for shapes in cases(device, small)
    ]
    if not any(chosen):
        raise ValueError(f"no case of batch {list(batch) or 'any'} and keys {list(keys) or 'any'} on {device}")
    torch.manual_seed(seed)
    config = {
        "dtype": str(dtype).removeprefix("torch."),
        "repeats": repeats,
        "seed": seed,
        "cuda_graphs": device == "cuda",
        "flex": flex,
    }
    result = record("kernels", device, config=config, decode=[], prefill=[])
    with torch.no_grad():
        result["ceilings"] = ceilings(device, dtype)
        runs: tuple[Callable[..., dict[str, Any]], ...] = (decode_case, prefill_case)
        for name, run, shapes in zip(("decode", "prefill"), runs, chosen, strict=True):
            for shape in shapes:
                torch.compiler.reset()  # after eight shapes it would compile no more
                row = run(*shape, device=device, dtype=dtype, repeats=repeats, flex=flex)
                result[name].append(row)
                done(name, result)
    return result


def _print(console: Console, kind: str, row: dict[str, Any]) -> None:
    shape = ", ".join(f"{name} {value}" for name, value in row["shape"].items())
    table = Table(box=box.SIMPLE_HEAD, title=f"{kind}: {shape}", title_justify="left")
    for column in ("", "microseconds [p20, p80]", "ratio", "GB/s" if kind == "decode" else "TFLOP/s"):
        table.add_column(column, justify="left" if not column else "right")
    for name, figure in row["columns"].items():
        us = {key: value * 1e6 for key, value in figure["seconds"].items()}
        ratio = next((value for key, value in figure.items() if key.startswith("ratio") and value), None)
        rate = figure["bytes_per_second"] or 0
        rate = rate / 1e9 if kind == "decode" else (figure["causal_flops_per_second"] or 0) / 1e12
        table.add_row(
            name,
            f"{us['median']:.1f} [{us['p20']:.1f}, {us['p80']:.1f}]",
            f"{ratio['median']:.2f}x" if ratio else "",
            f"{rate:.3g}" if rate else "",
        )
    for name, reason in row["no_figure"].items():
        table.add_row(name, f"no figure: {reason}")
    console.print(table)


def kernels(
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="float32, float16, bfloat16.", show_default="bfloat16, on a CPU float32")
    ] = "",
    repeats: Annotated[int, typer.Option(help="Timed rounds.", min=1)] = 25,
    small: Annotated[
        bool, typer.Option("--small", help="One tiny case of each kind, to see that everything runs.")
    ] = False,
    flex: Annotated[
        bool | None,
        typer.Option("--flex/--no-flex", help="FlexAttention, which compiles for every case.", show_default="on CUDA"),
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="Only cases of this batch; repeats.", show_default="all")
    ] = None,
    keys: Annotated[
        list[int] | None, typer.Option(help="Only cases of this many keys; repeats.", show_default="all")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the tensors and of the order.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the result here.")
    ] = None,
) -> None:
    """Edited decoding and masked prefill against SDPA, eager, FlexAttention and varlen_attn, on random tensors, checked first.

    Ratios are to SDPA (prefill: SDPA's causal path), within a round. "ours" is what the dispatch chooses on the device.

    Example: vlm-attn bench kernels --device cpu --json kernels.json
    """
    if device not in ("cpu", "cuda", "auto"):
        raise ValueError(f"device {device!r}: expected cpu, cuda or auto")
    device, _ = clock_on(device, cpu_time=False)
    wanted = dtype or ("bfloat16" if device == "cuda" else "float32")
    if wanted not in ("float32", "float16", "bfloat16"):
        raise ValueError(f"dtype {wanted!r}: expected float32, float16 or bfloat16")
    console = Console()

    def done(kind: str, result: dict[str, Any]) -> None:
        _print(console, kind, result[kind][-1])
        if json_file is not None:  # a run is long: what it has is kept
            write_json(json_file, result)

    result = measure(
        device=device,
        dtype=getattr(torch, wanted),
        repeats=repeats,
        small=small,
        flex=device == "cuda" if flex is None else flex,
        seed=seed,
        batch=batch or (),
        keys=keys or (),
        done=done,
    )
    reached = result["ceilings"]
    console.print(
        f"{result['device']}, {result['threads']} threads, torch {torch.__version__}, {wanted}; measured ceilings: copy "
        f"{reached['copy_bytes_per_second'] / 1e9:.3g} GB/s, matmul {reached['matmul_flops_per_second'] / 1e12:.3g} TFLOP/s"
    )


def main() -> int:
    """Entry of ``vlm-attn bench kernels``."""
    typer.run(kernels)
    return 0
