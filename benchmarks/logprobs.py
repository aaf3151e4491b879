"""The head, forward and backward with a frozen head: rlft beside TRL's, Liger's and cut-cross-entropy's (one H100).

    python benchmarks/logprobs.py [--sweep]     # prints the rows of a results file as JSON lines

rlft and TRL give log-prob and entropy and honour a gradient per token; Liger gives the mean loss only.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from timing import interleaved, peak_gib, row

from rlft.kernels import logprobs
from rlft.kernels.logprobs import linear_logprobs

WIDTH = 4096
SIZES = ((151_936, 1024), (151_936, 8192), (151_936, 32_768), (32_000, 1024), (32_000, 8192), (32_000, 32_768))


def inputs(vocab: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator(device="cuda").manual_seed(0)
    weight = torch.randn(vocab, WIDTH, device="cuda", dtype=torch.bfloat16, generator=g) * 0.02
    hidden = torch.randn(tokens, WIDTH, device="cuda", dtype=torch.bfloat16, generator=g).requires_grad_()
    targets = torch.randint(0, vocab, (tokens,), device="cuda", generator=g)
    return hidden, weight, targets, torch.randn(tokens, device="cuda", generator=g)


def stacks(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, upstream: torch.Tensor) -> dict[str, Any]:
    """name -> forward and backward of one head; those that are installed."""
    calls: dict[str, Callable[[], Any]] = {}

    def done() -> None:
        hidden.grad = None

    def ours() -> None:
        lp, _ = linear_logprobs(hidden, weight, targets, 1.0)
        lp.backward(upstream)
        done()

    calls["rlft"] = ours
    try:
        from trl.kernels import ChunkedLogProbFunction

        def trl() -> None:
            out = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 32_768, None, 1.0, ("entropy",))
            out[0].backward(upstream)
            done()

        calls["trl"] = trl
    except ImportError as error:
        print(f"trl is not measured: {error}", file=sys.stderr)
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss(reduction="mean")

        def liger() -> None:
            loss(weight, hidden, targets).backward()
            done()

        calls["liger"] = liger
    except ImportError as error:
        print(f"liger is not measured: {error}", file=sys.stderr)
    try:
        from cut_cross_entropy import linear_cross_entropy

        def cce() -> None:
            linear_cross_entropy(hidden, weight, targets, reduction="none").backward(upstream)
            done()

        calls["cce"] = cce
    except ImportError as error:
        print(f"cut-cross-entropy is not measured: {error}", file=sys.stderr)
    return calls


def accuracy(vocab: int) -> list[dict[str, Any]]:
    """Largest error of a log-prob against float64 over 256 tokens, for random rows and for rows with p near 1."""
    found = []
    for kind, lean in (("randn", 0.0), ("p near 1", 30.0)):
        hidden, weight, targets, _ = inputs(vocab, 256)
        with torch.no_grad():
            hidden += (lean / WIDTH / 0.02**2) * weight[targets]
            truth = (hidden.double() @ weight.double().T).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
            plain = (hidden @ weight.T).float().log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
            outs = {"torch bf16": plain, "rlft": linear_logprobs(hidden, weight, targets, 1.0)[0]}
            try:
                from trl.kernels import ChunkedLogProbFunction

                outs["trl"] = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 32_768, None, 1.0, ())[0]
            except ImportError:
                print("trl's accuracy is not measured", file=sys.stderr)
        for name, out in outs.items():
            worst = float((out.double() - truth).abs().max())
            found.append(row(f"head-accuracy/{vocab}", name, "max_error", worst, "nat", kind))
    return found


def rows() -> list[dict[str, Any]]:
    found = []
    for vocab, tokens in SIZES:
        work = f"head/{tokens}" if vocab == 151_936 else f"head-{vocab}/{tokens}"
        tensors = inputs(vocab, tokens)
        calls = stacks(*tensors)
        saved = tokens * WIDTH * 2 / 2**30
        times = interleaved(calls, repeats=7 if tokens > 16_000 else 15, warmup=2)
        for name, call in calls.items():
            note = f"V {vocab}, H {WIDTH}, bf16, forward and backward"
            found.append(row(work, name, "ms", times[name], "ms", note))
            note = f"beyond inputs; the gradient itself is {saved:.3f} GiB of it"
            found.append(row(work, name, "peak_GiB", peak_gib(call), "GiB", note))
        with torch.no_grad():
            alone = interleaved({"rlft": lambda t=tensors: linear_logprobs(*t[:3], 1.0)}, repeats=7)["rlft"]
        found.append(row(f"{work}-no-grad", "rlft", "ms", alone, "ms", "log-prob and entropy without gradient"))
        del tensors, calls
        torch.cuda.empty_cache()
    return found + accuracy(151_936) + accuracy(32_000)


def products() -> list[dict[str, Any]]:
    """The two matrix products by themselves, for the rows a chunk may have."""
    found = []
    vocab = 151_936
    hidden, weight, _, _ = inputs(vocab, 4096)
    h = hidden.detach()
    for rows_ in (256, 384, 512, 640, 768, 1024, 2048):
        z = torch.empty(rows_, vocab, device="cuda")
        e = torch.rand(rows_, vocab, device="cuda", dtype=torch.bfloat16)
        g = torch.empty(rows_, WIDTH, device="cuda")
        calls = {
            "logits fp32": lambda z=z, r=rows_: torch.mm(h[:r], weight.T, out_dtype=torch.float32, out=z),
            "logits bf16": lambda r=rows_: h[:r] @ weight.T,
            "E W fp32": lambda e=e, g=g: torch.mm(e, weight, out_dtype=torch.float32, out=g),
            "E W bf16": lambda e=e: e @ weight,
        }
        flops = 2 * rows_ * vocab * WIDTH
        for name, times in interleaved(calls, repeats=9).items():
            speed = [flops / ms / 1e9 for ms in times]
            found.append(row(f"head-products/{rows_}", name, "TFLOPs", speed, "TFLOP/s"))
    return found


def sweep() -> list[dict[str, Any]]:
    """Chunk budgets and the row kernel's block."""
    found = []
    hidden, weight, targets, upstream = inputs(151_936, 8192)
    for budget in (224, 336, 448, 672, 896, 1792):

        def call(budget: int = budget) -> None:
            linear_logprobs(hidden, weight, targets, 1.0, chunk_bytes=budget * 2**20)[0].backward(upstream)
            hidden.grad = None

        times = interleaved({"rlft": call}, repeats=7)["rlft"]
        rows_ = logprobs.chunk_rows(151_936, torch.bfloat16, budget * 2**20)
        found.append(row("head-sweep/8192", f"{rows_} rows", "ms", times, "ms"))
        found.append(row("head-sweep/8192", f"{rows_} rows", "peak_GiB", peak_gib(call), "GiB"))
    z = torch.randn(512, 151_936, device="cuda")
    e = torch.empty(512, 151_936, device="cuda", dtype=torch.bfloat16)
    given = (z, targets[:512], torch.empty(4, 512, device="cuda").unbind(), e)
    bytes_ = z.numel() * 6
    for block in (1024, 2048, 4096, 8192, 16_384):
        times = interleaved({"rows": lambda b=block: logprobs.launch_rows(*given, 1.0, None, 1.0, b)})
        speed = [bytes_ / ms / 1e6 for ms in times["rows"]]
        found.append(row("head-sweep/rows", f"block {block}", "GBs", speed, "GB/s"))
    return found


if __name__ == "__main__":
    for found_row in (products() + sweep()) if "--sweep" in sys.argv else rows():
        print(json.dumps(found_row), flush=True)
