"""Describe a decoder layer of transformers to the kernels: its projections, norms and constants.

Shapes: T rows, Hq query heads, Hk key heads, D head size; q, k and v of attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from rlft.kernels import attention_backends as backends
from rlft.kernels.nf4 import Nf4Weight
from rlft.kernels.rms_norm import GEMMA, LLAMA, OLMO
from rlft.models.families import Delta, Family
from rlft.models.fused import ops
from rlft.models.fused.decoder_shape import DecoderShape
from rlft.models.fused.expert_layer import Mixture
from rlft.models.fused.expert_shape import ExpertShape
from rlft.models.fused.expert_weights import StackAdapter
from rlft.models.fused.mixers import ConvMixer, DeltaMixer, Mixer
from rlft.models.fused.projection import Bound, Projection, adapter_tensors

QKV, OUT, GATE_UP, DOWN, INPUT_GATE, INPUT_OUT = range(6)
"""Indices of a layer's projections; the last two are of an input per layer. A layer of experts without a shared one has
the first two."""
ACTIVATIONS = {"swish": "silu", "gelu_new": "gelu_pytorch_tanh"}
"""Names of activations in transformers -> names in `rlft.kernels.swiglu`, where they differ."""
STYLES = {"llama": LLAMA, "gemma": GEMMA, "olmo": OLMO}
"""`Family.norm_style` -> `style` of `rlft.kernels.rms_norm`."""
NO_ROPE = "no rope"
"""Type of the layers that do not rotate q and k."""


class PerLayer(NamedTuple):
    """What a layer does with an input beside the residual stream."""

    size: int
    """Columns of the input."""
    norm: ops.Norm
    """Of what is added to the residual stream."""


class FusedLayer:
    """A decoder layer of transformers, as views of its modules' tensors."""

    def __init__(
        self,
        module: nn.Module,
        index: int,
        family: Family,
        config: Any,
        like: Tensor,
        weight_of: Callable[[Any], Tensor | Nf4Weight] | None = None,
    ) -> None:
        """Read projections, norms and constants from the modules.

        like: gives dtype and device of norms without weights. weight_of: as in `Projection`. Raises ValueError for
        weights that no kernel reads.
        """
        get = module.get_submodule
        self.index = index
        self.projections = tuple(
            Projection([get(name) for name in names], weight_of) for names in projections_of(family)
        )

        def norm(name: str | None, size: int) -> ops.Norm | None:
            # A config may replace a norm by the identity.
            module = None if name is None else get(name)
            missing = module is None or isinstance(module, nn.Identity)
            return None if missing else describe_norm(module, family.norm_style, like, size)

        hidden = self.projections[QKV].in_features
        self.input_norm, self.mlp_norm = norm(family.input_norm, hidden), norm(family.mlp_norm, hidden)
        self.attention_norm, self.down_norm = norm(family.attention_norm, hidden), norm(family.down_norm, hidden)
        q_name, k_name, *_ = (*(family.qk_norm or ()), None, None)
        attention: Any = get("self_attn") if family.qk_norm else None
        head_dim: int = attention.head_dim if family.qk_norm else 0
        self.qk_norm, self.qk_norm_whole = (norm(q_name, head_dim), norm(k_name, head_dim)), family.qk_norm_whole
        self.value_norm = norm(family.value_norm, head_dim)
        self.kv_from, self.shares_kv = family.kv_from, family.shares_kv
        """The layer whose k and v this one reads; None: its own. Whether others read this one's."""
        self.key_is_value = family.mixer is None and len(family.qkv) == 2
        """The columns of k are those of v too, before their norms."""
        self.mixer = describe_mixer(module, family, config, like)
        """What mixes the tokens; None: attention."""
        self.output_gate = family.output_gate
        if self.mixer is None:
            self._describe_attention(get("self_attn"), family, config)
        self.activation = describe_activation(module, family, config)
        self.gated = family.gated
        self.residual_factor = float(getattr(config, family.residual_factor)) if family.residual_factor else 1.0
        self.has_mlp = bool(family.gate_up)
        """Whether there is an MLP; beside experts it is the shared one."""
        self.width = self.projections[DOWN].in_features if self.has_mlp else 0
        self.experts = describe_experts(module, family, config, self.activation)
        self.scale = float(getattr(module, family.layer_scale)) if family.layer_scale else 1.0
        """Factor on the layer's result."""
        self.per_layer: PerLayer | None = None
        if family.per_layer_input is not None:
            per_layer_norm = norm(family.per_layer_input.norm, hidden)
            assert per_layer_norm is not None
            self.per_layer = PerLayer(self.projections[INPUT_OUT].in_features, per_layer_norm)

    def _describe_attention(self, attention: Any, family: Family, config: Any) -> None:
        """Read the constants of attention and its rotary embedding."""
        self.interleaved, self.qk_norm_after = family.interleaved, family.qk_norm_after
        self.type = config.layer_types[self.index] if family.rope_by_type else None
        if family.rope_bases is not None:
            base = getattr(config, family.rope_bases)[self.index]
            self.type = base_type(base) if base else NO_ROPE
        rotates = {
            "flag": lambda: attention.use_rope,
            "sliding": lambda: attention.sliding_window is None or attention.is_sliding,
            "config": lambda: (config.rope_parameters or {}).get("rope_theta") is not None,
        }
        if not rotates.get(family.rotary, lambda: True)():
            self.type = NO_ROPE
        self.head_dim = attention.head_dim
        self.q_heads = self.projections[OUT].in_features // self.head_dim
        self.k_heads = self.q_heads // attention.num_key_value_groups
        window = {
            # Qwen2 MoE sets it in layers with a window alone.
            "layer": lambda: getattr(attention, "sliding_window", None),
            "flag": lambda: attention.sliding_window if attention.is_sliding else None,
            "config": lambda: config.sliding_window,
        }
        self.attention = ops.Attention(
            scale=attention.scaling,
            window=window.get(family.window, lambda: None)(),
            softcap=getattr(attention, "attn_logit_softcapping", None),
            sinks=attention.sinks.detach() if family.sinks else None,
        )

    @property
    def finishes(self) -> bool:
        """Whether what the output projection reads is computed from the buffer of the first projection, too."""
        return self.output_gate if self.mixer is None else self.mixer.finishes

    def bind(self, adapter: str | None) -> tuple[Bound, ...]:
        """Look up the adapter of each projection."""
        return tuple(projection.bind(adapter) for projection in self.projections)

    def adapter_tensors(self, adapter: str | None) -> list[Tensor]:
        """Return the tensors of an adapter in this layer: those of `projection.adapter_tensors`, experts last."""
        stacks: tuple[StackAdapter, ...] = () if self.experts is None else self.experts.bind(adapter)
        return adapter_tensors([*self.bind(adapter), *stacks])

    def heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return views q [T, Hq, D], k and v [T, Hk, D] of a qkv buffer, which may have one place for k and v.

        Where a gate is beside q, q is a copy, since kernels read the heads of a row side by side.
        """
        q_columns, k_columns = self.q_heads * self.head_dim * (1 + self.output_gate), self.k_heads * self.head_dim
        ends = (q_columns + k_columns, q_columns + k_columns * (1 if self.key_is_value else 2))
        k, v = (qkv[:, end - k_columns : end].unflatten(1, (-1, self.head_dim)) for end in ends)
        return self.queries(qkv), k, v

    def queries(self, qkv: Tensor) -> Tensor:
        """Return q of `heads`, for layers that read the k and v of another."""
        if self.output_gate:
            return self.q_and_gate(qkv)[0].contiguous()
        return qkv[:, : self.q_heads * self.head_dim].unflatten(1, (-1, self.head_dim))

    def q_and_gate(self, qkv: Tensor) -> tuple[Tensor, Tensor]:
        """Return views of q and of the gate of attention's output, [T, Hq, D] each, of a qkv buffer that has both."""
        both = qkv[:, : 2 * self.q_heads * self.head_dim].unflatten(1, (-1, 2 * self.head_dim))
        q, gate = both.split(self.head_dim, dim=2)
        return q, gate


