"""Write the base that a run trains over as a plain model: 4-bit weights decoded, bit for bit what the trainer uses.

A server (`vllm serve`) that loads the original weights samples from another model than the one that is trained over
4-bit weights. From this folder it samples from the same one, and needs no quantizer.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlft.config.paths import user_path
from rlft.errors import ConfigError
from rlft.kernels.nf4 import Nf4Weight, decode
from rlft.models import experts
from rlft.models.load import Base, describe_base, load_base, load_tokenizer, resolve_device
from rlft.models.vision import save_image_processor
from rlft.runs.export import check_free, new_folder, read_back, writing


@dataclass(frozen=True)
class ExportedBase:
    """Result of `export_base`."""

    out: Path
    decoded: int
    """Number of weights that were decoded from 4 bits."""
    dtype: torch.dtype

    def summary(self) -> str:
        """Describe what was written, and how to serve it."""
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.out}: {self.decoded} weights decoded from 4 bits to {dtype}. Serve it with: vllm serve {self.out}"
        )


def export_base(model: str, out: str | Path, quantization: str = "nf4", dtype: str = "bfloat16") -> ExportedBase:
    """Write a base model with its 4-bit weights decoded to `dtype`: config, weights and tokenizer.

    quantization, dtype: as in `Config`, those of the runs. Raises ConfigError for what a user can fix, and ParityError
    when the written files are not what was decoded; `out` is then not created.
    """
    out = user_path(out, "out")
    check_free(out)
    cfg = Base(model, quantization, dtype)  # type: ignore[arg-type]
    device = resolve_device(cfg)
    plan = describe_base(cfg, device)
    if plan.quantization not in ("nf4", "mxfp4", "none"):
        raise ConfigError(
            f'quantization = "{plan.quantization}": only NF4 and MXFP4 weights are decoded; load them as they are'
        )
    base: Any = load_base(cfg, device)
    decoded = _decode(base, plan.dtype)
    if hasattr(base.config, "quantization_config"):
        del base.config.quantization_config
    base.hf_quantizer = None
    with new_folder(out, "exporting") as temporary:
        with writing(out):
            base.save_pretrained(temporary)
            load_tokenizer(model).save_pretrained(temporary)
            save_image_processor(model, base.config, None, temporary)
        read_back(base, temporary, "not exported")
    return ExportedBase(out, decoded, plan.dtype)


def _decode(base: Any, dtype: torch.dtype) -> int:
    """Replace the 4-bit linear modules and experts of a model by plain ones; return the number of weights."""
    names = [
        name for name, module in base.named_modules() if getattr(getattr(module, "weight", None), "quant_state", None)
    ]
    for name in names:
        module: Any = base.get_submodule(name)
        packed = Nf4Weight.from_bnb(module.weight)
        weight = torch.empty(packed.shape, dtype=dtype, device=packed.packed.device)
        decode([packed], [weight])
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        plain.weight = nn.Parameter(weight, requires_grad=False)
        plain.bias = module.bias
        parent, _, child = name.rpartition(".")
        setattr(base.get_submodule(parent), child, plain)
    stacks = [stack for stack in experts.stacks(base).values() if stack.in_four_bits]
    for stack in stacks:
        weight = experts.decoded(stack.module, stack.leaf, dtype)
        weight = weight.transpose(1, 2).contiguous() if stack.module.is_transposed else weight
        stack.module._buffers.pop(f"{stack.leaf}_scales", None)
        setattr(stack.module, stack.leaf, nn.Parameter(weight, requires_grad=False))
    if stacks:
        base._weight_conversions = None  # transformers' own, which save experts as their family's files hold them
    return len(names) + len(stacks)
