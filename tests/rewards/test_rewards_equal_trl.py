"""Reward functions of every kind that TRL's users have: rlft's rewards against those of TRL 1.16's own code.

`GRPOTrainer._calculate_rewards` itself is called, on a trainer made without its model; the same functions go through
`rlft.rewards.score`, as names (in a worker) and as objects (here).
"""

from __future__ import annotations

import functools
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import records
import torch

from rlft.config.data import Reward
from rlft.rewards.score import RewardFunction, build_rewards, score
from rlft.types import Prompt, Rollout

TEXTS = ["The answer is \\boxed{\\frac{1}{2}}", "so 4", "<think>hm</think> $\\frac{3}{4}$", "", "7 7 7 7 7 7 7 7 7 7"]
SOLUTIONS = ["0.5", "5", "$\\frac{3}{4}$", "no number at all", "7"]
STATE = {"global_step": 30, "max_steps": 100, "epoch": 0.5}

FILE = '''
"""Written for TRL; not one line is changed."""
def plain(completions, **kwargs):
    return [float(len(c)) for c in completions]

def chat(prompts, completions, **kwargs):
    return [float(len(c[0]["content"])) + 0.5 * len(p[0]["content"]) for p, c in zip(prompts, completions)]

def columns(prompts, completions, completion_ids, solution, level, chosen, **kwargs):
    assert "prompt" not in kwargs and "completion" not in kwargs
    return [len(i) + len(s) + n + len(w) for i, s, n, w in zip(completion_ids, solution, level, chosen)]

def nones(completions, **kwargs):
    return [None if i % 2 else 1.5 for i, _ in enumerate(completions)]

def numpy_scalars(completions, **kwargs):
    import numpy as np
    return [np.float32(0.1) * len(c) for c in completions]

def numpy_array(completions, **kwargs):
    import numpy as np
    return np.array([len(c) / 3 for c in completions])

def torch_scalars(completions, **kwargs):
    import torch
    return [torch.tensor(0.1 * len(c), dtype=torch.float64) for c in completions]

def torch_tensor(completions, **kwargs):
    import torch
    return torch.linspace(-1, 1, len(completions), dtype=torch.bfloat16)

def bools_and_ints(completions, **kwargs):
    import numpy as np
    return [True, False, 3, np.int64(4), np.bool_(True)]

def generator(completions, **kwargs):
    return (0.25 * len(c) for c in completions)

def nans(completions, **kwargs):
    import numpy as np
    return [float("nan"), np.nan, None, 2.0, np.float32("nan")]

def curriculum(completions, trainer_state, **kwargs):
    return [trainer_state.global_step / trainer_state.max_steps * len(c) for c in completions]

def logs(completions, log_metric=None, log_extra=None, **kwargs):
    log_metric("longest", max(map(len, completions)))
    import numpy as np
    log_metric("shortest", np.float32(min(map(len, completions))))
    log_metric("shortest", 10)
    for c in completions:
        log_extra("first", [c[:1]])
    log_extra("length", [len(c) for c in completions])
    return [0.0] * len(completions)

async def judged(completions, **kwargs):
    import asyncio
    await asyncio.sleep(0.01)
    return [None if not c else len(c) / 7 for c in completions]

class Grader:
    def __init__(self, scale): self.scale = scale
    def __call__(self, completions, **kwargs): return [self.scale * len(c) for c in completions]

class AsyncGrader(Grader):
    __name__ = "async_grader"
    async def __call__(self, completions, **kwargs): return [self.scale + len(c) for c in completions]

grader, async_grader = Grader(2.0), AsyncGrader(0.5)

def maths(completions, solution, **kwargs):
    """math_verify with its default timeouts, which are SIGALRMs."""
    from math_verify import parse, verify
    rewards = []
    for text, right in zip(completions, solution):
        gold = parse(right)
        rewards.append(float(verify(gold, parse(text))) if gold else None)
    return rewards
'''

PLAIN = [
    "plain",
    "columns",
    "nones",
    "numpy_scalars",
    "numpy_array",
    "torch_scalars",
    "torch_tensor",
    "bools_and_ints",
    "generator",
    "nans",
    "curriculum",
    "logs",
    "judged",
    "grader",
    "async_grader",
    "maths",
]


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("trl") / "trl_rewards.py"
    path.write_text(FILE)
    sys.path.insert(0, str(path.parent))
    yield path
    sys.path.remove(str(path.parent))


@pytest.fixture(scope="module")
def module(file: Path) -> Any:
    import trl_rewards  # type: ignore[import-not-found]

    return trl_rewards


