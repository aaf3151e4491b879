"""CUDA graphs without a GPU: what a bucket has room for, and that its buffers give what launches give, where a graph is
what would be captured, run again. With real graphs: test_fused_gpu.py."""

from __future__ import annotations

import gc
import itertools
import math
import random
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import records
import torch
from kernel_rule import DEVICE
from test_families import model_of
from torch import Tensor

from rlft.config.run import Optim
from rlft.kernels import attention_backends
from rlft.kernels.attention import Keys, Sequences, varlen_attention, varlen_attention_reference
from rlft.kernels.copies import Copies, gather_copies, launch_summed, summed_reference
from rlft.models.fused import graphs
from rlft.models.policy import Policy
from rlft.trainer.optim import Optimizer
from rlft.types import Batch, PackPlan, Prompt, Rollout


def drawn(draw: random.Random) -> Sequences:
    """Some prompts of 1 to 300 tokens, with 1 to 6 completions of 0 to 300 each, or rows without a prefix."""
    groups = [(draw.randint(1, 300), draw.randint(1, 6)) for _ in range(draw.randint(1, 5))]
    shared = draw.random() < 0.8
    lengths, prefix = ([p for p, _ in groups], [-1] * len(groups)) if shared else ([], [])
    for i, (_, completions) in enumerate(groups):
        lengths += [draw.randint(0, 300) for _ in range(completions)]
        prefix += [i if shared else -1] * completions
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return Sequences.of(bounds, torch.tensor(prefix))


def filled(s: Sequences) -> Sequences:
    return s._replace(bounds=(*s.bounds, graphs.round_up(s.bounds[-1])), prefix=(*s.prefix, -1))


@pytest.mark.parametrize("seed", range(40))
def test_a_bucket_has_room_for_its_pass_and_for_the_sequence_that_fills_it(seed: int) -> None:
    s = drawn(random.Random(seed))
    T, rows, shared = s.bounds[-1], graphs.round_up(s.bounds[-1]), max(s.prefix) >= 0
    seen = {window: Keys.seen(filled(s), window) for window in ((None, 100) if shared else ())}
    size = graphs._bucket(filled(s), rows, seen)
    lengths = [b - a for a, b in itertools.pairwise((*s.bounds, rows))]
    assert size.rows == rows >= T and size.sequences > len(s.prefix)
    assert size.longest >= max(lengths) or size.longest == rows
    assert tuple(k[0] for k in size.keys) == tuple(seen)
    for window, place, most in size.keys:
        index, bounds = seen[window]
        want, before = Keys.seen(s, window)
        assert place >= index.size and most >= max(b - a for a, b in itertools.pairwise(bounds))
        # The pass's own keys as without a bucket, and behind them the rest, which sees itself.
        assert (index[: want.size] == want).all() and index[want.size :].tolist() == list(range(T, rows))
        assert bounds == [*before, want.size + rows - T]
        assert graphs.key_capacity(graphs.count_keys(s, rows), rows) >= place, "what the memory plan counts"


def garbage(rows: int, keys: int, device: str) -> Any:
    """A bucket's buffers without its graphs, full of what nobody wrote."""
    graph = graphs.Bucket.__new__(graphs.Bucket)
    graph.x, graph.tables = torch.full((rows, 3), math.nan).to(device), {}
    index = torch.full((keys,), 3, dtype=torch.int64, device=device)
    starts, order, cu_k, cu_seqlens = (
        torch.full((n,), 3, dtype=torch.int32, device=device) for n in (rows + 1, keys, 65, 65)
    )
    cu_k[0] = cu_seqlens[0] = 0
    graph.cu_seqlens, graph.keys = cu_seqlens, {None: Keys(Copies(index, starts, order), cu_k, 2048)}
    return graph


def given(x: Tensor, s: Sequences, keys: Keys) -> graphs.Padded:
    return graphs.Padded(x, {}, s, {None: keys}, graphs._Size(0, 0, 0, ()))


def layouts() -> list[Sequences]:
    draw = random.Random(7)
    return [s for s in (drawn(draw) for _ in range(200)) if max(s.prefix) >= 0 and 1024 < s.bounds[-1] <= 1280][:6]


def test_what_an_earlier_pass_left_in_the_buffers_changes_nothing() -> None:
    """Several layouts one after the other through one bucket's buffers; attention in float64."""
    rows, graph = 1280, garbage(1280, 5 * 1280, "cpu")
    static = Sequences((0, rows), (-1,), graph.cu_seqlens, 2048, None, False, dict(graph.keys))
    assert len(layouts()) == 6
    for seed, s in enumerate(layouts()):
        T, g = s.bounds[-1], torch.Generator().manual_seed(seed)
        seen = Keys.seen(filled(s), None)
        graph.fill(given(torch.zeros(T, 3), s, Keys.made(*seen, rows, torch.device("cpu"))))
        # Rows of the bucket beyond the pass's hold what they like.
        q, k, v = (torch.randn(rows, h, 4, generator=g, dtype=torch.float64, requires_grad=True) for h in (2, 1, 1))
        out = varlen_attention(q, k, v, static, 0.5, backend="math")
        cu, prefix = torch.tensor(s.bounds), torch.tensor(s.prefix)
        want = varlen_attention_reference(q[:T], k[:T], v[:T], cu, prefix, 0.5)
        upstream = torch.randn(want.shape, generator=g, dtype=torch.float64)
        grads = [torch.autograd.grad((o * upstream).sum(), (q, k, v), retain_graph=True) for o in (out[:T], want)]
        assert torch.allclose(out[:T], want, atol=1e-12) and graph.x.isfinite().all()
        for ours, theirs in zip(*grads, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-12)


