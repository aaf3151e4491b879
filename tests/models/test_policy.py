"""The policy against transformers' own logits, packed against one row at a time, and the reference."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import peft
import pytest
import records
import torch
import transformers
from tiny import prompts, tiny_model, tiny_policy
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from rlft.config.run import Lora, Optim
from rlft.errors import ConfigError
from rlft.models.adapter import lora_parameters
from rlft.models.load import attach_lora
from rlft.models.policy import Policy
from rlft.trainer.optim import Optimizer
from rlft.types import PackPlan, Rollout


def rollouts(groups: int, samples: int = 3) -> list[Rollout]:
    """Completions of unequal length, ids 10 and up."""
    made = []
    for prompt in prompts(groups):
        for s in range(samples):
            ids = tuple(11 + (prompt.index * 5 + s * 3 + j) % 70 for j in range(1 + (2 * s + prompt.index) % 5))
            made.append(Rollout(prompt, ids, (True,) * len(ids), (-1.0,) * len(ids), "", "stop", s, 0, s))
    return made


def plan(n: int, budget: int = 10_000, share: bool = True, temperature: float = 1.0) -> PackPlan:
    return PackPlan("token_mean", budget, 8, temperature, share_prefix=share)


def scores(policy, made: list[Rollout], the_plan: PackPlan) -> dict[int, list[float]]:
    """Rollout index -> log-probs of its completion."""
    out = {}
    for batch in records.packed(made, the_plan):
        logprobs = policy.score(batch)
        own = [s for s in range(len(batch.prefix)) if batch.group_ids[s] >= 0]
        for s, row in zip(own, records.rows(batch, made), strict=True):
            mine = (batch.seq_ids == s) & batch.train_mask
            out[row] = logprobs[mine].tolist()
    return out


@torch.no_grad()
def alone(policy: Policy, rollout: Rollout, temperature: float) -> list[float]:
    """Log-probs of a completion from transformers' logits of its row alone."""
    ids = torch.tensor([rollout.prompt.ids + rollout.completion_ids])
    log_p = (policy.model(ids).logits[0] / temperature).log_softmax(-1)
    return [log_p[t - 1, ids[0, t]].item() for t in range(len(rollout.prompt.ids), ids.shape[1])]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("budget", [1, 25, 10_000])
def test_packed_log_probs_equal_transformers_logits_one_row_at_a_time(share: bool, budget: int) -> None:
    policy, made = tiny_policy(torch.float64, trained=0.3), rollouts(3)
    got = scores(policy, made, plan(len(made), budget, share, temperature=0.7))
    for index, rollout in enumerate(made):
        want = alone(policy, rollout, 0.7)
        # transformers' own norm rounds to fp32 inside a float64 model; ours does not.
        assert got[index] == pytest.approx(want, abs=1e-6)


def own_logits(policy: Policy, ids: torch.Tensor) -> torch.Tensor:
    """Logits [T, V] of transformers' own layers, which run where hidden states are asked for."""
    return policy.model(ids, output_hidden_states=True).logits[0]


OTHERS: dict[str, dict] = {"olmo": {}, "cohere": {"logit_scale": 0.5}, "starcoder2": {}}


@pytest.mark.parametrize("kind", OTHERS)
def test_any_other_architecture_trains_on_transformers_own_layers(kind: str) -> None:
    """With our head and packing: packed rows equal transformers' logits one at a time, and every adapter learns."""
    config = AutoConfig.for_model(
        kind,
        vocab_size=103,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.1,
        pad_token_id=0,
        **OTHERS[kind],
    )
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval().requires_grad_(False)
    policy, made = Policy(attach_lora(base, Lora(rank=4, alpha=8), 0)), rollouts(3)
    assert policy.path == f'transformers\' own layers, packed: no fused layer for the architecture "{kind}"'
    policy.adapter_params.data.add_(0.05)
    got = scores(policy, made, plan(len(made), 40, True, temperature=0.7))
    for index, rollout in enumerate(made):
        want = alone(policy, rollout, 0.7)
        assert got[index] == pytest.approx(want, abs=1e-5)
    the_plan = plan(len(made))
    policy.flat.zero_grad()
    for batch in records.packed(made, the_plan, torch.linspace(-1, 1, len(made))):
        (policy.logprobs(batch)[0] * batch.advantages).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in policy.flat.parameters.values())


@pytest.mark.parametrize("moved", ["flat", "its gradient", "a parameter", "a gradient"])
def test_tensors_that_left_the_buffers_are_seen(moved: str) -> None:
    flat = tiny_policy(torch.float32).flat
    flat.check_views()
    last = list(flat.parameters.values())[-1]
    if moved == "flat":
        flat.values.data = flat.values.data.clone()
    elif moved == "its gradient":
        flat.values.grad = flat.gradient.clone()
    elif moved == "a parameter":
        last.data = last.data.clone()
    else:
        last.grad = torch.zeros_like(last)
    with pytest.raises(AssertionError):
        flat.check_views()


