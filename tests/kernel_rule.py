"""The kernels' accuracy rule, and the two runs that every kernel must survive on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Without a GPU the launchers run in Triton's interpreter (conftest.py)."""

DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
"""bf16 arithmetic is not to be trusted in the interpreter."""

QUIET = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero):RuntimeWarning")
"""The interpreter is numpy, which warns where a GPU gives inf and goes on."""


def unread(dtype: torch.dtype, device: str = DEVICE) -> float:
    """What tests put where nothing is to be read: NaN. On a CPU with AMX, oneDNN's bf16 products read what lies behind
    rows whose length is no multiple of 32, and multiply it by 0: there the largest number, which that leaves alone."""
    return 3e38 if dtype == torch.bfloat16 and device == "cpu" else float("nan")


def assert_rule(name: str, got: Tensor, plain: Tensor, truth: Tensor, times: float) -> None:
    """Error of `got` against the float64 truth at most `times` that of plain PyTorch in the same dtype.

    Largest and root-mean-square error; the slack of 1e-6 of the largest entry is eight fp32 roundings.
    """
    assert got.dtype == plain.dtype and got.shape == truth.shape, f"{name}: {got.dtype} {tuple(got.shape)}"
    if got.numel() == 0:
        return
    ours, theirs = (got.double() - truth).abs(), (plain.double() - truth).abs()
    assert torch.isfinite(ours).all(), f"{name}: not finite"
    slack = 1e-6 * truth.abs().max()
    worst = ours.argmax()
    shown = f"worst [{worst}]: {got.flatten()[worst]}, plain {plain.flatten()[worst]}, {truth.flatten()[worst]} true"
    assert ours.max() <= times * theirs.max() + slack, f"{name}: error {ours.max()}, plain {theirs.max()}; {shown}"
    rms, plain_rms = ours.pow(2).mean().sqrt(), theirs.pow(2).mean().sqrt()
    assert rms <= times * plain_rms + slack, f"{name}: rms error {rms}, plain {plain_rms}; {shown}"


def assert_survives_stream_and_graph(run: Callable[[], Sequence[Tensor]]) -> None:
    """`run` gives the same bits again, on a side stream, and replayed from a CUDA graph over poisoned results."""
    expected = [t.clone() for t in run()]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        beside = run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for t in captured:
        t.fill_(float("nan") if t.is_floating_point() else -1)
    graph.replay()
    torch.cuda.synchronize()
    for again in (run(), beside, captured):
        for a, b in zip(again, expected, strict=True):
            assert torch.equal(a, b)
