"""The flat optimiser: schedule, clip, skipped updates, and its state, with moments in fp32 and in 8 bits."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rlft.config.run import Optim
from rlft.errors import ConfigError, TrainError
from rlft.trainer.optim import Optimizer, learning_rate


def make(values: list[float], grad: list[float], **options) -> tuple[nn.Parameter, Optimizer]:
    flat = nn.Parameter(torch.tensor(values))
    flat.grad = torch.tensor(grad)
    return flat, Optimizer(flat, Optim(**options), total=10)


def test_warm_up_then_schedule() -> None:
    linear = Optim(lr=1.0, warmup=2, schedule="linear")
    assert [learning_rate(linear, u, 6) for u in (0, 1, 2, 4, 6, 9)] == [0.5, 1.0, 1.0, 0.5, 0.0, 0.0]
    cosine = Optim(lr=1.0, schedule="cosine")
    assert learning_rate(cosine, 5, 10) == pytest.approx(0.5) and learning_rate(cosine, 0, 10) == 1.0
    assert learning_rate(Optim(lr=0.3), 1000, 10) == 0.3


def test_a_gradient_of_0_moves_by_momentum_and_decay_as_adamw_does() -> None:
    """A part of a step in which nothing is kept: docs/algorithms.md says so."""
    flat, optimizer = make([1.0, 2.0], [0.5, -0.5], lr=0.1, weight_decay=0.1)
    plain = nn.Parameter(flat.detach().clone())
    plain.grad, adam = flat.grad.clone(), torch.optim.AdamW([plain], lr=0.1, weight_decay=0.1)  # type: ignore[union-attr]
    for update in range(2):
        before = flat.detach().clone()
        optimizer.step(update, 0)
        adam.step()
        assert (flat - before).abs().min() > 0.01 and torch.allclose(flat, plain)
        flat.grad.zero_(), plain.grad.zero_()  # type: ignore[union-attr]


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedules_are_those_of_transformers_one_update_earlier_in_the_warm_up(schedule: str, warmup: int) -> None:
    import transformers

    total = 10
    adam = torch.optim.AdamW([nn.Parameter(torch.ones(1))], lr=0.3)
    make_schedule = getattr(transformers, f"get_{schedule}_schedule_with_warmup")
    theirs = make_schedule(adam, warmup, *(() if schedule == "constant" else (total,)))
    rates = []
    for _ in range(total + 1):
        rates.append(adam.param_groups[0]["lr"])
        adam.step()
        theirs.step()
    cfg = Optim(lr=0.3, schedule=schedule, warmup=warmup)  # type: ignore[arg-type]
    ours = [learning_rate(cfg, update, total) for update in range(total + 1)]
    assert ours == pytest.approx(rates[1 : warmup + 1] + rates[warmup:], abs=1e-12)
    assert [learning_rate(cfg, update, total) for update in (total + 1, 99)] == [ours[-1]] * 2


def test_first_adam_update_moves_by_the_learning_rate_against_the_sign() -> None:
    flat, optimizer = make([1.0, 1.0], [0.3, -0.4], lr=0.1, eps=1e-12)
    done = optimizer.step(0, 0)
    assert flat.tolist() == pytest.approx([0.9, 1.1]) and done.grad_norm == pytest.approx(0.5) and not done.skipped


def test_clip_scales_the_gradient_to_the_norm() -> None:
    flat, optimizer = make([0.0, 0.0], [30.0, 40.0], lr=0.1, max_grad_norm=1.0)
    assert optimizer.step(0, 0).grad_norm == pytest.approx(50.0)
    assert flat.grad is not None and flat.grad.tolist() == pytest.approx([0.6, 0.8])
    flat, optimizer = make([0.0, 0.0], [30.0, 40.0], lr=0.1, max_grad_norm=0.0)
    optimizer.step(0, 0)
    assert flat.grad is not None and flat.grad.tolist() == [30.0, 40.0]


@pytest.mark.parametrize("limit", [0.5, 100.0])
def test_the_clip_is_that_of_torch_over_all_tensors_of_the_buffer(limit: float) -> None:
    torch.manual_seed(0)
    parts = [nn.Parameter(torch.zeros(n)) for n in (3, 40, 700)]
    for part in parts:
        part.grad = torch.randn(part.shape)
    gradients = torch.cat([p.grad for p in parts if p.grad is not None])
    flat, optimizer = make([0.0] * 743, gradients.tolist(), max_grad_norm=limit)
    norm = torch.nn.utils.clip_grad_norm_(parts, limit)
    assert optimizer.step(0, 0).grad_norm == pytest.approx(norm.item(), rel=1e-6)
    clipped = torch.cat([p.grad for p in parts if p.grad is not None])
    assert flat.grad is not None and torch.allclose(flat.grad, clipped, rtol=1e-5, atol=0)
    assert torch.equal(flat.grad, gradients) == (limit == 100)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_gradient_changes_nothing_and_stops_the_run_after_k_in_a_row(bad: float) -> None:
    flat, optimizer = make([1.0], [bad], lr=0.1, max_skipped=3)
    assert optimizer.step(0, 0).skipped and flat.item() == 1.0 and optimizer.tensors() == {}
    with pytest.raises(TrainError, match=r"3 updates in a row had a non-finite gradient .*lower optim.lr \(0.1\)"):
        optimizer.step(0, skipped_before=2)


def run(name: str, gradients: Tensor, device: str = "cpu", resume_at: int | None = None) -> tuple[Tensor, Optimizer]:
    """Weights after an update with each gradient; at `resume_at` a new optimiser goes on from the saved tensors."""
    cfg = Optim(name=name, lr=0.1, weight_decay=0.01, schedule="cosine")  # type: ignore[arg-type]
    flat = nn.Parameter(torch.linspace(-1, 1, gradients.shape[1], device=device))
    optimizer = Optimizer(flat, cfg, total=len(gradients))
    for update, grad in enumerate(gradients):
        if update == resume_at:
            # As a checkpoint does it: through the CPU and safetensors.
            from safetensors.torch import load, save

            kept = load(save({n: t.detach().cpu().contiguous() for n, t in optimizer.tensors().items()}))
            flat = nn.Parameter(flat.detach().clone())
            optimizer = Optimizer(flat, cfg, total=len(gradients))
            optimizer.load_tensors(kept)
        flat.grad = grad.to(device, copy=True)  # it is clipped in place
        optimizer.step(update, 0)
    return flat.detach().cpu(), optimizer


def resumes_exactly(name: str, numel: int, device: str) -> None:
    torch.manual_seed(0)
    gradients = torch.randn(6, numel)
    whole, one = run(name, gradients, device)
    parts, two = run(name, gradients, device, resume_at=3)
    assert torch.equal(whole, parts)
    assert one.tensors().keys() == two.tensors().keys() and int(one.tensors()["step"]) == 6
    for key, value in one.tensors().items():
        assert torch.equal(value, two.tensors()[key]) and value.device == two.tensors()[key].device, key


BUFFERS = {"fused": ("adamw", 5003), "8 bits": ("adamw_8bit", 5003), "too small for 8 bits": ("adamw_8bit", 100)}


@pytest.mark.parametrize("name,numel", BUFFERS.values(), ids=BUFFERS)
def test_a_resumed_run_equals_a_whole_one_bit_for_bit(name: str, numel: int) -> None:
    resumes_exactly(name, numel, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("name,numel", BUFFERS.values(), ids=BUFFERS)
def test_a_resumed_run_on_a_gpu_equals_a_whole_one_bit_for_bit(name: str, numel: int) -> None:
    resumes_exactly(name, numel, "cuda")


def eight_bits_are_near(device: str) -> None:
    torch.manual_seed(0)
    gradients = torch.randn(6, 5000)
    exact, _ = run("adamw", gradients, device)
    near, optimizer = run("adamw_8bit", gradients, device)
    moments = optimizer.tensors()
    assert moments["state1"].dtype == moments["state2"].dtype == torch.uint8 and moments["state1"].shape == (5000,)
    moved = (exact - torch.linspace(-1, 1, 5000)).norm()
    assert 0 < (near - exact).norm() < 0.1 * moved


def test_8_bit_moments_are_bytes_and_go_nearly_where_fp32_ones_go() -> None:
    eight_bits_are_near("cpu")


@pytest.mark.gpu
def test_8_bit_moments_on_a_gpu() -> None:
    eight_bits_are_near("cuda")


@pytest.mark.parametrize("theirs,ours", [("adamw", "adamw_8bit"), ("adamw_8bit", "adamw")])
def test_moments_of_the_other_optimiser_say_what_to_set(theirs: str, ours: str) -> None:
    _, saved = run(theirs, torch.ones(1, 5000))
    _, other = run(ours, torch.ones(1, 5000))
    with pytest.raises(ConfigError, match=f'optim.name = "{ours}": .* moments of "{theirs}"; resume with optim.name'):
        other.load_tensors(saved.tensors())


@pytest.mark.parametrize("fp16", [False, True])
def test_an_update_reads_one_value_back(fp16: bool) -> None:
    """Every read of a tensor on the host is a wait on a GPU."""

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    flat = nn.Parameter(torch.ones(8))
    optimizer = Optimizer(flat, Optim(max_grad_norm=0.1), total=2, fp16=fp16)
    for update in range(2):
        flat.grad = torch.ones(8)
        with Reads() as reads:
            optimizer.scaled(flat.sum())
            optimizer.step(update, 0)
        assert reads.count == 1


@pytest.mark.gpu
@pytest.mark.parametrize("fp16", [False, True])
def test_an_update_on_a_gpu_waits_once(fp16: bool) -> None:
    flat = nn.Parameter(torch.ones(8, device="cuda"))
    optimizer = Optimizer(flat, Optim(max_grad_norm=0.1), total=2, fp16=fp16)
    for update in range(2):
        flat.grad = torch.ones(8, device="cuda")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")  # which itself warns that it is a prototype
            try:
                optimizer.scaled(flat.sum()).backward()
                optimizer.step(update, 0)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits = [str(w.message) for w in caught if "called a synchronizing" in str(w.message)]
        assert len(waits) == 1, waits
