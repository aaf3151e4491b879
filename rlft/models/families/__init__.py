"""Describe an architecture to the fused layers: names and flags, one file per transformers `model_type`.

A decoder layer of every family here is

    n1 = [norm](x);  q, k, v = n1 Wqkv;  q, k = rope(norm(q), norm(k));  o = attention(q, k, v) Wo
    mid = x + [c] [norm](o);  n2 = [norm](mid);  h = act(n2 Wgate) * (n2 Wup);  x' = mid + [c] [norm](h Wdown)

and a family gives the names of its modules, which of the norms in brackets and of q, k it has, the factor c, and its
conventions. Without a gate h = act(n2 Wup). Attention may have a sink in its softmax, and a gate on its output. In
layers of another type, which `by_type` describes, a gated DeltaNet (`Delta`) or a gated short convolution (`Conv`)
takes the place of q, k, v and attention:

    Delta   q, k, v, z, b, a = n1 W;  q, k, v = silu(conv(q, k, v));  y = delta rule(q, k, v, g(a), beta(b))
            o = (norm(y) * silu(z)) Wo
    Conv    B, C, u = n1 W;  o = (C * conv(B * u)) Wo

A layer may read the k and v of an earlier one, after its MLP a vector e that each layer has for each token
(`PerLayerInput`), and multiply its result by a constant: x" = (x' + norm((act(x' Wgate) * e) Wout)) constant.

In place of the MLP there may be a mixture of experts (`Experts`), each of the MLP's form, of which a token goes to a
few with weights w of a router; the shared expert that some families have is the MLP of the formula, maybe with a gate:

    x' = mid + sum of w_e expert_e(n2) + [sigmoid(n2 Wshared)] h Wdown
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

COMMON = frozenset(
    {
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
        *("vocab_size", "rms_norm_eps", "max_position_embeddings", "rope_parameters", "tie_word_embeddings"),
        *("pad_token_id", "bos_token_id", "eos_token_id", "eod_token_id"),
        *("initializer_range", "use_cache", "pretraining_tp"),
        *("output_router_logits", "router_aux_loss_coef"),
    }
)
"""Config fields that the modules of every family have in their shapes, norms and tables, or that no layer computes
with. A call that asks for the logits of routers runs transformers' layers."""
FACTORS = ("multiplier", "scaling", "scale", "factor")
"""Ends of the names of fields whose neutral value is 1; that of others is None, False, 0 or empty."""


@dataclass(frozen=True)
class Delta:
    """Names of the modules of a gated DeltaNet, as it is in a layer. `Family.qkv` lists the projections whose outputs
    are q, k, v, z, b and a, in this order."""

    conv: str = "linear_attn.conv1d"
    """Its parent module has A_log and dt_bias."""
    norm: str = "linear_attn.norm"
    """Norm of each head of the output, before the gate."""
    double_beta: str | None = None
    """Config flag for a beta in [0, 2] instead of [0, 1]."""
    by_head: bool = False
    """Whether outputs lie by key head: two projections, of q, k, v and z of a head, then the next, and of b and a."""

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of modules beside the projections."""
        return self.conv, self.norm


@dataclass(frozen=True)
class Conv:
    """Names of the modules of a gated short convolution. `Family.qkv` is the projection whose outputs are B, C and
    u."""

    conv: str = "conv.conv"

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of modules beside the projections."""
        return (self.conv,)


@dataclass(frozen=True)
class PerLayerInput:
    """Names of what a vector per token and layer, beside the residual stream, is made and read by.

    With P its size, L layers, c and d constants and x the embedded tokens, e [T, L, P] = (norm(x W c) + E[ids]) d.
    """

    gate: str = "per_layer_input_gate"
    """Of a layer: H columns to P, before the activation of the MLP."""
    out: str = "per_layer_projection"
    """Of a layer: P columns to H."""
    norm: str = "post_per_layer_input_norm"
    """Of a layer, behind `out`."""
    size: str = "hidden_size_per_layer_input"
    """Config field with P; 0: the layers have no such input."""
    projection: str = "per_layer_model_projection"
    """Of the decoder: W."""
    projection_norm: str = "per_layer_projection_norm"
    """Of the decoder, over P columns."""
    embedding: str = "embed_tokens_per_layer"
    """Of the decoder: E."""
    factors: tuple[str, str] = ("per_layer_model_projection_scale", "per_layer_input_scale")
    """Attributes of the decoder with c and d."""