def projections_of(family: Family) -> tuple[Sequence[str], ...]:
    """Return the names of a layer's linear modules, by projection."""
    own = family.per_layer_input
    per_layer = () if own is None else ((own.gate,), (own.out,))
    mlp = (family.gate_up, (family.down,)) if family.gate_up else ()
    return family.qkv, (family.out,), *mlp, *per_layer


def describe_norm(module: Any, style: str, like: Tensor, size: int) -> ops.Norm:
    """Describe an RMSNorm of transformers; families differ in the name of its epsilon.

    like, size: dtype, device and length of the weight of a norm that has none. The kernels read ones there.
    """
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    weight = getattr(module, "weight", None)
    if weight is None:
        with torch.inference_mode(False):  # a backward may keep it
            weight = torch.ones(size, dtype=like.dtype, device=like.device)
    return ops.Norm(weight.detach(), eps, STYLES[style])


def base_type(base: float) -> str:
    """Return the type of the layers whose rotary frequencies have this base."""
    return f"rope base {float(base)}"


def describe_activation(layer: nn.Module, family: Family, config: Any) -> ops.Activation:
    """Describe the activation of a layer's MLP; xIELU has frozen parameters in its module."""
    name = getattr(config, family.activation, family.activation)
    if name != "xielu" or family.activation_module is None:
        return ops.Activation(str(ACTIVATIONS.get(name, name)))
    module: Any = layer.get_submodule(family.activation_module)
    with torch.no_grad():
        # The softplus rounds in the module's dtype, as in transformers.
        above, below = softplus(module.alpha_p)[0], module.beta + softplus(module.alpha_n)[0]
        curve = torch.stack([above, below, module.beta, module.eps])
    return ops.Activation(name, curve.to(torch.promote_types(curve.dtype, torch.float32)))


