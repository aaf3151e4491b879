"""Prompts with images by vLLM on a GPU: the trainer's features, positions on three axes, and what is 0 after a wake.

Random models of three layers in bf16, with heads as wide as those of published ones.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import seeing
import torch
from test_engines import mismatch_of
from test_vision import Counted, prompt_of, some_rollouts
from test_vllm_gpu import same, sleep_under_junk, trained

from rlft.config.data import Sampling
from rlft.config.run import Engine, Lora
from rlft.models.load import attach_lora, pad_rows
from rlft.models.policy import Policy
from rlft.rollout.vllm.engine import VllmEngine
from rlft.types import Prompt, Rollout

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("vllm_visible"), pytest.mark.filterwarnings("ignore")]
SAMPLING = Sampling(group_size=4, max_tokens=24)
HEADS = {"qwen2_vl": 64, "qwen2_5_vl": 128, "qwen3_vl": 128}
Pair = tuple[Policy, VllmEngine]


def policy_of(kind: str) -> Policy:
    base = seeing.base_of(kind, torch.bfloat16, HEADS[kind]).to("cuda")
    pad_rows(base.get_input_embeddings().weight, base.get_output_embeddings().weight)
    policy = Policy(attach_lora(base, Lora(rank=16, alpha=24), 0), images=seeing.reader(kind))
    trained(policy, size=0.1)
    return policy


@pytest.fixture(
    scope="module",
    params=[(kind, mode) for kind in HEADS for mode in ("dequantized-graphs", "merged", "shared-graphs", "shared")],
)
def pair(request: pytest.FixtureRequest, vllm_visible: None) -> Iterator[Pair]:
    kind, how = request.param
    mode, _, graphs = how.partition("-")
    policy = policy_of(kind)
    options = Engine("vllm", mode=mode, max_seqs=32, graphs=bool(graphs), compile=False, kv_gib=1.0)
    engine = VllmEngine(policy, seeing.tokenizer(), options, 128, 16, note=print, detail=print)
    engine.load_adapter(policy.adapter(), 1)
    yield policy, engine
    engine.close()


def generate(pair: Pair, prompts: list[Prompt] | None = None) -> list[Rollout]:
    policy, engine = pair
    policy.forget_images()  # at the start of a step
    prompts = [rollout.prompt for rollout in some_rollouts()[::3]] if prompts is None else prompts
    return engine.generate(prompts, SAMPLING, (1, 0))


def mismatch(pair: Pair, rollouts: list[Rollout]) -> float:
    policy, engine = pair
    engine.sleep()
    found = mismatch_of(policy, rollouts)
    engine.wake()
    print("mismatch", found.values())
    assert found.tokens > 60
    return found.mean


def test_engine_and_trainer_agree_and_the_tower_runs_once(pair: Pair) -> None:
    policy, _ = pair
    vision = policy.vision = Counted(policy)
    assert mismatch(pair, generate(pair)) < 0.06
    assert vision.runs == [3]


def test_images_that_change_places_are_seen(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault injection: the features of a prompt's images, of one size, in another order."""
    policy, _ = pair
    assert policy.vision is not None
    own = policy.vision.features
    prompts = [prompt_of(0, "Which has more?", seeing.file_of(2), seeing.file_of(4))]
    right = mismatch(pair, generate(pair, prompts))
    monkeypatch.setattr(policy.vision, "features", lambda images: own(images)[::-1])
    turned = generate(pair, prompts)
    monkeypatch.undo()
    assert mismatch(pair, turned) > 3 * right


def test_everything_comes_back_from_sleep(pair: Pair) -> None:
    """Weights, and the zeros that a decoding step adds behind Qwen3-VL's first layers."""
    _, engine = pair
    first = generate(pair)
    sleep_under_junk(engine)
    assert all(not buffer.any() for buffer in engine._provider.zeros)
    assert same(generate(pair), first)


def test_a_changed_adapter_counts(pair: Pair) -> None:
    policy, engine = pair
    first = generate(pair)
    trained(policy, seed=8, size=0.1)
    assert same(generate(pair), first), "the engine has its own copy"
    engine.load_adapter(policy.adapter(), 2)
    assert [rollout.completion_ids for rollout in generate(pair)] != [rollout.completion_ids for rollout in first]
