"""The weights of the head's jacobians, of the log-prob and of the entropy: through Triton's interpreter on a CPU, on a
GPU through `linear_logprobs`. What the kernels share with the whole head is in test_logprobs.py."""

from __future__ import annotations

import os
import weakref

import pytest
import torch
from heads import OPTIONS, by_kernels, make
from kernel_rule import assert_rule
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlft.kernels.logprobs import CHUNK_BYTES, linear_logprobs, linear_logprobs_reference
from rlft.kernels.target_softmax import entropy_reference, target_softmax_reference


def plainly(h: Tensor, weight: Tensor, targets: Tensor, temperature: float, softcap: float | None, scale: float):
    """Log-probs and entropies as plain PyTorch has them, everything in the dtype of h."""
    z = scale * (h @ weight.T)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    log_p = (z / temperature).log_softmax(-1)
    return log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="on a GPU the test below runs the kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("peaked", [1.0, 6.0, -6.0], ids=["flat", "p near 1", "target below the maximum"])
def test_both_jacobians_keep_the_kernel_rule_in_the_interpreter(
    options: dict, dtype: torch.dtype, peaked: float
) -> None:
    """Error against float64 at most 3x plain PyTorch's in the same dtype."""
    hidden, weight, targets = (x.detach() for x in make(6, 32, 201, dtype, peaked))
    hidden = hidden / 4
    settings = {"temperature": 1.0, "softcap": None, "scale": 1.0} | options
    _, *jacobians = by_kernels(hidden, weight, targets, **settings, block=64, pad=3)
    h, truth_h = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    truth = linear_logprobs_reference(truth_h, weight.double(), targets, **settings)
    plain = plainly(h, weight, targets, **settings)
    for name, ours, theirs, true in zip(("log-prob", "entropy"), jacobians, plain, truth, strict=True):
        want, exact = (
            torch.autograd.grad(x.sum(), at, retain_graph=True)[0] for x, at in ((theirs, h), (true, truth_h))
        )
        assert_rule(name, ours, want, exact, 3.0)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs the kernels on CPU tensors")
@pytest.mark.parametrize("above", [13.0, 17.0, -70.0], ids=["a tail of 2e-6", "a tail of 4e-8", "a target of 1e-30"])
def test_a_flat_tail_is_not_lost_in_fp16(above: float) -> None:
    """The target's logit lies `above` all others: each of their probabilities is below what fp16 holds with all its
    bits, or at all, and together they are the whole jacobian of the log-prob, and of the entropy."""
    vocab, width = 5000, 8
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(vocab, width, generator=g).mul_(0.05)
    weight[:, 0], weight[:, 1] = 0.0, 1.0  # what all have in common cancels, if the tail is there
    weight[7, 0] = 1.0
    hidden = torch.zeros(1, width)
    hidden[0, 0] = above
    h, w, t = hidden.half(), weight.half(), torch.tensor([7])
    _, *jacobians = by_kernels(h, w, t, 1.0, None, 1.0, 1024)
    truth_h = h.double().requires_grad_()
    z = truth_h @ w.double().T
    d = z - z[:, 7:8]
    others = torch.arange(vocab) != 7
    # In float64 the sums over the tail, so that what is tiny is exact.
    s = d[:, others].exp().sum(1)
    entropy = s.log1p() - (d[:, others].exp() * d[:, others]).sum(1) / (1 + s)
    for ours, value in zip(jacobians, (-s.log1p(), entropy), strict=True):
        (want,) = torch.autograd.grad(value.sum(), truth_h, retain_graph=True)
        assert (ours.double() - want).norm() < 0.01 * want.norm() + 2**-24  # half of the smallest fp16


class Peak(TorchDispatchMode):
    """Bytes of all tensors that operations made, at most at once."""

    def __init__(self, given: Tensor) -> None:
        """given: not counted."""
        super().__init__()
        self.live: dict[int, int] = {given.untyped_storage()._cdata: 0}
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in self.live:
                storage = x.untyped_storage()
                self.live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, storage._cdata, None)
        self.most = max(self.most, sum(self.live.values()))
        return out


@pytest.mark.parametrize(("softcap", "most"), [(None, 1.1), (30.0, 2.1)], ids=["plain", "softcap"])
def test_the_references_hold_one_chunk_beside_the_logits(softcap: float | None, most: float) -> None:
    z, targets = torch.randn(64, 5000), torch.arange(64)
    first, again = z.clone(), z.clone()
    with Peak(first) as peak:
        found = target_softmax_reference(first, targets, 1.0, softcap, 1.0, True)
    assert peak.most <= most * z.nbytes
    found = found._replace(weights=None)
    with Peak(again) as peak:
        entropy_reference(again, targets, found, 1.0, softcap, 1.0)
    assert peak.most <= most * z.nbytes


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("peaked", [1.0, 6.0, -6.0], ids=["flat", "p near 1", "target below the maximum"])
@pytest.mark.parametrize(("n", "h", "v"), [(7, 128, 32000), (515, 576, 151_673)], ids=["one chunk", "two chunks"])
def test_both_jacobians_keep_the_kernel_rule_on_the_gpu(
    dtype: torch.dtype, peaked: float, n: int, h: int, v: int
) -> None:
    hidden, weight, targets = (x.detach().cuda() for x in make(n, h, v, dtype, peaked))
    hidden = hidden * (2 / h**0.5)
    leaves = [x.requires_grad_() for x in (hidden.clone(), hidden.clone(), hidden.double())]
    results = (
        linear_logprobs(leaves[0], weight, targets, 0.9, entropy_grad=True),
        plainly(leaves[1], weight, targets, 0.9, None, 1.0),
        linear_logprobs_reference(leaves[2], weight.double(), targets, 0.9),
    )
    # On a GPU the backward runs once, so the entropy's gradient is what a second call adds.
    for i, name in enumerate(("log-prob", "entropy")):
        if i:
            results = (linear_logprobs(leaves[0], weight, targets, 0.9, entropy_grad=True), *results[1:])
        ours, plain, truth = (
            torch.autograd.grad(x[i].sum(), at, retain_graph=j > 0)[0]
            for j, (x, at) in enumerate(zip(results, leaves, strict=True))
        )
        assert_rule(name, ours, plain, truth, 3.0)


@pytest.mark.gpu
def test_an_entropy_bonus_takes_a_second_jacobian_and_no_further_chunk() -> None:
    hidden, weight, targets = (x.detach().cuda() for x in make(4096, 1024, 151_936, torch.bfloat16))
    peaks = []
    for entropy_grad in (False, True):
        h = hidden.clone().requires_grad_()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        lp, entropy = linear_logprobs(h, weight, targets, 1.0, entropy_grad=entropy_grad)
        (lp.sum() + entropy.sum() if entropy_grad else lp.sum()).backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[0] - hidden.nbytes < CHUNK_BYTES + 24 * 2**20
    assert abs(peaks[1] - peaks[0] - hidden.nbytes) < 2**20, peaks
