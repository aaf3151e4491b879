"""The real small model: engine against trainer, fused layers against transformers' own, and a curve against PEFT's."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import records
import torch
from peft import PeftModel
from sums import ROOT, sums
from torch import Tensor

from rlft.config.data import Data, Sampling
from rlft.config.run import Config, Lora
from rlft.data.encode import encode_prompt
from rlft.data.prompts import Prompts, load_prompts
from rlft.kernels.attention import Sequences
from rlft.kernels.logprobs import linear_logprobs
from rlft.models import families
from rlft.models.fused.decoder import FusedDecoder
from rlft.models.load import Base, attach_lora, load_base, load_tokenizer
from rlft.models.policy import Policy
from rlft.rollout.eager import EagerEngine
from rlft.runs.folder import Run
from rlft.trainer import parity
from rlft.trainer.loop import train
from rlft.types import Batch, PackPlan, Rollout

CPU = torch.device("cpu")
CHATS = {
    "What is 53 + 5?": ["58", "53 + 5 = 58", "Let us add: 53 + 5 is 58, so the answer is 58."],
    "Name three colours of the rainbow.": ["Red, green and violet.", "Blue"],
    "Why is the sky blue? Answer in two sentences, and say which of the colours of sunlight is scattered the most.": [
        "Air scatters short waves of sunlight more than long ones, and blue is short. Violet is scattered even more, "
        "but there is less of it in sunlight and our eyes are less sensitive to it, so that what we see from all sides "
        "of the sky, away from the sun, looks blue.",
        "Because of Rayleigh scattering. Violet is scattered most.",
    ],
    "Translate into French: good morning": ["Bonjour."],
}


def chats(model: Path) -> list[Rollout]:
    """Real prompts with one to three completions each, of 2 to about 60 tokens."""
    tokenizer, made = load_tokenizer(str(model)), []
    for i, (text, answers) in enumerate(CHATS.items()):
        rows = [encode_prompt({"prompt": text, "completion": a}, i, Data("chats"), tokenizer) for a in answers]
        for s, ids in enumerate(row.recorded[0].ids for row in rows):
            made.append(Rollout(rows[0], ids, (True,) * len(ids), None, "", "stop", s, 0, s))
    return made


def batches(made: list[Rollout], budget: int = 10_000, share: bool = True) -> list[Batch]:
    plan = PackPlan("token_mean", budget, 100, 1.0, share_prefix=share)
    return records.packed(made, plan)


def by_rollout(batch: Batch, values: Tensor, made: list[Rollout]) -> dict[int, Tensor]:
    """Rollout -> the values [T] of its completion."""
    own = [s for s in range(len(batch.prefix)) if batch.group_ids[s] >= 0]
    return {
        row: values[(batch.seq_ids == s) & batch.train_mask]
        for s, row in zip(own, records.rows(batch, made), strict=True)
    }


def scores(policy: Policy, made: list[Rollout], weights: Any = "policy", **packing: Any) -> Tensor:
    """Our log-probs of all completions, in the order of the rollouts."""
    found: dict[int, Tensor] = {}
    for batch in batches(made, **packing):
        found |= by_rollout(batch, policy.score(batch, weights), made)
    return torch.cat([found[i] for i in range(len(made))])


@torch.no_grad()
def plain(model: PeftModel, made: list[Rollout]) -> Tensor:
    """The same from transformers' own layers and logits, one row at a time. The log-softmax over its logits is in
    float64: PyTorch's in fp32 on a CPU is itself off by 1e-5 nat over 49,152 tokens."""
    assert "forward" not in vars(model.get_base_model().get_decoder()), "fused layers would run"
    found = []
    for rollout in made:
        ids = torch.tensor([rollout.prompt.ids + rollout.completion_ids])
        log_p = model(ids).logits[0, len(rollout.prompt.ids) - 1 : -1].double().log_softmax(-1)
        found.append(log_p.gather(1, torch.tensor(rollout.completion_ids)[:, None])[:, 0])
    return torch.cat(found)


