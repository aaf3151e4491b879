"""The same faults in runs of TRL's trainers, with its defaults but for what `SETTINGS` says, on its own or Unsloth's
model.

A sampler of one's own is a `rollout_func`, which TRL documents for that; it hands log-probs over. Without one, TRL
samples by transformers' `generate`. TRL compares sampler and trainer where it samples by its vLLM (`use_vllm`), which
it then corrects for and logs; it has no such comparison for a `rollout_func` without vLLM.
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from material import (
    AT,
    ATTENTION,
    GROUP,
    LR,
    PROMPTS,
    STEPS,
    TOKENS,
    Outcome,
    finite,
    home,
    no_sinks,
    raise_ours,
    rendered_twice,
    rows_of,
    scaled_twice,
    short,
    with_nan_weight,
    with_two_bos,
    wrong_weight,
)
from torch import Tensor
from trl_sampler import Sampler, Stale, alone

UNSLOTH = False
"""Whether the models are Unsloth's; then it was imported before TRL."""
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

SETTINGS: dict[str, Any] = {
    "max_steps": STEPS,
    "learning_rate": LR,
    "logging_steps": 1,
    "report_to": [],
    "save_strategy": "no",
    "use_cpu": not torch.cuda.is_available(),
    "bf16": False,
    "disable_tqdm": True,
    "seed": 1,
    "per_device_train_batch_size": PROMPTS * GROUP,
}
"""Of all trainers. fp32, since it is a small model on a CPU."""


