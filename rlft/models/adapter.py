"""Hold the adapter's tensors as views of one flat fp32 buffer, and their gradients as views of another.

One buffer means one optimizer kernel, one norm, one copy to save and one tensor to reduce over ranks. The views remain
ordinary PEFT parameters: autograd adds into `.grad` in place, and `save_pretrained` writes them.
"""

from __future__ import annotations

import torch
from peft import PeftModel
from torch import Tensor, nn


def peft_name(parameter: str, adapter: str) -> str:
    """Return the name of an adapter tensor in a PEFT file: the parameter's name without that of the adapter."""
    return parameter.replace(f".{adapter}.", ".")


def a_by_expert(matrix: Tensor, experts: int) -> Tensor:
    """Return A [E r, in] of a stack of experts, which PEFT has by expert, then rank, as a view [E, r, in]."""
    return matrix.view(experts, -1, matrix.shape[1])


def b_by_expert(matrix: Tensor, experts: int) -> Tensor:
    """Return B [out, r E] of a stack of experts, whose columns are by rank, then expert, as a view [E, out, r]."""
    return matrix.view(len(matrix), -1, experts).permute(2, 0, 1)


def without_wrappers(name: str) -> str:
    """Return the name, in the base alone, of a module or parameter that PEFT has wrapped, once or several times."""
    return ".".join(part for part in name.split(".") if part != "base_layer")


def lora_parameters(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """Map PEFT name -> parameter of one adapter, in the order of the modules."""
    marks = (f".lora_A.{adapter}.", f".lora_B.{adapter}.")
    return {
        peft_name(parameter_name, adapter): parameter
        for parameter_name, parameter in model.named_parameters()
        if any(mark in parameter_name for mark in marks)
    }


def lora_scales(model: nn.Module, adapter: str) -> dict[str, float]:
    """Map the PEFT name of each lora_B -> the scale that the module applies, alpha / rank."""
    scales = {}
    for name, module in model.named_modules():
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict) and adapter in scaling:
            scales[f"{name}.lora_B.weight"] = float(scaling[adapter])
    return scales


class FlatAdapter:
    """The trained adapter: `values` [numel] fp32 with its gradient, and `start`, the initial values."""

    def __init__(self, model: PeftModel, name: str = "default", dtype: torch.dtype = torch.float32) -> None:
        """Move the adapter's parameters into the flat buffer. dtype: fp32, or fp64 in tests."""
        self.parameters = lora_parameters(model, name)
        assert self.parameters, f"no adapter called {name}"
        self.scales = lora_scales(model, name)
        values = torch.cat([parameter.detach().reshape(-1).to(dtype) for parameter in self.parameters.values()])
        self.values = nn.Parameter(values)
        self._buffer = self.values.grad = torch.zeros_like(values)
        # In host memory, since it is rarely needed: not at all if every B was 0, as the start is then the base.
        self.start = values.cpu().clone()
        self.fresh = self._is_fresh()
        """Whether every B was 0 initially, so that the starting policy is the base."""
        offset = 0
        self._gradients: dict[Tensor, Tensor] = {}
        self._addresses: list[int] = []
        for parameter in self.parameters.values():
            part = slice(offset, offset + parameter.numel())
            parameter.data = self.values.data[part].view(parameter.shape)
            parameter.grad = self._gradients[parameter] = self.values.grad[part].view(parameter.shape)
            self._addresses.append(parameter.data_ptr())
            offset += parameter.numel()

    def _is_fresh(self) -> bool:
        start = self.start.split([parameter.numel() for parameter in self.parameters.values()])
        return all(not part.any() for name, part in zip(self.parameters, start, strict=True) if ".lora_B." in name)

    def restore(self, values: Tensor, start: Tensor) -> None:
        """Set the values, and the values that training started from, to those of a checkpoint: [numel] each."""
        self.values.data.copy_(values)
        self.start.copy_(start)
        self.fresh = self._is_fresh()

    def tensors(self) -> dict[str, Tensor]:
        """Map PEFT name -> live tensor (a view, which changes with the next update)."""
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    @property
    def gradient(self) -> Tensor:
        """The gradient buffer [numel], of which all `.grad`s are views."""
        assert self.values.grad is not None
        return self.values.grad

    @property
    def gradients(self) -> dict[Tensor, Tensor]:
        """Parameter -> its view of the gradient buffer, for backwards that add into it themselves."""
        self.check_views()
        return self._gradients

    def not_finite(self) -> list[str]:
        """Return the PEFT names of tensors with a value that is not finite. Synchronizes with the device."""
        if self.values.detach().isfinite().all():
            return []
        return [name for name, tensor in self.tensors().items() if not tensor.isfinite().all()]

    def attach(self) -> None:
        """Put back, as 0, the gradients that `zero_grad` of an optimiser has removed."""
        if self.values.grad is None:
            self.values.grad = self._buffer.zero_()
        for parameter, view in self._gradients.items():
            if parameter.grad is None:
                parameter.grad = view.zero_()

    def zero_grad(self) -> None:
        """Set all gradients to 0, as views of the buffer."""
        self.gradient.zero_()

    def holds(self) -> bool:
        """Return whether the parameters of the model are still views of this buffer."""
        return all(
            parameter.data_ptr() == address
            for parameter, address in zip(self.parameters.values(), self._addresses, strict=True)
        )

    def check_views(self) -> None:
        """Assert that parameters and gradients are still views of the buffers and were not replaced."""
        assert self.values.data_ptr() == self._addresses[0], "the buffer"
        assert self.gradient.data_ptr() == next(iter(self._gradients.values())).data_ptr(), "the gradients' buffer"
        for (name, parameter), address in zip(self.parameters.items(), self._addresses, strict=True):
            assert parameter.data_ptr() == address and parameter.grad is self._gradients[parameter], name
