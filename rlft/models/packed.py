"""The first way to run a packed batch through transformers' own decoder: one row, our attention keeps sequences apart.

Registered in transformers' AttentionInterface. For decoders in which nothing but attention mixes tokens
(`rlft.models.structure.unpackable`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from rlft.errors import ConfigError
from rlft.kernels.attention import Sequences, varlen_attention

PACKED = "rlft_packed"
"""Our name in transformers' AttentionInterface."""
HARMLESS = frozenset(
    {
        "position_ids",
        "position_embeddings",
        "cache_position",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "cu_seq_lens_q",
        "cu_seq_lens_k",
        "max_length_q",
        "max_length_k",
    }
)
"""Keyword arguments that change nothing about causal attention over sequences that are said elsewhere."""


def register() -> None:
    """Make our attention known to transformers under its name."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED, packed_attention)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    sequences: Sequences | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface over our packed attention. query: [1, Hq, T, D]; returns [1, T, Hq, D].

    Raises ConfigError for every argument that it would have to ignore, by name.
    """
    name = type(module).__name__
    if sequences is None:
        raise ConfigError(
            f"{name} does not hand its keyword arguments to the attention function, so its sequences "
            f"cannot be packed: this architecture is not supported"
        )
    asked = {
        "attention_mask": attention_mask,
        "is_causal": True if is_causal is False else None,
        "dropout": dropout or None,
        **{key: value for key, value in kwargs.items() if key not in HARMLESS},
    }
    for key_name, given in asked.items():
        if given is not None:
            raise ConfigError(
                f"{name} calls its attention with {key_name}, which packed rows do not honour: this architecture is "
                f"not supported packed"
            )
    out = varlen_attention(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        sequences,
        scaling,
        window=sliding_window,
        softcap=softcap,
    )
    return out[None], None


def hidden(decoder: Any, ids: Tensor, positions: Tensor, sequences: Sequences, rows: Tensor) -> Tensor:
    """The head's input [N, H] at `rows` of a packed batch. ids, positions: [T] int64."""
    with _attention(decoder.config):
        states = decoder(input_ids=ids[None], position_ids=positions[None], use_cache=False, sequences=sequences)
    return states.last_hidden_state[0][rows]


@contextmanager
def _attention(config: Any) -> Iterator[None]:
    """Our attention for the span of one packed forward; `generate` and everybody else keep transformers' own."""
    before = config._attn_implementation
    config._attn_implementation = PACKED
    try:
        yield
    finally:
        config._attn_implementation = before
