"""vLLM's kernels of gated DeltaNets and short convolutions on the trainer's weights on a GPU, in every mode.

Random models of two layers in bf16, whose heads are as wide as those of published ones. vLLM's CPU build has no kernels
for OLMo hybrid, and a wrong rotary embedding for LFM2.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from random_base import base_of, config_of
from test_engines import mismatch_of
from test_families import CONV, LINEAR
from test_vllm_families import WIDE
from test_vllm_gpu import same, sleep_under_junk, trained
from tiny import prompts, tiny_tokenizer

from rlft.config.data import Sampling
from rlft.config.run import Engine, Lora
from rlft.environment import version
from rlft.errors import UnsupportedModel
from rlft.models.load import attach_lora, pad_rows
from rlft.models.policy import Policy
from rlft.rollout.vllm.engine import VllmEngine
from rlft.types import Rollout

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("vllm_visible"), pytest.mark.filterwarnings("ignore")]
SAMPLING = Sampling(group_size=4, max_tokens=24)
SIZES = WIDE | {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
HEADS = {"linear_key_head_dim": 128, "linear_value_head_dim": 128}
HYBRIDS: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {**LINEAR, **HEADS},
    "lfm2": CONV,
    "olmo_hybrid": {**LINEAR, **HEADS, "rope_parameters": None},
}
MODES = "dequantized-graphs", "merged", "shared-graphs", "shared"
REFUSED = {
    ("qwen3_5_text", "0.23"): "vLLM 0.23.* has no model Qwen3_5ForCausalLM",  # but one with a vision tower
    ("lfm2", "0.23"): "model.layers.0.conv.in_proj, which is no linear layer",  # it takes no quantization there
}
"""What a version of vLLM cannot sample -> what the error says."""
VERSION = ".".join(str(version("vllm")).split(".")[:2])
SAMPLED = [kind for kind in HYBRIDS if (kind, VERSION) not in REFUSED]
Pair = tuple[Policy, VllmEngine]


def policy_of(kind: str) -> Policy:
    torch.manual_seed(0)
    base = base_of(config_of(kind, **(SIZES | HYBRIDS[kind]))).to("cuda", torch.bfloat16).eval().requires_grad_(False)
    for name, parameter in base.named_parameters():
        if name.endswith("A_log"):
            parameter.data.copy_(torch.randn_like(parameter) - 2)  # a state that is not forgotten at once
    pad_rows(base.get_input_embeddings().weight, base.get_output_embeddings().weight)
    policy = Policy(attach_lora(base, Lora(rank=16, alpha=24), 0))
    trained(policy, size=0.1)
    return policy


def engine_of(policy: Policy, how: str) -> VllmEngine:
    mode, _, graphs = how.partition("-")
    options = Engine("vllm", mode=mode, max_seqs=32, graphs=bool(graphs), compile=False, kv_gib=1.0)  # type: ignore[arg-type]
    return VllmEngine(policy, tiny_tokenizer(), options, 64, 16, note=print, detail=print)


@pytest.mark.parametrize("kind", [kind for kind in HYBRIDS if kind not in SAMPLED])
def test_what_this_vllm_cannot_sample_is_refused_by_name(kind: str) -> None:
    with pytest.raises(UnsupportedModel, match=REFUSED[kind, VERSION]):
        engine_of(policy_of(kind), "dequantized")


@pytest.fixture(scope="module", params=[(kind, mode) for kind in SAMPLED for mode in MODES])
def pair(request, vllm_visible: None) -> Iterator[Pair]:
    kind, how = request.param
    policy = policy_of(kind)
    engine = engine_of(policy, how)
    engine.load_adapter(policy.adapter(), 1)
    yield policy, engine
    engine.close()


def generate(pair: Pair) -> list[Rollout]:
    return pair[1].generate(prompts(4), SAMPLING, (1, 0))


def test_engine_and_trainer_agree(pair: Pair) -> None:
    policy, engine = pair
    rollouts = generate(pair)
    engine.sleep()
    found = mismatch_of(policy, rollouts)
    engine.wake()
    print("mismatch", found.values())
    assert found.tokens > 200 and found.mean < 0.06


def test_states_and_weights_come_back_from_sleep(pair: Pair) -> None:
    _, engine = pair
    first = generate(pair)
    sleep_under_junk(engine)
    assert same(generate(pair), first)


def test_a_changed_adapter_counts(pair: Pair) -> None:
    policy, engine = pair
    first = generate(pair)
    trained(policy, seed=8, size=0.1)
    assert same(generate(pair), first), "the engine has its own copy"
    engine.load_adapter(policy.adapter(), 2)
    assert [r.completion_ids for r in generate(pair)] != [r.completion_ids for r in first]


def test_vllms_blocks_are_those_that_memory_was_asked_for(pair: Pair) -> None:
    engine = pair[1]
    config: Any = engine._llm.llm_engine.vllm_config
    print(config.cache_config.block_size, config.cache_config.num_gpu_blocks, engine._sizes.caches)
    assert config.cache_config.block_size <= engine._sizes.caches.block
    assert config.scheduler_config.max_num_seqs <= config.cache_config.num_gpu_blocks
