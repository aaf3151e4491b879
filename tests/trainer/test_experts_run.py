"""Runs over a mixture in NF4, from its files to a merged model: SFT and GRPO train experts; the adapter is PEFT's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import base_of, logits
from mixtures import save_mixture
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import rlft
from rlft.config.data import Data, Sampling
from rlft.config.run import Algo, Checkpoint, Config, Lora, Optim, Parity
from rlft.errors import ConfigError
from rlft.models.load import attach_lora
from rlft.runs.export import merge
from rlft.runs.export_base import export_base

LORA = Lora(rank=4, alpha=8)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    save_mixture(home / "model")
    rows = [{"prompt": f"say {i % 4}", "completion": f"{i % 4}{i % 4}"} for i in range(16)]
    (home / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "prompts.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
    return home


def config(home: Path, out: str, algo: str, data: str, **fields: Any) -> Config:
    return Config(
        model=str(home / "model"),
        data=Data(str(home / data), chat="never"),
        out=str(home / out),
        algo=Algo(algo),
        steps=3,
        prompts_per_step=4,
        lora=LORA,
        optim=Optim(lr=0.02),
        quantization="nf4",
        device="cpu",
        checkpoint=Checkpoint(every=3),
        **fields,
    )


@pytest.fixture(scope="module")
def run(home: Path) -> Path:
    """SFT over NF4."""
    rlft.train(config(home, "sft", "sft", "sft.jsonl"))
    return home / "sft"


def metrics(run: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def trained(run: Path) -> Path:
    (folder,) = (run / "checkpoints").glob("step-*")
    return folder


def test_sft_trains_experts_and_the_start_says_so(run: Path) -> None:
    losses, log = metrics(run, "loss"), (run / "log.txt").read_text()
    assert losses[-1] < losses[0] - 0.1
    assert "parameters in nf4 (computed in float32) on the CPU" in log
    assert "each expert has rank 2 (lora.expert_rank): 10.2 k of these parameters, 0.00015 GiB with gradient" in log
    assert "the router is frozen, and no auxiliary loss is added" in log
    assert "experts (2 x 8), not the router" in log and "experts: 2 layers of 8 in nf4, in fused layers" in log
    tensors = load_file(trained(run) / "adapter_model.safetensors")
    moved = {name for name, tensor in tensors.items() if "experts" in name and ".lora_B." in name and tensor.any()}
    assert len(moved) == 4
    saved = json.loads((trained(run) / "adapter_config.json").read_text())
    assert saved["r"] == 4 and saved["rank_pattern"] == {"experts.gate_up_proj": 2, "experts.down_proj": 2}


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys")  # PEFT looks for them among modules alone
def test_the_adapter_in_plain_peft_over_the_decoded_base_has_the_runs_logits(run: Path, tmp_path: Path) -> None:
    export_base(str(run.parent / "model"), tmp_path / "base", dtype="float32")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(trained(run)))
    ours = attach_lora(base_of(run.parent / "model", "nf4"), replace(LORA, resume_from=str(trained(run))), 0)
    assert torch.allclose(logits(plain.eval()), logits(ours), atol=1e-4)


def test_merging_writes_a_weight_per_expert_that_is_the_sum(run: Path, tmp_path: Path) -> None:
    """Into the plain weights, though the run was over 4 bits; in fp32, rounded once."""
    merge(run, tmp_path / "merged", dtype="bfloat16")
    merged, plain = (load_file(path / "model.safetensors") for path in (tmp_path / "merged", run.parent / "model"))
    tensors, scale, r = load_file(trained(run) / "adapter_model.safetensors"), 8 / 2, 2
    prefix, changed = "base_model.model.model.layers.1.mlp.experts.", 0
    # PEFT nests the wrapper of gate_up_proj in that of down_proj, or the other way round; widths tell them apart.
    factors = {tensors[f"{prefix}{w}lora_B.weight"].shape[0]: w for w in ("", "base_layer.")}
    for leaf, rows, parts in (("down_proj", 64, ["down_proj"]), ("gate_up_proj", 128, ["gate_proj", "up_proj"])):
        a, b = (tensors[f"{prefix}{factors[rows]}lora_{x}.weight"] for x in "AB")
        for expert in range(8):
            delta = scale * b.view(rows, r, 8)[:, :, expert] @ a.view(8, r, 64)[expert]
            for part, own in zip(parts, delta.chunk(len(parts)), strict=True):
                name = f"model.layers.1.mlp.experts.{expert}.{part}.weight"
                assert torch.equal(merged[name], (plain[name] + own).bfloat16()), (leaf, name)
                changed += not torch.equal(merged[name], plain[name].bfloat16())
    assert changed > 12


def test_grpo_samples_and_trains_the_same_policy(home: Path) -> None:
    def different(completions: list[str], **_: Any) -> list[float]:
        return [float(len(set(text)) % 3) for text in completions]

    sampling = Sampling(group_size=3, max_tokens=6)
    cfg = config(home, "grpo", "grpo", "prompts.jsonl", sampling=sampling, engine=rlft.Engine(name="eager"))
    rlft.train(cfg, rewards=[different])
    apart = metrics(home / "grpo", "sampling/sampling_logp_difference/mean")
    assert len(apart) == 3 and max(apart) < 1e-5
    assert Parity().probe, "the engine was compared with the trainer, under a random adapter"
    tensors = load_file(trained(home / "grpo") / "adapter_model.safetensors")
    assert sum(bool(t.any()) for name, t in tensors.items() if "experts" in name and ".lora_B." in name) == 4


def test_a_run_resumes_with_the_same_rank_of_experts_alone(run: Path, home: Path) -> None:
    cfg = replace(config(home, "sft", "sft", "sft.jsonl"), steps=4)
    with pytest.raises(ConfigError, match="expert"):
        rlft.train(replace(cfg, lora=replace(LORA, expert_rank=1)), resume=True)
    assert len(rlft.train(cfg, resume=True).metrics()["loss"]) == 4


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys")
def test_a_model_given_with_an_adapter_on_its_experts_is_trained_in_place(home: Path) -> None:
    """PEFT's settings say the rank of experts by a pattern, which [lora] says as expert_rank."""
    base = AutoModelForCausalLM.from_pretrained(home / "model")
    stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    ranks = {"experts.gate_up_proj": 1, "experts.down_proj": 1}
    settings: Any = {"target_modules": ["q_proj", "o_proj"], "target_parameters": stacks, "rank_pattern": ranks}
    model: Any = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **settings))
    ids = torch.arange(10, 20)[None]
    before = {name: p.clone() for name, p in model.named_parameters() if ".lora_B." in name}
    implementation, rlft_ran = base.config._experts_implementation, []

    class Ran(rlft.Callback):
        def on_step(self, *_: Any) -> None:
            rlft_ran.append(base.config._experts_implementation)

    cfg = replace(config(home, "given", "sft", "sft.jsonl"), quantization="auto", lora=Lora())
    rlft.train(cfg, model=model, callbacks=[Ran()])
    assert rlft_ran == ["rlft"] * 3 and base.config._experts_implementation == implementation != "rlft"
    assert (home / "given" / "config.toml").read_text().count("expert_rank = 1") == 1
    moved = [not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before]
    assert len(moved) == 8 and all(moved)
    assert not any("forward" in vars(module) for module in model.modules())
    lora = replace(LORA, targets=("q_proj", "o_proj", "gate_up_proj", "down_proj"), expert_rank=1)
    lora = replace(lora, resume_from=str(trained(home / "given")))
    mine = attach_lora(base_of(home / "model"), lora, 0)
    assert torch.allclose(model.eval()(ids).logits, mine(ids).logits, atol=1e-4)
