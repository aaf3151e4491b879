"""Every Triton kernel compiles for the cards we serve, without a GPU: A100 (sm_80), A10, A40 and 3090 (86), 4090 (89),
H100 (90), within the 99 KiB of shared memory that the smallest of them gives a block.

A new kernel adds rows to CASES: its launches on the largest tiles. Types are Triton's words: "*bf16:16" is a pointer
whose address is a multiple of 16, "i32:16" an integer that is one, as the launcher would find out by itself; what the
kernel takes as tl.constexpr is in `constants`.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from subprocess import PIPE
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux on x86_64")

from rlft.kernels.delta_forward import columns_of_block, warps
from rlft.kernels.mxfp4 import E2M1
from rlft.kernels.nf4_stack import NF4_BITS, bits_of
from rlft.kernels.target_softmax import FAR, MAX_FP16_WEIGHT, MIN_ENTROPY

VARYING = ("T", "N", "T_share", "SPLITS", "head_1", "head_2", "stride_head")
"""Names of arguments, in every file, that change with the number of tokens."""
ARCHITECTURES = (80, 86, 89, 90)
SHARED_MEMORY = 99 * 1024


class Case(NamedTuple):
    """One compilation. kernel: "file:function" in rlft/kernels. options: num_warps, num_stages, enable_fp_fusion."""

    kernel: str
    types: str
    constants: dict
    options: dict


def nf4(kernel: str, out: str, **constants) -> Case:
    common = {"COUNT": 7, "FIELDS": 10, "BLOCK": 64, "NESTED": 256, "TILE": 4096, "OUT": f"tl.{out}"}
    return Case(f"nf4:{kernel}", "*i64:16 *fp32:16", common | constants, {"num_warps": 4, "enable_fp_fusion": False})


# Triton's dot on fp32 is done without tensor cores ("ieee"), so both element types have their own code.
def columns(dtype: str, P: bool, TRANSPOSED: bool, BC: int, BR: int) -> Case:
    pointers, width = f"*{dtype}:16 i32:16 " * 3 + "*fp32:16 *fp32:16", 12288
    return Case(
        "low_rank:_columns",
        pointers + " i32 i32:16 i32:16",
        {
            "COUNT": 2,
            "FIRST": (0, 48, 96),
            "COLUMN": (0, width),
            "WIDTH": (width, width),
            "K": (0, BR),
            "RANK": (BR, BR),
            "BASE": (0, width * BR, 2 * width * BR),
            "P": P,
            "P_STRIDE": BR,
            "TRANSPOSED": TRANSPOSED,
            "BT": 32,
            "BC": BC,
            "BR": BR,
            "WIDE": False,
        },
        {"num_warps": 4, "num_stages": 3},
    )


def norm(kernel: str, pointers: str, H: int, rows: int, warps: int, absent: str = "", STYLE: int = 0) -> Case:
    """`pointers`: types of the pointers present, in order; `absent`: the optional one that is None."""
    strides = "i32 i32:16 i32:16 i32:16 i32:16" + (" fp32" if kernel == "forward_kernel" else "")
    constants = {"H": H, "BLOCK": 1 << (H - 1).bit_length(), "ROWS": rows, "STYLE": STYLE}
    constants |= {absent: None} if absent else {}
    return Case(f"rms_norm:{kernel}", f"{pointers} {strides}", constants, {"num_warps": warps})


def rope(
    kernel: str, D: int, R: int, rows: int, warps: int, with_norm: bool, PAIRS: bool = False, AFTER: bool = False
) -> Case:
    """Heads 28 + 4; positions where there is a norm; without it the norm's weights are absent too."""
    forward = kernel == "forward_kernel"
    heads, tables = (4, 5) if forward else (6, 7)  # pointers beside weights and tables; strides
    pointers = "*bf16:16 " * (heads + 2) + ("*bf16:16 *bf16:16 *i64:16" if with_norm else "")
    constants = {
        "HQ": 28,
        "HK": 4,
        "D": D,
        "R": R,
        "BLOCK": 1 << (R // 2 - 1).bit_length(),
        "TAIL": 1 << (max(1, D - R) - 1).bit_length(),
        "ROWS": rows,
        "STYLE": 1,
        "PAIRS": PAIRS,
        "AFTER": AFTER,
    }
    constants |= {} if with_norm else {"qw_ptr": None, "kw_ptr": None, "pos_ptr": None}
    types = f"{pointers} i32 {'i32:16 ' * tables} fp32"
    return Case(f"qk_rope:{kernel}", types, constants, {"num_warps": warps})


def glu(kernel: str, M: int, block: int, rows: int, ACT: str, gated: bool = True) -> Case:
    """Strides are as many as tensors, and without a gate some of them are 0."""
    absent = () if gated else ("up_ptr",) if kernel == "forward_kernel" else ("up_ptr", "dup_ptr")
    tensors = 3 if kernel == "forward_kernel" else 6
    curve = "*fp32:16 " if ACT == "xielu" else ""
    types = "*bf16:16 " * (tensors - len(absent)) + curve + "i32 " + "i32:16 " * tensors
    constants = {"M": M, "BLOCK": block, "ROWS": rows, "ACT": ACT} | dict.fromkeys(absent)
    constants |= {} if curve else {"curve_ptr": None}
    return Case(f"swiglu:{kernel}", types, constants, {"num_warps": 4})


def conv(kernel: str, dtype: str, C: int, K: int, ACT: bool) -> Case:
    tensors, tables = (2, 2) if kernel == "forward_kernel" else (3, 3)  # beside weight and bias
    types = f"*{dtype}:16 " * (tensors + 2) + "*i32:16 " * tables + "i32 " + "i32:16 " * tensors
    return Case(f"short_conv:{kernel}", types, {"C": C, "K": K, "ACT": ACT, "BLOCK": 128, "ROWS": 16}, {"num_warps": 4})


def delta(dtype: str, DK: int, DV: int) -> list[Case]:
    """All kernels of the gated delta rule for 16 heads of q and k, 32 of v; g is fp32 as transformers has it."""
    BK, whole = 1 << (DK - 1).bit_length(), 1 << (DV - 1).bit_length()
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    columns, part = columns_of_block(DK, DV, torch_dtype), min(whole, 32 if dtype == "fp32" else 64)
    x, f, i = f"*{dtype}:16 ", "*fp32:16 ", "*i32:16 "

    def options(*widths: int, most: int = 4) -> dict:
        return {"num_warps": warps(torch_dtype, *widths, most=most), "num_stages": 1}

    wide, columns_of_v = {"HK": 16, "HV": 32, "DK": DK, "C": 64}, min(64, whole)
    block, parts = {"DV": DV, "BV": columns_of_v}, {"DV": DV, "BD": 64, "BV": part}
    walked, few = options(BK, columns), options(columns_of_v)
    strides = [" ".join(["i32:16"] * count) for count in range(8)]
    through = {"DV": DV, "BK": BK, "BV": columns}
    return [
        Case(
            "delta_forward:prepare_kernel",
            x * 2 + f + x + i + f * 3 + x + f"{strides[4]} fp32",
            wide | {"L2NORM": True, "EPS": 1e-6},
            options(64),
        ),
        Case("delta_forward:walk_kernel", x * 3 + f * 2 + x * 3 + f + i + strides[3], wide | through, walked),
        Case("delta_forward:outputs_kernel", x * 2 + f * 3 + x * 3 + i + strides[2], wide | block, few),
        Case("delta_backward:local_kernel", x * 3 + f * 3 + x + i + strides[3], wide | block, few),
        *(
            Case(
                "delta_backward:back_kernel",
                x * 4 + f * 3 + x * 4 + f + i + strides[5],
                wide | through | {"CONTINUED": continued},
                options(BK, columns, most=8),
            )
            for continued in (False, True)
        ),
        Case(
            "delta_gradients:scores_kernel",
            x * 5 + f * 3 + x * 3 + f * 2 + i + f"i32 i32 {strides[5]}",
            wide | parts,
            options(part),
        ),
        Case(
            "delta_gradients:parts_kernel",
            x * 4 + f * 3 + x * 5 + f * 4 + i + f"i32 i32 {strides[4]}",
            wide | parts,
            options(part),
        ),
        Case(
            "delta_gradients:finish_kernel",
            x * 2 + f * 6 + x * 2 + f + x + f"i32 {strides[2]} fp32",
            {
                "HK": 16,
                "HV": 32,
                "DK": DK,
                "BK": BK,
                "GROUP": 2,
                "PARTS": -(-DK // 64) + 1,
                "ROWS": 2048 // BK,
                "L2NORM": True,
            },
            {"num_warps": 4},
        ),
    ]


def head(kernel: str, results: str, constants: dict, warps: int) -> Case:
    weights = "fp16" if kernel == "_weights_kernel" else "bf16"
    types = f"*fp32:16 *i64:16 *{weights}:16 *fp32:16 {results}i32 i32:16 i32:16 i32 fp32 fp32 fp32"
    return Case(f"target_softmax:{kernel}", types, {"BLOCK": 4096, "FAR": FAR} | constants, {"num_warps": warps})


def moved(kernel: str, types: str, H: int, k: int | None = None) -> Case:
    """gather's kernels: rows of H columns, k choices per token."""
    block = min(1024, 1 << (H - 1).bit_length())
    choices = {} if k is None else {"CHOICES": k}
    return Case(f"gather:{kernel}", types, {"H": H, "BLOCK": block, "ROWS": 2048 // block} | choices, {"num_warps": 4})


def choice(experts: int, k: int, groups: int, backward: bool) -> Case:
    """A router with sigmoid, a bias and groups."""
    sizes = {"EXPERTS": experts, "BINS": experts, "CHOICES": k, "ROWS": 1024 // experts, "SIGMOID": True}
    sizes |= {"RENORMALISED": True}
    if backward:
        return Case("expert_choice:_choose_backward", "*bf16:16 *i32:16 *fp32:16 *bf16:16 i32 i32:16 fp32", sizes, {})
    more = {"WIDTH": k, "GROUPS": groups, "KEPT": groups // 2, "given": None}
    types = "*fp32:16 *fp32:16 *i32:16 *fp32:16 i32 i32:16 fp32"
    return Case("expert_choice:_choose", types, sizes | more, {})


def product(dtype: str, layout: str, INNER: int, OUTER: int, tile: tuple[int, int, int, int, int], bias: bool) -> Case:
    """A grouped product. layout: strides of w over INNER and OUTER; the adjacent one is 1."""
    pointers = f"*{dtype}:16 " * (3 if bias else 2) + f"*i32:16 *{dtype}:16 i32 i32:16 i32:16"
    BM, BN, BK, warps, stages = tile
    constants = {"INNER": INNER, "OUTER": OUTER, "EXPERTS": 128, "BINS": 128, "BM": BM, "BN": BN, "BK": BK}
    constants |= {"TOGETHER": 8, "WIDE": False} | {name: 1 for name in ("w_inner", "w_outer") if name not in layout}
    constants |= {} if bias else {"bias": None, "bias_stride": 0}
    types = f"{pointers} i32:16 {'i32:16 ' if bias else ''}i32:16"
    return Case("grouped:_product", types, constants, {"num_warps": warps, "num_stages": stages})


NF4 = "*i32:16 *u8:16 *fp32:16 *fp32:16 *fp32:16"
"""A nested NF4 weight as the kernels of stacks read it."""


def stack(dtype: str, N: int, K: int, TILES: int, mx: bool = False) -> Case:
    """Decoding a stack of experts in nested NF4, or MXFP4; with TILES > 1 those that have rows."""
    pointers = "*i32:16 *u8:16" if mx else NF4
    constants = {"N": N, "K": K, "EXPERTS": 128, "BINS": 128, "BLOCK": 32 if mx else 64, "NESTED": -1 if mx else 256}
    constants |= {"BITS": bits_of(E2M1) if mx else NF4_BITS, "FLIP": 0 if mx else 1, "TILE": 1024, "TILES": TILES}
    constants |= {"ANY_ROWS": 2**30} | ({"offsets": None} if TILES == 1 else {})
    constants |= {} if not mx else dict.fromkeys(("nested_code", "nested_absmax", "offset"))
    types = f"{pointers} {'*i32:16 ' if TILES > 1 else ''}*{dtype}:16 i32:16 i32:16"
    return Case("nf4_stack:decode_kernel", types, constants, {"num_warps": 1, "enable_fp_fusion": False})


def packed_product(dtype: str, N: int, K: int, tile: tuple[int, int, int, int, int], mx: bool = False) -> Case:
    """A product with experts packed in nested NF4, or in MXFP4 with a bias."""
    BM, BN, BK, warps, stages = tile
    constants = {"N": N, "K": K, "EXPERTS": 128, "BINS": 128, "BM": BM, "BN": BN, "BK": BK, "WIDE": False}
    if mx:
        constants |= {"BLOCK": 32, "NESTED": -1, "BITS": bits_of(E2M1), "FLIP": 0}
        constants |= dict.fromkeys(("nested_code", "nested_absmax", "offset"))
        pointers, strides = f"*i32:16 *u8:16 *{dtype}:16", "i32:16 i32:16 i32:16"
    else:
        constants |= {"BLOCK": 64, "NESTED": 256, "BITS": NF4_BITS, "FLIP": 1, "bias": None, "bias_stride": 0}
        pointers, strides = NF4, "i32:16 i32:16"
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
    types = f"*{dtype}:16 {pointers} *i32:16 *{dtype}:16 {strides}"
    return Case("nf4_grouped:_product", types, constants, options)


def factor(kernel: str, dtype: str, C: int, R: int, constants: dict, options: dict) -> Case:
    """A gradient of each expert's factor; out is a view of PEFT's parameter, of any strides."""
    pointers = (
        "*fp32:16 *i32:16 *fp32:16 i32 " if kernel == "_add_shares" else f"*{dtype}:16 " * 2 + "*i32:16 *fp32:16 "
    )
    strides = "i32 i32 i32 fp32" if kernel == "_add_shares" else "*fp32:16 i32 i32:16 i32:16 i32 i32 i32 fp32"
    sizes = {"C": C, "R": R, "EXPERTS": 128, "BINS": 128, "ACCUMULATE": True}
    return Case(f"grouped_gradient:{kernel}", pointers + strides, sizes | constants, options)


B = "*bf16:16 "
SUMS = "*fp32:16 *fp32:16 *fp32:16 *fp32:16 i32:16 i32:16 i32:16 fp32 fp32 fp32 i32"
"""Of low_rank's `_sum_splits`."""

CASES = [
    nf4("_decode_words", "bfloat16", ONE_ROW=True, GATHER=True),
    nf4("_decode_words", "float16", ONE_ROW=False, GATHER=True, BLOCK=4096),
    nf4("_decode_words", "float32", ONE_ROW=False, GATHER=False, NESTED=0),
    nf4("_decode_elements", "bfloat16", TILE=1024),
    Case(
        "lora_group:_fill",
        "*i64:16 *fp32:16",
        {"COUNT": 18, "FIELDS": 8, "SOURCE": "tl.float32", "TARGET": "tl.bfloat16", "ALIGNED": True, "BLOCK": 1024},
        {},
    ),
    *(
        columns(*case)
        for case in (
            ("bf16", True, False, 256, 16),
            ("bf16", True, False, 256, 32),
            ("bf16", False, False, 128, 64),
            ("bf16", False, True, 128, 64),
            ("fp32", True, False, 128, 16),
            ("fp32", False, True, 64, 16),
        )
    ),
    Case(
        "low_rank:_fold_both",
        f"*fp32:16 *bf16:16 i32:16 i32 {SUMS}",
        {
            "COUNT": 3,
            "FIRST": (0, 16, 20, 24),
            "K": (0, 16, 32),
            "RANK": (16, 16, 16),
            "MOST": 16,
            "TAIL": 64,
            "P_STRIDE": 16,
            "BT": 16,
            "BR": 64,
            "SPLITS_BLOCK": 16,
            "BLOCK": 256,
        },
        {},
    ),
    Case("low_rank:_fold", SUMS, {"SPLITS_BLOCK": 16, "BLOCK": 256}, {}),
    # The longest prompts' rows, decoding's, and fp32.
    *(
        Case(
            "lora_add:_shrink",
            f"*fp32:16 *{dtype}:16 i32:16 *{dtype}:16 i32 i32:16 i32:16",
            {"RANKS": 48, "BT": BT, "BK": BK, "BR": 64, "WIDE": False},
            {"num_warps": 4, "num_stages": 3},
        )
        for dtype, BT, BK in (("bf16", 64, 128), ("bf16", 16, 128), ("fp32", 64, 64))
    ),
    *(
        Case(
            "lora_add:_expand",
            f"*{dtype}:16 i32:16 *fp32:16 *{dtype}:16 i32",
            {
                "COUNT": 3,
                "FIRST": (0, 32, 40, 48),
                "COLUMN": (0, 4096, 5120, 6144),
                "WIDTH": (4096, 1024, 1024),
                "RANK": rank,
                "PARTS": parts,
                "TOGETHER": min(parts, together),
                "BT": BT,
                "BC": 128,
                "BR": min(32, rank),
                "WIDE": False,
            },
            {"num_warps": 4},
        )
        for dtype, rank, parts, together, BT in (
            ("bf16", 16, 32, 8, 16),
            ("bf16", 64, 1, 2, 64),
            ("fp32", 32, 4, 2, 32),
        )
    ),
    # Many short rows a program; a usual row, alone; no power of two; the longest, in fp32.
    norm("forward_kernel", B * 5 + "*fp32:16", 128, 16, 4),
    norm("forward_kernel", B * 4 + "*fp32:16", 4096, 1, 8, "delta_ptr", 1),
    norm("backward_kernel", B * 3 + "*fp32:16 " + B, 4096, 1, 8, "dres_ptr", 1),
    norm("forward_kernel", B * 4 + "*fp32:16", 4096, 1, 8, "delta_ptr", 2),
    norm("backward_kernel", B * 3 + "*fp32:16 " + B, 4096, 1, 8, "dres_ptr", 2),
    norm("forward_kernel", "*fp16:16 " * 5 + "*fp32:16", 5120, 1, 16),
    norm("forward_kernel", "*fp32:16 " * 6, 16384, 1, 16),
    norm("backward_kernel", "*fp32:16 " * 6, 16384, 1, 16),
    # Whole heads; three quarters of 96; the widest, without a norm; interleaved, half and whole; a norm behind.
    *(
        rope(kernel, *shape)
        for kernel in ("forward_kernel", "backward_kernel")
        for shape in (
            *((128, 128, 16, 4, True), (96, 72, 16, 4, True), (512, 512, 4, 4, False)),
            *((128, 64, 16, 4, False, True), (128, 128, 16, 4, True, True)),
            *((128, 128, 16, 4, True, False, True), (96, 72, 16, 4, True, False, True)),
        )
    ),
    *(
        glu(kernel, *shape)
        for kernel in ("forward_kernel", "backward_kernel")
        for shape in (
            *((12288, 1024, 1, "silu"), (11008, 1024, 1, "gelu"), (48, 64, 16, "gelu_pytorch_tanh")),
            *((18432, 512, 1, "relu2", False), (14336, 512, 1, "xielu", False), (48, 64, 8, "xielu")),
        )
    ),
    # Qwen3-Next's convolution and LFM2's.
    *(
        conv(kernel, *shape)
        for kernel in ("forward_kernel", "backward_kernel")
        for shape in (("bf16", 8192, 4, True), ("fp32", 2048, 3, False))
    ),
    # The gated delta rule: Qwen3-Next's heads; and of the widest heads in fp32 the kernels with the most shared memory.
    *delta("bf16", 128, 128),
    *(case for case in delta("fp32", 256, 256) if re.search("walk|back_|parts", case.kernel)),
    # Narrow heads: the tiles in which descriptors of wgmma were wrong.
    *(case for case in delta("bf16", 32, 16) if re.search("walk|outputs|back_", case.kernel)),
    # The head: a split of a row with and without a softcap; the row done again; the merge of two attentions.
    head("_rows_kernel", "", {"CAPPED": False, "STORE": True}, 8),
    head("_rows_kernel", "", {"CAPPED": True, "STORE": True}, 8),
    head("_finish_kernel", "*fp32:16 *fp32 *fp32 *fp32 *fp32:16 ", {"CAPPED": True, "STORE": True, "SPLITS": 64}, 4),
    # fp16's weights, and the entropy's.
    *(
        head(
            "_weights_kernel",
            "*fp32 *fp32 ",
            {"CAPPED": entropy, "ENTROPY": entropy, "LARGEST": MAX_FP16_WEIGHT, "LEAST": MIN_ENTROPY},
            8,
        )
        for entropy in (False, True)
    ),
    Case(
        "logprobs:_jacobian_kernel",
        "*fp32:16 *bf16:16 *fp32:16 *fp32:16 *bf16:16 i32:16 fp32 i32:16 i32:16",
        {"BLOCK": 1024},
        {},
    ),
    Case("logprobs:_scale_rows_kernel", "*bf16:16 *fp32:16 *bf16:16 i32:16", {"BLOCK": 1024}, {}),
    # Choices of the widest router.
    Case(
        "route:_sort",
        "*i64:16 *i32:16 *i32:16 *i32:16 i32 i32",
        {"EXPERTS": 512, "BINS": 512, "BLOCK": 4096, "ROWS": 128},
        {"num_warps": 8},
    ),
    moved("_gather", "*bf16:16 *i32:16 *fp32:16 *bf16:16 i32 i32:16 i32:16", 2048, 8),
    moved("_combine", "*bf16:16 *i32:16 *fp32:16 *bf16:16 *bf16:16 i32 i32:16 i32:16 i32:16", 2048, 10),
    moved("_row_dots", B * 2 + "*fp32:16 i32 i32:16 i32:16", 768),
    # Products of experts: full tiles each way, with a bias and a short last step; few rows; a thin one (dS); fp32.
    product("bf16", "w_outer", 2880, 5760, (128, 128, 64, 8, 3), True),
    product("bf16", "w_inner", 1536 + 16, 2048, (128, 128, 64, 8, 3), False),
    product("bf16", "w_outer", 2048, 1536, (16, 128, 64, 4, 3), False),
    product("bf16", "w_inner", 1536, 16, (128, 16, 64, 2, 3), False),
    product("fp32", "w_inner", 2048, 768, (64, 64, 32, 4, 2), True),
    *(
        factor("_shares", dtype, C, R, {"BT": 32, "BC": BC, "BR": BR, "WIDE": False}, {"num_warps": 4, "num_stages": 3})
        for dtype, C, R, BC, BR in (("bf16", 1536, 64, 128, 64), ("fp32", 768, 16, 128, 16))
    ),
    factor("_add_shares", "", 2048, 16, {"BLOCK": 1024}, {}),
    # Of NF4 the experts with rows, of MXFP4 all; gpt-oss has an odd number of blocks of 64 a row.
    stack("fp16", 5760, 2880, 8),
    stack("bf16", 5760, 2880, 1, mx=True),
    # Packed experts times a sampled token's rows; more rows, a bias and a short last step (gpt-oss).
    packed_product("bf16", 1536, 2048, (16, 64, 64, 4, 4)),
    packed_product("fp16", 5760, 2880, (64, 64, 64, 4, 4), mx=True),
    # DeepSeek-V3's router.
    *(choice(256, 8, 8, backward) for backward in (False, True)),
    Case("copies:_sum_rows", B + "*i32:16 *i32:16 " + B + "i32 i32:16", {"C": 1024, "BLOCK": 1024, "ROWS": 2}, {}),
    Case(
        "lse_merge:_merge_kernel",
        "*bf16:16 *fp32:16 *bf16:16 *fp32:16" + " i32:16" * 6,
        {"BLOCK": 128},
        {"num_warps": 1},
    ),
    Case(
        "lse_merge:_sinks_kernel",
        "*bf16:16 *fp32:16 *bf16:16 i32 i32:16 i32:16 i32:16 i32",
        {"BLOCK": 128, "ROWS": 16},
        {"num_warps": 4},
    ),
]


def unset_registers(cubin: bytes) -> list[int]:
    """Return the uniform registers that machine code for Hopper reads before it has written them.

    ptxas 12.8 makes descriptors of wgmma from such a register where tiles of two swizzles meet: results are then wrong,
    or the kernel reads foreign memory.
    """
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        code = subprocess.run([knobs.nvidia.nvdisasm.path, "-c", file.name], capture_output=True, text=True, check=True)
    written, unset = set(), set()
    for line in re.findall(r"/\*[0-9a-f]{4,}\*/ +(?:@!?U?P\w+ +)?(.*?) *;", code.stdout):
        name, _, rest = line.partition(" ")
        operands = re.split(r", (?![^\[]*\])", rest)
        into = re.fullmatch(r"UR(\d+)", operands[0].strip())
        count = 4 if ".128" in name else 2 if ".64" in name or "WIDE" in name else 1
        for place, operand in enumerate(operands[1 if into else 0 :], start=1 if into else 0):
            for number in map(int, re.findall(r"\bUR(\d+)", operand)):
                # A descriptor of two matrices in shared memory has four registers, of the second alone the last two.
                first, last = (0, 4) if place == 1 else (2, 4)
                read = range(first, last) if operand.strip().startswith("gdesc") else range(2 if ".64" in name else 1)
                unset |= {number + i for i in read} - written
        if into:
            written |= {int(into[1]) + i for i in range(count)}
    return sorted(unset)


def compile_all(architectures: list[int]) -> list[dict]:
    """Compile CASES; runs in a separate process, because with TRITON_INTERPRET=1 there is nothing to compile."""
    import importlib

    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget

    found = []
    for architecture, case in itertools.product(architectures, CASES):
        file, name = case.kernel.split(":")
        kernel = getattr(importlib.import_module(f"rlft.kernels.{file}"), name).function
        constants = {k: getattr(tl, v[3:]) if str(v).startswith("tl.") else v for k, v in case.constants.items()}
        types = iter(case.types.split())
        signature = {arg: "constexpr" if arg in constants else next(types) for arg in kernel.arg_names}
        assert next(types, None) is None, f"{case.kernel}: more types than arguments"
        plain = {p.name for p in kernel.params if p.do_not_specialize}
        hints = {
            (i,): [["tt.divisibility", 16]]
            for i, (arg, t) in enumerate(signature.items())
            if t.endswith(":16") and arg not in plain
        }
        source = triton.compiler.ASTSource(
            kernel, {arg: t.removesuffix(":16") for arg, t in signature.items()}, constants, hints
        )
        done = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=case.options)
        varying = [p.name for p in kernel.params if p.name in VARYING and not (p.is_constexpr or p.do_not_specialize)]
        found.append(
            {
                "kernel": case.kernel,
                "architecture": architecture,
                "shared": done.metadata.shared,
                "compiled anew": varying,
                "fma": "fma.rn.f32" in done.asm["ptx"],
                "unset": unset_registers(done.asm["cubin"]) if "wgmma" in done.asm["ptx"] else [],
            }
        )
    return found


@pytest.fixture(scope="module")
def found() -> list[dict]:
    """By two processes, since the compiler uses one core."""
    code = "import json, sys, test_cross_compile as t; print(json.dumps(t.compile_all([*map(int, sys.argv[1:])])))"
    env = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    halves = [[str(a) for a in ARCHITECTURES[start::2]] for start in (0, 1)]
    runs = [
        subprocess.Popen([sys.executable, "-c", code, *half], env=env, stdout=PIPE, stderr=PIPE, text=True)
        for half in halves
    ]
    made = []
    for run in runs:
        out, errors = run.communicate()
        assert run.returncode == 0, errors[-3000:]
        made += json.loads(out.splitlines()[-1])
    return sorted(made, key=lambda one: one["architecture"])


def test_every_kernel_compiles_for_every_card(found) -> None:
    expected = [(a, case.kernel) for a in ARCHITECTURES for case in CASES]
    assert [(f["architecture"], f["kernel"]) for f in found] == expected


def test_shared_memory_fits(found) -> None:
    assert [f for f in found if f["shared"] > SHARED_MEMORY] == []


def test_no_kernel_is_compiled_anew_for_another_number_of_tokens(found) -> None:
    assert [f for f in found if f["compiled anew"]] == []


def test_nf4_scales_round_twice(found) -> None:
    """A fused multiply-add in code * absmax + offset rounds once and moves some bf16 results by one bit."""
    assert [f for f in found if f["kernel"].startswith(("nf4:", "nf4_stack:")) and f["fma"]] == []


def test_no_uniform_register_is_read_before_it_is_written(found) -> None:
    assert [f for f in found if f["unset"]] == []
