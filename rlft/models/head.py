"""How a causal language model of transformers turns states into logits: head matrix, softcap, scale.

A head with a bias is one matrix: the bias is one more column, and the states that reach it have a 1 there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

COLUMNS = 64
"""The widened matrix has a multiple of so many columns."""


def head_matrix(head: nn.Linear) -> Tensor:
    """The head's weight [V, H]; with a bias a copy [V, H'], the bias behind column H and zeros behind that."""
    if head.bias is None:
        return head.weight
    rows, width = head.weight.shape
    made = head.weight.data.new_zeros(rows, -(-(width + 1) // COLUMNS) * COLUMNS)
    made[:, :width] = head.weight.data
    made[:, width] = head.bias.data
    return made


def with_one(hidden: Tensor, columns: int) -> Tensor:
    """States [N, H] with a column of 1 behind them and zeros behind that: [N, columns]."""
    more = torch.zeros(hidden.shape[0], columns - hidden.shape[1], dtype=hidden.dtype, device=hidden.device)
    more[:, 0] = 1
    return torch.cat([hidden, more], dim=1)


def softcap_of(config: Any) -> float | None:
    """c where the logits are c tanh(z / c). config: of the text model."""
    return getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)


def scale_of(config: Any) -> float:
    """The factor on the logits. config: of the text model."""
    for name in ("logit_scale", "lm_head_multiplier"):  # Cohere; Falcon-H1
        if getattr(config, name, None):
            return float(getattr(config, name))
    scaling = float(getattr(config, "logits_scaling", None) or 1.0)
    # HyperCLOVA X multiplies by what Granite and MiniCPM 3 divide by.
    return scaling if config.model_type == "hyperclovax" else 1.0 / scaling
