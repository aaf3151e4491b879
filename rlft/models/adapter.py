"""The adapter's tensors as views of one flat fp32 buffer, and their gradients as views of another.

One buffer means one optimiser kernel, one norm, one copy to save and one tensor to sum over ranks. The views stay
ordinary PEFT parameters: autograd adds into `.grad` in place, and `save_pretrained` writes them.
"""

from __future__ import annotations

import torch
from peft import PeftModel
from torch import Tensor, nn


def peft_name(parameter: str, adapter: str) -> str:
    """Name of an adapter tensor in a PEFT file: the parameter's name without the adapter's."""
    return parameter.replace(f".{adapter}.", ".")


def lora_parameters(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """PEFT name -> parameter of one adapter, in the order of the modules."""
    marks = (f".lora_A.{adapter}.", f".lora_B.{adapter}.")
    return {peft_name(n, adapter): p for n, p in model.named_parameters() if any(m in n for m in marks)}


def lora_scales(model: nn.Module, adapter: str) -> dict[str, float]:
    """PEFT name of each lora_B -> alpha / rank as the module applies it."""
    scales = {}
    for name, module in model.named_modules():
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict) and adapter in scaling:
            scales[f"{name}.lora_B.weight"] = float(scaling[adapter])
    return scales


class FlatAdapter:
    """The trained adapter: `flat` [numel] fp32 with `flat.grad`, and `start`, the values it had at first."""

    def __init__(self, model: PeftModel, name: str = "default", dtype: torch.dtype = torch.float32) -> None:
        """Move the adapter's parameters into the flat buffer. dtype: fp32, or fp64 in tests."""
        self.parameters = lora_parameters(model, name)
        assert self.parameters, f"no adapter called {name}"
        self.scales = lora_scales(model, name)
        values = torch.cat([p.detach().reshape(-1).to(dtype) for p in self.parameters.values()])
        self.values = nn.Parameter(values)
        self.values.grad = torch.zeros_like(values)
        # In host memory: it is rarely wanted, and where every B was 0 it is the base itself.
        self.start = values.cpu().clone()
        self.fresh = all(not p.any() for n, p in self.parameters.items() if ".lora_B." in n)
        """True when every B was 0 at first, so that the starting policy is the base itself."""
        offset = 0
        self._gradients: dict[Tensor, Tensor] = {}
        self._addresses: list[int] = []
        for parameter in self.parameters.values():
            part = slice(offset, offset + parameter.numel())
            parameter.data = self.values.data[part].view(parameter.shape)
            parameter.grad = self._gradients[parameter] = self.values.grad[part].view(parameter.shape)
            self._addresses.append(parameter.data_ptr())
            offset += parameter.numel()

    def tensors(self) -> dict[str, Tensor]:
        """PEFT name -> the live tensor (a view: it changes with the next update)."""
        return {name: p.detach() for name, p in self.parameters.items()}

    @property
    def gradient(self) -> Tensor:
        """[numel]: the gradient buffer that all `.grad`s are views of."""
        assert self.values.grad is not None
        return self.values.grad

    @property
    def gradients(self) -> dict[Tensor, Tensor]:
        """Parameter -> its view of the gradient buffer, for backwards that add into it themselves."""
        self.check_views()
        return self._gradients

    def not_finite(self) -> list[str]:
        """PEFT names of the tensors that hold a value that is not finite. Waits for the device."""
        if self.values.detach().isfinite().all():
            return []
        return [name for name, tensor in self.tensors().items() if not tensor.isfinite().all()]

    def zero_grad(self) -> None:
        """Set all gradients to 0, keeping them views of the buffer."""
        self.gradient.zero_()

    def check_views(self) -> None:
        """Assert that parameters and gradients still live in the buffers (nothing replaced them behind our back)."""
        assert self.values.data_ptr() == self._addresses[0], "the buffer"
        assert self.gradient.data_ptr() == next(iter(self._gradients.values())).data_ptr(), "the gradients' buffer"
        for (name, p), address in zip(self.parameters.items(), self._addresses, strict=True):
            assert p.data_ptr() == address and p.grad is self._gradients[p], name
