"""A tiny model twice, plain and with fused layers, and what the two are compared by."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch import Tensor

from rlft.models.fused.decoder import FusedDecoder
from rlft.models.fused.fuse import fuse

IDS = torch.randint(3, 103, (3, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 9, [0] * 4 + [1] * 5, [0] * 2 + [1] * 7])


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """For files that import this. Two threads over operations this small are 50 times slower where cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model_of(fuses: bool, **options: Any) -> Any:
    """The tiny Llama with random B."""
    model, g = tiny_model(**options), torch.Generator().manual_seed(7)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.copy_(torch.randn(p.shape, generator=g) * 0.1)
    if fuses:
        assert isinstance(fuse(model), FusedDecoder)
    return model


def pair(**options: Any) -> tuple[Any, Any]:
    """Plain and fused."""
    return model_of(False, **options), model_of(True, **options)


def ran(model: Any, call: Callable[[], Any]) -> tuple[Any, bool]:
    """The result of a call, and whether fused layers ran in it."""
    fused = vars(model.get_base_model().get_decoder())["forward"].__self__
    fused._last_plan = None
    return call(), fused.last_plan is not None


def logits(model: Any, **inputs: Any) -> Tensor:
    """Of the tokens that the mask leaves."""
    inputs = {"input_ids": IDS, "attention_mask": MASK, "use_cache": False} | inputs
    inputs = {name: value() if isinstance(value, type) else value for name, value in inputs.items()}
    out = model(**inputs).logits
    mask = inputs["attention_mask"]
    return out if mask is None or mask.dim() != 2 else out[mask.bool()]


def gradients(model: Any, **inputs: Any) -> dict[str, Tensor]:
    model.zero_grad()
    logits(model, **inputs).square().mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def near(got: Any, want: Any, tolerance: float = 1e-5) -> None:
    """Within `tolerance` of the largest value; for dicts, of that of each entry."""
    if isinstance(want, dict):
        assert got.keys() == want.keys() and want
        for name, value in want.items():
            near(got[name], value, tolerance)
        return
    assert got.shape == want.shape and want.abs().max() > 0
    assert (got - want).abs().max() <= tolerance * want.abs().max()


def same(plain: Any, fused: Any, **inputs: Any) -> None:
    """Fused layers run, and logits and all gradients equal the plain model's."""
    out, was_fused = ran(fused, lambda: logits(fused, **inputs))
    assert was_fused
    near(out, logits(plain, **inputs))
    near(gradients(fused, **inputs), gradients(plain, **inputs))