def step_gradient(budget: int, share: bool):
    """Adapter gradient of one step over 9 rollouts of 3 groups, packed in this way."""
    policy, made = tiny_policy(torch.float64, trained=0.3), rollouts(3)
    the_plan = plan(len(made), budget, share)
    policy.flat.zero_grad()
    for batch in records.packed(made, the_plan, torch.linspace(-1, 1, len(made))):
        logprobs, _ = policy.logprobs(batch)
        (-(logprobs * batch.advantages * batch.weight).sum()).backward()
    policy.flat.check_views()
    return policy.flat.gradient


@pytest.mark.parametrize(("budget", "share"), [(30, True), (20, True), (20, False)])
def test_splitting_and_sharing_give_the_same_adapter_gradient(budget: int, share: bool) -> None:
    """To 1e-12 through the whole model: the fused layers round nothing to fp32 inside a float64 model."""
    whole = step_gradient(10_000, True)
    assert whole.abs().max() > 1e-2
    assert torch.allclose(whole, step_gradient(budget, share), atol=1e-12, rtol=0)


def test_gradients_of_every_lora_tensor_equal_plain_transformers() -> None:
    policy, made = tiny_policy(torch.float64, trained=0.3), rollouts(1, samples=1)
    the_plan = plan(1)
    (batch,) = records.packed(made, the_plan)
    policy.flat.zero_grad()
    policy.logprobs(batch)[0].sum().backward()
    ours = {n: p.grad.clone() for n, p in policy.flat.parameters.items()}
    policy.flat.zero_grad()
    ids = torch.tensor([made[0].prompt.ids + made[0].completion_ids])
    log_p = own_logits(policy, ids).log_softmax(-1)
    sum(log_p[t - 1, ids[0, t]] for t in range(len(made[0].prompt.ids), ids.shape[1])).backward()
    for name, p in policy.flat.parameters.items():
        assert torch.allclose(ours[name], p.grad, atol=1e-6), name


def test_entropy_is_that_of_the_sampled_distribution() -> None:
    policy, made = tiny_policy(torch.float64), rollouts(1, samples=1)
    the_plan = plan(1, temperature=0.5)
    (batch,) = records.packed(made, the_plan)
    _, entropy = policy.logprobs(batch)
    ids = torch.tensor([made[0].prompt.ids + made[0].completion_ids])
    log_p = (own_logits(policy, ids) / 0.5).log_softmax(-1)
    first = len(made[0].prompt.ids)
    assert entropy[batch.train_mask][0].item() == pytest.approx(
        -(log_p.exp() * log_p).sum(-1)[first - 1].item(), abs=1e-6
    )
    assert not entropy.requires_grad


def test_the_reference_of_a_new_adapter_is_the_base_and_scoring_it_changes_nothing() -> None:
    policy, made = tiny_policy(torch.float64), rollouts(2)
    the_plan = plan(len(made))
    (batch,) = records.packed(made, the_plan)
    base = policy.score(batch)
    for tensor in policy.adapter().values():
        tensor.add_(0.1)
    before = policy.adapter_params.detach().clone()
    with policy.model.disable_adapter():
        off = policy.score(batch)
    assert torch.equal(policy.score(batch, weights="reference"), base) and torch.allclose(base, off, atol=1e-12)
    assert not torch.allclose(policy.score(batch), base, atol=1e-3)
    assert torch.equal(policy.adapter_params, before)


def test_the_reference_of_a_continued_adapter_is_its_start(tmp_path) -> None:
    first = tiny_policy(trained=0.3)
    first.model.save_pretrained(tmp_path, selected_adapters=["default"])
    lora = Lora(rank=4, alpha=8, resume_from=str(tmp_path))
    policy = type(first)(tiny_model(lora=lora))
    made = rollouts(2)
    the_plan = plan(len(made))
    (batch,) = records.packed(made, the_plan)
    start = first.score(batch)
    assert not policy.flat.fresh
    policy.adapter_params.data.mul_(0.5)
    assert torch.equal(policy.score(batch, weights="reference"), start)
    assert not torch.allclose(policy.score(batch), start, atol=1e-3)


def test_an_adapter_that_does_not_fit_is_named(tmp_path) -> None:
    tiny_policy().model.save_pretrained(tmp_path, selected_adapters=["default"])
    base = tiny_model().unload()
    with pytest.raises(ConfigError, match=r"lora.rank = 8, but the adapter in .* has 4: set lora.rank = 4"):
        attach_lora(base, Lora(rank=8, alpha=8, resume_from=str(tmp_path)), 0)
    with pytest.raises(ConfigError, match="no PEFT adapter there"):
        attach_lora(base, Lora(resume_from=str(tmp_path / "nothing")), 0)


def test_an_adapter_of_another_base_is_refused(tmp_path) -> None:
    """One of a deeper model leaves tensors over; in a wider model its shapes clash."""
    lora = Lora(rank=4, alpha=8, resume_from=str(tmp_path))
    Policy(tiny_model(layers=3)).model.save_pretrained(tmp_path, selected_adapters=["default"])
    with pytest.raises(ConfigError, match="does not fit this base: 14 of its tensors have no place in it and 0"):
        attach_lora(tiny_model().unload(), lora, 0)
    wide = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=103,
            hidden_size=64,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
        )
    )
    with pytest.raises(ConfigError, match=r"does not fit this base .*size mismatch"):
        attach_lora(wide, lora, 0)


