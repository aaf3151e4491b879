"""How long the host needs to launch a decoder layer's forward and backward, without a GPU.

    python benchmarks/host_time.py --out DIR --commit HASH

A layer of Qwen3's kind in NF4 with LoRA and a shared prompt, at L0 and with weights that are decoded for each layer: as
a GPU runs it, but for a few tokens on the CPU, with a Triton driver that launches nothing, and with matrix products and
attention that return at once. So it is the time of Python and of PyTorch around the launches, which is what a GPU waits
for where micro-batches are small; not in it are flash attention's own Python and what CUDA takes for a launch. For
comparing two commits on one machine: `PYTHONPATH` says whose rlft is measured.
"""

from __future__ import annotations

import collections
import importlib
import pkgutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent / "peers"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import stacks
from nowhere import Nowhere
from results_file import arguments, write
from timing import row

LAYERS, TOKENS, REPEATS = 8, 12, 300


def replace(module: ModuleType, name: str, function: Callable[..., Any]) -> None:
    """Put a function in the place of one of a module; one that is called otherwise now would go on to be measured."""
    assert hasattr(module, name), f"{module.__name__} has no {name}"
    setattr(module, name, function)


def pretend() -> collections.Counter[str]:
    """Tensors on the CPU take the kernels' path, and nothing is launched or multiplied. Counts what would be."""
    import triton

    import rlft.kernels
    from rlft.kernels import attention_backends
    from rlft.models.fused import ops

    counts: collections.Counter[str] = collections.Counter()
    driver: Any = Nowhere()

    class Counted:
        def __init__(self, *compiled: Any) -> None: ...

        def __call__(self, *arguments: Any) -> None:
            counts["launches of Triton"] += 1

    driver.launcher_cls = Counted
    triton.runtime.driver.set_active(driver)
    for found in pkgutil.iter_modules(rlft.kernels.__path__):
        module: Any = importlib.import_module(f"rlft.kernels.{found.name}")
        if hasattr(module, "on_gpu"):
            module.on_gpu = lambda op, on_gpu=module.on_gpu, **tensors: (on_gpu(op, **tensors), True)[1]
    replace(ops, "_uses_kernel", lambda x: True)
    replace(attention_backends, "choose_backend", lambda *arguments: "fa4")

    def forward(backend: str, q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        return torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)

    def backward(backend: str, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)

    replace(attention_backends, "forward", forward)
    replace(attention_backends, "backward", backward)

    def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        counts["products"] += 1
        return a.new_empty(a.shape[0], b.shape[1]) if out is None else out

    torch.mm = product  # type: ignore[assignment]
    torch.addmm = lambda start, a, b, out=None: product(a, b, out)
    Tensor.addmm_ = lambda self, a, b: product(a, b, self)  # type: ignore[assignment]
    Tensor.__matmul__ = product  # type: ignore[assignment]
    return counts


def main() -> None:
    args = arguments(__doc__).parse_args()
    stacks.DEVICE = "cpu"
    stacks.SHAPES["host"] = stacks.SHAPES["tiny"] | {
        "num_hidden_layers": LAYERS,
        "head_dim": 32,
        "hidden_size": 128,
        "intermediate_size": 192,
    }
    from rlft.config.run import Lora
    from rlft.kernels.attention import Sequences
    from rlft.models.fused import memory
    from rlft.models.fused.levels import L0
    from rlft.models.load import Base, attach_lora, load_base
    from rlft.models.policy import Policy

    with tempfile.TemporaryDirectory() as folder:
        stacks.path_of = lambda shape: f"{folder}/{shape}"
        base = load_base(Base(stacks.make("host"), "nf4", "bfloat16", "cpu"), torch.device("cpu"))
    policy = Policy(attach_lora(base, Lora(rank=16, alpha=32), seed=1))
    counts = pretend()
    torch.set_num_threads(1)
    fused = policy.fused
    assert fused is not None
    fused.shape = fused._shape()  # type: ignore[reportPrivateUsage]
    fused.plan = memory.evaluate(fused.shape, 4096, 4096, (LAYERS, L0, L0), memory.PassOptions(8192, "layer", 2**28))
    sequences = Sequences.of(
        torch.tensor([0, 4, 8, TOKENS], dtype=torch.int32),
        torch.tensor([-1, 0, 0], dtype=torch.int32),
        torch.device("cpu"),
    )
    embedded = torch.randn(TOKENS, 128, dtype=torch.bfloat16).requires_grad_()
    positions, gradients = torch.arange(TOKENS), policy.flat.gradients
    forward: list[float] = []
    backward: list[float] = []
    for turn in range(20 + REPEATS):
        if turn == 20:
            counts.clear()
        begin = time.perf_counter()
        hidden, _ = fused.hidden(embedded, positions, sequences, gradients)
        middle = time.perf_counter()
        hidden.backward(torch.ones_like(hidden))
        end = time.perf_counter()
        if turn >= 20:
            forward.append((middle - begin) / LAYERS * 1e6)
            backward.append((end - middle) / LAYERS * 1e6)
    each = {name: count / REPEATS / LAYERS for name, count in counts.items()}
    note = ", ".join(f"{count:g} {name}" for name, count in each.items()) + " per layer, forward and backward"
    both = [a + b for a, b in zip(forward, backward, strict=True)]
    made = (("forward", forward), ("backward", backward), ("both", both))
    rows = [row(f"host/layer/{name}", "rlft", "us", times, "us", note) for name, times in made]
    for r in rows:
        print(r["work"], r["value"], r["note"], flush=True)
    print(write("host_time", rows, args.out, args.commit))


if __name__ == "__main__":
    main()
