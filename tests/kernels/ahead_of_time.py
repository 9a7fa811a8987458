# SPDX-License-Identifier: Apache-2.0
"""Compiles every kernel for a device that is not there; run by ``test_ahead_of_time.py``: ``ahead_of_time.py TARGET``.

Prints a JSON list: kernel, matrix instructions, bytes of shared memory, bytes spilled to the stack.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vlm_attn.kernels import masks, triton_prefill, triton_probe, triton_segmented, tuning

TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 8),
    "sm_90": (GPUTarget("cuda", 90, 32), 9),
    "sm_100": (GPUTarget("cuda", 100, 32), 10),
    "sm_120": (GPUTarget("cuda", 120, 32), 12),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 0),
}
MATRIX = r"mma\.sync|wgmma\.mma|tcgen05\.mma|v_mfma"
#: What launches pass as sizes that need not be multiples of 16.
ODD = {
    "ratio",
    "rows",
    "length",
    "parts",
    "kv_heads",
    "heads",
    "chunk",
    "first_column",
    "first",
    "row_tiles",
    "key_tiles",
    "N",
}
FLOATS = {"scale", "cap", "hidden", "visual_abs", "visual_factor", "system_factor"}
POINTERS = {
    "query": "bf16", "key": "bf16", "value": "bf16", "segments": "fp16", "logs": "fp16", "mask": "u8",
    "lse": "fp32", "out": "fp32",
    "mass": "fp32", "weight": "fp32", "head_scale": "fp32", "result": "bf16", "result_lse": "fp32", "keys": "u8",
    "last_column": "i32", "entropy": "fp32", "attention": "fp32", "column_sum": "fp32", "state": "i8", "order": "i32",
    "full": "i32", "some": "i32", "group_of_rows": "u8", "group": "u8", "image_of_rows": "i32", "image": "i32",
    "score": "fp32", "score_from": "i64", "document_of_rows": "i32", "document": "i32", "log_weight": "fp16",
    "summed": "u8", "size": "fp32", "holding": "i32", "number": "i32",
}  # fmt: skip


def compiled(kernel: Any, target: GPUTarget, constants: dict[str, Any], options: dict[str, int], **types: str) -> Any:
    """A kernel for a target, with the alignment that contiguous tensors have."""
    names = kernel.arg_names
    kinds = {}
    for name in names:
        if name in constants:
            kinds[name] = "constexpr"
        elif name in types or name in POINTERS:
            kinds[name] = "*" + types.get(name, POINTERS.get(name, ""))
        else:
            kinds[name] = "fp32" if name in FLOATS else "i32"
    aligned = [i for i, n in enumerate(names) if kinds[n][0] == "*" or (kinds[n] == "i32" and n not in ODD)]
    source = ASTSource(
        fn=kernel,
        signature=kinds,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    return triton.compile(source, target=target, options=options)


def split(block: dict[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """Block sizes, and options of the compiler."""
    return (
        {name: n for name, n in block.items() if name.startswith("BLOCK")},
        {name: n for name, n in block.items() if name.startswith("num_")},
    )


def configurations(major: int) -> Any:
    """Kernel, constants, options, other types, and whether it multiplies matrices (None: as the device likes, in float32)."""
    unit = {"query_d": 1, "key_d": 1}
    single = dict.fromkeys(("query", "key", "value", "out"), "fp32")
    for dim, count, score in ((64, 4, 1), (128, 4, 0), (128, 8, 2), (256, 5, 0), (256, 8, 0)):
        blocks, options = split(tuning._decode(major, 2 * dim, count * 8)[0])
        sizes = {"N": count, "WHOLE": count == 4, "BLOCK_D": dim}
        flags = {"MASK": 1, "CAP": dim == 256, "SCORE": score}
        strides = {"value_d": 1, "mask_s": 1, "score_s": 1}
        constants = {**sizes, **flags, **strides, **blocks, **unit}
        yield triton_segmented.partials_kernel, constants, options, {}, True
    blocks, options = split(tuning._decode(major, 1024, 16)[0])
    yield triton_segmented.partials_kernel, {**constants, "N": 5, **blocks}, options, single, None
    blocks, options = split(tuning._decode(major, 256, 16)[0])
    flags = {"CAP": True, "BLOCK_D": 128, **blocks, **unit}
    yield triton_segmented.head_mean_kernel, flags, options, {}, True
    yield triton_segmented.masses_kernel, {"BLOCK_N": 16, "BLOCK_T": 64}, {"num_warps": 1}, {}, False
    flags = {"WEIGHT": 1, "SCALE": True, "KEEP_LSE": False, "BLOCK_M": 512, "BLOCK_D": 128, "STEP": 64}
    yield triton_segmented.combine_kernel, flags, {"num_warps": 4}, {}, False
    for dim, name, full in ((64, "causal", True), (128, "modality-mutual", False), (256, "vision-block", True)):
        blocks, options = split(tuning.fitting(tuning.PREFILL, major, 2 * dim)[0][1])
        clauses = [int(number) for clause in masks.named(name).clauses for number in clause]
        documents = {"DOCUMENTS": full}
        mask = {"COUNT": len(clauses) // 4, "MASK": triton_prefill.padded(clauses), **documents, **blocks}
        yield triton_prefill.tiles_kernel, mask, {}, {}, False
        flags = {"CAP": False, "SCORE": dim == 128, "WEIGHT": full, "BLOCK_D": dim, **unit}
        sums = {"SEGMENTS": full, "value_d": 1}
        yield triton_prefill.prefill_kernel, {**mask, **flags, **sums}, options, {"out": "bf16"}, True
        yield triton_prefill.sums_kernel, {**mask, **flags}, options, {}, True
        if dim == 256:
            wide, options_of_wide = split(tuning.fitting(tuning.PREFILL, major, 1024)[0][1])
            yield triton_prefill.prefill_kernel, {**mask, **flags, **sums, **wide}, options_of_wide, single, None
        flags = {"MASK": 0, "CAP": False, "LAST": True, "KEYS": True, "BLOCK_D": dim, "mask_s": 1, **unit}
        yield triton_probe.totals_kernel, {**flags, **blocks, "COUNT": 4, "N": 4, "BLOCK_R": 64}, options, {}, True
        yield triton_probe.columns_kernel, {**flags, **blocks, "MAPS": False, "BLOCK_R": 64}, options, {}, True


def stack(binary: bytes) -> int | None:
    """Bytes of stack a CUDA kernel uses: what did not fit the registers. None without the tool that tells."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=False).stdout
    found = re.search(r"STACK:(\d+)", text)
    return int(found[1]) if found else None


def main() -> None:
    """Compile for the target named on the command line."""
    target, major = TARGETS[sys.argv[1]]
    results = []
    for kernel, constants, options, types, matrices in configurations(major):
        made = compiled(kernel, target, constants, options, **types)
        code = made.asm.get("ptx") or made.asm["amdgcn"]
        results.append(
            {
                "kernel": kernel.__name__,
                "dim": constants.get("BLOCK_D"),
                "segments": constants.get("N"),
                "multiplies": matrices,
                "matrix_instructions": len(re.findall(MATRIX, code)),
                "shared": made.metadata.shared,
                "stack": stack(made.asm["cubin"]) if "cubin" in made.asm else None,
            }
        )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