def test_targets_that_match_nothing_list_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"lora.targets = \('qqq',\): qqq matches no linear layer.*down_proj.*q_proj"):
        tiny_model(lora=Lora(targets=("qqq",)))


def test_dropout_is_on_with_gradient_and_off_without() -> None:
    policy, made = tiny_policy(trained=0.5, lora=Lora(rank=4, alpha=8, dropout=0.5)), rollouts(1)
    the_plan = plan(len(made))
    (batch,) = records.packed(made, the_plan)
    assert torch.equal(policy.score(batch), policy.score(batch))
    assert not torch.equal(policy.logprobs(batch)[0], policy.logprobs(batch)[0])


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_step_between_a_forward_and_its_backward_is_an_error(name: Any, fused: bool) -> None:
    """The optimiser writes to the flat buffer, whose version is not that of the parameters in its memory."""
    policy, made = tiny_policy(trained=0.3, lora=Lora(rank=4, alpha=8, dropout=0.0 if fused else 0.1)), rollouts(3)
    assert (policy.fused is not None) == fused
    the_plan = plan(len(made))
    (batch,) = records.packed(made, the_plan)
    optimizer = Optimizer(policy.adapter_params, Optim(name=name, lr=0.1), 10, views=policy.flat.parameters.values())

    def backward(between: Callable[[], object]) -> torch.Tensor:
        logprobs = policy.logprobs(batch)[0]
        between()
        policy.flat.zero_grad()
        logprobs.sum().backward()
        return policy.flat.gradient

    assert backward(lambda: policy.score(batch, weights="reference")).any()
    with pytest.raises(RuntimeError, match="in place between forward" if fused else "modified by an inplace operation"):
        backward(lambda: optimizer.step(0, 0))
    with pytest.raises(RuntimeError, match="in place between forward" if fused else "modified by an inplace operation"):
        backward(lambda: [tensor.add_(0.1) for tensor in policy.adapter().values()])
    assert backward(lambda: None).any()


def test_loading_generating_and_training_patch_nothing() -> None:
    """Every public attribute of the libraries is the same object before and after; what changes is registered."""
    before = {
        (m.__name__, n): getattr(m, n, None)
        for m in (torch, torch.nn, torch.nn.functional, transformers, peft)
        for n in list(vars(m))
    }
    implementation = transformers.LlamaForCausalLM.forward
    policy, made = tiny_policy(), rollouts(1)
    the_plan = plan(len(made))
    (batch,) = records.packed(made, the_plan)
    policy.logprobs(batch)[0].sum().backward()
    changed = [key for key, value in before.items() if vars(sys.modules[key[0]]).get(key[1]) is not value]
    assert not changed and transformers.LlamaForCausalLM.forward is implementation
    assert policy.base.config._attn_implementation == "sdpa"


def test_lora_parameters_carry_the_names_of_a_peft_file() -> None:
    names = list(lora_parameters(tiny_model(), "default"))
    assert names[0] == "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert len(names) == 2 * 7 * 2


@pytest.mark.gpu
@pytest.mark.parametrize("share", [True, False])
def test_the_policy_in_bf16_on_a_gpu_agrees_with_fp64_within_twice_what_one_row_at_a_time_differs(share: bool) -> None:
    """Log-probs and the adapter's gradient, packed on the flash attention of the machine. The yardstick is the same
    model in bf16 run one row at a time by transformers."""
    made = rollouts(6)
    exact, gpu = tiny_policy(torch.float64, trained=0.3), Policy(tiny_model(torch.bfloat16).cuda())
    with torch.no_grad():
        for name, tensor in gpu.adapter().items():
            tensor.copy_(exact.adapter()[name])
    plain = [
        gpu.model(torch.tensor([r.prompt.ids + r.completion_ids]).cuda())
        .logits[0, len(r.prompt.ids) - 1 : -1]
        .float()
        .log_softmax(-1)[range(len(r.completion_ids)), list(r.completion_ids)]
        .detach()
        .cpu()
        for r in made
    ]
    (batch,) = records.packed(made, plan(len(made), share=share))
    results = []
    for policy in (exact, gpu):
        logprobs, _ = policy.logprobs(batch)
        policy.flat.zero_grad()
        (logprobs * batch.weight.to(logprobs.device)).sum().backward()
        results.append((logprobs.detach().cpu().double(), policy.flat.gradient.detach().cpu().double()))
    (want, gradient), (got, ours) = results
    own = [s for s in range(len(batch.prefix)) if batch.group_ids[s] >= 0]
    alone = torch.cat([plain[records.rows(batch, made)[own.index(s)]] for s in own]).double()
    mask = batch.train_mask
    assert (got - want)[mask].norm() <= 2 * (alone - want[mask]).norm() + 1e-3
    assert (ours - gradient).norm() <= 0.05 * gradient.norm()
