"""transformers' Trainer and TRL's SFT, DPO and GRPO trainers run fused layers: loss curves and trained adapters equal
those of the same model without them, and no call of the decoder falls back.

A fall-back in words is a warning, which is an error here; `Calls` counts the silent ones.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from fused_pair import one_thread  # noqa: F401
from peft import LoraConfig, PeftModel
from tiny import tiny_model, tiny_tokenizer
from torch import Tensor
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from rlft.models.fused.decoder import FusedDecoder
from rlft.models.fused.fuse import fuse

CHECKPOINTING = "gradient checkpointing has no effect"
COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "logging_steps": 1,
    "report_to": [],
    "save_strategy": "no",
    "learning_rate": 1e-2,
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 1,
    "bf16": False,
    "gradient_checkpointing": False,
}


@pytest.fixture(autouse=True)
def trl_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL asks for this variable where a rollout_func is given."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


class Calls:
    """Counts the calls of a model's decoder and how many of them ran fused layers, with and without gradient."""

    def __init__(self, model: PeftModel) -> None:
        fused = fuse(model)
        assert isinstance(fused, FusedDecoder), fused
        self.all = self.fused = self.without_grad = 0
        hidden = fused.hidden

        def counted(*args: Any, **options: Any) -> Any:
            self.fused += 1
            self.without_grad += not torch.is_grad_enabled()
            return hidden(*args, **options)

        fused.hidden = counted  # type: ignore[method-assign]
        fused.decoder.register_forward_pre_hook(lambda *_: setattr(self, "all", self.all + 1))

    def check(self) -> None:
        assert self.all == self.fused > 0


def curve(trainer: Trainer) -> list[dict[str, float]]:
    """What the trainer logged, without times."""
    skip = ("runtime", "per_second", "time", "epoch")
    return [{k: float(v) for k, v in row.items() if not any(s in k for s in skip)} for row in trainer.state.log_history]


def adapter(model: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


def model_with_noise() -> PeftModel:
    """B is not 0, so that base and adapter differ and every A has a gradient at once."""
    model, g = tiny_model(), torch.Generator().manual_seed(7)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.copy_(torch.randn(p.shape, generator=g) * 0.05)
    return model


def both(make: Callable[[Any], Trainer], start: Callable[[], Any] = model_with_noise) -> tuple[Any, Calls]:
    """Train a plain model and a fused one; curves and adapters must agree. Returns the fused trainer and its calls.

    start: gives the model; one without an adapter is fused once the trainer has made it a PEFT model.
    """
    ends, calls = [], None
    for fuses in (False, True):
        model = start()
        if fuses and isinstance(model, PeftModel):
            calls = Calls(model)
        torch.manual_seed(5)
        trainer = make(model)
        if fuses and calls is None:
            calls = Calls(trainer.model)  # type: ignore[arg-type]
        before = adapter(trainer.model)
        trainer.train()
        ends.append((trainer, curve(trainer), adapter(trainer.model)))
        assert any(not torch.equal(v, before[n]) for n, v in ends[-1][2].items())
    (_, plain, want), (trainer, ours, got) = ends
    assert calls is not None
    calls.check()
    assert sum("loss" in row for row in plain) >= 3
    assert [row.keys() for row in plain] == [row.keys() for row in ours]
    for a, b in zip(plain, ours, strict=True):
        for name, value in a.items():
            assert b[name] == pytest.approx(value, abs=1e-5, rel=1e-5), name
    assert want.keys() == got.keys()
    # Adam divides a gradient by its own size: one that is nothing but rounding moves its weight by anything up to lr.
    off = torch.cat([(got[name] - value).abs().flatten() for name, value in want.items()])
    assert (off > 2e-5).double().mean() < 1e-3 and off.max() < 1e-3
    return trainer, calls


def rows(count: int) -> list[dict[str, list[int]]]:
    """Rows of 3 to 20 tokens, of which the first two are not trained."""
    g, made = torch.Generator().manual_seed(0), []
    for _ in range(count):
        ids = torch.randint(3, 103, (int(torch.randint(3, 21, (1,), generator=g)),), generator=g).tolist()
        made.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100, -100, *ids[2:]]})
    return made


