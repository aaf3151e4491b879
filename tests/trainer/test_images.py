"""Counting squares in pictures with a tiny random vision-language model: SFT, DPO and GRPO, from files to adapters."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import seeing
import torch
from safetensors.torch import load_file
from small_run import small_run
from tiny import save_tiny

import rlft
from rlft.cli.reward_check import check
from rlft.config.data import Data, Eval, Sampling
from rlft.config.run import Algo, Checkpoint, Config, Lora
from rlft.errors import ConfigError, DataError
from rlft.models import policy
from rlft.models.load import attach_lora
from rlft.models.vision import Vision
from rlft.runs.export import merge
from rlft.runs.folder import Run
from rlft.trainer import validate
from rlft.trainer.loop import train

TIMES = ("time/", "perf/", "step_time")
SIZES = ((24, 16), (16, 40), (32, 24))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, pictures, rows that name them by relative paths, and a reward file."""
    folder = tmp_path_factory.mktemp("home")
    seeing.save(folder / "model")
    (folder / "pictures").mkdir()
    rows = []
    for i in range(12):
        seeing.picture(i % 5, SIZES[i % 3]).save(folder / "pictures" / f"{i}.png")
        images = [f"pictures/{i}.png"] if i % 4 else []
        rows.append({"prompt": f"How many ({i})?", "images": images, "answer": str(i % 5)})
    write = {"prompts": rows}
    write["sft"] = [{**row, "completion": f"{row['answer']} squares"} for row in rows]
    write["pairs"] = [{**row, "chosen": f"{row['answer']} squares", "rejected": "many"} for row in rows]
    for name, lines in write.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "rewards.py").write_text(
        "from pathlib import Path\n"
        "def digits(completions, images, **kwargs):\n"
        "    paths = [Path(path) for some in images for path in some or ()]\n"
        "    assert all(path.is_absolute() and path.is_file() for path in paths)\n"
        "    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]\n"
    )
    return folder


def grpo(home: Path, out: Path, **changes: Any) -> Config:
    own: dict[str, Any] = {
        "prompts_per_step": 2,
        "sampling": Sampling(group_size=3, max_tokens=5),
        "checkpoint": Checkpoint(keep=10),
    }
    return small_run(home, out, **(own | changes))


def sft(home: Path, out: Path, **changes: Any) -> Config:
    data = Data(str(home / "sft.jsonl"))
    return replace(grpo(home, out), **({"data": data, "algo": Algo("sft"), "rewards": ()} | changes))


def metrics(out: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(TIMES)} for line in lines]


