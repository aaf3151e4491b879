"""A run on 1, 2 and 4 ranks is one run: the same completions and rewards to the bit, the same weights to rounding.

All ranks are processes of this machine over gloo; those of one number run every case of this file in turn.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from losses import LOSSES, PAIRS, Toy, batches_of, filled_step, rows_of, step
from mixtures import save_mixture
from records import groups
from reward_functions import broken_on_rank_1, digits
from safetensors.torch import load_file
from test_placement import loaded, save_blocks
from test_placement import results as results_of
from test_routing_replay import Reporting
from tiny import save_tiny
from torch import Tensor

import rlft
from rlft import dist
from rlft.batch import count, micro_batch_tokens, pack
from rlft.errors import ConfigError, RewardError, TrainError
from rlft.trainer import engines
from rlft.trainer.metrics import Metrics
from rlft.trainer.optim import Optimizer
from rlft.trainer.prepare import PackedStep, dealt, per_completion
from rlft.trainer.step import dealt_plan
from rlft.types import FinishReason, PackPlan, Prompt, Rollout, Stat, Stats

OURS = ("time/", "perf/", "batch/", "packing/", "step_time", "parity/limit")
"""Metrics that depend on the machine or on how the step is packed."""
Results = dict[str, Any]


# ---- what a rank computes ----


def settings(home: Path, out: Path, **more: Any) -> dict[str, Any]:
    common: dict[str, Any] = {
        "model": str(home / "model"),
        "data": str(home / "prompts.jsonl"),
        "out": str(out),
        "dtype": "float64",
        "steps": 3,
        "prompts_per_step": 5,  # on no number of ranks here the same for all
        "sampling": {"group_size": 4, "max_tokens": 6},
        "lora": {"rank": 4, "alpha": 8},
        "optim": {"lr": 1e-2},
        "if_exists": "overwrite",
    }
    return common | more


RUNS: dict[str, dict[str, Any]] = {
    "grpo": {"optim": {"lr": 1e-2, "minibatches": 2, "passes": 2}, "eval": {"rows": 5, "every": 2}},
    "kl in the reward": {"algo": {"name": "reinforce_plus_plus", "kl": "reward", "kl_coef": 0.1}},
    "dynamic sampling": {"dynamic_sampling": {"rounds": 2}, "curriculum": {"solved_share": 0.9}},
    "small micro-batches": {"algo": {"name": "gspo"}, "packing": {"tokens_per_micro_batch": 40}},
    "dpo": {"algo": "dpo", "data": "pairs.jsonl", "eval": {"rows": 3, "every": 2}},
    "kto": {"algo": "kto", "data": "labels.jsonl"},
    "sft": {"algo": "sft", "data": "sft.jsonl", "eval": {"rows": 3}},
    "routing replay": {"model": "mixture", "parity": {"probe": False, "ceiling": 50.0}},
}
RECORDED = ("dpo", "kto", "sft")


def train(home: Path, name: str, out: Path, **more: Any) -> None:
    wanted = dict(RUNS[name])
    wanted |= {key: str(home / wanted[key]) for key in ("data", "model") if key in wanted}
    cfg = rlft.Config(**settings(home, out, **wanted | more))
    with pytest.MonkeyPatch.context() as patch:
        if name == "routing replay":
            patch.setattr(engines, "EagerEngine", Reporting)
        rlft.train(cfg, rewards=None if name in RECORDED else [digits], resume=more.get("if_exists") == "resume")


def make_home(home: Path) -> None:
    save_tiny(home / "model")
    save_mixture(home / "mixture")
    save_blocks(home / "blocks")
    draw = random.Random(0)
    texts = ["".join(draw.choice("abc 123") for _ in range(draw.randrange(2, 9))) for _ in range(96)]
    rows = {
        "prompts": [{"prompt": f"say {i}"} for i in range(24)],
        "pairs": [{"prompt": f"say {i}", "chosen": texts[i] + "1", "rejected": texts[i + 24] + "2"} for i in range(24)],
        "labels": [{"prompt": f"say {i}", "completion": texts[i] + "x", "label": i % 3 > 0} for i in range(24)],
        "sft": [{"prompt": f"say {i}", "completion": texts[i] + "y"} for i in range(24)],
    }
    for name, lines in rows.items():
        (home / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))


def gradients() -> dict[str, Tensor]:
    """Gradient of every loss over its micro-batches, of which each rank runs those that it is dealt."""
    toy, found = Toy(), {}
    for name in LOSSES:
        made, values = rows_of(name in PAIRS)
        batches = [toy.filled(batch) for batch in batches_of(made, "token_mean", 9, True, values, name in PAIRS)]
        assert len(batches) >= 3
        own = dealt(batches)
        flat = toy.gradient(own, name)[1] if own else torch.zeros_like(toy.gradient(batches, name)[1])
        found[name] = dist.sum_tensor(flat)
    return found


def prepared() -> tuple[float, Tensor]:
    """An entropy quantile, and sums per completion, over micro-batches that are dealt out."""
    policy: Any = SimpleNamespace(entropy=lambda batch: (batch.input_ids * 0.37).sin().abs())
    plan, rollouts = PackPlan("token_mean", 9, 9, 1.0), step()
    quantile = PackedStep(policy, plan, [], batches_of(rollouts, budget=9)).entropy_quantile(0.8)
    return quantile, per_completion(rollouts, plan, lambda batch: batch.input_ids.double() ** 2)


def micro_batches() -> list[Stats]:
    """Four micro-batches; only the third has "kl", and one of them has a nan."""
    values = torch.tensor([[0.1, 0.7, 2.5], [-1.0, 3.0, 0.3], [0.2, 0.2, 9.0], [4.0, -7.0, 1.1]])
    masks = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1], [0, 1, 0]]).bool()
    made = [
        {
            "entropy": Stat.mean(row, mask),
            "loss": Stat("sum", row.double().sum()),
            "low": Stat("min", row.min()),
            "high": Stat("max", row.max()),
            "broken": Stat("max", math.nan if i == 2 else 1.0),
            "nothing": Stat.mean(row, mask & False),
        }
        for i, (row, mask) in enumerate(zip(values, masks, strict=True))
    ]
    made[2]["kl"] = Stat("mean", 0.5, 4.0)
    return made


def metrics() -> dict[str, float]:
    merged = Metrics()
    for stats in micro_batches()[dist.share(4)]:
        merged.add(stats)
    return merged.reduce().values()


def raised(function: Any) -> tuple[str, str, int]:
    """Type, text and exit code of what a call raises."""
    try:
        function()
    except rlft.RlftError as error:
        return type(error).__name__, str(error), error.exit_code
    return "", "", 0


def faults(home: Path, out: Path) -> dict[str, tuple[str, str, int]]:
    """What a rank raises when something is wrong on one of them."""
    base = rlft.Config(**settings(home, out))
    few = rlft.Config(**settings(home, out, prompts_per_step=1))
    odd = rlft.Config(**settings(home, out, seed=42 + (dist.rank() == 1)))
    found = {
        "reward": raised(lambda: rlft.train(base, rewards=[broken_on_rank_1])),
        "few prompts": raised(lambda: rlft.train(few, rewards=[digits])),
        "odd config": raised(lambda: rlft.train(odd, rewards=[digits])),
    }
    before = Optimizer.step

    def flipped(self: Optimizer, *arguments: Any) -> Any:
        update = before(self, *arguments)
        if dist.rank() == 1:
            self._flat.data.view(torch.int32)[3] ^= 1
        return update

    Optimizer.step = flipped  # type: ignore[method-assign]
    try:
        found["flipped bit"] = raised(lambda: rlft.train(base, rewards=[digits]))
    finally:
        Optimizer.step = before  # type: ignore[method-assign]
    return found


def divided(home: Path) -> dict[str, bool]:
    """Whether a base divided over the ranks computes what a whole one does, each rank for itself."""
    found = {}
    for quantization in ("none", "nf4"):
        policies = [loaded(home / "blocks", quantization, place) for place in ("device", "sharded", "host")]
        _, shared, _ = policies
        assert shared.fused is not None and shared.fused.placement is not None
        weight = next(p for name, p in shared.base.named_parameters() if "q_proj.base_layer" in name)
        for place, policy in zip(("sharded", "host"), policies[1:], strict=True):
            for _ in range(1 + dist.rank()):  # ranks need not run as many passes
                pairs = list(zip(results_of(policies[0]), results_of(policy), strict=True))
            equal = all(torch.equal(one, other) for one, other in pairs)
            found[f"{place} {quantization}"] = equal and weight.is_meta
    return found


def compute(home: Path, out: Path) -> Results:
    for name in RUNS:
        train(home, name, out / name)
    found: Results = {"gradients": gradients(), "prepared": prepared(), "metrics": metrics()}
    return found


def _rank(rank: int, world: int, home: str, out: str) -> None:
    """One of several processes; one that hangs says where and ends."""
    faulthandler.dump_traceback_later(780, exit=True)
    torch.set_num_threads(1)
    os.environ["RANK"] = str(rank)  # as torchrun does
    torch.distributed.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=world)
    found = compute(Path(home), Path(out)) | {
        "divided": divided(Path(home)),
        "faults": faults(Path(home), Path(out) / "faults"),
    }
    torch.save(found, f"{out}/{rank}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    make_home(folder)
    return folder


@pytest.fixture(scope="module")
def alone(home: Path) -> tuple[Path, Results]:
    out = home / "alone"
    return out, compute(home, out)


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def ranks(request: pytest.FixtureRequest, home: Path) -> tuple[Path, list[Results]]:
    world = request.param
    out = home / f"ranks{world}"
    out.mkdir()
    torch.multiprocessing.start_processes(_rank, (world, str(home), str(out)), nprocs=world, start_method="forkserver")
    return out, [torch.load(out / str(rank), weights_only=False) for rank in range(world)]


Pair = tuple[tuple[Path, Results], tuple[Path, list[Results]]]


@pytest.fixture
def both(alone: tuple[Path, Results], ranks: tuple[Path, list[Results]]) -> Pair:
    return alone, ranks


# ---- laws ----


@pytest.mark.parametrize("name", RUNS)
def test_completions_rewards_and_advantages_are_equal_and_weights_to_rounding(both: Pair, name: str) -> None:
    (one, _), (many, _) = both
    files = sorted((one / name / "rollouts").iterdir())
    assert len(files) == 3
    for file in files:
        rows, others = (
            pq.ParquetFile(path).read().to_pylist() for path in (file, many / name / "rollouts" / file.name)
        )
        assert len(rows) == len(others) > 0
        for row, other in zip(rows, others, strict=True):
            for key in ("logprobs", "sampler_logprobs"):  # from the second step on by weights that round differently
                values, other_values = row.pop(key), other.pop(key)
                assert (values is None) == (other_values is None)
                assert (values or []) == pytest.approx(other_values or [], abs=1e-5)
            if name == "kl in the reward":
                assert row.pop("advantage") == pytest.approx(other.pop("advantage"), abs=1e-5)
            assert row == other
    weights, other_weights = (
        load_file(folder / name / "checkpoints" / "step-000003" / "adapter_model.safetensors") for folder in (one, many)
    )
    moved = max(float(tensor.abs().max()) for key, tensor in weights.items() if "lora_B" in key)
    # Masters and moments are fp32, and Adam divides by gradients that are nearly 0.
    assert moved > 1e-3 and max(float((weights[k] - other_weights[k]).abs().max()) for k in weights) < 1e-5


@pytest.mark.parametrize("name", RUNS)
def test_logged_numbers_are_equal(both: Pair, name: str) -> None:
    (one, _), (many, _) = both
    lines, others = (
        [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        for folder in (one, many)
    )
    for line, other in zip(lines, others, strict=True):
        assert line.keys() == other.keys() - {"time/wait"}
        for key in line:
            if not key.startswith(OURS):
                atol = 1e-5 if key.startswith(("mismatch/", "sampling/")) else 1e-7  # of log-probs in fp32
                assert other[key] == pytest.approx(line[key], rel=1e-5, abs=atol, nan_ok=True), (line["step"], key)


def test_gradients_of_every_loss_are_equal_to_1e_12(both: Pair) -> None:
    (_, one), (_, many) = both
    for name in LOSSES:
        assert one["gradients"][name].abs().max() > 1e-3, name
        for found in many:
            assert torch.equal(found["gradients"][name], many[0]["gradients"][name]), name
            assert (found["gradients"][name] - one["gradients"][name]).abs().max() < 1e-12, name
    assert filled_step(False)


def test_what_a_loss_asks_of_the_whole_update_is_equal(both: Pair) -> None:
    (_, one), (_, many) = both
    for found in many:
        assert found["prepared"][0] == one["prepared"][0] > 0
        assert torch.equal(found["prepared"][1], one["prepared"][1]) and found["prepared"][1].abs().max() > 0
        assert found["metrics"] == pytest.approx(one["metrics"], rel=1e-15, nan_ok=True)
        assert repr(found["metrics"]) == repr(many[0]["metrics"])  # as text, since nan is not nan
    assert {name: round(value, 6) for name, value in one["metrics"].items() if name != "broken"} == {
        "entropy": 0.533333,  # (0.1 + 0.7 + 0.2 + 0.2 + 9 - 7) / 6: the mean of the ranks' means would differ
        "loss": 13.1,
        "low": -7.0,
        "high": 9.0,
        "kl": 0.125,
    }


def test_only_the_lead_writes_and_nothing_else_is_left(both: Pair) -> None:
    (one, _), (many, _) = both
    names = [
        sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        for folder in (one / "grpo", many / "grpo")
    ]
    assert names[0] == names[1]


def test_a_base_that_lies_elsewhere_computes_the_same_bits(ranks: tuple[Path, list[Results]]) -> None:
    for found in ranks[1]:
        assert found["divided"] == dict.fromkeys(("sharded none", "host none", "sharded nf4", "host nf4"), True)


# ---- faults ----


def test_a_fault_of_one_rank_ends_all_with_its_text_and_exit_code(ranks: tuple[Path, list[Results]]) -> None:
    found = [results["faults"]["reward"] for results in ranks[1]]
    kinds, texts, codes = zip(*found, strict=True)
    assert set(codes) == {RewardError.exit_code} and all("returned 1 rewards for " in text for text in texts)
    assert kinds[1] == "RewardError" and set(kinds[:1] + kinds[2:]) == {"ElsewhereError"}
    assert texts[0] == f"rank 1: {texts[1]}"


def test_more_ranks_than_prompts_are_refused(ranks: tuple[Path, list[Results]]) -> None:
    for results in ranks[1]:
        kind, text, code = results["faults"]["few prompts"]
        assert (kind, code) == ("ConfigError", ConfigError.exit_code)
        assert f"prompts_per_step = 1 on {len(ranks[1])} ranks" in text


def test_a_rank_with_another_config_is_named(ranks: tuple[Path, list[Results]]) -> None:
    for results in ranks[1]:
        kind, text, _ = results["faults"]["odd config"]
        assert kind == "TrainError" and text.startswith("the config (its digest) of rank 1 is ")


def test_a_flipped_bit_of_one_adapter_is_found_in_its_step(ranks: tuple[Path, list[Results]]) -> None:
    for results in ranks[1]:
        kind, text, code = results["faults"]["flipped bit"]
        assert (kind, code) == (
            "TrainError",
            TrainError.exit_code,
        ) and "the adapter (sum of its bits) of rank 1" in text


# ---- arithmetic ----


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
def test_every_item_is_dealt_once_and_no_rank_has_much_more(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(world)
    monkeypatch.setattr(dist, "world", lambda: world)
    for size in (0, 1, 2, 5, 40):
        costs = [draw.expovariate(1.0) for _ in range(size)]
        taken, loads, shares = [], [], []
        for rank in range(world):
            monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
            own = dist.deal(costs)
            assert own == sorted(own)
            taken += own
            loads.append(sum(costs[i] for i in own))
            shares += list(range(size))[dist.share(size)]
        assert sorted(taken) == list(range(size)) == shares
        assert max(loads) <= sum(costs) / world + max(costs, default=0.0)


@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_micro_batches_leave_no_rank_much_more_than_the_others(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(world)
    lengths = [min(8000, int(draw.lognormvariate(6.6, 0.7)) + 16) for _ in range(128)]
    prompts = [Prompt((1,) * 256, {}, i) for i in range(16)]
    rollouts = [
        Rollout(prompts[i // 8], (2,) * length, (True,) * length, None, "", FinishReason.STOP, i % 8, 0, i)
        for i, length in enumerate(lengths)
    ]
    step_groups = groups(rollouts)
    for budget in (8192, 27_000, 65_536):
        plan = PackPlan("token_mean", budget, 8000, 1.0)
        assert dealt_plan(plan, step_groups) is plan  # in one process
        with monkeypatch.context() as patch:
            patch.setattr(dist, "is_alone", lambda: False)
            patch.setattr(dist, "world", lambda: world)
            chosen = dealt_plan(plan, step_groups)
        batches = pack(step_groups, chosen, count(step_groups))
        tokens = [len(batch.input_ids) for batch in batches]
        assert tokens == micro_batch_tokens(step_groups, plan, count(step_groups))(chosen.budget)
        assert chosen.budget <= budget and max(tokens) <= max(budget, 256 + max(lengths))
        print(budget, chosen.budget, len(tokens), max(dist.loads(tokens, world)) * world / sum(tokens))
        # Of micro-batches of at most a rank's share of the tokens, 27,000 leaves the fullest of 4 ranks 1.3 times that.
        assert max(dist.loads(tokens, world)) < 1.1 * sum(tokens) / world


def test_part_of_torchruns_environment_is_refused() -> None:
    with (
        pytest.raises(
            ConfigError, match="WORLD_SIZE = 2 without LOCAL_RANK, MASTER_ADDR, MASTER_PORT: start ranks with"
        ),
        dist.started(1.0, {"WORLD_SIZE": "2", "RANK": "0"}),
    ):
        pass
    with dist.started(1.0, {}):
        assert dist.is_alone() and dist.world() == 1 and dist.lead()
