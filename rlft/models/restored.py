"""Put a model back as it was: modules, hooks, attributes, configs and gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def restored(model: nn.Module, configs: list[Any]) -> Iterator[None]:
    """Restore, when the block ends, everything of a model but the values of its tensors.

    That is every attribute of every module, its children and hooks included, every attribute of `configs`, and of each
    parameter its dtype, gradient and `requires_grad`. The block may replace the memory of parameters; they get their
    own again.
    """
    owners = [*model.modules(), *{id(config): config for config in configs if config is not None}.values()]
    attributes = [(vars(owner), dict(vars(owner)), _contents(owner)) for owner in owners]
    parameters = [(each, each.dtype, each.grad, each.requires_grad, each.data_ptr()) for each in model.parameters()]
    for parameter, *_ in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for now, before, contents in attributes:
            now.clear()
            now.update(before)
            for container, items in contents:
                _fill(container, items)
        for parameter, dtype, gradient, trained, address in parameters:
            parameter.grad = None
            if parameter.data_ptr() != address:
                parameter.data = torch.empty_like(parameter.data, dtype=dtype).copy_(parameter.data)
            parameter.requires_grad_(trained)
            parameter.grad = gradient


def _contents(owner: Any) -> list[tuple[Any, Any]]:
    """Return the containers among an object's attributes, each with a copy of what it holds."""
    return [(value, value.copy()) for value in vars(owner).values() if isinstance(value, dict | list | set)]


def _fill(container: Any, items: Any) -> None:
    """Put `items` into a container, in place, since other objects may hold the same one."""
    container.clear()
    if isinstance(container, list):
        container.extend(items)
    else:
        container.update(items)
