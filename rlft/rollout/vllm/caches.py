"""Sizes of what vLLM keeps of sequences: keys and values of their tokens, and states of recurrent layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlft.models import families

BLOCK = 128
"""Tokens to which a sequence's part of the KV cache is rounded up: vLLM's largest block size (on a CPU)."""
CHUNK = 64
"""Tokens for which vLLM's kernels of the gated delta rule have one state."""


@dataclass(frozen=True)
class Caches:
    """What vLLM keeps of sequences, in blocks of one size: keys and values of tokens, and states of recurrent layers.

    Layers are in groups of one kind and one size. A block holds for each layer of a group the keys and values of some
    tokens, or a state (`_get_kv_cache_groups_uniform_page_size` of vLLM).
    """

    per_token: int
    """Bytes of keys and values per token."""
    block: int = BLOCK
    """Tokens in a block, whose keys and values are not smaller than a state."""
    states: int = 0
    """Bytes of the states of a sequence, whatever its length."""

    @classmethod
    def of(cls, config: Any, item: int) -> Caches:
        """Compute the sizes. config: of the text decoder. item: bytes of an element in the engine's dtype."""
        tokens, states = [_token(layer, item) for layer in _layers(config)], _states(config, item)
        if not states:
            return cls(sum(tokens))
        token, attention = max(tokens), len(tokens) - len(states)
        fewer, more = sorted((attention or len(states), len(states)))
        group = more if more < 1.5 * fewer else fewer
        block = BLOCK * -(-max(states) // (BLOCK * token))
        page = group * block * token
        return cls(-(-attention // group) * group * token, block, -(-len(states) // group) * page)

    def of_sequence(self, tokens: int) -> int:
        """Return the bytes of a sequence."""
        return -(-tokens // self.block) * self.block * self.per_token + self.states


def _layers(config: Any) -> list[Any]:
    """Return the config of each layer that has a cache; the last layers of Gemma 4 read that of earlier ones.

    Heads may differ in size between layers.
    """
    own, shared = getattr(config, "per_layer_config", None), getattr(config, "num_kv_shared_layers", None) or 0
    return [config if own is None else own[index] for index in range(config.num_hidden_layers - shared)]


def _token(config: Any, item: int) -> int:
    """Return the bytes of the keys and values of a token in one layer."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads) * item


def _states(config: Any, item: int) -> list[int]:
    """Return the bytes of a sequence's state in each recurrent layer; vLLM has that of a delta rule in fp32."""
    states = []
    for mixer in _mixers(config):
        if isinstance(mixer, families.Delta):
            keys, values = _widths(config)
            tail = (config.linear_conv_kernel_dim - 1) * (2 * keys + values) * item
            states.append(tail + values * config.linear_key_head_dim * 4)
        else:
            states.append((config.conv_L_cache - 1) * config.hidden_size * item)
    return states


def _mixers(config: Any) -> list[families.Delta | families.Conv]:
    """Return what mixes tokens in each recurrent layer."""
    family = families.find(config.model_type)
    if family is None:
        return []
    mixers = [family.of_layer(config, index).mixer for index in range(config.num_hidden_layers)]
    return [mixer for mixer in mixers if mixer is not None]


def _widths(config: Any) -> tuple[int, int]:
    """Return the columns of the keys and of the values of a gated DeltaNet."""
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    return keys, config.linear_num_value_heads * config.linear_value_head_dim


def delta_work(config: Any, item: int) -> int:
    """Return the bytes per token that gated DeltaNets take beside the other layers' temporaries; 0 without any."""
    if not any(isinstance(mixer, families.Delta) for mixer in _mixers(config)):
        return 0
    keys, values = _widths(config)
    # What is projected, convolved and arranged by heads, the output, and a state in fp32 for each chunk.
    return 3 * (2 * keys + 2 * values) * item + values * config.linear_key_head_dim * 4 // CHUNK
