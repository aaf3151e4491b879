"""LoRA dropout in a run, and an adapter that is continued: what decides the numbers is the config's, and is said."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_train import grpo, home, metrics, sft  # noqa: F401
from tiny import tiny_model

import rlft
from rlft.config.data import Data
from rlft.config.run import Algo, Config, Engine, Lora, Optim
from rlft.errors import ConfigError
from rlft.models.continued import changed_dropout
from rlft.models.load import attach_lora
from rlft.trainer.loop import train
from rlft.trainer.validate import problems


def adapter_with(folder: Path, dropout: float = 0.0, **options: Any) -> str:
    """The folder of a saved adapter that moves log-probs."""
    model = tiny_model(seed=3, lora=Lora(rank=4, alpha=8, dropout=dropout, **options))
    g = torch.Generator().manual_seed(7)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.copy_(torch.randn(p.shape, generator=g) * 0.2)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return str(folder)


def dropout_of(folder: Path) -> float:
    return json.loads((folder / "adapter_config.json").read_text())["lora_dropout"]


def test_grpo_from_an_adapter_with_dropout_runs_without(home: Path, tmp_path: Path, capsys) -> None:
    """Engine and trainer agree to rounding, the sampler's weights are 1, and the checkpoint has the run's dropout."""
    saved = adapter_with(tmp_path / "adapter", 0.05)
    cfg = grpo(home, tmp_path / "run", steps=1, lora=Lora(rank=4, alpha=8, resume_from=saved), engine=Engine("eager"))
    result = train(cfg, verbose=True)
    said = capsys.readouterr().out
    assert f"lora.dropout = 0 from here on; the adapter in {saved} was trained with 0.05" in said and "fused" in said
    values = metrics(tmp_path / "run")[-1]
    assert values["sampling/sampling_logp_difference/max"] < 1e-4
    assert values["sampling/importance_sampling_ratio/min"] == pytest.approx(1, abs=1e-4)
    assert values["sampling/importance_sampling_ratio/max"] == pytest.approx(1, abs=1e-4)
    assert dropout_of(Path(saved)) == 0.05 and dropout_of(result.adapter) == 0


@pytest.mark.parametrize("saved", [0.0, 0.3])
def test_the_dropout_of_the_config_is_that_of_the_training(saved: float, home: Path, tmp_path: Path, capsys) -> None:
    """SFT from an adapter that was saved without and with it: the same numbers."""
    ends = []
    for name, d in (("other", saved), ("same", 0.1)):
        folder = adapter_with(tmp_path / name, d)
        cfg = sft(home, tmp_path / f"run-{name}", steps=2, lora=Lora(rank=4, alpha=8, dropout=0.1, resume_from=folder))
        ends.append(train(cfg))
        told = f"lora.dropout = 0.1 from here on; the adapter in {folder} was trained with {saved:g}"
        assert (told in capsys.readouterr().out) == (d != 0.1)
    losses = [[m["loss"] for m in metrics(e.out)] for e in ends]
    assert losses[0] == losses[1] and dropout_of(ends[0].adapter) == 0.1
    none = train(sft(home, tmp_path / "none", steps=2, lora=Lora(rank=4, alpha=8, resume_from=folder)))
    assert [m["loss"] for m in metrics(none.out)] != losses[0]


def test_load_says_that_it_changes_the_dropout(home: Path, tmp_path: Path) -> None:
    saved = adapter_with(tmp_path / "adapter", 0.05)
    with pytest.warns(UserWarning, match=r"^rlft: lora.dropout = 0 from here on; .* was trained with 0.05$"):
        model, _ = rlft.load(str(home / "model"), lora=Lora(rank=4, alpha=8, resume_from=saved))
    assert not any(isinstance(m, torch.nn.Dropout) and m.p for m in model.modules())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert changed_dropout(Lora(dropout=0.05, resume_from=saved)) is None and changed_dropout(Lora()) is None


# ---- targets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        (
            "all-linear",
            ("q_proj", "v_proj"),
            r"lora.targets = 'all-linear' is 14 layers of this model \(down_proj, .*v_proj\), but the adapter in .* is "
            r"on 4 \(q_proj, v_proj\): set lora.targets = \['q_proj', 'v_proj'\]",
        ),
        (("q_proj",), ("q_proj", "v_proj"), r"is 2 layers of this model \(q_proj\), but the adapter in .* is on 4"),
        (("q_proj", "o_proj"), ("q_proj", "v_proj"), r"4 layers of this model \(o_proj, q_proj\).* on 4 \(q_proj, v_p"),
    ],
)
def test_other_targets_are_refused_and_both_are_named(ours: Any, theirs: Any, message: str, tmp_path: Path) -> None:
    saved = adapter_with(tmp_path / "adapter", targets=theirs)
    with pytest.raises(ConfigError, match=message):
        attach_lora(tiny_model().unload(), Lora(rank=4, alpha=8, targets=ours, resume_from=saved), 0)
    attach_lora(tiny_model().unload(), Lora(rank=4, alpha=8, targets=theirs, resume_from=saved), 0)


def test_an_adapter_in_some_layers_only_is_refused(tmp_path: Path) -> None:
    """PEFT's layers_to_transform: the names of the targets are the same."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], layers_to_transform=[1], task_type="CAUSAL_LM")
    get_peft_model(tiny_model().unload(), config).save_pretrained(str(tmp_path))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"is 2 layers of this model \(q_proj\), but the adapter in .* is on 1"):
        attach_lora(tiny_model().unload(), Lora(rank=4, alpha=8, targets=("q_proj",), resume_from=str(tmp_path)), 0)