@dataclass(frozen=True)
class Experts:
    """Names of the modules of a mixture of experts; config fields that say which layers have one, and how it scores."""

    stacks: str = "mlp.experts"
    """The module with a weight of all experts, which transformers' interface of experts calls."""
    router: str = "mlp.gate"
    """Its module has `weight` [E, H] and `top_k`; in some families `bias`, and `e_score_correction_bias`, which is
    added to scores for ranking."""
    wide_router: bool = False
    """Whether logits are computed in fp32; else in the dtype of activations. Scores are in fp32 in any case."""
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    renormalised: str | bool = True
    """Whether the weights of a token are divided by their sum, or the config flag for it."""
    scale: str | None = None
    """Config field with the factor on the weights."""
    groups: tuple[str, str] | None = None
    """Config fields with the number of groups of experts, and of those from which experts are chosen."""
    own_gate: bool = False
    """Whether the module with the stacks computes activation and gate, with its own numbers and order of columns. Else
    they are the MLP's, of gate and up side by side."""
    shared_gate_up: tuple[str, ...] = ()
    """`Family.gate_up` of the shared expert; (): there is none."""
    shared_down: str = ""
    """`Family.down` of the shared expert."""
    shared_gate: str | None = None
    """Linear module of one output, whose sigmoid multiplies that of the shared expert."""
    count: str = "num_experts"
    """Config field with the number of experts; 0: layers are dense."""
    dense_first: str | None = None
    """Config field with the number of first layers that are dense."""
    dense_layers: str | None = None
    """Config field with the indices of layers that are dense."""
    every: str | None = None
    """Config field n, where only every n-th layer has experts."""

    def dense(self, config: Any, index: int) -> bool:
        """Return whether a layer has the family's MLP and no experts."""
        first = getattr(config, self.dense_first) if self.dense_first is not None else 0
        listed = getattr(config, self.dense_layers) if self.dense_layers is not None else None
        every = getattr(config, self.every) if self.every is not None else 1
        return not getattr(config, self.count) or index < first or index in (listed or ()) or (index + 1) % every > 0


