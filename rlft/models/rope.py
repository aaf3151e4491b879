"""Rotary tables that do not depend on what else is in a call.

transformers takes the factors of "longrope" and the base of "dynamic" RoPE from the largest position of each call. In a
packed batch that position is another sequence's, and with a cache it grows in the middle of a sequence. vLLM decides
longrope once, by max_model_len, for every sequence. A run does the same: `fix` decides by the longest sequence that
the run can have and sets the decoder's rotary modules, so that packed, padded and cached calls have the same tables.
Dynamic RoPE has no such table beyond the model's context, and is refused there.

Nothing is fixed by `rlft.load`: under a Trainer, each call has the tables that transformers gives it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from rlft.errors import ConfigError

Factors = Literal["short factors", "long factors"]
FIXED = "longrope, long factors"
"""`rope_type` of a rotary module whose factors are fixed: no name of transformers, which decides by "longrope"."""


@dataclass(frozen=True)
class Regime:
    """The longrope factors of a run, for all of its sequences."""

    factors: Factors
    original: int
    """original_max_position_embeddings: tokens up to which transformers takes the short factors."""
    longest: int
    """Tokens that a sequence of the run can have."""

    def __str__(self) -> str:
        why = f"the longest can have {self.longest:,} tokens, and the short factors are for up to {self.original:,}"
        if self.factors == "long factors" and self.longest <= self.original:
            why = "as in the run that trained the adapter"
        return f"rope: {self.factors} for all sequences: {why}"


def limit(decoder: nn.Module) -> int | None:
    """Tokens up to which the rotary tables of every call are the same; None: of any length."""
    return min((_limit(m, kind) for m, kind in _by_call(decoder) if kind != FIXED), default=None)


def fix(decoder: nn.Module, longest: int, long: bool = False) -> Regime | None:
    """Give all sequences of a run one rotary table; None where the model has one anyway.

    longest: tokens that a sequence of the run can have. long: take longrope's long factors in any case. Raises
    ConfigError where no fixed table is what transformers and vLLM compute. Calls may repeat, to more tokens.
    """
    regime = None
    for module, kind in _by_call(decoder):
        most = _limit(module, kind)
        if kind != FIXED and (longest > most or (long and kind == "longrope")):
            if kind != "longrope" or isinstance(module.rope_type, dict):
                raise _refused(module, kind, longest, most)
            _fix_long(module, longest, most)
        if kind in ("longrope", FIXED):
            factors: Factors = "long factors" if module.rope_type == FIXED else "short factors"
            regime = Regime(factors, most, longest)
    return regime


def _by_call(decoder: nn.Module) -> list[tuple[Any, str]]:
    """The rotary modules whose tables depend on the largest position of a call, or did, with the kind of RoPE."""
    found = []
    for module in decoder.modules():
        kinds: Any = getattr(module, "rope_type", ())
        for kind in (kinds,) if isinstance(kinds, str) else kinds.values() if isinstance(kinds, dict) else ():
            if kind in ("longrope", FIXED) or "dynamic" in kind:
                found.append((module, kind))
    return found


def _limit(module: Any, kind: str) -> int:
    if kind not in ("longrope", FIXED):
        return int(module.original_max_seq_len)
    parameters = module.config.rope_parameters
    if isinstance(module.rope_type, dict):
        return min(
            int(p["original_max_position_embeddings"]) for p in parameters.values() if p["rope_type"] == "longrope"
        )
    return int(parameters["original_max_position_embeddings"])


def _fix_long(module: Any, longest: int, original: int) -> None:
    """Set the long factors for every call, and check that the tables are those of transformers' long calls."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    device = module.inv_freq.device
    wanted = _tables(module, torch.arange(original + 1, device=device))
    inv_freq, _ = ROPE_INIT_FUNCTIONS["longrope"](module.config, device, seq_len=original + 1)
    module.inv_freq = inv_freq
    # transformers chooses by call where this says "longrope"; of the module it is read nowhere else.
    module.rope_type = FIXED
    for positions in (slice(0, 2), slice(original - 1, original), slice(original, original + 1)):
        tables = _tables(module, torch.arange(original + 1, device=device)[positions])
        if not all(torch.equal(a, b[:, positions]) for a, b in zip(tables, wanted, strict=True)):
            raise _refused(module, "longrope", longest, original)


@torch.no_grad()
def _tables(module: Any, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, [1, positions, R] float32."""
    return module(torch.zeros(1, 1, 1, device=positions.device), positions[None])


def _refused(module: Any, kind: str, longest: int, most: int) -> ConfigError:
    return ConfigError(
        f"rope_type {kind!r} of {type(module).__name__}: beyond {most} tokens its rotary tables depend on the longest "
        f"sequence of each call, so engine and trainer would differ, and a sequence of this run can have {longest}; "
        f"lower sampling.max_tokens and eval.max_tokens, or drop long rows with data.max_prompt_tokens"
    )
