"""Load experts in MXFP4 as gpt-oss was released: the bytes stay as they are in the files.

The files hold a stack as `gate_up_proj_blocks` [E, out, in / 32, 16] and `gate_up_proj_scales` [E, out, in / 32]. Here
the blocks are the parameter `gate_up_proj` of the layer and the scales a buffer beside it; both are saved under their
names in the files. `register` makes the quantizer known to transformers by its public functions, under a name that only
rlft's loading asks for. transformers' own MXFP4 needs kernels from the hub and has no gradient, or dequantizes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Mxfp4Config  # pyright: ignore[reportAttributeAccessIssue]
from transformers.core_model_loading import WeightRenaming
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationMethod

from rlft.errors import ConfigError
from rlft.kernels.mxfp4 import BLOCK
from rlft.models import experts

METHOD = "rlft_stacked_mxfp4"
"""Name of the quantizer among those of transformers."""


class StackMxfp4(nn.Parameter):
    """A parameter with the blocks [E, out, in / 32, 16] uint8 of a stack that is [E, in, out] when decoded."""

    @property
    def ds_shape(self) -> torch.Size:
        """The decoded shape, under the name by which PEFT asks a parameter that does not lie in memory as it is."""
        count, rows, blocks, _ = self.shape
        return torch.Size((count, blocks * BLOCK, rows))


class StackedConfig(Mxfp4Config):
    """MXFP4's settings under the name of `StackedQuantizer`, as long as a model is being loaded."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(modules_to_not_convert=settings.get("modules_to_not_convert"))
        self.quant_method = METHOD  # type: ignore[assignment]


class StackedQuantizer(HfQuantizer):
    """A quantizer of transformers that takes MXFP4 stacks from files, and quantizes nothing."""

    _stacks: dict[str, experts.Stack]
    """Names in the model being loaded."""

    def is_serializable(self) -> bool:
        """Return True: a model is saved as its files were."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: adapters are trained over it."""
        return True

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any) -> list[Any]:
        """Return the conversions from names in the files; the reverse of those of blocks saves them.

        model: given by transformers 5.24, not by 5.19.
        """
        leaves = sorted({experts.leaf_of(name) for name in self._stacks})
        # In the reverse the second is a pattern, which neither the bias nor the scales match.
        return [*(WeightRenaming(f"{leaf}_blocks", f"{leaf}(?!_)") for leaf in leaves), *weight_conversions]

    def _process_model_before_weight_loading(self, model: Any, **options: Any) -> None:
        self._stacks = experts.stacks(model)
        for stack in self._stacks.values():
            module: Any = stack.module
            if not (module.is_transposed and module.has_gate):
                raise ConfigError(f"model: {type(module).__name__} in MXFP4: gpt-oss' experts alone are known in it")
            count, columns, rows = stack.shape
            scales = torch.empty(count, rows, columns // BLOCK, dtype=torch.uint8, device="meta")
            blocks = torch.empty(*scales.shape, BLOCK // 2, dtype=torch.uint8, device="meta")
            setattr(module, stack.leaf, nn.Parameter(blocks, requires_grad=False))
            module.register_buffer(f"{stack.leaf}_scales", scales)

    def _process_model_after_weight_loading(self, model: Any, **options: Any) -> Any:
        """Make the blocks parameters that say their shape, and name the files' quantizer in the config."""
        for name, stack in self._stacks.items():
            blocks, scales = stack.weight, getattr(stack.module, f"{stack.leaf}_scales")
            parameter = StackMxfp4(blocks.data, requires_grad=False) if blocks.dim() == 4 else blocks
            if experts.shape_of(parameter) != stack.shape or {blocks.dtype, scales.dtype} != {torch.uint8}:
                raise ConfigError(
                    f"model: its files hold {name} as {blocks.dtype} {list(blocks.shape)}, and it is a stack "
                    f"{list(stack.shape)} in blocks of MXFP4; give the files as they were released"
                )
            setattr(stack.module, stack.leaf, parameter)
        self._stacks = {}
        self.quantization_config = Mxfp4Config(modules_to_not_convert=self.quantization_config.modules_to_not_convert)  # type: ignore[attr-defined]
        model.config.quantization_config = self.quantization_config
        model.quantization_method = QuantizationMethod.MXFP4
        return model


def register() -> None:
    """Make the quantizer known to transformers."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(StackedQuantizer)
        register_quantization_config(METHOD)(StackedConfig)