@torch.no_grad()
def without_adapter(base: Any, made: list[Rollout]) -> Tensor:
    """Log-probs by fused layers over a model into which no adapter was put."""
    assert not any(hasattr(module, "lora_A") for module in base.modules())
    decoder, family = base.get_decoder(), families.find("llama")
    assert family is not None
    fused, found = FusedDecoder(base, decoder, family), {}
    for batch in batches(made):
        rows = batch.train_mask.nonzero()[:, 0]
        sequences = Sequences.of(batch.cu_seqlens, batch.prefix, CPU)
        hidden, _ = fused.hidden(base.get_input_embeddings()(batch.input_ids), batch.position_ids, sequences)
        logprobs, _ = linear_logprobs(
            fused.final_norm(hidden[batch.source[rows]]),
            base.get_output_embeddings().weight,
            batch.input_ids[rows],
            batch.temperature,
        )
        found |= by_rollout(batch, torch.zeros(len(batch.input_ids)).index_put((rows,), logprobs), made)
    return torch.cat([found[i] for i in range(len(made))])


def set_b(model: PeftModel, size: float) -> None:
    """Every B from the same random numbers, times `size`."""
    g = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.copy_(size * torch.randn(p.shape, generator=g))


class Measured(NamedTuple):
    """The model in fp32 and what was computed before its layers were fused."""

    made: list[Rollout]
    policy: Policy
    """Of an adapter that was fresh when the policy was made, and has random numbers in every B now."""
    plain: Tensor
    """transformers' log-probs with those numbers."""
    without: Tensor
    """Fused log-probs from before there was an adapter."""


@pytest.fixture(scope="module")
def fp32(smollm2: Path) -> Measured:
    made, base = chats(smollm2), load_base(Base(str(smollm2), dtype="float32"), CPU)
    without = without_adapter(base, made)
    model = attach_lora(base, Lora(), 0)
    set_b(model, 0.02)
    theirs = plain(model, made)
    set_b(model, 0.0)
    policy = Policy(model)
    set_b(model, 0.02)
    assert policy.fused is not None and policy.flat.fresh
    return Measured(made, policy, theirs, without)


def test_log_probs_in_fp32_are_transformers_to_1e_5(fp32: Measured) -> None:
    """Mean over 100 tokens and more of |difference|, all packed with shared prompts; and the adapter does something."""
    ours = scores(fp32.policy, fp32.made)
    assert len(ours) > 100 and (fp32.plain - fp32.without).abs().mean() > 0.05
    assert (ours - fp32.plain).abs().mean() < 1e-5 and (ours - fp32.plain).abs().max() < 1e-4


@pytest.mark.parametrize(("budget", "share"), [(10_000, True), (10_000, False), (130, True)])
def test_packed_rows_equal_one_row_at_a_time(fp32: Measured, budget: int, share: bool) -> None:
    """All rows in one micro-batch and in several, prompts shared and not: 5e-6 in the mean, which is fp32's own noise
    (transformers is 9e-6 from float64 here), and 3e-5 at most."""
    alone = scores(fp32.policy, fp32.made, budget=1, share=False)
    packed = scores(fp32.policy, fp32.made, budget=budget, share=share)
    assert (packed - alone).abs().mean() < 5e-6 and (packed - alone).abs().max() < 3e-5


def test_the_adapter_off_is_the_base_bit_for_bit(fp32: Measured) -> None:
    """Compared by torch.equal: the log-probs of every completion token, from (1) fused layers over the model before
    PEFT had put anything into it, (2) the policy with its non-zero adapter switched off, (3) the reference of that
    policy, whose adapter was fresh at first. Same packing, same micro-batches."""
    with fp32.policy.model.disable_adapter():
        off = scores(fp32.policy, fp32.made)
    assert torch.equal(off, fp32.without)
    assert torch.equal(scores(fp32.policy, fp32.made, "reference"), fp32.without)
    assert not torch.allclose(scores(fp32.policy, fp32.made), fp32.without, atol=1e-2)


