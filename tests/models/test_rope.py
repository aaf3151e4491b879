"""longrope and dynamic RoPE: a sequence's tables do not depend on what it is packed, padded or decoded with.

The yardstick is transformers' own call over one row, filled up with tokens behind it where the long factors are due:
nothing looks ahead, so they change only the choice of factors.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import records
import torch
from test_engines import mismatch_of
from test_policy import plan, rollouts, scores
from test_train import grpo, home, metrics, sft  # noqa: F401
from tiny import prompts, tiny_policy, tiny_tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from rlft.config.data import Data, Eval, Sampling
from rlft.config.run import Config, Engine, Lora
from rlft.errors import ConfigError
from rlft.models import rope
from rlft.models.fused.decoder import FusedDecoder
from rlft.models.fused.fuse import fuse
from rlft.models.load import attach_lora
from rlft.models.policy import Policy
from rlft.rollout.eager import EagerEngine
from rlft.runs import checkpoint
from rlft.trainer.engines import longest_sequence, start
from rlft.trainer.loop import train
from rlft.trainer.reopen import evaluate_run, generate_from_run, open_run
from rlft.types import Prompt, Recorded, Rollout

ORIGINAL = 16
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [3.0] * 4,
    "original_max_position_embeddings": ORIGINAL,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
KINDS = ("phi3", "olmo")
"""Fused layers and transformers' own."""


def base_of(kind: str, parameters: dict[str, Any] = LONGROPE, context: int = 64, seed: int = 0, **more: Any) -> Any:
    config = AutoConfig.for_model(
        kind,
        vocab_size=103,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        max_position_embeddings=context,
        rope_parameters=dict(parameters),
        **more,
        # Phi-3's config takes its own over that of the parameters.
        **{k: v for k, v in parameters.items() if k == "original_max_position_embeddings"},
    )
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval().requires_grad_(False)


def policy_of(kind: str, dtype: torch.dtype = torch.float64, **options: Any) -> Policy:
    policy = Policy(attach_lora(base_of(kind, **options).to(dtype), Lora(rank=4, alpha=8), 0), dtype=dtype)
    policy.adapter_params.data.add_(0.02)
    return policy


def rollout(index: int, prompt: int, completion: int) -> Rollout:
    ids = tuple(10 + (7 * index + j) % 80 for j in range(prompt))
    made = tuple(11 + (5 * index + 3 * j) % 70 for j in range(completion))
    return Rollout(Prompt(ids, {}, index), made, (True,) * completion, None, "", "stop", 0, 0, 0)


@torch.no_grad()
def by_transformers(policy: Policy, made: Rollout, length: int) -> list[float]:
    """Log-probs of a completion by transformers' own layers and rule, in a call of so many positions."""
    model = copy.deepcopy(policy.model)
    fresh = type(model.get_base_model().get_decoder().rotary_emb)
    decoder: Any = model.get_base_model().get_decoder()
    decoder.rotary_emb = fresh(decoder.config)
    ids = torch.tensor([made.prompt.ids + made.completion_ids])
    filled = torch.nn.functional.pad(ids, (0, max(0, length - ids.shape[1])), value=50)
    log_p = model(filled, output_hidden_states=True).logits[0].log_softmax(-1)
    return [log_p[t - 1, ids[0, t]].item() for t in range(len(made.prompt.ids), ids.shape[1])]