def rows(conversational: bool = False) -> list[dict[str, Any]]:
    made = []
    for i, solution in enumerate(SOLUTIONS):
        text = f"question {i}"
        prompt = [{"role": "user", "content": text}] if conversational else text
        made.append({"prompt": prompt, "completion": "never seen", "solution": solution, "level": i, "chosen": "x" * i})
    return made


def trl_rewards(functions: list[Any], data: list[dict[str, Any]]) -> tuple[torch.Tensor, Any]:
    """TRL's [rows, functions], and the trainer with what was logged."""
    from transformers import TrainerState
    from trl.trainer import grpo_trainer as trl

    trainer = object.__new__(trl.GRPOTrainer)
    trainer.accelerator = SimpleNamespace(device=torch.device("cpu"), is_main_process=True)
    trainer.args = SimpleNamespace(report_to=[])
    trainer.state = TrainerState(**STATE)
    trainer.reward_funcs, trainer.reward_processing_classes = functions, [None] * len(functions)
    trainer.reward_func_names = [trl.get_callable_name(f) for f in functions]
    trainer.environments = None
    trainer._pending_extra_logs, trainer._pending_metrics = defaultdict(list), defaultdict(list)
    thread, trainer.async_loop, ready = trl.start_event_loop_in_daemon(name="TRL")
    ready.wait()
    try:
        prompts = [row["prompt"] for row in data]
        chat = isinstance(prompts[0], list)
        completions = [[{"role": "assistant", "content": t}] if chat else t for t in TEXTS]
        return trainer._calculate_rewards(data, prompts, completions, [list(range(len(t))) for t in TEXTS]), trainer
    finally:
        trl.shutdown_event_loop_in_daemon(thread, trainer.async_loop)
        trainer.async_loop.close()  # which TRL leaves to the end of the process


def rollouts(data: list[dict[str, Any]]) -> list[Rollout]:
    made = []
    for i, (row, text) in enumerate(zip(data, TEXTS, strict=True)):
        prompt = Prompt((1,), row, i, tuple(row["prompt"]) if isinstance(row["prompt"], list) else None)
        ids = tuple(range(len(text)))
        made.append(Rollout(prompt, ids, (True,) * len(ids), None, text, "stop", 0, 0, 0))
    return made


def ours(rewards: list[Any], data: list[dict[str, Any]]) -> tuple[torch.Tensor, Any, list[RewardFunction]]:
    """rlft's [rows, functions], the parts, and the functions."""
    functions = build_rewards(rewards)
    try:
        _, parts = score(rollouts(data), functions, STATE)
    finally:
        for function in functions:
            function.close()
    assert not any(any(outcome.invalid) for outcome in parts.outcomes.values()), parts.faults()
    return torch.tensor([parts.outcomes[f.name].values for f in functions]).T.float(), parts, functions


