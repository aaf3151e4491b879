"""The experts that vLLM chose come with the rollouts, each at its token, and training takes them.

The engine of this file has so little memory and so short passes that prompts are cut, cached and computed again. In
fp32 its routers choose as those of transformers do over the whole sequence, which is the truth here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_engines import mismatch_of
from test_vllm_experts import policy_of
from tiny import tiny_policy, tiny_tokenizer
from vllm_models import register

from rlft.config.data import Sampling
from rlft.config.run import Engine
from rlft.errors import ConfigError, EngineError
from rlft.models.policy import Policy
from rlft.rollout.routing import replays
from rlft.rollout.vllm import memory, requests, routes
from rlft.rollout.vllm import start as vllm_start
from rlft.rollout.vllm.engine import VllmEngine
from rlft.rollout.vllm.routes import RouteLog, Span, fill, places_of
from rlft.routes import Routes
from rlft.types import FinishReason, Prompt, Rollout

CPU = torch.device("cpu")
SAMPLING = Sampling(group_size=2, max_tokens=24)
Pass = list[Span]


# ---- in vLLM -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sampled(vllm_visible: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A policy, rollouts of an engine whose routers were moved a little, the passes, and the routers' choices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "BATCHED", 100)  # tokens of a pass
        made = requests.parameters
        # vLLM's CPU build cannot cut the prompt of a request with a seed.
        patch.setattr(requests, "parameters", lambda *given: _seedless(made(*given)))
        policy = policy_of("qwen3_moe", "none", tmp_path_factory.mktemp("none"))
        vllm_start.environment()
        with vllm_start.quiet(), vllm_start.defaults_restored():
            register(type(policy.base).__name__)
        engine = VllmEngine(policy, tiny_tokenizer(), Engine("vllm", max_seqs=8, kv_gib=0.0014), 300, 8)
        try:
            yield _sampled(policy, engine)
        finally:
            engine.close()


def _sampled(policy: Policy, engine: VllmEngine) -> Any:
    engine.load_adapter(policy.adapter(), 0)
    log, passes = engine._provider.log, []
    assert log is not None
    log.add = lambda spans: (passes.append(list(spans)), RouteLog.add(log, spans))  # type: ignore[method-assign]
    ids = [tuple(10 + (i * 7 + j * j) % 80 for j in range(142 if i < 2 else 120)) for i in range(6)]
    # In blocks of 128 tokens: completions of the last four need another block for their end.
    rows = [Prompt(each, {"prompt": "p"}, i) for i, each in enumerate([*ids, ids[0][:135] + ids[1][135:140]])]
    before = {router: router.weight.clone() for router in routers(policy)}
    g = torch.Generator().manual_seed(2)
    for router in before:
        router.weight.data += 0.01 * torch.randn(router.weight.shape, generator=g)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # of requests without a seed
        rollouts = engine.generate(rows, SAMPLING, (1, 0))
    chosen = [choices(policy, rollout) for rollout in rollouts]
    for router, weight in before.items():
        router.weight.data.copy_(weight)
    return policy, rollouts, passes, chosen


def _seedless(given: Any) -> Any:
    given.seed = None
    return given


def routers(policy: Policy) -> list[Any]:
    return [layer.mlp.gate for layer in policy.base.model.layers]  # type: ignore[union-attr]


@torch.no_grad()
def choices(policy: Policy, rollout: Rollout) -> np.ndarray:
    """What transformers' routers choose over the sequence, [tokens, layers, k]."""
    found: list[torch.Tensor] = []
    hooks = [router.register_forward_hook(lambda *given: found.append(given[2][2])) for router in routers(policy)]
    ids = torch.tensor([rollout.prompt.ids + rollout.completion_ids])
    policy.model(input_ids=ids, use_cache=False, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    return torch.stack(found, 1).numpy()


def test_each_token_has_the_experts_that_the_engine_chose(sampled: Any) -> None:
    _, rollouts, passes, chosen = sampled
    spans = [span for each in passes for span in each]
    first = {span.request: span for span in reversed(spans)}
    assert any(0 < span.start < 100 and span.count > 1 for span in spans), "prompts were cut"
    assert sum(span.start == 128 for span in first.values()) >= 3, "beginnings of prompts were cached"
    again = [
        span
        for i, span in enumerate(spans)
        if any(o.request == span.request and o.start > span.start for o in spans[:i])
    ]
    assert again, "requests were computed again"
    for rollout, truth in zip(rollouts, chosen, strict=True):
        assert rollout.routes.prompt.dtype == np.uint8
        got = np.concatenate([rollout.routes.prompt, rollout.routes.completion])
        assert np.array_equal(got[:-1], truth[:-1])
        assert rollout.routes.completion[-1].tolist() == [[0, 1], [0, 1]]
    for one, other in zip(rollouts[::2], rollouts[1::2], strict=True):
        assert one.routes.prompt is other.routes.prompt, "held once for a group"


def test_replayed_experts_bring_engine_and_trainer_together(sampled: Any) -> None:
    """The trainer's routers differ a little from those that the engine had."""
    policy, rollouts, _, chosen = sampled
    own = [choices(policy, rollout) for rollout in rollouts]
    moved = np.mean([np.mean(np.sort(a, 2) != np.sort(b, 2)) for a, b in zip(own, chosen, strict=True)])
    assert 0.005 < moved < 0.2, "a few choices differ"
    replayed = mismatch_of(policy, rollouts)
    live = mismatch_of(policy, [replace(rollout, routes=None) for rollout in rollouts])
    assert replayed.tokens == live.tokens > 200
    assert replayed.mean < 0.7 * live.mean


def test_the_rows_of_a_pass_are_in_the_order_of_either_model_runner(vllm_visible: None) -> None:
    from rlft.rollout.vllm.worker import spans_of

    scheduled = SimpleNamespace(
        scheduled_cached_reqs=SimpleNamespace(req_ids=["3-0a1b2c3d", "1-ffffffff"], num_computed_tokens=[9, 4]),
        scheduled_new_reqs=[SimpleNamespace(req_id="7-12345678", num_computed_tokens=128)],
        num_scheduled_tokens={"7-12345678": 5, "3-0a1b2c3d": 1, "1-ffffffff": 1},
    )
    batch = SimpleNamespace(req_ids=["1-ffffffff", "7-12345678", "3-0a1b2c3d"])
    v1, v2 = SimpleNamespace(input_batch=batch), SimpleNamespace(execute_model_state=SimpleNamespace(input_batch=batch))
    assert spans_of(v1, scheduled) == spans_of(v2, scheduled) == [Span(1, 4, 1), Span(7, 128, 5), Span(3, 9, 1)]


# ---- putting passes together -----------------------------------------------------------------------------------------


def rollout(prompt: Prompt, sample: int, tokens: int) -> Rollout:
    ids = tuple(range(tokens))
    return Rollout(prompt, ids, (True,) * tokens, (0.0,) * tokens, "", FinishReason.STOP, sample, 0, 0, routes=Routes())


def logged(passes: list[Pass], rows: int = 64) -> RouteLog:
    """A log of two layers, where the first expert of the n-th row of all passes is n % 100, and the second n % 100 +
    100."""
    log, n = RouteLog(rows, 2, 2, 200, CPU), 0
    for spans in passes:
        for row in range(sum(span.count for span in spans)):
            log.buffer[row] = torch.tensor([n % 100, n % 100 + 100])
            n += 1
        log.add(spans)
    return log


def test_a_position_keeps_its_first_row_unless_it_samples_again() -> None:
    """As a loop over all rows has it, for requests that begin again at random positions."""
    g = np.random.default_rng(3)
    for _ in range(20):
        lengths = g.integers(3, 12, 4).tolist()
        spans = [(int(g.integers(4)), 0, 0)] * 12
        spans = [(request, int(g.integers(0, 9)), int(g.integers(1, 5))) for request, *_ in spans]
        want: list[dict[int, int]] = [{} for _ in lengths]
        reached, row = [0] * len(lengths), 0
        for request, start, count in spans:
            for i in range(count):
                if start + i < lengths[request]:
                    if i == count - 1 and reached[request] <= start + count:
                        want[request][start + i] = row
                    else:
                        want[request].setdefault(start + i, row)
                row += 1
            reached[request] = max(reached[request], start + count)
        got = places_of(np.array(spans), lengths)
        assert [place.tolist() for place in got] == [
            [known.get(i, -1) for i in range(length)] for known, length in zip(want, lengths, strict=True)
        ]


def test_what_is_run_again_in_parts_counts_where_it_samples() -> None:
    """A request that was preempted after token 6, and whose tokens 0 to 7 are run again in two passes."""
    spans = [(0, 0, 4), (0, 4, 1), (0, 5, 1), (0, 6, 1), (0, 0, 5), (0, 5, 3)]
    (places,) = places_of(np.array(spans), [8])
    assert places.tolist() == [0, 1, 2, 3, 4, 5, 6, 14]


def test_a_prompt_may_begin_as_another_one_and_its_completion() -> None:
    """A turn of a conversation, whose cache is that of the turn before."""
    rows = [Prompt((1, 2, 3), {}, 0), Prompt((1, 2, 3, 0, 1, 9), {}, 1)]
    rollouts = [rollout(rows[0], 0, 3), rollout(rows[1], 0, 1)]
    fill(logged([[Span(0, 0, 3)], [Span(0, 3, 1)], [Span(0, 4, 1)], [Span(1, 4, 2)]]), rollouts, 1)
    assert rollouts[1].routes is not None
    assert rollouts[1].routes.prompt[:, 0, 0].tolist() == [0, 1, 2, 3, 5, 6]


def test_a_prompt_is_held_once_and_its_beginning_may_be_anothers() -> None:
    """Prompt 1 begins as prompt 0 does, prompt 2 as prompt 1; request 1 finds all but a token of prompt 0."""
    rows = [Prompt((1, 2, 3), {}, 0), Prompt((1, 2, 4, 5, 6), {}, 1), Prompt((1, 2, 4, 5, 7), {}, 2)]
    passes = [
        [Span(0, 0, 3), Span(1, 2, 1), Span(4, 4, 1), Span(5, 4, 1), Span(2, 2, 3), Span(3, 4, 1)],
        [Span(i, (3, 5, 5)[i // 2], 1) for i in (5, 3, 1)],
    ]
    rollouts = [rollout(rows[i // 2], i % 2, 1 + i % 2) for i in range(6)]
    fill(logged(passes), rollouts, 2)
    routes_of = [each.routes for each in rollouts]
    assert [each.prompt[:, 1, 0].tolist() for each in routes_of[::2] if each] == [
        [0, 1, 2],
        [0, 1, 6, 7, 8],
        [0, 1, 6, 7, 4],
    ]
    assert [each.completion[:, 0, 0].tolist() for each in routes_of if each] == [
        [0],
        [12, 0],
        [0],
        [11, 0],
        [0],
        [10, 0],
    ]
    again = logged(passes)
    many = [replace(each, routes=Routes()) for each in rollouts]
    for limit in (routes.HELD, 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(routes, "HELD", limit)
            fill(logged(passes), many, 2)
        assert many == rollouts, "copies that have moved to the host"
    again.clear()
    with pytest.raises(EngineError, match=r"did not report the experts of every token of row 0, a fault of rlft or"):
        fill(again, many, 2)


def test_missing_experts_stop_the_run() -> None:
    row = Prompt((1, 2, 3), {}, 5)
    for passes in ([[Span(0, 0, 2)], [Span(0, 3, 1)]], [[Span(0, 0, 3)]], [[Span(0, 1, 2)], [Span(0, 3, 1)]]):
        with pytest.raises(EngineError, match="did not report the experts of every token of row 5"):
            fill(logged(passes), [rollout(row, 0, 2)], 1)
    for layers, experts in ((slice(1), [0, 1]), (slice(2), [0, 250])):
        log = logged([])
        log.buffer[:] = torch.tensor([2, 3])
        log.clear()
        log.buffer[:, layers] = torch.tensor(experts)
        log.add([Span(0, 0, 4)])
        with pytest.raises(EngineError, match="did not report the experts of every layer"):
            log.take()


# ---- the setting -----------------------------------------------------------------------------------------------------


def test_the_setting_is_honoured_or_refused_by_name(tmp_path: Any) -> None:
    dense, mixture = tiny_policy(), policy_of("qwen3_moe", "none", tmp_path)
    on, auto, off = (Engine(routing_replay=value) for value in (True, "auto", False))
    assert replays(mixture, auto, "vllm") == replays(mixture, on, "vllm")
    assert replays(mixture, on, "vllm") == (
        True,
        "routing replay: training takes the experts that vLLM chose, in 2 layers",
    )
    done, line = replays(mixture, off, "vllm")
    assert not done and "off: engine.routing_replay = false; each pass of training chooses experts by itself" in line
    done, line = replays(mixture, auto, "eager")
    assert not done and "off: the eager engine does not report the experts that it chooses" in line
    assert replays(dense, auto, "vllm") == replays(dense, off, "vllm") == (False, "")
    with pytest.raises(ConfigError, match=r'engine.routing_replay = true: the eager engine .* set "auto" or false'):
        replays(mixture, on, "eager")
    with pytest.raises(ConfigError, match=r"engine.routing_replay = true: the model has no layers of experts"):
        replays(dense, on, "vllm")
    mixture.__dict__["experts"] = 2**16
    with pytest.raises(ConfigError, match=r"true: 65536 experts of a layer, and their numbers are held in 16 bits"):
        replays(mixture, on, "vllm")
    for name in ("eager", "replay"):
        with pytest.raises(
            ConfigError, match=rf'true: engine.name = "{name}" does not report the experts of each token'
        ):
            Engine(name, routing_replay=True)  # type: ignore[arg-type]