def model_of(folder: Path, kind: str, dropout: float = 0.0) -> dict[str, Any]:
    """What a trainer is given as its model: a path with PEFT's settings, or Unsloth's model with its adapter."""
    if UNSLOTH:
        from unsloth import FastLanguageModel  # pyright: ignore[reportMissingImports]

        model, _ = FastLanguageModel.from_pretrained(str(folder / "model"), max_seq_length=512, load_in_4bit=False)
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        return {
            "model": FastLanguageModel.get_peft_model(
                model, r=4, lora_alpha=16, lora_dropout=dropout, target_modules=targets
            )
        }
    from peft import LoraConfig

    lora = LoraConfig(r=4, lora_alpha=16, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")
    return {"model": str(folder / "model"), "peft_config": lora}


def loading(kind: str) -> dict[str, Any]:
    """Settings of a trainer by where its model comes from: it loads a path in fp32, and Unsloth has loaded bf16."""
    if UNSLOTH:
        return {"bf16": True}
    return {"model_init_kwargs": {"dtype": "float32", "attn_implementation": ATTENTION.get(kind, "sdpa")}}


def rewards_of(folder: Path, name: str) -> Callable[..., Any]:
    """A function of the folder's reward file."""
    spec = importlib.util.spec_from_file_location("rewards", folder / "rewards.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "model")


def grpo(
    folder: Path,
    kind: str = "llama",
    reward: str = "digits",
    dropout: float = 0.0,
    chat: bool = False,
    sampler: Any = None,
    **settings: Any,
) -> Any:
    """A GRPO trainer over the folder's prompts."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    args = GRPOConfig(
        output_dir=str(folder / "run"),
        num_generations=GROUP,
        max_completion_length=TOKENS,
        shuffle_dataset=False,
        **(SETTINGS | loading(kind) | settings),
    )
    tokenizer = tokenizer_of(folder)
    if not chat:
        tokenizer.chat_template = None
    return GRPOTrainer(
        args=args,
        reward_funcs=[rewards_of(folder, reward)],
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows_of(folder / "prompts.jsonl")),
        rollout_func=sampler,
        **model_of(folder, kind, dropout),
    )


def sft(folder: Path, kind: str = "llama", **settings: Any) -> Any:
    """An SFT trainer over the folder's recorded completions."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    tokenizer = tokenizer_of(folder)
    tokenizer.chat_template = None
    return SFTTrainer(
        args=SFTConfig(output_dir=str(folder / "run"), **(SETTINGS | loading(kind) | settings)),
        train_dataset=Dataset.from_list(rows_of(folder / "recorded.jsonl")),
        processing_class=tokenizer,
        **model_of(folder, kind),
    )


class Warned(logging.Handler):
    """Collects what the libraries warn of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(" ".join(record.getMessage().split())[:200])


@contextmanager
def warnings_into(found: list[str]) -> Iterator[None]:
    """Warnings and log lines of level WARNING, each once."""
    handler, loggers = Warned(), [logging.getLogger(name) for name in ("transformers", "trl", "accelerate", "peft")]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for logger in loggers:
            logger.addHandler(handler)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeHandler(handler)
            texts = [*handler.texts, *(" ".join(str(w.message).split())[:200] for w in caught)]
            found += list(dict.fromkeys(texts))


def run(
    make: Callable[[], Any], inject: Callable[[Any], None] | None = None, said: Callable[[Any], str] | None = None
) -> Outcome:
    """Train with a fault. said: what a run that ends has to say."""
    warned: list[str] = []
    made: list[Any] = []
    try:
        with warnings_into(warned):
            made.append(make())
            if inject is not None:
                inject(made[0])
            made[0].train()
        note = f"ends green; {said(made[0]) if said else state(made[0])}"
        return Outcome("finished", made[0].state.global_step, note, tuple(warned))
    except Exception as error:  # whatever a library raises is what is recorded
        raise_ours(error)
        step = made[0].state.global_step + 1 if made else 0
        return Outcome("stopped_at_step", step, f"{short(error)}; exit code 1", tuple(warned))


def state(trainer: Any) -> str:
    """Whether the adapter is finite, and the losses that were logged."""
    losses = [f"{row['loss']:.4g}" for row in trainer.state.log_history if "loss" in row]
    where = "adapter finite" if finite(trainer.model) else f"adapter NOT finite, loss logged as {losses[-1]}"
    return f"{where}; losses logged {' '.join(losses)}"


def rewarded(trainer: Any) -> str:
    """What was logged of the rewards in the step of the fault."""
    values = trainer.state.log_history[AT - 1]
    return f"reward logged as {values['reward']} in step {AT}, {state(trainer)}"


# ---- a sampler of one's own ----------------------------------------------------------------------------------------


def sampled(folder: Path, kind: str = "llama", **fault: Any) -> Outcome:
    """A run with such a sampler, and how far it and the trainer were apart in the last step."""
    sampler = Sampler(**fault)

    def said(trainer: Any) -> str:
        apart = f"{sampler.apart[-1]:.2g} nat per token in the last step" if sampler.apart else "not sampled"
        return f"sampler and trainer {apart}, {state(trainer)}"

    return run(lambda: grpo(folder, kind, sampler=sampler), said=said)


# ---- the trainer -----------------------------------------------------------------------------------------------------


def nan_adapter(trainer: Any) -> None:
    """A weight of the adapter is nan after the update of step `AT`."""
    from transformers import TrainerCallback

    class Spoil(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step + 1 == AT:
                with torch.no_grad():
                    [p for n, p in kwargs["model"].named_parameters() if "lora_B" in n][-1][0, 0] = float("nan")

    trainer.add_callback(Spoil())


def changed_loss(change: Callable[[Any, Tensor], Tensor]) -> Callable[[Any], None]:
    """The loss of the first micro-batch of step `AT`, between forward and backward."""

    def inject(trainer: Any) -> None:
        compute, seen = trainer.compute_loss, []

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            loss = compute(*args, **kwargs)
            if trainer.state.global_step + 1 != AT or seen:
                return loss
            seen.append(1)
            return (change(trainer, loss[0]), loss[1]) if isinstance(loss, tuple) else change(trainer, loss)

        trainer.compute_loss = wrapped

    return inject


def early_update(trainer: Any, loss: Tensor) -> Tensor:
    """An update of the optimiser before the backward, with gradients of ones."""
    for p in trainer.model.parameters():
        if p.requires_grad:
            p.grad = torch.ones_like(p)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    return loss


def packed_hybrid(folder: Path) -> Outcome:
    """`packing=True` of SFT; its first batch's log-probs beside those of each sequence alone."""
    home(folder, "lfm2")
    apart: list[float] = []

    def compare(trainer: Any) -> None:
        batch = next(iter(trainer.get_train_dataloader()))
        ids, positions = batch["input_ids"][0], batch["position_ids"][0]
        inputs = {k: v for k, v in batch.items() if k not in ("labels", "completion_mask")}
        with torch.no_grad():
            logits = trainer.model.eval()(**inputs).logits[0]
            ends = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
            for start, end in itertools.pairwise(ends):
                own = logits[start : end - 1].log_softmax(-1).gather(1, ids[start + 1 : end, None]).squeeze(1)
                apart.append(float((own - alone(trainer.model, ids[start:end])).abs().max()))
        trainer.model.train()

    return run(
        lambda: sft(folder, "lfm2", packing=True, max_length=256, per_device_train_batch_size=1),
        compare,
        lambda t: f"log-probs up to {max(apart):.2g} nat from each sequence alone, {state(t)}",
    )


def sinks_dropped(folder: Path) -> Outcome:
    """gpt_oss with an attention that has no sinks, as one asks for it."""
    home(folder, "gpt_oss")
    asked = {} if UNSLOTH else {"model_init_kwargs": {"dtype": "float32", "attn_implementation": "sdpa"}}
    return run(lambda: sft(folder, "gpt_oss", **asked))


def dropout(folder: Path) -> Outcome:
    """How far log-probs with dropout are from those without, after the run."""
    home(folder)

    def said(trainer: Any) -> str:
        ids = torch.tensor(tokenizer_of(folder)("say 17 and 203")["input_ids"])
        ids = ids.to(next(trainer.model.parameters()).device)
        torch.manual_seed(0)
        with torch.no_grad():
            off = alone(trainer.model.eval(), ids)
            on = torch.stack([alone(trainer.model.train(), ids) for _ in range(64)])
        apart = float((on - off).abs().mean())
        return f"log-probs that train {apart:.2g} nat from those sampled from, {state(trainer)}"

    return run(lambda: grpo(folder, dropout=0.05), said=said)


def marked(make: Callable[[], Any]) -> Outcome:
    """How often the mark that begins a prompt or turn is in the first prompt that the model is given."""
    seen: list[int] = []

    def count(_: Any, args: Any, kwargs: Any) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if not seen and ids is not None:
            seen.append(int((ids[0] == 1).sum()))

    def watch(trainer: Any) -> None:
        trainer.model.get_base_model().register_forward_pre_hook(count, with_kwargs=True)

    return run(make, watch, lambda t: f"{seen[0]} marks of a beginning in the first prompt, {state(t)}")


def absent(why: str) -> Callable[[Path], Outcome]:
    return lambda _: Outcome("not_injected", 0, why)


RUNS: dict[str, Callable[[Path], Outcome]] = {
    "none": lambda f: run(lambda: grpo(home(f))),
    "stale_adapter": absent("it has no copy of the adapter without vLLM"),
    "stale_adapter_unseen": lambda f: sampled(home(f), spoiled=Stale()),
    "scaled_twice": lambda f: sampled(home(f), spoiled=lambda t: scaled_twice(t.model, "default")),
    "sampler_temperature": lambda f: sampled(home(f), temperature=0.6),
    "sampler_weight": lambda f: sampled(home(f), spoiled=lambda t: wrong_weight(t.model)),
    "few_sequences_off": lambda f: sampled(home(f), off=2.0),
    "no_sinks": lambda f: sampled(home(f, "gpt_oss"), "gpt_oss", spoiled=lambda t: no_sinks(t.model)),
    "two_bos": lambda f: marked(lambda: grpo(with_two_bos(f))),
    "rendered_twice": lambda f: marked(lambda: grpo(rendered_twice(f), chat=True)),
    "packed_hybrid": packed_hybrid,
    "packed_sinks": sinks_dropped,
    "recorded_temperature": absent("cannot happen: SFT has no temperature"),
    "dropout": dropout,
    "update_before_backward": lambda f: run(
        lambda: grpo(home(f)), changed_loss(early_update), lambda t: f"gradients of another adapter, {state(t)}"
    ),
    "buffer_left": absent("cannot happen: it has no buffer of the adapter"),
    "other_tile": absent("cannot happen: one kernel for both"),
    "nan_adapter": lambda f: run(lambda: grpo(home(f)), nan_adapter),
    "nan_adapter_recorded": lambda f: run(lambda: sft(home(f)), nan_adapter),
    "nan_weight": lambda f: run(lambda: sft(with_nan_weight(f))),
    "nan_loss": lambda f: run(
        lambda: grpo(home(f), per_device_train_batch_size=PROMPTS * GROUP // 2, gradient_accumulation_steps=2),
        changed_loss(lambda _, loss: loss * float("nan")),
    ),
    "nan_rewards": lambda f: run(lambda: grpo(home(f), reward="nan"), said=rewarded),
    "reward_raises": lambda f: run(lambda: grpo(home(f), reward="raises")),
    "infinite_reward": lambda f: run(lambda: grpo(home(f), reward="infinite"), said=rewarded),
    "reward_hangs": lambda f: run(lambda: grpo(home(f), reward="hangs")),
    "reward_dies": lambda f: run(lambda: grpo(home(f), reward="dies")),
    "empty_completions": lambda f: sampled(home(f), empty=True),
}
"""Fault -> its run in a folder."""