def equal(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.fixture(scope="module")
def in_workers(file: Path) -> tuple[torch.Tensor, Any, list[RewardFunction]]:
    return ours([Reward(f"{file}:{name}") for name in PLAIN], rows())


@pytest.fixture(scope="module")
def by_trl(module: Any) -> tuple[torch.Tensor, Any]:
    return trl_rewards([getattr(module, name) for name in PLAIN], rows())


@pytest.mark.parametrize("name", PLAIN)
def test_a_named_function_gives_trls_rewards(name: str, in_workers: Any, by_trl: Any) -> None:
    column = PLAIN.index(name)
    assert in_workers[2][column].apart
    equal(in_workers[0][:, column], by_trl[0][:, column])


def test_the_same_functions_called_here_give_trls_rewards(module: Any, by_trl: Any) -> None:
    """Each as a closure over itself, as in a script or a notebook."""

    def closed(function: Any) -> Any:
        @functools.wraps(function)
        def closure(**kwargs: Any) -> Any:
            return function(**kwargs)

        return closure

    objects = [getattr(module, name) for name in PLAIN]
    given = [f if name.endswith("grader") else closed(f) for name, f in zip(PLAIN, objects, strict=True)]
    mine, _, functions = ours(given, rows())
    assert not any(f.apart for f in functions)
    equal(mine, by_trl[0])


def test_what_is_logged_is_trls(in_workers: Any, by_trl: Any) -> None:
    metrics = in_workers[1].metrics()
    for name, values in by_trl[1]._pending_metrics.items():
        assert metrics[f"custom/{name}"] == pytest.approx(sum(values) / len(values)), name
    columns = records.columns(in_workers[1])
    for name, values in by_trl[1]._pending_extra_logs.items():
        assert columns[f"logs/{name}"] == values, name
    assert set(by_trl[1]._pending_metrics) == {"longest", "shortest"} and len(columns["logs/first"]) == len(TEXTS)


def test_the_sum_mean_and_spread_are_trls(module: Any, file: Path) -> None:
    """Weights, None in one function and in all, the statistics: the lines after `_calculate_rewards` in TRL."""
    from trl.trainer.utils import nanstd

    names, weights = ["plain", "nones", "nans"], [0.5, 2.0, -1.0]
    per_function, _ = trl_rewards([getattr(module, name) for name in names], rows())
    total = (per_function * torch.tensor(weights)).nansum(dim=1)
    functions = build_rewards([Reward(f"{file}:{name}", weight=w) for name, w in zip(names, weights, strict=True)])
    mine, parts = score(rollouts(rows()), functions, STATE)
    for function in functions:
        function.close()
    equal(mine, total)
    metrics = parts.metrics()
    assert metrics["reward"] == pytest.approx(total.nanmean().item())
    assert metrics["reward_std"] == pytest.approx(nanstd(total).item())
    assert metrics["rewards/nones/mean"] == pytest.approx(per_function[:, 1].nanmean().item())
    assert metrics["rewards/plain/std"] == pytest.approx(nanstd(per_function[:, 0]).item())


def test_a_row_that_nothing_applies_to_is_no_reward_in_both_and_said(module: Any) -> None:
    theirs, _ = trl_rewards([module.nones], rows())
    mine, parts, _ = ours([module.nones], rows())
    equal(mine, theirs)
    assert parts.total.isnan().tolist() == theirs.isnan().all(dim=1).tolist() == [False, True, False, True, False]
    assert parts.faults() == ["no reward function applied to 2 of 5 completions (None), which are left out"]


def test_conversational_rows_give_trls_messages(module: Any, file: Path) -> None:
    data = rows(conversational=True)
    equal(ours([f"{file}:chat"], data)[0], trl_rewards([module.chat], data)[0])
    equal(
        ours([lambda prompts, completions, **_: module.chat(prompts, completions)], data)[0],
        trl_rewards([module.chat], data)[0],
    )


def test_trls_own_reward_functions_work_as_they_are() -> None:
    """Functions by object and by name; TRL's factories give objects, which run here."""
    from trl import rewards as r

    data = rows(conversational=True)
    functions = [
        r.accuracy_reward,
        r.reasoning_accuracy_reward,
        r.think_format_reward,
        r.get_cosine_scaled_reward(max_len=30),
        r.get_repetition_penalty_reward(ngram_size=2),
        r.get_soft_overlong_punishment(40, 30),
    ]
    theirs, trainer = trl_rewards(functions, data)
    mine, parts, made = ours(functions, data)
    equal(mine, theirs)
    assert [f.name for f in made] == trainer.reward_func_names
    assert [f.apart for f in made] == [True, True, True, False, False, False]
    equal(ours(["trl.rewards:accuracy_reward", "trl.rewards:think_format_reward"], data)[0], theirs[:, [0, 2]])
    assert (
        records.columns(parts)["accuracy_reward/gold_parsed"]
        == trainer._pending_extra_logs["gold_parsed"][: len(TEXTS)]
    )


def test_partials_are_named_and_scored_as_by_trl(module: Any) -> None:
    def scaled(completions: list[str], scale: float, **kwargs: Any) -> list[float]:
        return [scale * len(c) for c in completions]

    partials = [functools.partial(scaled, scale=3.0), functools.partial(functools.partial(module.judged))]
    theirs, trainer = trl_rewards(partials, rows())
    mine, _, made = ours(partials, rows())
    equal(mine, theirs)
    assert [f.name for f in made] == trainer.reward_func_names == ["scaled", "judged"]


def test_a_function_without_kwargs_gets_what_it_names_where_trl_fails(module: Any) -> None:
    def short(completions: list[str], level: list[int]) -> list[float]:
        return [len(c) * n for c, n in zip(completions, level, strict=True)]

    with pytest.raises(TypeError, match="unexpected keyword argument"):
        trl_rewards([short], rows())
    theirs, _ = trl_rewards([lambda completions, level, **_: short(completions, level)], rows())
    equal(ours([short], rows())[0], theirs)


def test_the_states_that_a_function_sees_are_plain_values_of_the_step() -> None:
    seen: list[Any] = []
    ours([lambda completions, trainer_state, **_: seen.append(trainer_state) or [0.0] * len(completions)], rows())
    assert {name: getattr(seen[0], name) for name in STATE} == STATE


def test_the_comparison_can_fail(module: Any) -> None:
    with pytest.raises(AssertionError):
        equal(
            ours([lambda completions, **_: [1.0] * len(completions)], rows())[0], trl_rewards([module.plain], rows())[0]
        )