def test_kernels_read_no_more_of_the_buffers_than_was_filled() -> None:
    """Copies and sums by the kernels, with NaN behind the keys of the pass."""
    rows, graph = 1280, garbage(1280, 5 * 1280, DEVICE)
    for seed, s in enumerate(layouts()):
        T, g = s.bounds[-1], torch.Generator().manual_seed(seed)
        fresh = Keys.made(*Keys.seen(filled(s), None), rows, torch.device(DEVICE)).copies
        on_device = s._replace(cu_seqlens=s.cu_seqlens.to(DEVICE))
        graph.fill(given(torch.zeros(T, 3, device=DEVICE), on_device, Keys(fresh, on_device.cu_seqlens, 0)))
        static, number = graph.keys[None].copies, fresh.index.numel()
        x, d = (torch.randn(n, 1, 4, generator=g).to(DEVICE) for n in (rows, 5 * rows))
        d[number:] = math.nan
        assert torch.equal(gather_copies(x, static)[:number], x[fresh.index])
        assert torch.allclose(launch_summed(d, static), summed_reference(d[:number], fresh), atol=1e-5)


def test_rows_are_padded_by_a_quarter_at_most_where_they_are_many() -> None:
    for rows in (*range(1, 3000, 7), 32_767, 32_769):
        padded = graphs.round_up(rows)
        assert rows <= padded < rows + max(graphs.ROWS, rows / 4 + 1)
    assert len({graphs.round_up(rows) for rows in range(16_384, 32_768)}) <= 5


class Fake:
    """A CUDA graph that runs on a CPU what it would have captured."""

    def __init__(self) -> None:
        self.replay: Any = None


class Capturing:
    """torch.cuda.graph: finds the function that is captured among the names of the code that captures."""

    def __init__(self, graph: Fake, pool: Any) -> None:
        self._graph = graph

    def __enter__(self) -> None:
        self._names = sys._getframe(1).f_locals

    def __exit__(self, *error: Any) -> None:
        names, made = self._names, self._names["self"]
        if self._graph is made.forward_graph:
            self._graph.replay = lambda: made.out.copy_(names["forward"]())
        else:
            self._graph.replay = names["backward"]


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_backends, "choose_backend", lambda *of: "math")
    fakes = {"CUDAGraph": Fake, "graph": Capturing, "graph_pool_handle": lambda: 1, "memory_reserved": lambda device: 0}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)


def grouped(
    groups: list[tuple[int, list[int]]], g: torch.Generator, vocab: int, sampler: float | None = None
) -> list[Rollout]:
    """Prompts, each with completions of these lengths. sampler: the log-prob of every token."""
    rollouts = []
    for i, (prompt, lengths) in enumerate(groups):
        shared = Prompt(tuple(torch.randint(3, vocab, (prompt,), generator=g).tolist()), {}, i)
        for sample, n in enumerate(lengths):
            ids = tuple(torch.randint(3, vocab, (n,), generator=g).tolist())
            logprobs = None if sampler is None else (sampler,) * n
            rollouts.append(Rollout(shared, ids, (True,) * n, logprobs, "", "stop", sample, 0, 0))
    return rollouts


def groups_of(groups: list[tuple[int, list[int]]], g: torch.Generator, vocab: int) -> Batch:
    """`grouped`, in one micro-batch."""
    rollouts = grouped(groups, g, vocab)
    plan = PackPlan("token_mean", 10**6, 10**4, 1.0)
    (batch,) = records.packed(rollouts, plan)
    return batch


@pytest.mark.usefixtures("fake_cuda")
@pytest.mark.parametrize("name", ["qwen3", "gemma3", "mistral", "granite_swa"])
def test_passes_of_a_bucket_give_what_launches_give(name: str) -> None:
    """In float64: groups of other shapes one after the other, windows that cut prompts, a row without a prompt."""
    policy, g = Policy(model_of(name, torch.float64), torch.float64), torch.Generator().manual_seed(9)
    fused, kept = policy.fused, graphs.Graphs()
    assert fused is not None

    def gradient(batch: Batch, by: graphs.Graphs | None) -> Tensor:
        fused.graphs = by
        policy.flat.zero_grad()
        (policy.logprobs(batch)[0] * batch.weight).sum().backward()
        return policy.flat.gradient.clone()

    shapes = [
        [(20, [30, 9, 1]), (7, [25, 25])],
        [(25, [8, 3]), (3, [30, 30, 30])],
        [(11, [40])],
        [(2, [5]), (30, [20] * 5)],
        [(24, [17, 30, 2]), (9, [28, 6])],
    ]
    for shape in shapes * 2:
        batch = groups_of(shape, g, 61)
        want = gradient(batch, None)
        for _ in range(2):  # the first pass of a bucket is launched
            made = gradient(batch, kept)
            assert float((made - want).norm()) < 1e-12 * float(want.norm())
        policy.adapter_params.data.add_(
            torch.randn(policy.adapter_params.shape, generator=g, dtype=torch.float64) * 1e-3
        )
    assert 1 < len(kept._graphs) < len(shapes), "buckets are used again"