# ---- dropout and ratios ------------------------------------------------------------------------------------------


def told(cfg: Config) -> list[str]:
    return [text for text in problems(cfg) if text.startswith("lora.dropout")]


def test_dropout_is_refused_where_the_completions_are_sampled(home: Path, tmp_path: Path) -> None:
    cfg = grpo(home, tmp_path / "run", lora=Lora(rank=4, alpha=8, dropout=0.05))
    for engine in ("auto", "eager"):
        (text,) = told(replace(cfg, engine=Engine(engine)))  # type: ignore[arg-type]
        assert text.startswith("lora.dropout = 0.05: completions are sampled without dropout")
    with pytest.raises(ConfigError, match=r"lora.dropout = 0.05: completions are sampled without dropout"):
        train(cfg)
    assert told(replace(cfg, lora=Lora())) == []
    assert told(sft(home, tmp_path / "run", lora=cfg.lora)) == []
    assert len(told(sft(home, tmp_path / "run", lora=cfg.lora, engine=Engine("eager")))) == 1


def test_dropout_is_refused_where_recorded_completions_have_a_ratio(home: Path, tmp_path: Path) -> None:
    algo = Algo("grpo", {"advantage": "identity"})
    cfg = sft(home, tmp_path / "run", algo=algo, lora=Lora(dropout=0.05), optim=Optim(minibatches=2))
    assert cfg.data == Data(str(home / "sft.jsonl"))
    (text,) = told(cfg)
    assert text.startswith("lora.dropout = 0.05 with 2 updates per rollout batch")
    assert told(replace(cfg, optim=Optim())) == told(replace(cfg, lora=Lora())) == []
    assert told(replace(cfg, algo=Algo("sft"))) == []


@pytest.mark.parametrize("experts", [True, False])
def test_an_adapter_of_a_mixture_of_experts_is_continued(experts: bool, tmp_path: Path) -> None:
    """Targets are compared as rlft names them, the experts' parameters too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=103,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
    )

    def base() -> Any:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)

    lora = Lora(rank=4, alpha=8, experts=experts)
    attach_lora(base(), lora, 0).save_pretrained(str(tmp_path), save_embedding_layers=False)
    again = attach_lora(base(), replace(lora, resume_from=str(tmp_path)), 0)
    assert any("experts" in n for n, _ in again.named_parameters() if "lora_A" in n) == experts
    with pytest.raises(ConfigError, match=r"lora.targets = 'all-linear' is \d+ layers of this model"):
        attach_lora(base(), replace(lora, experts=not experts, resume_from=str(tmp_path)), 0)