MIXED = [rollout(0, 4, 6), rollout(1, 6, 30), rollout(2, 3, 9), rollout(3, 2, 20)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", [1, 40, 10_000])
def test_a_short_row_beside_a_long_one_has_the_long_factors_of_the_run(kind: str, budget: int) -> None:
    policy = policy_of(kind)
    assert (policy.fused is not None) == (kind == "phi3")
    policy.fix_rope(36)
    assert policy.rope == rope.Regime("long factors", ORIGINAL, 36)
    got = scores(policy, MIXED, plan(4, budget))
    for row, made in enumerate(MIXED):
        assert got[row] == pytest.approx(by_transformers(policy, made, 36), abs=1e-5)
    # The regime is no formality: by transformers' rule the row alone is elsewhere.
    short = by_transformers(policy, MIXED[0], 0)
    assert max(abs(a - b) for a, b in zip(got[0], short, strict=True)) > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_do_not_depend_on_the_split(kind: str) -> None:
    found = []
    for budget in (1, 40, 10_000):
        policy, the_plan = policy_of(kind), plan(4, budget)
        policy.fix_rope(36)
        policy.flat.zero_grad()
        for batch in records.packed(MIXED, the_plan, torch.linspace(-1, 1, 4)):
            (policy.logprobs(batch)[0] * batch.advantages * batch.weight).sum().backward()
        found.append(policy.flat.gradient.clone())
    assert found[0].abs().max() > 1e-2
    for other in found[1:]:
        assert torch.allclose(found[0], other, atol=1e-12 if kind == "phi3" else 1e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_up_to_the_original_length_all_have_the_short_factors(kind: str) -> None:
    policy = policy_of(kind)
    policy.fix_rope(ORIGINAL)
    assert policy.rope == rope.Regime("short factors", ORIGINAL, ORIGINAL)
    made = [rollout(0, 4, 6), rollout(1, 6, 10)]
    got = scores(policy, made, plan(2))
    for row, one in enumerate(made):
        assert got[row] == pytest.approx(by_transformers(policy, one, 0), abs=1e-5)
    with pytest.raises(AssertionError, match="36 tokens, and rotary tables were fixed for 16"):
        scores(policy, MIXED, plan(4))


@pytest.mark.parametrize("kind", KINDS)
def test_a_cached_decode_past_the_original_length_keeps_its_factors(kind: str) -> None:
    policy = policy_of(kind, torch.float32)
    policy.fix_rope(34)
    engine = EagerEngine(policy, tiny_tokenizer(), batch_size=5)
    engine.load_adapter(policy.adapter(), 0)
    made = engine.generate(prompts(3), Sampling(group_size=2, max_tokens=25), (1, 0))
    assert max(len(r.prompt.ids) + len(r.completion_ids) for r in made) > ORIGINAL + 5
    assert mismatch_of(policy, made).largest < 1e-4
    for r in made:
        assert r.sampler_logprobs == pytest.approx(by_transformers(policy, r, 36), abs=1e-4)
    engine.close()


def test_sampling_that_could_cross_without_a_regime_is_stopped() -> None:
    engine = EagerEngine(policy := policy_of("phi3", torch.float32), tiny_tokenizer())
    engine.load_adapter(policy.adapter(), 0)
    with pytest.raises(AssertionError, match="rotary tables were fixed for 16"):
        engine.generate(prompts(1), Sampling(group_size=1, max_tokens=25), (1, 0))


def test_a_regime_is_kept_by_later_calls_and_any_model_without_one_is_left_alone() -> None:
    policy = policy_of("phi3")
    policy.fix_rope(36)
    policy.fix_rope(10)
    assert policy.rope == rope.Regime("long factors", ORIGINAL, 10)
    policy = policy_of("phi3")
    policy.fix_rope(10, long=True)
    assert policy.rope is not None and policy.rope.factors == "long factors"
    assert str(policy.rope) == "rope: long factors for all sequences: as in the run that trained the adapter"
    plain = tiny_policy()
    before = dict(vars(plain.base.get_decoder().rotary_emb))  # type: ignore[operator,union-attr]
    plain.fix_rope(100_000)
    assert plain.rope is None and rope.limit(plain.base) is None
    assert before == vars(plain.base.get_decoder().rotary_emb)  # type: ignore[operator,union-attr]


# ---- refused -----------------------------------------------------------------------------------------------------


def test_dynamic_rope_is_exact_up_to_the_context_and_refused_beyond() -> None:
    policy = policy_of("llama", parameters=DYNAMIC, context=16)
    policy.fix_rope(16)
    assert policy.rope is None
    made = [rollout(0, 4, 6), rollout(1, 6, 10)]
    got = scores(policy, made, plan(2))
    for row, one in enumerate(made):
        assert got[row] == pytest.approx(by_transformers(policy, one, 0), abs=1e-6)
    with pytest.raises(AssertionError, match="36 tokens"):
        scores(policy, MIXED, plan(4))
    with pytest.raises(
        ConfigError, match=r"rope_type 'dynamic' of LlamaRotaryEmbedding: beyond 16 tokens .* can have 17; lower"
    ):
        policy.fix_rope(17)


def test_a_rotary_module_that_goes_on_choosing_by_call_is_refused() -> None:
    """Phi-3.5-MoE has another scale for long calls."""
    parameters = LONGROPE | {"short_mscale": 1.1, "long_mscale": 1.4}
    base = base_of("phimoe", parameters=parameters, num_local_experts=2)
    with pytest.raises(ConfigError, match="rope_type 'longrope' of PhimoeRotaryEmbedding: beyond 16 tokens"):
        rope.fix(base, 17)
    assert rope.fix(base_of("phimoe", parameters=parameters, num_local_experts=2), 16) is not None


# ---- the longest sequence of a run -------------------------------------------------------------------------------


def config_of(**changes: Any) -> Config:
    base = Config(model="m", data=Data("d"), out="o", steps=1, sampling=Sampling(max_tokens=10), device="cpu")
    return replace(base, **changes)


def rows(*lengths: int, recorded: int = 0) -> list[Prompt]:
    extra = (Recorded((5,) * recorded, (True,) * recorded, 1.0, ""),) if recorded else ()
    return [Prompt((5,) * n, {}, i, None, extra) for i, n in enumerate(lengths)]


def test_the_longest_sequence_of_a_run() -> None:
    policy, eager, vllm = policy_of("phi3"), Engine(name="eager"), Engine(name="vllm", max_model_len=17)
    longest = lambda cfg, *more: longest_sequence(cfg, policy, *more)  # noqa: E731
    assert longest(config_of(engine=eager), rows(3, 5), rows(4), True) == 15
    assert longest(config_of(engine=eager), rows(3, 5), rows(7), False) == 17
    evaluated = config_of(engine=eager, eval=Eval(rows=1, max_tokens=30))
    assert longest(evaluated, rows(3, 5), rows(4), True) == 35
    assert longest(config_of(engine=vllm), rows(3, 5), rows(4), True) == 17
    # max_model_len is about vLLM, and recorded rows are as long as they are.
    assert longest(config_of(engine=replace(vllm, name="eager")), rows(3), [], True) == 13
    assert longest(config_of(), rows(3, 5, recorded=40), [], False) == 45
    assert longest(config_of(), rows(3, recorded=2), rows(9, recorded=3), False) == 12
    assert longest(config_of(eval=Eval(rows=1, max_tokens=60)), rows(3, recorded=2), rows(9), True) == 69
    assert longest(config_of(engine=Engine(max_model_len=99)), rows(3, recorded=2), rows(9), False) == 5


def test_vllm_is_started_with_a_length_that_gives_it_the_trainers_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    from rlft.rollout.vllm import engine

    started: list[int] = []
    monkeypatch.setattr(engine, "VllmEngine", lambda *a: started.append(a[3]))
    policy = policy_of("phi3", torch.float32)

    class Silent:
        def phase(self, _: str) -> None: ...
        def warn(self, _: str) -> None: ...
        def detail(self, _: str) -> None: ...
        def generating(self, *_: int) -> None: ...

    def begin(**changes: Any) -> None:
        start(config_of(engine=Engine(name="vllm", **changes)), policy, None, Silent(), rows(3))  # type: ignore[arg-type]

    begin()
    policy.fix_rope(36)  # by recorded rows, say
    begin()
    begin(max_model_len=20)
    assert started == [13, ORIGINAL + 1, 20]
    with pytest.raises(ConfigError, match=r"engine.max_model_len = 16: vLLM would take longrope's short factors"):
        begin(max_model_len=16)


# ---- whole runs --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Phi-3 whose short factors are for up to 48 tokens; prompts in the template have about 30."""
    folder = tmp_path_factory.mktemp("phi3")
    base = base_of("phi3", LONGROPE | {"original_max_position_embeddings": 48}, context=256)
    base.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def test_a_run_says_its_factors_and_its_engine_agrees(home: Path, tmp_path: Path, long_model: str, capsys) -> None:
    cfg = grpo(home, tmp_path / "run", model=long_model, steps=1, sampling=Sampling(group_size=4, max_tokens=40))
    train(cfg, verbose=True)
    said = capsys.readouterr().out
    assert "rope: long factors for all sequences: the longest can have" in said and "up to 48" in said
    (values,) = [v for v in metrics(tmp_path / "run") if "loss" in v]
    assert values["sampling/sampling_logp_difference/max"] < 1e-4
    # Sampled from in a call of few tokens, the adapter has the factors it was trained with.
    assert checkpoint.continued_from(tmp_path / "run/checkpoints/step-000001")["rope"] == "long factors"
    with open_run(tmp_path / "run") as run, open_run(tmp_path / "run", "base") as untrained:
        assert run.long and untrained.long
    assert isinstance(generate_from_run(tmp_path / "run", ["say 3"], max_tokens=3)[0], str)
    train(replace(cfg, steps=2, sampling=Sampling(group_size=4, max_tokens=3)), resume=True, verbose=True)
    said = capsys.readouterr().out
    assert "rope: short factors for all sequences" in said
    assert "rope of the checkpoint is long factors, here it is short factors" in said


@pytest.mark.parametrize("budget", [1, 10_000])
def test_the_longest_recorded_row_decides_for_all(home: Path, tmp_path: Path, long_model: str, budget: int) -> None:
    """Held-out loss of a run over one long and many short rows: transformers' with the long factors for each."""
    data = [{"prompt": f"say {i}", "completion": "x" * (3 if i else 60)} for i in range(8)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, data)))
    (tmp_path / "held.jsonl").write_text("\n".join(map(json.dumps, [{"prompt": "of 9", "completion": "abc"}] * 2)))
    cfg = sft(
        home,
        tmp_path / "run",
        model=long_model,
        steps=1,
        prompts_per_step=8,
        data=Data(f"{tmp_path}/d.jsonl"),
        eval=Eval(rows=2, data=Data(f"{tmp_path}/held.jsonl")),
    )
    result = train(replace(cfg, packing=replace(cfg.packing, tokens_per_micro_batch=budget)))
    tokenizer, model = tiny_tokenizer(), AutoModelForCausalLM.from_pretrained(long_model)
    chat: Any = [{"role": "user", "content": "of 9"}]
    prompt = tokenizer.encode(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    answer = [*tokenizer.encode("abc"), tokenizer.eos_token_id]
    ids = torch.tensor([prompt + answer + [50] * 60])
    labels = torch.tensor([[-100] * len(prompt) + answer + [-100] * 60])
    with torch.no_grad():
        wanted = model(input_ids=ids, labels=labels).loss.item()
        short = model(input_ids=ids[:, :-60], labels=labels[:, :-60]).loss.item()
    assert result.before["eval/loss"] == pytest.approx(wanted, abs=1e-5) and abs(wanted - short) > 1e-3
    assert evaluate_run(tmp_path / "run")["eval/loss"] == pytest.approx(result.after["eval/loss"], abs=1e-6)


# ---- transformers' callers ---------------------------------------------------------------------------------------


def hidden_of(model: Any, ids: Tensor, mask: Tensor | None, **more: Any) -> Tensor:
    decoder = model.get_base_model().get_decoder()
    hidden = decoder(input_ids=ids, attention_mask=mask, use_cache=False, **more).last_hidden_state
    return hidden if mask is None else hidden[mask.bool()]


@pytest.mark.parametrize("parameters", [LONGROPE, DYNAMIC])
@pytest.mark.parametrize("width", [12, 16, 17, 24])
def test_a_padded_call_has_transformers_tables_for_it(parameters: dict[str, Any], width: int) -> None:
    """Of the columns of the call, those of padding too: fused layers see the rows without them."""
    kind = "phi3" if parameters is LONGROPE else "llama"
    plain, fused = (
        attach_lora(base_of(kind, parameters, context=64 if parameters is LONGROPE else 16), Lora(4), 0)
        for _ in range(2)
    )
    assert isinstance(fuse(fused), FusedDecoder)
    ids = torch.randint(3, 103, (3, width), generator=torch.Generator().manual_seed(0))
    right = torch.tensor([[1] * n + [0] * (width - n) for n in (10, 5, 12)])
    for mask in (right, right.flip(1), None):
        assert torch.allclose(hidden_of(plain, ids, mask), hidden_of(fused, ids, mask), atol=1e-5)
    positions = (right.flip(1).cumsum(1) - 1).clamp(min=0)
    ours, theirs = (hidden_of(m, ids, right.flip(1), position_ids=positions) for m in (fused, plain))
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_rollouts_of_other_tests_fit() -> None:
    """`rollouts` stays below the original length, so that tests over every family need no regime."""
    assert max(len(r.prompt.ids) + len(r.completion_ids) for r in rollouts(3)) <= ORIGINAL