def plain_trainer(model: PeftModel, folder: Path, **options: Any) -> Trainer:
    settings = COMMON | {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2} | options
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **settings),
        train_dataset=Dataset.from_list(rows(16)),
        eval_dataset=Dataset.from_list(rows(6)),
        data_collator=DataCollatorForSeq2Seq(tiny_tokenizer()),
    )


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5}])
def test_transformers_trainer(options: dict[str, Any], tmp_path: Path) -> None:
    """Padded batches with labels, with evaluation between the steps; then the saved adapter is read back."""
    trainer, calls = both(lambda model: plain_trainer(model, tmp_path, **options))
    assert calls.without_grad == 4  # two evaluations of two batches: Trainer sets config.use_cache to False
    trainer.save_model(str(tmp_path / "saved"))
    again = PeftModel.from_pretrained(tiny_model().unload(), str(tmp_path / "saved"))
    trained = adapter(trainer.model)
    assert trained and all(torch.equal(v, trained[n]) for n, v in adapter(again).items())


def test_gradient_checkpointing_has_no_effect_and_that_is_said_once(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=CHECKPOINTING) as said:
        trainer, _ = both(lambda model: plain_trainer(model, tmp_path, gradient_checkpointing=True))
    assert trainer.model.get_base_model().get_decoder().gradient_checkpointing
    assert sum(CHECKPOINTING in str(w.message) for w in said) == 1


def test_a_resumed_trainer_goes_on_as_the_whole_run(tmp_path: Path) -> None:
    """Trainer's own checkpoints, of adapter and optimiser, on the fused path."""
    settings = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    ends = []
    for steps, resume in ((4, None), (4, str(tmp_path / "checkpoint-2"))):
        model = model_with_noise()
        calls = Calls(model)
        trainer = plain_trainer(model, tmp_path, max_steps=steps, **settings)
        trainer.train(resume_from_checkpoint=resume)
        calls.check()
        ends.append(adapter(model))
    assert all(torch.equal(v, ends[1][n]) for n, v in ends[0].items())


# ---- TRL ---------------------------------------------------------------------------------------------------------


def sft(model: PeftModel, data: list[dict[str, Any]], folder: Path, tokenizer: Any = None, **options: Any) -> Trainer:
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(output_dir=str(folder), **(COMMON | {"max_steps": 3, "max_length": 64} | options))
    return SFTTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(data),
        eval_dataset=Dataset.from_list(data[:4]),
        processing_class=tokenizer or tiny_tokenizer(),
    )


COMPLETIONS = [{"prompt": "ab" * (1 + i % 3), "completion": "xyz" * (1 + i % 5)} for i in range(12)]


def test_sft_with_padding_trains_on_completions(tmp_path: Path) -> None:
    _, calls = both(lambda model: sft(model, COMPLETIONS, tmp_path, eval_strategy="steps", eval_steps=3))
    assert calls.without_grad == 1


@pytest.mark.parametrize("options", [{"packing": True}, {"padding_free": True, "max_length": None}])
def test_sft_with_several_sequences_in_a_row(options: dict[str, Any], tmp_path: Path) -> None:
    """Rows without a mask, whose positions start again: transformers' sdpa keeps them apart, and so do fused layers."""
    seen = []

    def make(model: PeftModel) -> Trainer:
        decoder: Any = model.get_base_model().get_decoder()  # type: ignore[operator]
        decoder.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
        return sft(model, COMPLETIONS, tmp_path, per_device_train_batch_size=2, **options)

    both(make)
    assert all(call["attention_mask"] is None and (call["position_ids"] == 0).sum() > 1 for call in seen)


def test_sft_on_the_assistants_turns_only(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    data = [
        {"messages": [{"role": "user", "content": "q" * (1 + i % 4)}, {"role": "assistant", "content": "a" * (1 + i)}]}
        for i in range(12)
    ]
    both(lambda model: sft(model, data, tmp_path, tokenizer, assistant_only_loss=True))


def test_trls_defaults_of_autocast_and_checkpointing(tmp_path: Path) -> None:
    """TRL turns both on. Over a bf16 model autocast changes nothing; over an fp32 one transformers' layers run."""
    defaults: dict[str, Any] = {"bf16": True, "gradient_checkpointing": True}
    model = tiny_model()
    fused = fuse(model)
    assert isinstance(fused, FusedDecoder)
    with pytest.warns(UserWarning, match=r"autocast to torch.bfloat16 over weights of torch.float32") as said:
        sft(model, COMPLETIONS, tmp_path, **defaults).train()
    assert fused.last_plan is None
    assert sum("rlft:" in str(w.message) for w in said) == 1

    curves = []
    for fuses in (False, True):
        model = tiny_model(torch.bfloat16)
        calls = Calls(model) if fuses else None
        trainer = sft(model, COMPLETIONS, tmp_path, **defaults)
        if calls is None:
            trainer.train()
        else:
            with pytest.warns(UserWarning, match=CHECKPOINTING):
                trainer.train()
            calls.check()
        assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}
        curves.append([row["loss"] for row in curve(trainer) if "loss" in row])
    assert curves[1] == pytest.approx(curves[0], rel=5e-3)


