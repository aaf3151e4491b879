"""`launch` runs what Triton itself would have run, whatever the arguments: compiled for an H100, launched nowhere. In a
process of its own, because with TRITON_INTERPRET=1 there is nothing to compile."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="Triton is for Linux on x86_64")

import triton.language as tl  # noqa: E402
from nowhere import Nowhere  # noqa: E402

from rlft.kernels.launch import kernel, launch  # noqa: E402


@kernel(varying=("T",))
def scaled(x, y, absent, T, stride, factor, BLOCK: tl.constexpr, HOW: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at * stride, mask=at < T, other=0.0) * factor
    if absent is not None:
        value += tl.load(absent + at, mask=at < T, other=0.0)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=at < T)


@kernel(varying=("T",))
def other(x, y, absent, T, stride, factor, BLOCK: tl.constexpr, HOW: tl.constexpr):
    """With the arguments of `scaled`."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at * stride, tl.load(x + at, mask=at < T, other=0.0), mask=at < T)


def calls() -> Iterator[tuple[list[Any], dict[str, Any]]]:
    """Every argument in turn as Triton tells it apart, with all kinds of another one."""
    many = torch.zeros(4096)

    def tensor(dtype: torch.dtype = torch.float32, first: int = 0) -> Tensor:
        return many.view(dtype)[first:]

    xs = [tensor(), tensor(first=1), tensor(torch.bfloat16), tensor(torch.bfloat16, 8), tensor(torch.bfloat16, 4)]
    for x in xs:
        for absent in (None, tensor(), tensor(first=2)):
            yield [x, tensor(), absent, 100, 16, 1.0], {"BLOCK": 64, "HOW": "a"}
    for T in (1, 16, 17, 2**31 - 1, 2**31):
        for stride in (1, 2, 16, 2**33):
            yield [xs[0], tensor(), None, T, stride, 0.5], {"BLOCK": 64, "HOW": "a"}
    # Equal to each other, and to others above, for Python.
    for factor in (1, 1.0, True, 2, 2.0):
        for stride in (1, True):
            yield [xs[0], tensor(), None, 100, stride, factor], {"BLOCK": 64, "HOW": 1}
    for how in ("a", "b", 1, 1.0, True, None):
        for more in ({}, {"num_warps": 2}, {"num_stages": 2}):
            yield [xs[0], tensor(), None, 3, 3, 2.0], {"HOW": how, "BLOCK": 32, **more}


def compare() -> None:
    """Twice each: a call that is new, and one like it."""
    nowhere = Nowhere()
    triton.runtime.driver.set_active(nowhere)
    every = [(run, *call) for run in (scaled, other) for call in calls()]
    for run, arguments, constants in every:
        run.function[(7,)](*arguments, **constants)
    wanted, nowhere.ran = nowhere.ran, []
    assert len({which for which, *_ in wanted}) > 20, "the calls do differ for Triton"
    for _ in range(2):
        for run, arguments, constants in every:
            launch(run, (7,), *arguments, **constants)
        assert len(nowhere.ran) == len(wanted)
        for got, want in zip(nowhere.ran, wanted, strict=True):
            assert len(got) == len(want) and all(
                a is b or (type(a), a) == (type(b), b) for a, b in zip(got, want, strict=True)
            ), (got, want)
        nowhere.ran = []


def look_once() -> None:
    """Triton does not look at a call like an earlier one, with other tokens and other tensors."""
    nowhere = Nowhere()
    triton.runtime.driver.set_active(nowhere)
    x, y = torch.zeros(64), torch.zeros(64)
    launch(scaled, (1,), x, y, None, 64, 1, 1.0, BLOCK=64, HOW="a")
    triton.JITFunction.run = None
    launch(scaled, (2, 3), y, x, None, 50, 1, 1.0, BLOCK=64, HOW="a")
    (first, *_), (which, *got) = nowhere.ran
    assert which == first and got[:3] == [2, 3, 1]
    assert all(a is b for a, b in zip(got[3:], (y, x, None, 50, 1, 1.0, 64, "a"), strict=True))


@pytest.mark.parametrize("function", ["compare", "look_once"])
def test_what_runs_is_what_triton_would_run(function: str) -> None:
    env = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    code = f"import test_launch; test_launch.{function}()"
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
