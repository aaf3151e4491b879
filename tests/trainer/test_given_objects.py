"""Model, tokenizer and optimiser objects in place of what a config names: equal runs, resume, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
import transformers
from reward_functions import by_length
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import rlft
from rlft.errors import ConfigError
from rlft.runs import checkpoint, export
from rlft.trainer.given_optimizer import GivenOptimizer
from rlft.trainer.result import Result


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("given")
    tiny.save_tiny(folder / "model")
    (folder / "data.jsonl").write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(8)))
    return folder


def config(home: Path, out: Path, **settings: Any) -> rlft.Config:
    basics: dict[str, Any] = {
        "model": str(home / "model"),
        "data": str(home / "data.jsonl"),
        "out": str(out),
        "steps": 2,
        "prompts_per_step": 2,
        "sampling": {"group_size": 3, "max_tokens": 4},
        "optim": {"lr": 0.01},
        "lora": {"rank": 4},
    }
    return rlft.Config(**basics | settings)


def numbers(result: Result) -> list[dict[str, float]]:
    """The metrics that a clock or the process has no part in."""
    rows = result._run.metrics()
    return [{k: v for k, v in row.items() if not k.startswith(("perf/", "time/", "step_time"))} for row in rows]


def adapter(result: Result) -> torch.Tensor:
    _, tensors, _ = checkpoint.load_checkpoint(result.adapter, checkpoint.continued_from(result.adapter))
    return tensors["adapter"]


def described(model: nn.Module) -> list[Any]:
    """Everything of a model that a run might change, without the values of an adapter."""
    modules = [
        (
            name,
            type(module),
            module.training,
            sorted(vars(module)),
            {k: len(v) for k, v in vars(module).items() if isinstance(v, dict | list | set)},
        )
        for name, module in model.named_modules()
    ]
    tensors = [
        (name, each.dtype, each.requires_grad, each.grad, each.untyped_storage().nbytes())
        for name, each in model.named_parameters()
    ]
    config: Any = getattr(model, "config", None)
    adapters = [str(each) for each in getattr(model, "peft_config", {}).values()]
    return [modules, tensors, config.to_dict(), adapters]


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: each.detach().clone() for name, each in model.named_parameters() if ".lora_" not in name}


@pytest.fixture(scope="module")
def by_name(home: Path) -> Result:
    return rlft.train(config(home, home / "by-name"), rewards=[by_length])


def test_a_run_with_a_plain_model_equals_the_run_by_name(home: Path, by_name: Result, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(home / "model").train()
    before, weights = described(model), values(model)
    result = rlft.train(config(home, tmp_path / "run"), rewards=[by_length], model=model)
    assert numbers(result) == numbers(by_name) and torch.equal(adapter(result), adapter(by_name))
    assert described(model) == before
    after = values(model)
    assert after.keys() == weights.keys() and all(torch.equal(after[name], weights[name]) for name in weights)
    assert result.generate("say 1", temperature=0) == by_name.generate("say 1", temperature=0)
    again = rlft.train(config(home, tmp_path / "again"), rewards=[by_length], model=model)  # a cell run twice
    assert numbers(again) == numbers(by_name)


@pytest.mark.parametrize("kind", ["rlft", "peft"])
def test_the_adapter_of_a_peft_model_is_trained(home: Path, by_name: Result, tmp_path: Path, capsys, kind: str) -> None:
    """Its settings are taken over; the object keeps the trained values, and everything else as it was."""
    if kind == "rlft":
        model: Any = rlft.load(str(home / "model"), lora=rlft.Lora(rank=4))[0]
    else:
        base = AutoModelForCausalLM.from_pretrained(home / "model")
        settings = peft.LoraConfig(r=4, lora_alpha=32, lora_dropout=0.1, target_modules=["q_proj", "v_proj"])
        model = peft.get_peft_model(base, settings).to(torch.bfloat16)
    before, weights = described(model), values(model)
    result = rlft.train(config(home, tmp_path / "run", lora={}), rewards=[by_length], model=model)
    shown = capsys.readouterr().out
    assert described(model) == before
    assert all(torch.equal(each, weights[name]) for name, each in values(model).items())
    trained = torch.cat([each.detach().flatten() for name, each in model.named_parameters() if ".lora_" in name])
    saved = adapter(result)
    assert torch.equal(trained, saved.to(trained.dtype)) and saved.abs().sum() > 0
    if kind == "rlft":
        assert numbers(result) == numbers(by_name)
        assert "the adapter of the model given is trained: rank 4, alpha 32, on all-linear" in shown
    else:
        assert "rank 4, alpha 32, on q_proj, v_proj" in shown and "the adapter given has 0.1" in shown
        text = (result.out / "config.toml").read_text()
        assert 'dtype = "bfloat16"' in text and 'targets = [\n    "q_proj",\n    "v_proj",\n]' in text
    assert isinstance(result.generate("say 1"), str)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_object_equals_the_run_by_name(home: Path, tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    plain = LlamaForCausalLM(LlamaConfig(vocab_size=103, eos_token_id=2, initializer_range=0.2, **sizes))  # type: ignore
    plain.save_pretrained(tmp_path / "model")
    tiny.tiny_tokenizer().save_pretrained(tmp_path / "model")
    options: dict[str, Any] = {"load_in_8bit": True}
    if kind == "nf4":
        options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32, quantization_config=BitsAndBytesConfig(**options)
    )
    cfg = {"model": str(tmp_path / "model")}
    named = rlft.train(config(home, tmp_path / "a", quantization=kind, **cfg), rewards=[by_length])
    before = described(model)
    result = rlft.train(config(home, tmp_path / "b", **cfg), rewards=[by_length], model=model)
    assert numbers(result) == numbers(named) and described(model) == before
    assert result.generate("say 1", temperature=0) == named.generate("say 1", temperature=0)


def stop_after_one(state: Any, metrics: dict[str, float]) -> None:
    if state.step == 1:
        raise KeyboardInterrupt


def momentum(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


@pytest.mark.parametrize("optimizer", [momentum, torch.optim.NAdam])
def test_a_run_resumes_with_its_objects_to_the_bit_and_not_without(home: Path, tmp_path: Path, optimizer: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(home / "model")
    tokenizer.chat_template = tiny.CHATML.replace("<|im_end|>'", "!<|im_end|>'")

    def objects() -> dict[str, Any]:
        model = rlft.load(str(home / "model"), lora=rlft.Lora(rank=4))[0]
        return {"model": model, "tokenizer": tokenizer, "optimizer": optimizer}

    whole = rlft.train(config(home, tmp_path / "whole"), rewards=[by_length], **objects())
    cfg = config(home, tmp_path / "parts")
    given = objects()
    with pytest.raises(KeyboardInterrupt):
        rlft.train(cfg, rewards=[by_length], callbacks=[stop_after_one], **given)
    with pytest.raises(ConfigError, match=r"given model, tokenizer, optimizer .*resumed with nothing; .*model=\.\.\."):
        rlft.train(cfg, rewards=[by_length], resume=True)
    # The object has the values of step 1; those that the checkpoint started from are in the checkpoint.
    resumed = rlft.train(cfg, rewards=[by_length], resume=True, **given)
    assert numbers(resumed) == numbers(whole) and torch.equal(adapter(resumed), adapter(whole))
    assert resumed.model()[1].chat_template == tokenizer.chat_template
    assert whole.generate("say 1", temperature=0) == resumed.generate("say 1", temperature=0)


def test_a_given_optimizer_is_what_moves_the_adapter(home: Path, by_name: Result, tmp_path: Path) -> None:
    adam = rlft.train(
        config(home, tmp_path / "a"), rewards=[by_length], optimizer=torch.optim.AdamW, optim={"lr": 0.01}
    )
    other = rlft.train(config(home, tmp_path / "b"), rewards=[by_length], optimizer=torch.optim.SGD)
    assert not torch.equal(adapter(other), adapter(by_name)) and not torch.equal(adapter(other), adapter(adam))


def test_a_model_of_no_files_takes_a_tokenizer_and_a_config_file_needs_no_name(home: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM(AutoModelForCausalLM.from_pretrained(home / "model").config)
    model.config._name_or_path = ""
    (tmp_path / "run.toml").write_text(
        f'data = "{home}/data.jsonl"\nout = "{tmp_path}/run"\nsteps = 1\nprompts_per_step = 2\n'
        "[sampling]\ngroup_size = 2\nmax_tokens = 4\n"
    )
    with pytest.raises(ConfigError, match="tokenizer: the model given does not say"):
        rlft.train(tmp_path / "run.toml", rewards=[by_length], model=model)
    result = rlft.train(tmp_path / "run.toml", rewards=[by_length], model=model, tokenizer=tiny.tiny_tokenizer())
    assert 'model = "LlamaForCausalLM"' in (tmp_path / "run" / "config.toml").read_text()
    # The name may be somebody else's model on the hub.
    for use in (lambda: result.generate("a"), result.model, lambda: export.merge(result.out, tmp_path / "merged")):
        with pytest.raises(ConfigError, match=r"does not say what it was loaded from.*PeftModel.from_pretrained"):
            use()
    adapted = peft.PeftModel.from_pretrained(model, result.adapter)
    (saved,) = result.adapter.glob("adapter_model.safetensors")
    assert all(
        torch.equal(each, load_file(saved)[name]) for name, each in peft.get_peft_model_state_dict(adapted).items()
    )


def lora(**settings: Any) -> peft.PeftModel:
    base = tiny.tiny_model().unload()
    return peft.get_peft_model(base, peft.LoraConfig(**{"target_modules": ["q_proj"], **settings}))  # type: ignore


def two_adapters() -> peft.PeftModel:
    model = lora()
    model.add_adapter("second", peft.LoraConfig(target_modules=["q_proj"]))
    return model


def merged() -> peft.PeftModel:
    model = lora()
    model.merge_adapter()
    return model


def trainable_norm() -> peft.PeftModel:
    model = lora()
    model.get_base_model().model.norm.weight.requires_grad_(True)
    return model


def two_dtypes() -> Any:
    model: Any = tiny.tiny_model().unload()
    model.model.layers[0].input_layernorm.double()
    return model


def ia3() -> Any:
    return peft.get_peft_model(
        tiny.tiny_model().unload(), peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    )  # type: ignore


def bert() -> Any:
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=103, **size))


REFUSED = {
    "fills in": (bert, {}, "model: BertForMaskedLM has no head that continues text; give a causal language model"),
    "no model": (lambda: nn.Linear(2, 2), {}, "model: Linear is not a model"),
    "another name": (lambda: renamed("other"), {}, r'was loaded from "other" .* set model = "other"'),
    "no head": (lambda: tiny.tiny_model().unload().model, {}, "model: LlamaModel has no head"),
    "two adapters": (two_adapters, {}, "model: its adapters are default, second, .*delete_adapter"),
    "ia3": (ia3, {}, "model: its adapter is of the kind IA3"),
    "dora": (lambda: lora(use_dora=True), {}, "model: its adapter has use_dora = True"),
    "modules to save": (lambda: lora(modules_to_save=["lm_head"]), {}, "has modules_to_save = "),
    "ranks": (lambda: lora(rank_pattern={"q_proj": 2}), {}, "rank_pattern = .*lora.resume_from"),
    "merged": (merged, {}, r"merged into the base; call model.unmerge_adapter\(\)"),
    "trained base": (trainable_norm, {}, "model: 1 weights of its base require a gradient, .*norm.weight"),
    "head": (lambda: lora(target_modules=["lm_head"]), {}, "model: its adapter is on lm_head"),
    "rank": (lora, {"lora": {"rank": 5}}, "lora.rank = 5: the adapter of the model given has 8"),
    "resume_from": (lora, {"lora": {"resume_from": "x"}}, 'lora.resume_from = "x": the model given has an adapter'),
    "two dtypes": (
        two_dtypes,
        {},
        r"model: model.layers.0.input_layernorm.weight of the LlamaForCausalLM given is torch.float64, and its "
        r"embeddings are torch.float32; cast the model with .to\(torch.float32\)",
    ),
    "dtype": (lora, {"dtype": "bfloat16"}, 'dtype = "bfloat16": the model given has "float32"'),
    "quantization": (lora, {"quantization": "nf4"}, 'quantization = "nf4": the model given has "none"'),
}


def renamed(name: str) -> Any:
    model = tiny.tiny_model().unload()
    model.config._name_or_path = name
    return model


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trained_is_refused_by_name(home: Path, tmp_path: Path, case: str) -> None:
    make, settings, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        rlft.train(config(home, tmp_path / "run", **{"lora": {}, **settings}), rewards=[by_length], model=make())
    assert not (tmp_path / "run").exists()


class Forgets(torch.optim.SGD):
    """Counts its steps where no state_dict has them."""

    count = 0

    def step(self, closure: Any = None) -> None:
        self.count += 1
        self.param_groups[0]["params"][0].data.sub_(self.count * 0.01)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1), "a SGD is bound to other parameters.*lambda"),
        (3, "optimizer: a int makes no optimiser"),
        (nn.Linear, "optimizer: the class Linear makes no optimiser"),
        (lambda parameters: parameters, "it returned a list"),
        (lambda _: torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1), "is not over the parameters"),
        (torch.optim.LBFGS, "LBFGS"),
        (Forgets, "Forgets keeps something outside of its state"),
    ],
)
def test_an_optimizer_that_cannot_be_honoured_is_refused(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GivenOptimizer(given)


def test_settings_that_a_given_optimizer_would_not_follow_are_refused() -> None:
    flat = nn.Parameter(torch.ones(3))
    with pytest.raises(ConfigError, match=r"optim.lr = 1e-05: the optimizer given has lr = 0.01"):
        GivenOptimizer(momentum).over(flat, rlft.Optim())
    with pytest.raises(ConfigError, match=r"optim.eps = 0.1: a setting of AdamW"):
        GivenOptimizer(torch.optim.SGD).over(flat, rlft.Optim(eps=0.1))
    assert GivenOptimizer(momentum).state_bytes(10) == 40 and GivenOptimizer(torch.optim.SGD).state_bytes(10) == 0
    assert GivenOptimizer(torch.optim.AdamW).state_bytes(10) == 80


def test_another_tokenizer_than_of_transformers_is_refused(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tokenizer: str is not a tokenizer of transformers"):
        rlft.train(config(home, tmp_path / "run"), rewards=[by_length], tokenizer="x")  # type: ignore[arg-type]


def test_a_run_that_fails_puts_the_model_back(home: Path, tmp_path: Path) -> None:
    def broken(completions: list[str], **_: Any) -> list[float]:
        raise ValueError("broken")

    model = AutoModelForCausalLM.from_pretrained(home / "model")
    before = copy.deepcopy(described(model))
    with pytest.raises(rlft.RewardError):
        rlft.train(config(home, tmp_path / "run"), rewards=[broken], model=model)
    assert described(model) == before
