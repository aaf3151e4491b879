"""Mixtures of experts in vLLM on a GPU, in every mode: rlft's kernels in CUDA graphs, vLLM's own in memory that is
filled, and what sleeps and wakes.

Random models of two layers in bf16, with heads as wide as those of published ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import records
import torch
from mixtures import save_mixture
from test_engines import PLAN, mismatch_of
from test_experts_mxfp4 import release
from test_vllm_gpu import same, sleep_under_junk, trained
from tiny import prompts, tiny_tokenizer
from torch import Tensor

from rlft.config.data import Sampling
from rlft.config.run import Engine, Lora
from rlft.errors import EngineError
from rlft.models.load import Base, attach_lora, load_base
from rlft.models.policy import Policy
from rlft.rollout.vllm.engine import VllmEngine
from rlft.types import Prompt, Rollout

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("vllm_visible"), pytest.mark.filterwarnings("ignore")]
SAMPLING = Sampling(group_size=4, max_tokens=24)
SIZES = {"hidden_size": 256, "head_dim": 64, "moe_intermediate_size": 128, "intermediate_size": 128}
MODELS = (("qwen3_moe", "nf4"), ("mixtral", "none"), ("gpt_oss", "mxfp4"))
HOW = ("dequantized-graphs", "merged-graphs", "shared-graphs", "shared")
Pair = tuple[Policy, VllmEngine]


def policy_of(kind: str, form: str, folder: Path, lora: Lora) -> Policy:
    if form == "mxfp4":
        release(folder, **SIZES)
    else:
        save_mixture(folder, kind, **SIZES)
    base = load_base(Base(str(folder), "auto" if form == "mxfp4" else form, "bfloat16", "cuda"), torch.device("cuda"))
    policy = Policy(attach_lora(base, lora, 0))
    trained(policy, size=0.1)
    return policy


def engine_of(policy: Policy, how: str) -> VllmEngine:
    mode, _, graphs = how.partition("-")
    options: Any = Engine("vllm", mode=mode, max_seqs=32, graphs=bool(graphs), compile=False, kv_gib=1.0)  # type: ignore[arg-type]
    engine = VllmEngine(policy, tiny_tokenizer(), options, 64, 16, note=print, detail=print)
    engine.load_adapter(policy.adapter(), 1)
    return engine


@pytest.fixture(
    scope="module", params=[(*model, how) for model in MODELS for how in HOW], ids=lambda row: f"{row[0]}-{row[2]}"
)
def pair(request, vllm_visible: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    kind, form, how = request.param
    policy = policy_of(kind, form, tmp_path_factory.mktemp(kind), Lora(rank=16, alpha=24))
    engine = engine_of(policy, how)
    yield policy, engine
    engine.close()


def generate(pair: Pair) -> list[Rollout]:
    return pair[1].generate(prompts(4), SAMPLING, (1, 0))


def methods(engine: VllmEngine) -> set[str]:
    """Names of the classes that compute experts."""
    (model,) = engine._llm.collective_rpc(lambda worker: worker.get_model())
    return {type(module.quant_method).__name__ for module in model.modules() if hasattr(module, "w2_weight")}


def test_engine_and_trainer_agree(pair: Pair) -> None:
    policy, engine = pair
    rollouts = generate(pair)
    assert methods(engine) == {"FilledExperts" if engine.choice.mode == "merged" else "ExpertsMethod"}
    engine.sleep()
    found = mismatch_of(policy, rollouts)
    engine.wake()
    print("mismatch", found.values())
    assert found.tokens > 200 and found.mean < 0.12


def test_experts_come_back_from_sleep_and_give_their_memory(pair: Pair) -> None:
    _, engine = pair
    first = generate(pair)
    sleep_under_junk(engine)
    assert same(generate(pair), first)
    stacks = 2 * 2 * 8 * (256 * 256 + 256 * 128)
    assert (engine.memory["weights of the engine"] >= stacks) == (engine.choice.mode != "shared")


def test_adapters_of_experts_count(pair: Pair) -> None:
    policy, engine = pair
    first = generate(pair)
    trained(policy, size=0.1)
    for name, tensor in policy.adapter().items():
        if ".experts" in name and ".lora_B." in name:
            tensor.zero_()
    assert same(generate(pair), first), "the engine has its own copy"
    engine.load_adapter(policy.adapter(), 2)
    second = generate(pair)
    assert [r.sampler_logprobs for r in second] != [r.sampler_logprobs for r in first]
    engine.sleep()
    assert mismatch_of(policy, second).mean < 0.12
    engine.wake()
    trained(policy, size=0.1)
    engine.load_adapter(policy.adapter(), 3)
    assert same(generate(pair), first)


def test_a_changed_element_is_read_back(pair: Pair) -> None:
    """Fault injection, in a stack or in a slot of one."""
    policy, engine = pair
    if engine.choice.mode == "merged":
        assert engine._provider.weight_copy is not None
        places = engine._provider.weight_copy._places
        next(place for name, place in places.items() if name.endswith("experts.down_proj"))[-1, -1, -1] += 1
    else:
        slots = {name: b for name, _, b in engine._provider.slots()}
        next(b for name, b in slots.items() if name.endswith("experts.down_proj"))[-1, -1, -1] += 1
    with pytest.raises(EngineError, match=r"does not hold the trainer's adapter: .*experts.down_proj"):
        engine._check(engine._held, 3)
    engine.load_adapter(policy.adapter(), 3)


def test_vllms_kernel_computes_dequantized_experts_without_adapters(vllm_visible: None, tmp_path: Path) -> None:
    policy = policy_of("qwen3_moe", "nf4", tmp_path, Lora(rank=16, alpha=24, experts=False))
    engine = engine_of(policy, "dequantized-graphs")
    try:
        assert methods(engine) == {"FilledExperts"}
        rollouts = engine.generate(prompts(4), SAMPLING, (1, 0))
        engine.sleep()
        assert mismatch_of(policy, rollouts).mean < 0.12
        engine.wake()
        assert same(engine.generate(prompts(4), SAMPLING, (1, 0)), rollouts)
    finally:
        engine.close()


# ---- experts of each token -------------------------------------------------------------------------------------------


def long_prompts() -> list[Prompt]:
    """Twelve of 38 tokens, four with a common beginning of two cache blocks."""
    ids = [tuple(10 + (7 * i + j * j + 3 * j * i) % 80 for j in range(38)) for i in range(12)]
    return [Prompt(ids[0][:33] + each[33:] if i < 4 else each, {"prompt": "p"}, i) for i, each in enumerate(ids)]


@torch.no_grad()
def live(policy: Policy, rollout: Rollout) -> Tensor:
    """What the trainer's routers choose over the sequence in transformers' layers, [tokens, layers, k]."""
    found: list[Tensor] = []
    blocks = [layer.mlp for layer in policy.base.model.layers]  # type: ignore[union-attr]
    routers = [getattr(block, "gate", None) or block.router for block in blocks]
    hooks = [router.register_forward_hook(lambda *given: found.append(given[2][2])) for router in routers]
    ids = torch.tensor([rollout.prompt.ids + rollout.completion_ids], device="cuda")
    policy.model(input_ids=ids, use_cache=False, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    return torch.stack(found, 1).cpu()


def test_each_token_has_the_experts_that_the_engine_chose(pair: Pair) -> None:
    """More sequences than the engine decodes at a time, and prompts that are cached. In bf16 a few choices differ."""
    policy, engine = pair
    sampling = Sampling(group_size=4, max_tokens=24)
    rollouts = engine.generate(long_prompts(), sampling, (1, 0))
    again = engine.generate(long_prompts(), sampling, (1, 0))
    assert [each.routes for each in again] == [each.routes for each in rollouts]
    engine.sleep()
    shares = []
    for rollout in rollouts:
        assert rollout.routes is not None and rollout.routes.completion.shape == (len(rollout.completion_ids), 2, 2)
        own = live(policy, rollout)[:-1]
        got = torch.from_numpy(np.concatenate([rollout.routes.prompt, rollout.routes.completion]))[:-1].to(own.dtype)
        shares.append(float((own[..., :, None] == got[..., None, :]).any(-1).float().mean()))
    print("equal choices, mean and least of a sequence", np.mean(shares), min(shares))
    # A choice that belongs to another token is equal by chance in a quarter of all cases.
    assert np.mean(shares) > 0.9 and min(shares) > 0.75
    replayed = mismatch_of(policy, rollouts)
    free = mismatch_of(policy, [replace(rollout, routes=None) for rollout in rollouts])
    engine.wake()
    print("mismatch, replayed and live", replayed.mean, free.mean)
    assert replayed.tokens == free.tokens > 600
    assert replayed.mean < 0.12 and replayed.mean <= 1.1 * free.mean


def test_a_pass_over_given_experts_has_a_gradient_and_the_same_bits_without(pair: Pair) -> None:
    policy, engine = pair
    rollouts = engine.generate(long_prompts(), SAMPLING, (2, 0))
    engine.sleep()
    for batch in records.packed(rollouts, PLAN):
        policy.flat.zero_grad()
        planned = policy.planned(batch)
        logprobs, _ = policy.logprobs(planned)
        logprobs.sum().backward()
        assert policy.flat.gradient.isfinite().all() and policy.flat.gradient.abs().max() > 0
        assert torch.equal(policy.score(planned), logprobs)
        assert not torch.equal(policy.score(replace(planned, routes=planned.routes.flip(0))), logprobs)  # type: ignore[union-attr]
    engine.wake()
