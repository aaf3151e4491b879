"""Loss scaling in float16: its rule, that it cancels exactly, and a run that has it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_model, tiny_tokenizer
from torch import Tensor, nn

from rlft.config.data import Data
from rlft.config.run import Algo, Config, Lora, Optim, Parity
from rlft.errors import TrainError
from rlft.trainer.loop import train
from rlft.trainer.optim import LossScale, Optimizer


def test_the_scale_moves_as_gradscalers() -> None:
    ours = LossScale()
    scale, tracker = torch.full((1,), 2.0**16), torch.zeros(1, dtype=torch.int32)
    for update in range(6500):
        bad = update in (0, 1, 1999, 2500, 6300)
        ours.update(not bad)
        torch.ops.aten._amp_update_scale_(scale, tracker, torch.tensor([float(bad)]), 2.0, 0.5, 2000)
        assert (ours.value, ours.good) == (scale.item(), tracker.item()), update
    assert ours.value == 2.0**12, "five halvings and one doubling"


def updates(fp16: bool) -> tuple[list[Tensor], list[float], Tensor]:
    """Weights after each of three updates of two micro-batches, with clipping, their norms, and the last gradient."""
    torch.manual_seed(0)
    flat = nn.Parameter(torch.randn(50))
    flat.grad = torch.zeros(50)
    optimizer, weights, norms = Optimizer(flat, Optim(lr=0.1, weight_decay=0.01), total=3, fp16=fp16), [], []
    for update in range(3):
        flat.grad.zero_()
        for batch in torch.randn(2, 4, 50):
            optimizer.scaled((batch @ flat).sigmoid().log().sum()).backward()
        norms.append(optimizer.step(update, 0).grad_norm)
        weights.append(flat.detach().clone())
    return weights, norms, flat.grad


def test_scaled_losses_give_the_unscaled_update_bit_for_bit() -> None:
    """A scale that is applied twice or not at all is off by 65,536 in the norm, and clipping would not hide it."""
    (plain, norms, grad), (scaled, scaled_norms, scaled_grad) = updates(False), updates(True)
    assert all(map(torch.equal, plain, scaled)) and norms == scaled_norms and torch.equal(grad, scaled_grad)
    assert min(norms) > 1, "clipped"


def test_without_float16_the_loss_is_handed_through() -> None:
    flat = nn.Parameter(torch.ones(1))
    optimizer, loss = Optimizer(flat, Optim(), total=1), flat.sum()
    assert optimizer.scaled(loss) is loss and optimizer.metrics() == {} and optimizer.tensors() == {}
    scaling = Optimizer(flat, Optim(), total=1, fp16=True)
    assert scaling.scaled(loss).item() == 2**16 and scaling.metrics() == {"loss_scale": 2**16}


def test_gradients_below_float16_are_kept() -> None:
    """The backward of a float16 product, whose gradient of 1e-9 is 0 there without a scale."""
    found = []
    for fp16 in (False, True):
        flat = nn.Parameter(torch.ones(4))
        optimizer = Optimizer(flat, Optim(), total=1, fp16=fp16)
        optimizer.scaled((flat.half() * 1.0).float().sum() * 1e-9).backward()
        found.append(optimizer.step(0, 0).grad_norm)
    assert found[0] == 0 and found[1] == pytest.approx(2e-9, rel=1e-2)


def test_the_search_for_a_scale_does_not_stop_the_run_and_a_scale_of_1_does() -> None:
    flat = nn.Parameter(torch.ones(1))
    optimizer = Optimizer(flat, Optim(max_skipped=3), total=99, fp16=True)
    for skipped in range(16):
        flat.grad = torch.tensor([math.inf])
        assert optimizer.metrics()["loss_scale"] == 2 ** (16 - skipped)
        assert optimizer.step(0, skipped).skipped and flat.item() == 1
    with pytest.raises(TrainError, match="17 updates in a row had a non-finite gradient"):
        optimizer.step(0, 16)
    for skipped in (0, 1):  # a new row of skips, at scale 1 from its start
        flat.grad = torch.tensor([math.nan])
        assert optimizer.step(0, skipped).skipped and optimizer.metrics()["loss_scale"] == 1
    with pytest.raises(TrainError, match="3 updates in a row"):
        optimizer.step(0, 2)


def test_scale_and_count_are_restored() -> None:
    flat = nn.Parameter(torch.ones(1))
    one = Optimizer(flat, Optim(), total=9, fp16=True)
    for grad in (math.inf, 1.0, 1.0):
        flat.grad = torch.tensor([grad])
        one.step(0, 0)
    kept = {name: tensor.clone() for name, tensor in one.tensors().items()}
    two = Optimizer(flat, Optim(), total=9, fp16=True)
    two.load_tensors(kept)
    assert (float(kept["loss_scale"]), int(kept["loss_scale_good"])) == (2**15, 2)
    assert two.tensors().keys() == kept.keys() and all(torch.equal(two.tensors()[n], kept[n]) for n in kept)
    # From float16 to float32 and back: the moments stay, the scale starts again.
    three = Optimizer(flat, Optim(), total=9)
    three.load_tensors(kept)
    assert three.tensors().keys() == {"step", "exp_avg", "exp_avg_sq"}
    two = Optimizer(flat, Optim(), total=9, fp16=True)
    two.load_tensors(three.tensors())
    assert two.metrics() == {"loss_scale": 2**16}


def run(out: Path, **changes) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Metrics and last checkpoint of an SFT run over a tiny model."""
    home = out.parent
    if not (home / "model").exists():
        tiny_model(seed=3).unload().save_pretrained(home / "model")
        tiny_tokenizer().save_pretrained(home / "model")
        rows = [{"prompt": f"say {i}", "completion": f"it is {i * i}"} for i in range(8)]
        (home / "sft.jsonl").write_text("\n".join(map(json.dumps, rows)))
    cfg = Config(
        model=str(home / "model"),
        data=Data(str(home / "sft.jsonl")),
        out=str(out),
        algo=Algo("sft"),
        steps=2,
        prompts_per_step=2,
        lora=Lora(rank=4, alpha=8),
        optim=Optim(lr=1e-2),
        parity=Parity(probe=False),
    )
    cfg = replace(cfg, **changes)
    train(cfg, resume=out.exists())
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return lines, load_file(out / "checkpoints" / f"step-{cfg.steps:06d}" / "trainer.safetensors")


def test_a_float16_run_has_the_gradient_of_a_float32_one_and_resumes_exactly(tmp_path: Path) -> None:
    half, whole = run(tmp_path / "half", dtype="float16")
    full, _ = run(tmp_path / "full")
    assert [line["grad_norm"] for line in half] == pytest.approx([line["grad_norm"] for line in full], rel=0.05)
    assert [line["loss_scale"] for line in half] == [2**16, 2**16] and "loss_scale" not in full[0]
    run(tmp_path / "parts", dtype="float16", steps=1)
    _, parts = run(tmp_path / "parts", dtype="float16")
    assert int(whole["optim.loss_scale_good"]) == 2 and whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