def saved(out: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(out / "checkpoints" / f"step-{step:06d}" / "trainer.safetensors")


@pytest.mark.parametrize("make", [grpo, sft])
def test_one_step_and_one_more_equal_two_bit_for_bit(make: Any, home: Path, tmp_path: Path) -> None:
    evals = {"eval": Eval(rows=2, every=1)} if make is grpo else {}
    train(make(home, tmp_path / "two", **evals))
    train(make(home, tmp_path / "one", steps=1, **evals))
    train(make(home, tmp_path / "one", **evals), resume=True)
    whole, parts = saved(tmp_path / "two", 2), saved(tmp_path / "one", 2)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    steps = [[line for line in metrics(tmp_path / run) if "loss" in line] for run in ("two", "one")]
    assert steps[0] == steps[1]
    if make is grpo:
        assert all(step["sampling/sampling_logp_difference/max"] < 1e-5 for step in steps[0])
        rows = Run.resume(tmp_path / "two").read_rollouts(2)
        masked = [piece for row in rows for piece in row["pieces"] if piece in ("<|image_pad|>", "<|video_pad|>")]
        assert steps[0][1]["sampling/image_tokens"] == len(masked)
        names = [json.loads(row["data"]).get("images") for row in rows]
        assert all(not given or given[0].startswith(str(home / "pictures")) for given in names) and any(names)
        page = (tmp_path / "two" / "report.html").read_text()
        assert "pictures/" in page and 'src="data:image/jpeg;base64,' in page
        pictured = {row["group"] for row in rows if row["thumbnails"]}
        assert pictured == {row["group"] for row in rows if json.loads(row["data"]).get("images")}


@pytest.mark.parametrize("kind", ["gemma3", *(pytest.param(k, marks=pytest.mark.slow) for k in ("mllama", "qwen3_vl"))])
@pytest.mark.filterwarnings("ignore:`hidden_state` is deprecated:FutureWarning")
def test_other_families_are_resumed_bit_for_bit(kind: str, home: Path, tmp_path: Path) -> None:
    """Images whose tokens attend in both directions, or that cross-attention reads, and with an adapter on the tower
    (Qwen3-VL); a run is sampled and merged."""
    model = str(seeing.save(home / kind, kind))
    more = {"model": model, "lora": Lora(rank=4, alpha=8, vision=kind == "qwen3_vl")}
    train(grpo(home, tmp_path / "two", **more))
    train(grpo(home, tmp_path / "one", steps=1, **more))
    train(grpo(home, tmp_path / "one", **more), resume=True)
    whole, parts = saved(tmp_path / "two", 2), saved(tmp_path / "one", 2)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    steps = [line for line in metrics(tmp_path / "two") if "loss" in line]
    assert all(step["sampling/sampling_logp_difference/max"] < 1e-5 for step in steps)
    shown = home / "pictures" / "1.png"
    texts = [rlft.generate(tmp_path / "two", "How many?", images=images) for images in ([shown], [])]
    assert texts[0] != texts[1]
    assert merge(tmp_path / "two", tmp_path / "merged", dtype="float32").difference < 1e-4


def test_a_run_trains_the_tower(home: Path, tmp_path: Path) -> None:
    """Features follow the adapter of each step, in the engine and in the trainer, and the merged model has it."""
    run = train(grpo(home, tmp_path / "run", lora=Lora(rank=4, alpha=8, vision=True)))
    steps = [line for line in metrics(tmp_path / "run") if "loss" in line]
    assert all(step["sampling/sampling_logp_difference/max"] < 1e-5 for step in steps)
    adapter = load_file(Path(run.adapter) / "adapter_model.safetensors")
    of_tower = [tensor for name, tensor in adapter.items() if ".visual." in name and ".lora_B." in name]
    assert len(of_tower) == 10 and all(tensor.any() for tensor in of_tower)
    assert merge(run.out, tmp_path / "merged", dtype="float32").difference < 1e-4


def test_an_adapter_on_the_tower_alone_trains_beside_rows_of_text(home: Path, tmp_path: Path) -> None:
    """Their log-probs have no gradient."""
    rows = [{"prompt": f"How many ({i})?", "completion": "some"} for i in range(4)]
    (home / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lora = Lora(rank=4, alpha=8, vision=True, targets=("fc1",), dropout=0.0)
    train(sft(home, tmp_path / "run", data=Data(str(home / "text.jsonl")), lora=lora))
    assert all(line["grad_norm"] == 0 for line in metrics(tmp_path / "run") if "grad_norm" in line)


def test_every_step_runs_the_tower_over_the_same_images_together(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features held from an earlier step would leave fewer images to run together, which a resumed run has not."""
    runs: list[int] = []

    class Counted(Vision):
        def _computed(self, images: Any) -> Any:
            runs.append(len(images))
            return super()._computed(images)

    monkeypatch.setattr(policy, "Vision", Counted)
    rows = (home / "sft.jsonl").read_text().splitlines()
    (home / "two.jsonl").write_text("\n".join(rows[1:3]))
    train(sft(home, tmp_path / "run", data=Data(str(home / "two.jsonl")), steps=3))
    assert runs == [2] * 3


def test_pairs_begin_at_ln_2_and_part(home: Path, tmp_path: Path) -> None:
    train(sft(home, tmp_path / "run", data=Data(str(home / "pairs.jsonl")), algo=Algo("dpo")))
    first, second = metrics(tmp_path / "run")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) and second["loss"] < first["loss"]


def test_a_run_is_sampled_evaluated_and_merged(home: Path, tmp_path: Path) -> None:
    from transformers import AutoImageProcessor

    run = train(grpo(home, tmp_path / "run", steps=1, eval=Eval(rows=2)))
    shown, other = home / "pictures" / "1.png", seeing.picture(4, SIZES[1])
    texts = [rlft.generate(run.out, "How many?", images=images) for images in ([shown], [other], [str(shown)], [])]
    assert texts[0] == texts[2] and len(set(texts)) == 3  # drawn with the same seed
    assert rlft.evaluate(run.out)["eval/rows"] == 2
    shown_lines: list[Any] = []
    assert check(f"{home}/rewards.py:digits", shown_lines.append, data=str(home / "prompts.jsonl"), run=Path(run.out))
    merged = merge(run.out, tmp_path / "merged", dtype="float32")
    assert merged.difference < 1e-4
    assert AutoImageProcessor.from_pretrained(merged.out).merge_size == 2
    assert "AutoModelForImageTextToText" in (merged.out / "README.md").read_text()


def test_images_are_refused_where_nothing_reads_them(home: Path, tmp_path: Path) -> None:
    save_tiny(home / "blind")
    blind = grpo(home, tmp_path / "run", model=str(home / "blind"))
    (problem,) = validate.problems(blind)
    assert problem.startswith("row 1: the row has images, and the model takes text alone")
    with pytest.raises(DataError, match="row 1: the row has images, and the model takes text alone"):
        train(blind)
    with pytest.raises(ConfigError, match="given does not say where its image processor is"):
        train(grpo(home, tmp_path / "run"), model=seeing.base_of("qwen2_vl"), tokenizer=seeing.tokenizer())
    (home / "pictures" / "broken.png").write_bytes(seeing.file_of(3)[:-40])
    rows = [{"prompt": "a", "images": [f"pictures/{name}.png"], "answer": "3"} for name in ("1", "broken", "2")]
    (home / "broken.jsonl").write_text("\n".join(map(json.dumps, rows)))
    broken = grpo(home, tmp_path / "run", data=Data(str(home / "broken.jsonl")))
    (problem,) = validate.problems(broken)
    assert re.search(r"row 1: image 0: .*broken.png is no image that can be read", problem)
    dropped = replace(broken, data=replace(broken.data, on_error="drop"), steps=1, prompts_per_step=2)
    train(dropped)
    assert '"row": 1' in (tmp_path / "run" / "dropped.jsonl").read_text()


def test_a_model_given_is_trained_as_the_one_it_was_loaded_from(home: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    train(grpo(home, tmp_path / "named"))
    model = AutoModelForImageTextToText.from_pretrained(home / "model")
    attributes = {name: sorted(vars(module)) for name, module in model.named_modules()}
    train(grpo(home, tmp_path / "given"), model=model)
    named, given = saved(tmp_path / "named", 2), saved(tmp_path / "given", 2)
    assert all(torch.equal(named[name], given[name]) for name in named)
    assert attributes == {name: sorted(vars(module)) for name, module in model.named_modules()}
    assert model.model.rope_deltas is None
    with rlft.sampler(
        attach_lora(model, Lora(rank=4), 0), seeing.tokenizer(), Sampling(group_size=1, max_tokens=2)
    ) as sampler:
        (rollout,) = sampler.generate([{"prompt": "How many?", "image": seeing.picture(2)}])
    assert len(rollout.prompt.images) == 1


def test_the_tower_gets_no_adapter(home: Path) -> None:
    config = Lora(rank=4, targets=("qkv",))
    with pytest.raises(ConfigError, match=r"lora.targets = .*qkv matches no linear layer of the text decoder"):
        attach_lora(seeing.base_of("qwen2_vl"), config, 0)
    names = list(seeing.policy_of("qwen2_5_vl").adapter())
    assert names and not [name for name in names if "visual" in name]


def test_a_loop_of_ones_own_samples_with_images() -> None:
    policy = seeing.policy_of("qwen2_vl", torch.float32)
    with rlft.sampler(policy, seeing.tokenizer(), Sampling(group_size=2, max_tokens=3)) as sampler:
        rollouts = sampler.generate([{"prompt": "How many?", "image": seeing.picture(2)}, "And here?"])
    assert [len(rollout.prompt.images) for rollout in rollouts] == [1, 1, 0, 0]
