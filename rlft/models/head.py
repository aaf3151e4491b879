"""Read how a causal language model of transformers turns states into logits: head matrix, softcap, scale.

Shapes: N states, H hidden size, V vocabulary. A head with a bias becomes one matrix: the bias is one more column, and
the states have a 1 there. In formulae, z is a logit and c the softcap.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

COLUMNS = 64
"""The widened matrix has a multiple of this number of columns."""


def head_matrix(head: nn.Linear) -> Tensor:
    """Return the head's weight [V, H]; with a bias a copy [V, H'] with the bias in column H and zeros behind it."""
    if head.bias is None:
        return head.weight
    rows, width = head.weight.shape
    widened = head.weight.data.new_zeros(rows, -(-(width + 1) // COLUMNS) * COLUMNS)
    widened[:, :width] = head.weight.data
    widened[:, width] = head.bias.data
    return widened


def append_ones(hidden: Tensor, columns: int) -> Tensor:
    """Append a column of ones and columns of zeros to states [N, H]: [N, columns]."""
    extra = torch.zeros(hidden.shape[0], columns - hidden.shape[1], dtype=hidden.dtype, device=hidden.device)
    extra[:, 0] = 1
    return torch.cat([hidden, extra], dim=1)


def softcap_of(config: Any) -> float | None:
    """Return c if the logits are c tanh(z / c), else None. config: of the text model."""
    return getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)


def scale_of(config: Any) -> float:
    """Return the factor on the logits. config: of the text model."""
    for name in ("logit_scale", "lm_head_multiplier"):  # Cohere; Falcon-H1
        if getattr(config, name, None):
            return float(getattr(config, name))
    scaling = float(getattr(config, "logits_scaling", None) or 1.0)
    # HyperCLOVA X multiplies by this setting, Granite and MiniCPM 3 divide by it.
    return scaling if config.model_type == "hyperclovax" else 1.0 / scaling
