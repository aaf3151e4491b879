"""Describe a decoder layer of transformers to the kernels: its projections, norms and constants.

Shapes: T rows, Hq query heads, Hk key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from rlft.kernels import attention_backends as backends
from rlft.kernels.nf4 import Nf4Weight
from rlft.kernels.rms_norm import GEMMA, LLAMA, OLMO
from rlft.models.families import Family
from rlft.models.fused import ops
from rlft.models.fused.memory import DecoderShape
from rlft.models.fused.projection import Bound, Projection

QKV, OUT, GATE_UP, DOWN = range(4)
"""Indices of a layer's projections."""
ACTIVATIONS = {"swish": "silu", "gelu_new": "gelu_pytorch_tanh"}
"""Names of activations in transformers -> names in `rlft.kernels.swiglu`, where they differ."""
STYLES = {"llama": LLAMA, "gemma": GEMMA, "olmo": OLMO}
"""`Family.norm_style` -> `style` of `rlft.kernels.rms_norm`."""
NO_ROPE = "no rope"
"""Type of the layers that do not rotate q and k."""


class FusedLayer:
    """A decoder layer of transformers, as views of its modules' tensors."""

    def __init__(
        self,
        module: nn.Module,
        index: int,
        family: Family,
        config: Any,
        weight_of: Callable[[Any], Tensor | Nf4Weight] | None = None,
    ) -> None:
        """Read projections, norms and constants from the modules.

        weight_of: as in `Projection`. Raises ValueError for weights that no kernel reads.
        """
        get = module.get_submodule
        self.index = index
        self.projections = tuple(
            Projection([get(name) for name in names], weight_of) for names in projections_of(family)
        )

        def norm(name: str | None) -> ops.Norm | None:
            # A config may replace a norm by the identity.
            module = None if name is None else get(name)
            missing = module is None or isinstance(module, nn.Identity)
            return None if missing else describe_norm(module, family.norm_style)

        self.input_norm, self.mlp_norm = norm(family.input_norm), norm(family.mlp_norm)
        self.attention_norm, self.down_norm = norm(family.attention_norm), norm(family.down_norm)
        q_name, k_name = family.qk_norm or (None, None)
        self.qk_norm, self.qk_norm_whole = (norm(q_name), norm(k_name)), family.qk_norm_whole
        self.interleaved, self.qk_norm_after = family.interleaved, family.qk_norm_after
        attention: Any = get("self_attn")
        self.type = config.layer_types[index] if family.rope_by_type else None
        if family.rope_bases is not None:
            base = getattr(config, family.rope_bases)[index]
            self.type = base_type(base) if base else NO_ROPE
        rotates = {
            "flag": lambda: attention.use_rope,
            "sliding": lambda: attention.sliding_window is None or attention.is_sliding,
        }
        if not rotates.get(family.rotary, lambda: True)():
            self.type = NO_ROPE
        self.head_dim = attention.head_dim
        self.q_heads = config.num_attention_heads
        self.k_heads = config.num_key_value_heads
        window = {
            "layer": lambda: attention.sliding_window,
            "flag": lambda: attention.sliding_window if attention.is_sliding else None,
            "config": lambda: config.sliding_window,
        }
        self.attention = ops.Attention(
            scale=attention.scaling,
            window=window.get(family.window, lambda: None)(),
            softcap=getattr(attention, "attn_logit_softcapping", None),
            sinks=attention.sinks.detach() if family.sinks else None,
        )
        self.activation = describe_activation(module, family, config)
        self.gated = family.gated
        self.residual_factor = float(getattr(config, family.residual_factor)) if family.residual_factor else 1.0
        self.width = self.projections[DOWN].in_features

    def bind(self, adapter: str | None) -> tuple[Bound, ...]:
        """Look up the adapter of each projection."""
        return tuple(projection.bind(adapter) for projection in self.projections)

    def heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return views q [T, Hq, D], k and v [T, Hk, D] of a qkv buffer."""
        head_dim, q_heads, k_heads = self.head_dim, self.q_heads, self.k_heads
        parts = qkv[:, : (q_heads + 2 * k_heads) * head_dim].split(
            [q_heads * head_dim, k_heads * head_dim, k_heads * head_dim], dim=1
        )
        return tuple(part.unflatten(1, (-1, head_dim)) for part in parts)  # type: ignore[return-value]


def projections_of(family: Family) -> tuple[Sequence[str], ...]:
    """Return the names of a layer's linear modules, by projection."""
    return family.qkv, (family.out,), family.gate_up, (family.down,)


def describe_norm(module: Any, style: str) -> ops.Norm:
    """Describe an RMSNorm of transformers; families differ in the name of its epsilon."""
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    return ops.Norm(module.weight.detach(), eps, STYLES[style])


def base_type(base: float) -> str:
    """Return the type of the layers whose rotary frequencies have this base."""
    return f"rope base {float(base)}"


def describe_activation(layer: nn.Module, family: Family, config: Any) -> ops.Activation:
    """Describe the activation of a layer's MLP; xIELU has frozen parameters in its module."""
    name = getattr(config, family.activation)
    if name != "xielu" or family.activation_module is None:
        return ops.Activation(str(ACTIVATIONS.get(name, name)))
    module: Any = layer.get_submodule(family.activation_module)
    with torch.no_grad():
        # The softplus rounds in the module's dtype, as in transformers.
        above, below = softplus(module.alpha_p)[0], module.beta + softplus(module.alpha_n)[0]
        curve = torch.stack([above, below, module.beta, module.eps])
    return ops.Activation(name, curve.to(torch.promote_types(curve.dtype, torch.float32)))


def describe_shape(
    layers: Sequence[FusedLayer], adapter: str | None, vocab: int, weight: Tensor, entropy_grad: bool
) -> DecoderShape:
    """Return the sizes that the memory plan is computed from.

    adapter: name of the active one; None: adapters are off. weight: of a norm, which gives device and dtype.
    """
    first = layers[0]
    bound = first.bind(adapter)
    return DecoderShape(
        layers=len(layers),
        hidden=first.projections[0].in_features,
        q=first.q_heads * first.head_dim,
        kv=first.k_heads * first.head_dim,
        q_heads=first.q_heads,
        intermediate=first.width,
        vocab=vocab,
        dtype=weight.dtype,
        tails=tuple(projection.group.tail for projection in bound),  # type: ignore[arg-type]
        ranks=tuple(projection.group.rank for projection in bound),  # type: ignore[arg-type]
        qk_norm=first.qk_norm[0] is not None,
        post_norm=first.down_norm is not None,
        residual_factor=first.residual_factor != 1,
        gated=first.gated,
        attention=backends.choose_backend(weight.device, weight.dtype, first.head_dim, first.attention.softcap),
        entropy_grad=entropy_grad,
    )