@dataclass(frozen=True)
class Family:
    """Names and flags of an architecture; module paths are relative to a decoder layer, config attributes to the text
    config."""

    decoder: str
    """Class name of the decoder model in transformers."""
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    """Three projections, or one whose output rows are q, k and v."""
    out: str = "self_attn.o_proj"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    """Two projections, or one whose output rows are gate and up; without a gate the one before the activation."""
    gated: bool = True
    """Whether the MLP has a gate."""
    down: str = "mlp.down_proj"
    experts: Experts | None = None
    """A mixture of experts in place of the MLP. Names of an MLP are then those of dense layers; in what `of_layer`
    returns, of the shared expert, and `gate_up` is () where there is none."""
    final_norm: str = "norm"
    """Norm of the decoder, before the head."""
    mixer: Delta | Conv | None = None
    """What mixes the tokens of a layer; None: attention."""
    by_type: Mapping[str, Family] = field(default_factory=dict, hash=False)
    """Entry of the config's `layer_types` -> description of the layers of that type, where it is another one."""
    output_gate: bool = False
    """The projection of q has, behind q of each head, as many columns of a gate: attention's output is multiplied by
    its sigmoid."""
    input_norm: str | None = "input_layernorm"
    """None: q, k and v are projected from the residual stream itself."""
    attention_norm: str | None = None
    """Norm of the output of attention, before the residual."""
    mlp_norm: str | None = "post_attention_layernorm"
    """None: gate and up are projected from the residual stream itself."""
    down_norm: str | None = None
    """Norm of the output of the MLP, before the residual."""
    qk_norm: tuple[str, ...] | None = None
    """Norms of q and of k, over each head; of q alone in layers that read another layer's k."""
    qk_norm_flag: str | None = None
    """Config flag for these norms; None: there are always."""
    value_norm: str | None = None
    """Norm of v, over each head."""
    key_is_value: str | None = None
    """Config flag for layers of full attention without a projection of v, whose v is what k is projected to."""
    shared_kv: str | None = None
    """Config field with a number of last layers that read k and v of the last layer of their type before them."""
    kv_from: int | None = None
    """The layer whose k and v are read; None: the layer makes them. Set by `of_layer`."""
    shares_kv: bool = False
    """Whether later layers read the layer's k and v. Set by `of_layer`."""
    per_layer_input: PerLayerInput | None = None
    """Vectors per token and layer that the layers read."""
    layer_scale: str | None = None
    """Tensor of one element that the result of the layer is multiplied by."""
    qk_norm_whole: bool = False
    """The norms of q and k are over all heads together."""
    qk_norm_after: bool = False
    """The norms of q and k, over each head, come after the rotary embedding."""
    norm_style: str = "llama"
    """How norms multiply by their weight (`rlft.kernels.rms_norm`): "llama", "gemma", 1 + weight in fp32, "olmo", the
    weight in fp32."""
    activation: str = "hidden_act"
    """Config attribute with the name of the MLP's activation, or that name where it is fixed."""
    activation_module: str | None = None
    """The activation's module, in families whose activation may have parameters (xIELU)."""
    sinks: bool = False
    """Whether the attention module has `sinks`, a logit per query head in the denominator of its softmax. They are
    frozen and get no gradient."""
    window: str = "layer"
    """Where the sliding window is defined: "layer", `sliding_window` of the attention module; "flag", there, for layers
    with `is_sliding`; "config", of the config, for all layers; "none"."""
    rope_by_type: bool = False
    """Whether the rotary embedding is called once per type of layer."""
    rope_bases: str | None = None
    """Config field with the base of the rotary frequencies of each layer, 0 for layers that do not rotate q and k. The
    decoder has a rotary module for each base, in `rotary_embs`."""
    interleaved: bool = False
    """Whether the rotary embedding turns neighbouring entries, not entry i of each half."""
    half_tables: bool = False
    """Whether the rotary module returns a column for each pair of entries, not two."""
    turns_back: bool = False
    """Whether the rotary embedding turns by minus the angle."""
    rotary: str = "all"
    """Which layers rotate q and k: "all"; "flag", those with `use_rope` of the attention module; "sliding", those with
    a window, or all of a config without one; "config", all of a config with a `rope_theta`."""
    query_scale: tuple[str, str] | None = None
    """Names in `rope_parameters` of b and L: q at position p is multiplied by 1 + b log(1 + floor(p / L))."""
    embedding_factor: str | None = None
    """Config field with the factor on the embedded tokens, which the decoder multiplies by outside its embedding."""
    embedding_norm: bool = False
    """Whether the embedded tokens go through the final norm before the first layer."""
    residual_factor: str | None = None
    """Config field with the factor on the outputs of attention and MLP, behind their norms, before the residual."""
    dropouts: tuple[str, ...] = ("attention_dropout",)
    """Config fields of dropouts, which are 0 in evaluation mode. In training mode they must be 0."""
    reads: tuple[str, ...] = ()
    """Config fields that the layers depend on, beside `COMMON`, `dropouts` and those that other attributes name. Any
    other field must have its neutral value."""
    without_effect: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Config field -> a further value with which layers compute the same for text."""

    def of_layer(self, config: Any, index: int) -> Family:
        """Return the description of a layer."""
        here = self.by_type.get(config.layer_types[index], self) if self.by_type else self
        if here.experts is not None:
            here = here._with_experts(here.experts, config, index)
        if here.qk_norm_flag is not None and not getattr(config, here.qk_norm_flag):
            here = _changed(here, qk_norm=None)
        if here.per_layer_input is not None and not getattr(config, here.per_layer_input.size):
            here = _changed(here, per_layer_input=None)
        source, read = here._shared(config, index)
        if source is not None:
            norms = here.qk_norm and here.qk_norm[:1]
            return _changed(here, qkv=here.qkv[:1], qk_norm=norms, value_norm=None, kv_from=source)
        if here.key_is_value and getattr(config, here.key_is_value) and config.layer_types[index] == "full_attention":
            here = _changed(here, qkv=here.qkv[:2])
        return _changed(here, shares_kv=True) if read else here

    def _with_experts(self, experts: Experts, config: Any, index: int) -> Family:
        """Return the description of a layer of a mixture."""
        if experts.dense(config, index):
            return _changed(self, experts=None)
        return _changed(self, gate_up=experts.shared_gate_up, down=experts.shared_down)

    def _shared(self, config: Any, index: int) -> tuple[int | None, bool]:
        """Return the layer whose k and v a layer reads (None: its own), and whether another layer reads its own."""
        count = getattr(config, self.shared_kv) if self.shared_kv is not None else 0
        if not count:
            return None, False
        first, kind = config.num_hidden_layers - count, config.layer_types[index]
        source = max(i for i in range(first) if config.layer_types[i] == kind)
        return (source, False) if index >= first else (None, index == source and kind in config.layer_types[first:])

    def unread(self, config: Any) -> Iterator[tuple[str, Any]]:
        """Yield name and value of each field of the config's class that matters and that the layers do not read."""
        own = (self.activation, self.rope_bases, self.embedding_factor, self.residual_factor)
        own += (self.key_is_value, self.shared_kv, self.per_layer_input and self.per_layer_input.size)
        known = {*COMMON, *self.reads, *self.dropouts, *own}
        # A config whose layers differ has a config for each, which may leave parts of a layer out too.
        layers = list(config.per_layer_config) if getattr(config, "is_heterogeneous", False) else [config]
        for name in (*fields_of(config), "skip"):
            for layer in layers if name not in known else ():
                value = getattr(layer, name, None)
                harmless = name in self.without_effect and value == self.without_effect[name]
                if not (harmless or neutral(name, value)):
                    yield name, value
                    break


@functools.cache
def _changed(family: Family, **changes: Any) -> Family:
    """Return a description with other attributes. Cached, since layers are described at every call of a model."""
    return replace(family, **changes)


def fields_of(config: Any) -> list[str]:
    """Return the fields that the class of a config adds to those that all configs of transformers have."""
    from transformers import PretrainedConfig

    general = {field.name for field in fields(PretrainedConfig)}  # type: ignore[arg-type]
    return [field.name for field in fields(type(config)) if field.name not in general]


def neutral(name: str, value: Any) -> bool:
    """Return whether a layer with this value of a field computes what a layer without the field computes."""
    if name.endswith(FACTORS) and not isinstance(value, bool):
        return value is None or value == 1
    return not value


def find(model_type: str) -> Family | None:
    """Return the family of a `model_type`; None if there is no file of that name."""
    if not model_type.isidentifier() or importlib.util.find_spec(f"{__name__}.{model_type}") is None:
        return None
    return importlib.import_module(f"{__name__}.{model_type}").FAMILY
