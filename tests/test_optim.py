"""The flat optimiser: schedule, clip, skipped updates, and its state."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rlft.config import Optim
from rlft.errors import ConfigError, TrainError
from rlft.optim import Optimizer, learning_rate


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


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_gradient_changes_nothing_and_stops_the_run_after_k_in_a_row(bad: float) -> None:
    flat, optimizer = make([1.0], [bad], lr=0.1, max_skipped=3)
    assert optimizer.step(0, 0).skipped and flat.item() == 1.0 and optimizer.tensors() == {}
    with pytest.raises(TrainError, match=r"3 updates in a row had a non-finite gradient .*lower optim.lr \(0.1\)"):
        optimizer.step(0, skipped_before=2)


def test_restored_moments_continue_bit_for_bit() -> None:
    one, a = make([1.0, 2.0], [0.1, -0.2], lr=0.1)
    a.step(0, 0)
    two, b = make(one.tolist(), [0.3, 0.1], lr=0.1)
    b.load_tensors({n: t.clone() for n, t in a.tensors().items()})
    one.grad = torch.tensor([0.3, 0.1])
    a.step(1, 0)
    b.step(1, 0)
    assert torch.equal(one, two)


def test_8_bit_moments_without_a_gpu_say_what_to_set() -> None:
    with pytest.raises(ConfigError, match=r'optim.name = "adamw_8bit" needs a GPU, this run is on cpu: set "adamw"'):
        make([1.0], [1.0], name="adamw_8bit")
