"""An optimiser that is given in place of AdamW: a class of torch.optim, or a function that makes one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rlft.config.run import Optim
from rlft.errors import ConfigError

NUMBER = "number."
"""Prefix of the name of an optimiser's number that is saved as a tensor."""

OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class GivenOptimizer:
    """A class of torch.optim, or a function that makes such an optimiser over a list of parameters."""

    def __init__(self, make: Any) -> None:
        """Raises ConfigError for anything else, and for an optimiser that does not resume to the bit."""
        if isinstance(make, torch.optim.Optimizer):
            raise ConfigError(
                f"optimizer: a {type(make).__name__} is bound to other parameters than the run trains; give its class, "
                f"or a function of the parameters: lambda parameters: torch.optim.{type(make).__name__}(parameters, "
                f"lr=...)"
            )
        self._is_class = isinstance(make, type) and issubclass(make, torch.optim.Optimizer)
        if not (self._is_class or (callable(make) and not isinstance(make, type | nn.Module))):
            raise ConfigError(
                f"optimizer: {shown(make)} makes no optimiser; give a class of torch.optim, or a function of the "
                f"parameters that returns one"
            )
        self._make: Callable[..., Any] = make
        self._state_bytes = 0.0
        trial = self._tried()
        self.name = f"{type(trial).__module__}.{type(trial).__qualname__}"

    def over(self, flat: nn.Parameter, cfg: Optim) -> torch.optim.Optimizer:
        """Return the optimiser of a run. Raises ConfigError for settings of [optim] that it would not follow."""
        default = Optim()
        for name in ("name", "betas", "eps", "weight_decay"):
            if getattr(cfg, name) != getattr(default, name):
                raise ConfigError(
                    f"optim.{name} = {getattr(cfg, name)!r}: a setting of AdamW, and an optimizer is given; leave it "
                    f"out, and give it to the optimizer"
                )
        optimizer = self._built(flat, cfg.lr)
        rate = float(optimizer.param_groups[0]["lr"])
        if rate != cfg.lr:
            raise ConfigError(
                f"optim.lr = {cfg.lr}: the optimizer given has lr = {rate}; set optim.lr to it, since schedule and "
                f"warm-up of [optim] set the rate of every update"
            )
        return optimizer

    def state_bytes(self, numel: int) -> int:
        """Return the bytes of its state over `numel` parameters."""
        return round(self._state_bytes * numel)

    def _built(self, parameter: nn.Parameter, rate: float) -> torch.optim.Optimizer:
        made = self._make([parameter], lr=rate) if self._is_class else self._make([parameter])
        if not isinstance(made, torch.optim.Optimizer):
            raise ConfigError(f"optimizer: it returned {shown(made)}; return an optimiser of torch.optim")
        groups = made.param_groups
        if len(groups) != 1 or len(groups[0]["params"]) != 1 or groups[0]["params"][0] is not parameter:
            raise ConfigError(
                f"optimizer: the {type(made).__name__} it returned is not over the parameters it was called with; "
                f"return torch.optim.{type(made).__name__}(parameters, ...), with one group"
            )
        return made

    def _tried(self) -> torch.optim.Optimizer:
        """Make three updates of a small tensor, the third by the optimiser and by one that resumes it; they must agree.

        Returns the optimiser.
        """
        first, second = (nn.Parameter(torch.linspace(-1, 1, 64)) for _ in range(2))
        try:
            made = self._built(first, 0.01)
            for number in range(2):
                first.grad = torch.linspace(0.5, -2, 64) * (number + 1)
                made.step()
            resumed = self._built(second, 0.01)
            second.data.copy_(first.data)
            set_state(resumed, second, {name: each.clone() for name, each in state_of(made, first).items()})
            for parameter, optimizer in ((first, made), (second, resumed)):
                parameter.grad = torch.linspace(1, -1, 64)
                optimizer.step()
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(
                f"optimizer: {shown(self._make)} fails on a small tensor ({type(error).__name__}: {error}); give one "
                f"whose step() needs nothing but gradients"
            ) from error
        if not torch.equal(first.data, second.data):
            raise ConfigError(
                f"optimizer: {type(made).__name__} keeps something outside of its state, so a resumed run would differ "
                f"from an uninterrupted one; give another one"
            )
        state = state_of(made, first).values()
        self._state_bytes = sum(each.nbytes for each in state if each.numel() == first.numel()) / first.numel()
        return made


def state_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """Return the state of a parameter as tensors. Raises ConfigError for what no checkpoint can hold."""
    tensors = {}
    for name, value in optimizer.state.get(parameter, {}).items():
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, bool | int | float):
            kind = torch.float64 if isinstance(value, float) else None
            tensors[f"{NUMBER}{name}"] = torch.tensor(value, dtype=kind)
        elif value is not None:
            raise ConfigError(
                f"optimizer: the state {name} of {type(optimizer).__name__} is a {type(value).__name__}, and a "
                f"checkpoint holds tensors and numbers; give another one"
            )
    return tensors


def set_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, tensors: Mapping[str, Tensor]) -> None:
    """Restore the result of `state_of`."""
    state = {
        name.removeprefix(NUMBER): value.item() if name.startswith(NUMBER) else value for name, value in tensors.items()
    }
    optimizer.load_state_dict(optimizer.state_dict() | {"state": {0: state} if state else {}})


def shown(value: Any) -> str:
    """Return a value as an error message shows it."""
    return f"a {type(value).__name__}" if not isinstance(value, type) else f"the class {value.__name__}"
