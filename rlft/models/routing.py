"""Give the experts of each token to transformers' own layers, in place of the choice of their routers.

A router of transformers returns its logits, and the weight and number of each expert of a token. A hook on it, during a
pass that has the experts, replaces the latter two: the weights of given experts come from the logits as they are now,
with the gradient to them. How a router scores is read from what it returns, so that its own code decides.

Shapes: T tokens of a pass, E experts, k experts of a token.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlft.kernels.expert_choice import Scoring, choose_experts
from rlft.models import experts
from rlft.models.adapter import without_wrappers

NAMES = ("gate", "router")
"""Of routers beside the experts, in transformers."""
ROWS, SPREAD = 32, 2.0
"""Random rows that a router is called with, and the standard deviation of their logits."""
CLOSE = 0.02
"""Largest relative difference of a weight: some routers compute in bf16, or round to it."""


class Router(NamedTuple):
    """A router of transformers' layers."""

    module: Any
    k: int
    scoring: Scoring


def routers_of(base: nn.Module) -> tuple[Router, ...] | str:
    """Return the routers of a model's layers with experts, in their order; or why they cannot be given experts."""
    found = []
    for name, _ in experts.layers(base):
        block = base.get_submodule(without_wrappers(name).rpartition(".")[0])
        module = next((router for each in NAMES if _is_router(router := getattr(block, each, None))), None)
        scoring = None if module is None else _scoring(module)
        if module is None or scoring is None:
            return f"the router of {type(block).__name__} has a form that rlft does not know"
        found.append(Router(module, module.top_k, scoring))
    return tuple(found)


def _is_router(module: Any) -> bool:
    """Return whether a module maps rows to a choice of experts, as far as its attributes say."""
    weight, k = getattr(module, "weight", None), getattr(module, "top_k", None)
    if not (isinstance(module, nn.Module) and isinstance(weight, Tensor) and weight.dim() == 2 and isinstance(k, int)):
        return False
    return len(inspect.signature(type(module).forward).parameters) == 2  # self and the rows


@torch.no_grad()
def _scoring(module: Any) -> Scoring | None:
    """Return how a router weights the experts that it chooses; None where no `Scoring` gives its weights."""
    weight: Tensor = module.weight
    rows = torch.randn(ROWS, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    spread = (rows.float() @ weight.float().T).std().clamp(min=1e-6)
    returned = module(rows * (SPREAD / spread).to(rows.dtype))
    shapes = [(ROWS, weight.shape[0]), (ROWS, module.top_k), (ROWS, module.top_k)]
    if not isinstance(returned, tuple) or [tuple(getattr(each, "shape", ())) for each in returned] != shapes:
        return None
    logits, weights, chosen = returned
    for kind in ("softmax", "sigmoid"):
        for renormalised in (True, False):
            scoring = Scoring(kind, renormalised)
            want = choose_experts(logits, module.top_k, scoring, given=chosen.int().contiguous()).weights
            ratio = weights.to(want.dtype) / want
            scale = ratio.median()
            if bool(((ratio - scale).abs() <= CLOSE * scale).all()):
                # Rounded as a factor of a config is not.
                factor = float(getattr(module, "routed_scaling_factor", 1.0))
                return replace(scoring, scale=factor) if abs(float(scale) - factor) <= CLOSE * factor else None
    return None


class Choice(NamedTuple):
    """The experts of each row that the layers get, for transformers' routers."""

    routers: tuple[Router, ...]
    routes: Tensor | None
    """[T, layers, k] integers; None: the routers choose."""

    def of(self, rows: Tensor) -> Choice:
        """Return the choice for other rows, by their indices among these."""
        return self if self.routes is None else Choice(self.routers, self.routes[rows])

    @contextmanager
    def given(self) -> Iterator[None]:
        """Give the experts to the routers inside the block."""
        with ExitStack() as stack:
            if self.routes is not None:
                for router, rows in zip(self.routers, self.routes.unbind(1), strict=True):
                    handle = router.module.register_forward_hook(functools.partial(_replaced, router, rows))
                    stack.callback(handle.remove)
            yield


NO_CHOICE = Choice((), None)


def _replaced(router: Router, rows: Tensor, module: nn.Module, args: Any, returned: tuple[Tensor, ...]) -> Any:
    """Return what a router returns, with the experts `rows` [T, k] and their weights."""
    logits, weights, chosen = returned
    choice = choose_experts(logits, router.k, router.scoring, given=rows.int().contiguous())
    return logits, choice.weights.to(weights.dtype), choice.experts.to(chosen.dtype)
