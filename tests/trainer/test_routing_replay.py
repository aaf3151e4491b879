"""Experts that an engine reports go through a whole run, also a resumed one, and through the probe.

On ranks: test_ranks.py. vLLM's own: tests/rollout/test_vllm_routes.py. Here the eager engine samples, and what it
reports is drawn at random, so that a choice that went to another token, or was left out, would change the run.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mixtures import save_mixture
from reward_functions import digits
from safetensors.torch import load_file
from test_engines import PLAN
from test_experts import adapted
from tiny import prompts, tiny_tokenizer
from torch import Tensor
from vllm_models import register

import rlft
from rlft.config.data import Sampling
from rlft.config.run import Engine, Parity
from rlft.errors import ConfigError
from rlft.models.policy import Policy
from rlft.rollout.eager import EagerEngine
from rlft.rollout.vllm import start as vllm_start
from rlft.routes import Routes
from rlft.trainer import agreement, engines
from rlft.trainer.validate import problems
from rlft.types import Rollout

STEPS = 2


class Reporting(EagerEngine):
    """An engine whose rollouts have random experts, the same for the same completion; prompts are held once."""

    def generate(self, prompts: Any, *given: Any, **more: Any) -> list[Rollout]:
        rollouts = super().generate(prompts, *given, **more)
        held = {id(prompt): _random(len(prompt.ids), prompt.index) for prompt in prompts}
        return [
            replace(
                rollout, routes=Routes(held[id(rollout.prompt)], _random(len(rollout.completion_ids), rollout.seed))
            )
            for rollout in rollouts
        ]


def _random(tokens: int, seed: int) -> np.ndarray:
    """Two of eight experts for each token in each of two layers."""
    return np.random.default_rng(seed).random((tokens, 2, 8)).argsort(2)[..., :2].astype(np.uint8)


def train(home: Path, out: str, kind: type[EagerEngine] = Reporting, **more: Any) -> dict[str, Tensor]:
    """Run, and return the adapter. kind: what engine.name = "eager" starts."""
    given: dict[str, Any] = {
        "model": str(home / "model"),
        "data": str(home / "prompts.jsonl"),
        "out": str(home / out),
        "dtype": "float64",
        "steps": STEPS,
        "prompts_per_step": 3,
        "sampling": {"group_size": 4, "max_tokens": 6},
        "lora": {"rank": 4, "alpha": 8},
        "optim": {"lr": 1e-2, "minibatches": 1, "passes": 2},
        "algo": {"name": "grpo", "kl_coef": 0.05},
        # Random experts are another policy than the one that sampled.
        "parity": {"probe": False, "ceiling": 50.0},
        "engine": {"name": "eager"},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "EagerEngine", kind)
        rlft.train(rlft.Config(**given | more), rewards=[digits], resume=more.get("if_exists") == "resume")
    (*_, last) = sorted((home / out / "checkpoints").iterdir())
    return load_file(last / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    save_mixture(home / "model")
    (home / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": f"say {i}"}) for i in range(9)))
    return home


@pytest.fixture(scope="module")
def whole(home: Path) -> dict[str, Tensor]:
    return train(home, "whole")


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def test_a_resumed_run_is_bit_equal_and_reported_experts_count(home: Path, whole: dict[str, Tensor]) -> None:
    train(home, "resumed", steps=1)
    assert apart(train(home, "resumed", if_exists="resume"), whole) == 0
    assert apart(train(home, "live", EagerEngine), whole) > 1e-3
    log = (home / "live" / "log.txt").read_text()
    assert log.count("routing replay is off: the eager engine does not report the experts that it chooses; each") == 1


def test_the_probe_measures_both_ways_and_steps_repeat_it() -> None:
    """The engine's routers are moved before it samples, and back before the trainer scores."""

    class Moved(EagerEngine):
        def generate(self, prompts: Any, *given: Any, **more: Any) -> list[Rollout]:
            self._move(0.01)
            rollouts = [
                replace(rollout, routes=self._routes(rollout)) for rollout in super().generate(prompts, *given, **more)
            ]
            self._move(-0.01)
            return rollouts

        def _move(self, size: float) -> None:
            g = torch.Generator().manual_seed(2)
            for layer in self.policy.base.model.layers:
                weight = layer.mlp.gate.weight.data
                weight += size * torch.randn(weight.shape, generator=g, dtype=weight.dtype)

        def _routes(self, rollout: Rollout) -> Routes:
            found: list[Tensor] = []
            gates = [layer.mlp.gate for layer in self.policy.base.model.layers]
            hooks = [gate.register_forward_hook(lambda *given: found.append(given[2][2])) for gate in gates]
            with torch.no_grad():
                ids = torch.tensor([rollout.prompt.ids + rollout.completion_ids])
                self.policy.model(input_ids=ids, use_cache=False, output_hidden_states=True)
            for hook in hooks:
                hook.remove()
            routes = torch.stack(found, 1).to(torch.uint8).numpy()
            return Routes(routes[: len(rollout.prompt.ids)], routes[len(rollout.prompt.ids) :])

    policy = Policy(adapted("qwen3_moe", torch.float32))
    engine: Any = Moved(policy, tiny_tokenizer(), 8)
    engine.policy = policy
    lines: list[str] = []
    cfg: Any = type("Cfg", (), {"parity": Parity(), "sampling": Sampling(max_tokens=12), "seed": 3})
    limit = agreement.agree(cfg, policy, engine, prompts(12), PLAN, lines.append)
    assert limit.probed.keys() == {"parity/probe", "parity/probe_live"}
    assert 0 < limit.probed["parity/probe"] < 0.7 * limit.probed["parity/probe_live"]
    assert lines[-1].startswith("with experts that the trainer's routers choose they would agree to ")


def test_what_cannot_be_honoured_is_refused_before_a_run(home: Path) -> None:
    """Recorded completions, and the eager engine where "auto" takes it."""
    (home / "sft.jsonl").write_text("\n".join(json.dumps({"prompt": f"say {i}", "completion": "1"}) for i in range(9)))
    options, out = Engine(routing_replay=True), str(home / "refused")
    cfg = rlft.Config(str(home / "model"), str(home / "sft.jsonl"), out, steps=1, algo="sft", engine=options)
    assert problems(cfg) == [
        "engine.routing_replay = true: recorded completions come without an engine's experts; leave it out"
    ]
    eager = r"engine.routing_replay = true: the eager engine does not report the experts .*; set .auto. or false"
    with pytest.raises(ConfigError, match=eager):
        train(home, "refused", engine=options, steps=1)
    with pytest.raises(ConfigError, match=eager):
        rlft.sampler(adapted("qwen3_moe", torch.float32), tiny_tokenizer(), engine=options)


def test_a_run_with_vllm_replays_and_says_so(vllm_visible: None, tmp_path: Path) -> None:
    save_mixture(tmp_path / "model", hidden_size=128, head_dim=32)  # sizes that vLLM's CPU build has
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": f"say {i}"}) for i in range(9)))
    options: dict[str, Any] = {"name": "vllm", "max_seqs": 8, "routing_replay": True}
    vllm_start.environment()
    with vllm_start.quiet(), vllm_start.defaults_restored():
        register("Qwen3MoeForCausalLM")
    train(tmp_path, "run", EagerEngine, engine=options, dtype="float32", steps=1, parity={"probe_prompts": 2})
    (line,) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert line["parity/probe"] < 1e-4 and line["parity/probe_live"] < 1e-4
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "routing replay: training takes the experts that vLLM chose, in 2 layers" in log
    assert "with experts that the trainer's routers choose they would agree to " in log
