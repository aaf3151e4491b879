"""Fix rotary tables, so that they do not depend on the other sequences of a call.

transformers chooses the factors of "longrope" and the base of "dynamic" RoPE by the largest position of each call. In a
packed batch that position may belong to another sequence, and with a KV cache it grows in the middle of a sequence.
vLLM chooses the longrope factors once, by max_model_len, for every sequence. A run does the same: `fix` chooses by the
longest possible sequence of the run and sets the decoder's rotary modules, so that packed, padded and cached calls have
the same tables. Dynamic RoPE has no such table beyond the model's context and is refused there.

`rlft.load` fixes nothing: under a Trainer, each call has the tables that transformers chooses. R: rotary columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from rlft.errors import ConfigError

Factors = Literal["short factors", "long factors"]
FIXED = "longrope, long factors"
"""`rope_type` of a rotary module whose factors are fixed. Not a type of transformers, which acts on "longrope"."""


@dataclass(frozen=True)
class Regime:
    """The longrope factors of a run, for all its sequences."""

    factors: Factors
    original: int
    """original_max_position_embeddings: number of tokens up to which transformers uses the short factors."""
    longest: int
    """Number of tokens that a sequence of the run can have at most."""

    def __str__(self) -> str:
        reason = f"the longest can have {self.longest:,} tokens, and the short factors are for up to {self.original:,}"
        if self.factors == "long factors" and self.longest <= self.original:
            reason = "as in the run that trained the adapter"
        return f"rope: {self.factors} for all sequences: {reason}"


def limit(decoder: nn.Module) -> int | None:
    """Return the number of tokens up to which all calls have the same rotary tables; None: without limit."""
    return min((_limit(module, kind) for module, kind in _by_call(decoder) if kind != FIXED), default=None)


def fix(decoder: nn.Module, longest: int, long: bool = False) -> Regime | None:
    """Use one rotary table for all sequences of a run. Returns None if the model needs no choice.

    longest: most tokens of a sequence of the run. long: use longrope's long factors in any case. Raises ConfigError if
    no fixed table equals what transformers and vLLM compute. May be called again, with more tokens.
    """
    regime = None
    for module, kind in _by_call(decoder):
        short_limit = _limit(module, kind)
        if kind != FIXED and (longest > short_limit or (long and kind == "longrope")):
            if kind != "longrope" or isinstance(module.rope_type, dict):
                raise _refused(module, kind, longest, short_limit)
            _fix_long(module, longest, short_limit)
        if kind in ("longrope", FIXED):
            factors: Factors = "long factors" if module.rope_type == FIXED else "short factors"
            regime = Regime(factors, short_limit, longest)
    return regime


def _by_call(decoder: nn.Module) -> list[tuple[Any, str]]:
    """Return (module, kind of RoPE) of rotary modules whose tables depend on the call, or did before `fix`."""
    modules = []
    for module in decoder.modules():
        kinds: Any = getattr(module, "rope_type", ())
        for kind in (kinds,) if isinstance(kinds, str) else kinds.values() if isinstance(kinds, dict) else ():
            if kind in ("longrope", FIXED) or "dynamic" in kind:
                modules.append((module, kind))
    return modules


def _limit(module: Any, kind: str) -> int:
    """Return the number of tokens up to which a rotary module has the same tables in every call."""
    if kind not in ("longrope", FIXED):
        return int(module.original_max_seq_len)
    parameters = module.config.rope_parameters
    if isinstance(module.rope_type, dict):
        return min(
            int(options["original_max_position_embeddings"])
            for options in parameters.values()
            if options["rope_type"] == "longrope"
        )
    return int(parameters["original_max_position_embeddings"])


def _fix_long(module: Any, longest: int, original: int) -> None:
    """Set the long factors for every call, and check that the tables equal those of long calls in transformers."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    device = module.inv_freq.device
    expected = _tables(module, torch.arange(original + 1, device=device))
    inv_freq, _ = ROPE_INIT_FUNCTIONS["longrope"](module.config, device, seq_len=original + 1)
    module.inv_freq = inv_freq
    # transformers chooses per call if this is "longrope"; the attribute is read nowhere else.
    module.rope_type = FIXED
    for positions in (slice(0, 2), slice(original - 1, original), slice(original, original + 1)):
        tables = _tables(module, torch.arange(original + 1, device=device)[positions])
        if not all(
            torch.equal(actual, reference[:, positions]) for actual, reference in zip(tables, expected, strict=True)
        ):
            raise _refused(module, "longrope", longest, original)


@torch.no_grad()
def _tables(module: Any, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin, [1, positions, R] float32."""
    return module(torch.zeros(1, 1, 1, device=positions.device), positions[None])


def _refused(module: Any, kind: str, longest: int, most: int) -> ConfigError:
    """Build the error for tables that cannot be fixed."""
    return ConfigError(
        f"rope_type {kind!r} of {type(module).__name__}: beyond {most} tokens its rotary tables depend on the longest "
        f"sequence of each call, so engine and trainer would differ, and a sequence of this run can have {longest}; "
        f"lower sampling.max_tokens and eval.max_tokens, or drop long rows with data.max_prompt_tokens"
    )


SCALED = ("linear", "dynamic", "yarn")
"""RoPE types whose factor extends the context; the others (llama3, longrope) name it in max_position_embeddings."""


def context_of(config: Any) -> int | None:
    """Return the largest number of tokens that a model is made for; None where its config names none."""
    text = config.get_text_config()
    trained = getattr(text, "max_position_embeddings", None)
    if not isinstance(trained, int):
        return None
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type")) not in SCALED:
        return trained
    # max_position_embeddings is the context before the extension in some configs and after it in others.
    original = rope.get("original_max_position_embeddings") or trained
    return max(trained, int(original * rope.get("factor", 1.0)))


def vocabulary_of(config: Any) -> int | None:
    """Return the rows of a model's embedding; None where its config names none."""
    size = getattr(config.get_text_config(), "vocab_size", None)
    return size if isinstance(size, int) else None
