"""Run a packed batch through transformers' own decoder as one row; rlft's attention keeps the sequences apart.

The attention is registered in transformers' AttentionInterface. This works for decoders in which only attention mixes
tokens (`rlft.models.structure.unpackable`). Shapes: T packed tokens, N states, Hq query heads, D head size, H hidden
size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rlft.errors import ConfigError
from rlft.kernels.attention import Sequences, varlen_attention
from rlft.models.routing import NO_CHOICE, Choice
from rlft.models.vision import ImageRows

PACKED = "rlft_packed"
"""Name of rlft's attention in transformers' AttentionInterface."""
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
"""Keyword arguments that do not change causal attention, given `sequences`."""


def register() -> None:
    """Register rlft's attention with transformers."""
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
    """Implement transformers' attention interface by rlft's packed attention.

    query: [1, Hq, T, D]. Returns [1, T, Hq, D] and None. Raises ConfigError, with its name, for every argument that
    would have to be ignored.
    """
    name = type(module).__name__
    if sequences is None:
        raise ConfigError(
            f"{name} does not hand its keyword arguments to the attention function, so its sequences "
            f"cannot be packed: this architecture is not supported"
        )
    unsupported = {
        "attention_mask": attention_mask,
        "is_causal": True if is_causal is False else None,
        "dropout": dropout or None,
        **{key: value for key, value in kwargs.items() if key not in HARMLESS},
    }
    for argument, setting in unsupported.items():
        if setting is not None:
            raise ConfigError(
                f"{name} calls its attention with {argument}, which packed rows do not honour: this architecture is "
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


def hidden(
    decoder: Any,
    ids: Tensor,
    positions: Tensor,
    sequences: Sequences,
    rows: Tensor,
    images: ImageRows | None = None,
    choice: Choice = NO_CHOICE,
) -> Tensor:
    """Return the head's input [N, H] at `rows` of a packed batch.

    ids: [T] int64. positions: [T] int64, [3, T] with images. choice: the experts of the T tokens.
    """
    # The rows of images that attend to each other are in `sequences`.
    seen = None if images is None else replace(images, blocks=None)
    given = inputs(decoder, ids[None], positions[..., None, :], seen)
    with _attention(decoder.config), choice.given():
        states = decoder(**given, use_cache=False, sequences=sequences)
    return states.last_hidden_state[0][rows]


def inputs(
    decoder: Any, ids: Tensor, positions: Tensor, images: ImageRows | None, mask: Tensor | None = None
) -> dict[str, Any]:
    """Return the arguments by which a decoder of transformers takes rows with the features of images.

    ids: [B, S] int64. positions: [B, S] or [3, B, S] int64. images: for the rows of `ids.flatten()`. mask: [B, S], 0 at
    padding; None: the caller gives none to the decoder, or padding is on the right.
    """
    if images is None:
        return {"input_ids": ids, "position_ids": positions}
    embedded = decoder.get_input_embeddings()(ids)
    given: dict[str, Any] = {
        "inputs_embeds": images.embedded(embedded.flatten(0, 1)).view(embedded.shape),
        "position_ids": positions,
    }
    if images.deep:
        seen = torch.zeros(ids.numel(), dtype=torch.bool, device=ids.device).index_fill(0, images.rows, True)
        # transformers adds them in the order of the rows.
        order = images.rows.argsort()
        given["visual_pos_masks"] = seen.view(ids.shape)
        given["deepstack_visual_embeds"] = [deep[order] for deep in images.deep]
    if images.blocks is not None:
        blocks = torch.full((ids.numel(),), -1, device=ids.device).index_copy(0, images.rows, images.blocks)
        given["attention_mask"] = block_masks(decoder.config, blocks.view(ids.shape), mask, embedded.dtype)
    elif mask is not None:
        given["attention_mask"] = mask
    return given


def block_masks(config: Any, blocks: Tensor, mask: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return transformers' masks [B, 1, S, S] by type of layer, for rows with images that attend in both directions.

    A token sees those before it and those of its block; with a window only those less than the window before it.
    config: of the decoder. blocks: [B, S] int64, the block of each token, -1 for none. mask: [B, S], 0 at padding.
    """
    places = torch.arange(blocks.shape[1], device=blocks.device)
    together = (blocks[:, :, None] == blocks[:, None, :]) & (blocks >= 0)[:, :, None]
    seen = together | (places[:, None] >= places[None, :])
    if mask is not None:
        seen = seen & (mask > 0)[:, None, :]
    near = places[None, :] > places[:, None] - (getattr(config, "sliding_window", None) or len(places))
    # The smallest number and not -inf: rows at padding see nothing, and would become nan.
    hidden = {"full_attention": ~seen, "sliding_attention": ~(seen & near)}
    lowest = torch.finfo(dtype).min
    return {
        kind: torch.zeros(where.shape, dtype=dtype, device=where.device).masked_fill(where, lowest)[:, None]
        for kind, where in hidden.items()
    }


@contextmanager
def _attention(config: Any) -> Iterator[None]:
    """Use rlft's attention during one packed forward; `generate` and other callers keep transformers' own."""
    before = config._attn_implementation
    config._attn_implementation = PACKED
    try:
        yield
    finally:
        config._attn_implementation = before
