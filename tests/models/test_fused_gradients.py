"""Gradients of a fused model that are taken in other ways than one backward of one loss, against the unfused model's:
cast adapters, hooks, autograd.grad, several passes, DDP.
"""

from __future__ import annotations

import faulthandler
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from fused_pair import IDS, MASK, gradients, logits, model_of, near, one_thread, pair, ran, same  # noqa: F401
from torch import Tensor

from rlft.models.fused.levels import L0, L4
from rlft.models.fused.memory import MemoryPlan
from rlft.models.fused.offload import Offload


def test_adapters_cast_to_bf16_have_ordinary_bf16_gradients() -> None:
    """As TRL casts them for a quantised model (`param.data = param.data.to(bf16)`), after the model was fused."""
    ends = []
    for cast in (True, False):
        model = model_of(True, dtype=torch.bfloat16)
        for p in model.parameters():
            if p.requires_grad and cast:
                p.data = p.data.to(torch.bfloat16)
        ends.append(gradients(model))
    assert {g.dtype for g in ends[0].values()} == {torch.bfloat16} != {g.dtype for g in ends[1].values()}
    near({n: g.float() for n, g in ends[0].items()}, ends[1], 0.03)


def test_gradients_add_up_are_set_to_none_and_can_be_asked_for() -> None:
    plain, fused = pair()
    once = gradients(fused)
    logits(fused).square().mean().backward()
    named = {n: p for n, p in fused.named_parameters() if p.requires_grad}
    near({n: p.grad for n, p in named.items()}, {n: 2 * g for n, g in once.items()}, 1e-6)
    fused.zero_grad(set_to_none=True)
    assert all(p.grad is None for p in named.values())
    asked = torch.autograd.grad(logits(fused).square().mean(), list(named.values()))
    assert all(p.grad is None for p in named.values())
    assert all(torch.equal(g, once[n]) for n, g in zip(named, asked, strict=True))
    some = [n for n in named if "layers.1.mlp" in n]
    (part,) = torch.autograd.grad(logits(fused).square().mean(), [named[some[0]]])
    assert torch.equal(part, once[some[0]])
    near(once, gradients(plain))


def test_hooks_of_parameters_see_whole_gradients_and_frozen_ones_have_none() -> None:
    plain, fused = pair()
    seen: dict[str, Tensor] = {}
    for name, p in fused.named_parameters():
        if "lora_B" in name:
            p.register_hook(lambda g: 2 * g)
            p.register_post_accumulate_grad_hook(lambda p, name=name: seen.update({name: p.grad.clone()}))
        elif "lora_A" in name:
            p.requires_grad_(False)
    gradients(fused)
    want = {n: 2 * g for n, g in gradients(plain).items() if "lora_B" in n}
    near(seen, want)
    assert all(p.grad is None for n, p in fused.named_parameters() if "lora_A" in n)


def test_several_passes_before_their_backwards() -> None:
    """As in DPO with a pass of the reference in between, and with backwards in another order than the passes."""
    ends = []
    for model in pair():
        first, second = logits(model), logits(model, input_ids=IDS.flip(0))
        with torch.no_grad(), model.disable_adapter():
            logits(model, input_ids=IDS[:1], attention_mask=None)
        model.zero_grad()
        (first.square().mean()).backward()
        one = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        (second.square().mean()).backward()
        ends.append((one, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    near(ends[1][0], ends[0][0])
    near(ends[1][1], ends[0][1])


def test_layers_above_those_on_the_host_start_the_copies_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the first of them would wait for its own; they are the first layers, and run their backwards last."""
    plain, fused = pair()
    decoder = fused.get_base_model().model.forward.__self__
    decoder.plan = MemoryPlan((L4, L0), 64, "layer", 2**20, 0, 0, 0)
    asked: list[tuple[int, list[int]]] = []
    monkeypatch.setattr(Offload, "ahead", lambda self, records, layer, device: asked.append((layer, list(records))))
    near(gradients(fused), gradients(plain))
    assert asked == [(1, [0]), (0, [0])]


def test_an_adapter_that_changes_between_forward_and_backward_is_refused() -> None:
    """As autograd does for the plain model: an optimiser step between the two would mix old and new weights."""
    for model in pair():
        out = logits(model)
        with torch.no_grad():
            next(p for n, p in model.named_parameters() if "lora_B" in n).mul_(2)
        with pytest.raises(RuntimeError, match="modified"):
            out.sum().backward()


def test_training_after_inference_mode() -> None:
    plain, fused = pair()
    with torch.inference_mode():
        out, was_fused = ran(fused, lambda: logits(fused))
    assert was_fused and out.is_inference()
    same(plain, fused)


def _ddp(rank: int, folder: str) -> None:
    """One of two processes: gradients of a plain and a fused model, by DDP. One that hangs says where and ends."""
    faulthandler.dump_traceback_later(300, exit=True)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    got: dict[str, dict[str, Tensor]] = {}
    for fuses in (False, True):
        model = torch.nn.parallel.DistributedDataParallel(model_of(fuses).train())
        for sync in (False, True):
            model.zero_grad()
            with nullcontext() if sync else model.no_sync():
                out = model(IDS.roll(rank), attention_mask=MASK, use_cache=False).logits
                out[MASK.bool()].square().mean().backward()
            got[f"{fuses} {sync}"] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    torch.save(got, f"{folder}/{rank}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()


def test_ddp_over_two_processes(tmp_path: Path) -> None:
    """Averaged over both where DDP synchronises, each process's own under no_sync."""
    torch.multiprocessing.start_processes(_ddp, (str(tmp_path),), nprocs=2, start_method="forkserver")
    first, second = (torch.load(tmp_path / str(rank)) for rank in range(2))
    for sync in ("True", "False"):
        near(first[f"True {sync}"], first[f"False {sync}"])
    near(first["True True"], {n: (g + second["True False"][n]) / 2 for n, g in first["True False"].items()})
    assert all(torch.equal(g, second["True True"][n]) for n, g in first["True True"].items())
    assert not any(torch.allclose(g, second["True False"][n]) for n, g in first["True False"].items())


@pytest.mark.parametrize("masked", [True, False])
def test_inputs_embeds_have_a_gradient(masked: bool) -> None:
    ends = []
    for model in pair():
        embeds = torch.randn(3, 9, 64, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
        out = logits(model, input_ids=None, inputs_embeds=embeds[..., ::2], attention_mask=MASK if masked else None)
        out.square().mean().backward()
        ends.append((out.detach(), embeds.grad))
    near(ends[1][0], ends[0][0])
    near(ends[1][1], ends[0][1])