PAIRS = [{"prompt": "ab" * (1 + i % 3), "chosen": "x" * (2 + i % 5), "rejected": "yz" * (1 + i % 3)} for i in range(8)]


def dpo(model: Any, folder: Path, **options: Any) -> Trainer:
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(output_dir=str(folder), **(COMMON | {"max_steps": 3, "max_length": 64}))
    return DPOTrainer(
        model=model, args=args, train_dataset=Dataset.from_list(PAIRS), processing_class=tiny_tokenizer(), **options
    )


def test_dpo_against_a_copy_of_the_adapter(tmp_path: Path) -> None:
    """Given a PEFT model, TRL adds a second adapter "ref" to it, after it was fused, and switches between the two."""
    trainer, calls = both(lambda model: dpo(model, tmp_path))
    assert set(trainer.model.peft_config) == {"default", "ref"}
    assert calls.without_grad == 3 and calls.fused == 6
    assert curve(trainer)[0]["loss"] == pytest.approx(0.693147, abs=1e-6)


def test_dpo_against_the_base(tmp_path: Path) -> None:
    """TRL makes the PEFT model and disables its adapter for the reference, which is then the base bit for bit."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    other = fuse(model_with_noise())
    assert isinstance(other, FusedDecoder)
    same = []

    def make(base: Any) -> Trainer:
        trainer = dpo(base, tmp_path, peft_config=config)
        decoder: Any = base.get_decoder()

        def compare(_: Any, args: Any, kwargs: Any, out: Any) -> None:
            if not torch.is_grad_enabled() and "forward" in vars(decoder):
                with other.model.disable_adapter():
                    want = other.decoder(**kwargs).last_hidden_state
                same.append(torch.equal(out.last_hidden_state, want))

        decoder.register_forward_hook(compare, with_kwargs=True)
        return trainer

    trainer, calls = both(make, lambda: tiny_model().unload())
    assert set(trainer.model.peft_config) == {"default"}
    assert calls.without_grad == 3 and same == [True] * 3


def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """Recorded completions of unequal length, by the place in the batch."""
    prompt_ids = [tiny_tokenizer()(p)["input_ids"] for p in prompts]
    completions = [[10 + (7 * i + j) % 80 for j in range(2 + 3 * i % 7)] for i in range(len(prompts))]
    return {"prompt_ids": prompt_ids, "completion_ids": completions, "logprobs": [[-4.5] * len(c) for c in completions]}


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float((7 * i) % 3) for i in range(len(completions))]


def grpo(model: PeftModel, folder: Path, **options: Any) -> Trainer:
    from trl import GRPOConfig, GRPOTrainer

    settings = (
        COMMON | {"max_steps": 3, "num_generations": 4, "max_completion_length": 16, "shuffle_dataset": False} | options
    )
    return GRPOTrainer(
        model=model,
        reward_funcs=[reward],
        args=GRPOConfig(output_dir=str(folder), **settings),
        train_dataset=Dataset.from_list([{"prompt": "ab" * (1 + i)} for i in range(6)]),
        processing_class=tiny_tokenizer(),
        rollout_func=rollout,
    )


@pytest.mark.parametrize(
    ("options", "without_grad"),
    [
        ({}, 0),
        ({"beta": 0.1}, 3),
        ({"num_iterations": 2, "max_steps": 4}, 2),
        ({"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "loss_type": "grpo"}, 0),
    ],
)
def test_grpo_on_recorded_completions(options: dict[str, Any], without_grad: int, tmp_path: Path) -> None:
    """beta: log-probs of the adapter "ref" too. Several iterations: old log-probs from a pass without gradient."""
    trainer, calls = both(lambda model: grpo(model, tmp_path, **options))
    assert calls.without_grad == without_grad
    assert all(row["grad_norm"] > 1e-3 for row in curve(trainer) if "grad_norm" in row)