def test_log_probs_in_bf16_are_no_further_from_the_truth_than_transformers(smollm2: Path) -> None:
    """The truth is transformers in fp32 over the weights of the bf16 model, so that their rounding is no part of it.
    transformers has PEFT's adapter in fp32; ours is rounded to bf16 for the products."""
    made = chats(smollm2)
    model = attach_lora(load_base(Base(str(smollm2), dtype="bfloat16"), CPU), Lora(), 0)
    set_b(model, 0.02)
    theirs, truth = plain(model, made), plain(copy.deepcopy(model).float(), made)
    policy = Policy(model)
    assert policy.fused is not None
    ours, noise = (scores(policy, made) - truth).abs().mean(), (theirs - truth).abs().mean()
    assert 1e-3 < ours <= noise, (ours, noise)


def curve_of_peft(cfg: Config, steps: int) -> list[float]:
    """SFT with transformers' layers, PEFT's adapter and torch.optim.AdamW, one row at a time."""
    rows = load_prompts(cfg.data, load_tokenizer(cfg.model), cfg.seed).prompts
    prompts = Prompts(rows, cfg.seed, cfg.data.shuffle)
    model = attach_lora(load_base(cfg, CPU), cfg.lora, cfg.seed)
    trained, o = [p for p in model.parameters() if p.requires_grad], cfg.optim
    adam = torch.optim.AdamW(trained, o.lr, o.betas, o.eps, o.weight_decay)
    losses = []
    for _ in range(steps):
        taken = prompts.take(cfg.prompts_per_step)
        tokens = sum(len(p.recorded[0].ids) for p in taken)
        losses.append(0.0)
        for prompt in taken:
            answer = torch.tensor(prompt.recorded[0].ids)
            ids = torch.tensor([[*prompt.ids, *prompt.recorded[0].ids]])
            logits = model(ids, use_cache=False, logits_to_keep=len(answer) + 1).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, answer, reduction="sum") / tokens
            loss.backward()
            losses[-1] += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, o.max_grad_norm)
        adam.step()
        adam.zero_grad()
    assert "forward" not in vars(model.get_base_model().get_decoder())
    return losses


def test_50_sft_steps_have_the_losses_of_transformers_and_peft(smollm2_cut: Path, tmp_path: Path) -> None:
    """`rlft.train` with the settings of examples/sft.toml, two rows a step, on the first four layers of the real model,
    so that it takes seconds. `benchmarks/sft_curve.py` does the same with all thirty."""
    cfg = Config.load(ROOT / "examples" / "sft.toml")
    cfg = replace(
        cfg,
        model=str(smollm2_cut),
        data=Data(str(ROOT / "examples" / "sums_sft.jsonl")),
        out=str(tmp_path / "run"),
        steps=50,
        prompts_per_step=2,
        dtype="float32",
        device="cpu",
        quantization="none",
    )
    train(cfg)
    ours = [line["loss"] for line in Run.resume(tmp_path / "run").metrics()]
    theirs = curve_of_peft(cfg, 50)
    assert len(ours) == 50 and sum(theirs[:5]) > 1.5 * sum(theirs[-5:])
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-4


def test_the_trainer_agrees_with_the_engine_to_1e_4_nat_in_fp32(smollm2: Path, tmp_path: Path) -> None:
    cfg = sums(smollm2, tmp_path)
    tokenizer = load_tokenizer(cfg.model)
    policy = Policy(attach_lora(load_base(cfg, CPU), cfg.lora, cfg.seed))
    for name, tensor in policy.adapter().items():
        if ".lora_B." in name:
            tensor.copy_(0.02 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)))
    engine = EagerEngine(policy, tokenizer)
    engine.load_adapter(policy.adapter(), version=0)
    prompts = load_prompts(cfg.data, tokenizer, 0).prompts[:6]
    rollouts = engine.generate(prompts, Sampling(group_size=4, max_tokens=24), (0, 0))
    plan = PackPlan("token_mean", 400, 24, 1.0)
    found = parity.Mismatch()
    for batch in records.packed(rollouts, plan):
        found.add(policy.score(batch), batch)
    assert found.tokens > 200 and found.mean < 1e-4 and found.values()["mismatch/outside"] == 0