def describe_mixer(module: nn.Module, family: Family, config: Any, like: Tensor) -> Mixer | None:
    """Describe what mixes the tokens of a layer; None: attention. Raises ValueError for what no kernel computes."""
    if isinstance(family.mixer, Delta):
        norm = describe_norm(module.get_submodule(family.mixer.norm), "llama", like, 0)
        return DeltaMixer(module, family.mixer, norm, config)
    return None if family.mixer is None else ConvMixer(module, family.mixer)


def describe_experts(module: nn.Module, family: Family, config: Any, activation: ops.Activation) -> Mixture | None:
    """Describe the experts of a layer; None: it has none. Raises ValueError for what no kernel computes."""
    if family.experts is None:
        return None
    added = (family.down_norm, family.residual_factor, family.per_layer_input, family.layer_scale)
    assert added == (None,) * 4 and family.gated, "what no layer of experts has"
    return Mixture(module, family.experts, activation, config)


def mixers_of(layers: Sequence[FusedLayer]) -> str | None:
    """Name what layers have in place of attention; None: all have attention."""
    return " and ".join(sorted({layer.mixer.title for layer in layers if layer.mixer is not None})) or None


def graphless_of(layers: Sequence[FusedLayer]) -> str | None:
    """Name what no CUDA graph runs; None: graphs can run these layers."""
    others = {
        "experts": any(layer.experts is not None for layer in layers),
        "inputs per layer": any(layer.per_layer is not None for layer in layers),
        "shared keys and values": any(layer.shares_kv for layer in layers),
    }
    titles = [mixers_of(layers), *(title for title, there in others.items() if there)]
    return " and ".join(title for title in titles if title is not None) or None


def describe_shape(
    layers: Sequence[FusedLayer], adapter: str | None, vocab: int, weight: Tensor, entropy_grad: bool
) -> DecoderShape:
    """Return the sizes that the memory plan is computed from.

    adapter: name of the active one; None: adapters are off. weight: of a norm, which gives device and dtype.
    """
    shapes = [_layer_shape(layer, len(layers), adapter, vocab, weight, entropy_grad) for layer in layers]
    kinds = tuple(dict.fromkeys(shapes))
    if len(kinds) == 1:
        return kinds[0]
    return replace(kinds[0], kinds=kinds, order=tuple(kinds.index(shape) for shape in shapes))


def _layer_shape(
    layer: FusedLayer, layers: int, adapter: str | None, vocab: int, weight: Tensor, entropy_grad: bool
) -> DecoderShape:
    """Return the sizes of a decoder with `layers` layers like this one."""
    bound, mixer = layer.bind(adapter), layer.mixer
    if mixer is None:
        q_heads, q, kv = layer.q_heads, layer.q_heads * layer.head_dim, layer.k_heads * layer.head_dim
        attention = backends.choose_backend(weight.device, weight.dtype, layer.head_dim, layer.attention.softcap)
    else:
        q_heads, q, kv, attention = 0, mixer.width, 0, "none"
    return DecoderShape(
        layers=layers,
        hidden=layer.projections[0].in_features,
        q=q,
        kv=kv,
        q_heads=q_heads,
        intermediate=layer.width,
        vocab=vocab,
        dtype=weight.dtype,
        tails=_four([projection.group.tail for projection in bound]),
        ranks=_four([projection.group.rank for projection in bound]),
        qk_norm=layer.qk_norm[0] is not None,
        post_norm=layer.down_norm is not None,
        residual_factor=layer.residual_factor != 1,
        gated=layer.gated,
        attention=attention,
        entropy_grad=entropy_grad,
        output_gate=layer.output_gate,
        kv_projections=0 if layer.kv_from is not None else 1 if layer.key_is_value else 2,
        value_norm=layer.value_norm is not None,
        shares_kv=layer.shares_kv,
        per_layer=layer.per_layer.size if layer.per_layer is not None else 0,
        mixer=None if mixer is None else mixer.sizes(weight.dtype.itemsize),
        experts=None if layer.experts is None else _expert_shape(layer, layer.experts, adapter),
    )


def _four(sizes: Sequence[int]) -> tuple[int, ...]:
    """Return sizes of at least four projections, with 0 for an MLP that there is not."""
    return (*sizes, *(0,) * (4 - len(sizes)))


def _expert_shape(layer: FusedLayer, mixture: Mixture, adapter: str | None) -> ExpertShape:
    """Return the sizes of a layer's experts."""
    up, down = mixture.bind(adapter)
    return ExpertShape(
        experts=mixture.experts,
        k=mixture.k,
        hidden=layer.projections[0].in_features,
        width=mixture.width,
        tails=(up.tail, down.tail),
        ranks=(up.rank, down.rank),
        own_gate=mixture.own_gate is not None,
        shared=layer.has_mlp,
    )