@pytest.fixture
def launched(fake_cuda: None) -> tuple[Policy, graphs.Graphs, Callable[[], Tensor]]:
    """A policy, its graphs, and the loss of a batch whose first pass ran by launches: the next forward is captured."""
    policy, g = Policy(model_of("qwen3", torch.float64), torch.float64), torch.Generator().manual_seed(9)
    assert policy.fused is not None
    kept = policy.fused.graphs = graphs.Graphs()
    batch = groups_of([(20, [30, 9, 1]), (7, [25, 25])], g, 61)

    def loss() -> Tensor:
        return (policy.logprobs(batch)[0] * batch.weight).sum()

    loss().backward()
    return policy, kept, loss


def test_weights_that_move_between_a_forward_and_its_backward_are_not_read(launched) -> None:
    policy, kept, loss_of = launched
    loss = loss_of()
    (graph,) = kept._graphs.values()
    assert all(plan is not None for plan in graph.write_tables), "what it reads lives as long as it"
    policy.fused.store.release()
    with pytest.raises(RuntimeError, match="another pass moved the weights' buffers"):
        loss.backward()


def test_a_step_between_a_forward_and_its_backward_is_an_error(launched) -> None:
    policy, kept, loss_of = launched
    optimizer = Optimizer(policy.adapter_params, Optim(), 1, views=policy.flat.parameters.values())
    loss = loss_of()
    assert kept._graphs
    optimizer.step(0, 0)
    with pytest.raises(RuntimeError, match="CUDA graph: the adapter was modified in place between forward and"):
        loss.backward()


def test_a_loss_that_is_held_on_to_holds_no_graph(launched) -> None:
    """The training loop's last loss is alive while the engine wakes, for which graphs and weights' buffers go."""
    _, kept, loss_of = launched
    loss = loss_of()
    loss.backward()
    (graph,) = map(weakref.ref, kept._graphs.values())
    kept.clear()
    gc.collect()  # the fakes hold what they captured
    assert graph() is None and loss.grad_fn is not None


def test_scoring_and_training_of_a_bucket_are_one_computation(fake_cuda: None) -> None:
    """To the bit: launched at first, then a graph; the forward graph alone where there is no gradient."""
    policy, g = Policy(model_of("qwen3", torch.float64), torch.float64), torch.Generator().manual_seed(9)
    assert policy.fused is not None
    kept = policy.fused.graphs = graphs.Graphs()
    batch = policy.planned(groups_of([(20, [30, 9, 1]), (7, [25, 25])], g, 61))
    assert batch.plan.padded == 256
    old = policy.score(batch)
    assert not kept._graphs, "the first pass of a bucket is launched"
    for _ in range(2):
        now, _ = policy.logprobs(batch)
        now.sum().backward()
        assert torch.equal(old, now.detach()) and torch.equal(old, policy.score(batch))
    assert len(kept._graphs) == 1
    (waiting, _) = policy.logprobs(batch)
    assert torch.equal(old, policy.score(batch)), "launched while a graph waits for its backward"
    waiting.sum().backward()
    policy.score(batch, weights="reference")
    assert len(kept._graphs) == 1, "no graph of another adapter than the one that is trained"


def test_bytes_of_graphs_are_those_that_are_there(fake_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their buffers go with them; their pool stays for the next ones."""
    held = [0]
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: held[0])
    captured = graphs._Graph.__init__

    def takes_memory(self: Any, *args: Any) -> None:
        captured(self, *args)
        held[0] += 10_000_000

    monkeypatch.setattr(graphs._Graph, "__init__", takes_memory)
    policy, g = Policy(model_of("qwen3", torch.float64), torch.float64), torch.Generator().manual_seed(9)
    assert policy.fused is not None
    kept = policy.fused.graphs = graphs.Graphs()
    batch = groups_of([(20, [30, 9, 1]), (7, [25, 25])], g, 61)
    for _ in range(2):
        policy.logprobs(batch)[0].sum().backward()
    (graph,) = kept._graphs.values()
    own = graphs._bytes(graph)
    assert kept.bytes == 10_000_000 and 0 < own < 10_000_000
    monkeypatch.setattr(graphs._Graph, "__init__", captured)
    for _ in range(3):  # captured again, into the pool that is there
        policy.fused.store.release()
        policy.logprobs(batch)[0].sum().backward()
    assert kept.bytes == 10_000_000
    kept._graphs.clear()
    assert kept.bytes == 10_000_000 - own
    kept.clear()
    assert kept.bytes == 0
