"""Recorded rollouts, and one optimiser step over them by each stack's own trainer.

    trl           TRL's GRPOTrainer, DPOTrainer and SFTTrainer over transformers + PEFT + bitsandbytes, SDPA, gradient
                  checkpointing, micro-batches of 8 sequences (4 pairs; one pack of 8,192 tokens)
    trl-tuned     the same with flash-attn-4 and micro-batches of one sequence (one pair): rows as long as these fill a
                  GPU alone, so this takes the least memory and no more time
    unsloth       the trainers of "trl" with Unsloth's model, Unsloth imported first
    unsloth-rows  no trainer: Unsloth's model with its loss from labels, one row after the other, and AdamW; what its
                  GRPO step could come down to without padding
    rlft          rlft.trainer.loop.loop over an engine that returns the recorded rollouts

What is measured begins when the rollouts are handed over (the return of `rollout_func`, or of `engine.generate`) and
ends with the optimiser step. In it: padding or packing, rewards (recorded, a list), advantages, reference log-probs,
forward, backward, clip, AdamW. Not in it: sampling, logging, and, of TRL's DPO and SFT trainers only, collating, which
transformers does before it says that a step begins. GRPO's loss is without a correction for the sampler in all stacks,
since TRL's has none without its own vLLM.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from stacks import DEVICE, SHAPES, base_of, lora, path_of, tokenizer_of, unsloths_model
from workers import GIB, Desk

ROWS = 64
PACK = 8192
"""Tokens of a pack in SFT, of the stacks that pack to a length."""
MICRO = {"grpo": 8, "dpo": 4, "sft": 1}
"""`per_device_train_batch_size` of TRL and Unsloth."""
UNITS = {"grpo": "sequences", "dpo": "pairs", "sft": "packs"}
EOS = 2


class Work(NamedTuple):
    """Rollouts that are recorded."""

    kind: str
    """"grpo", "dpo" or "sft"."""
    prompt: int
    """Tokens of each prompt; 0: none, the rows are texts that are trained from the second token on."""
    group: int
    """Completions per prompt."""
    outlier: int = 0
    """Tokens of one completion that is longer than the others; 0: none."""
    seed: int = 0
    """Of the lengths and the tokens."""


WORKS = {
    "grpo-step/lognormal": Work("grpo", 256, 8),
    # Seed 0 has a longest completion of 8,000 tokens, and padding makes 6.0 times as many tokens of it; the median of
    # 1,000 seeds is 3.3 times, and 3,911 tokens. Of the seeds, 14 is next to the median in both and in the mean.
    "grpo-step/lognormal-median": Work("grpo", 256, 8, seed=14),
    "grpo-step/lognormal-p1024": Work("grpo", 1024, 8),
    "grpo-step/outlier": Work("grpo", 256, 8, outlier=16_384),
    "dpo-step/lognormal": Work("dpo", 256, 2),
    "sft-step/packed": Work("sft", 0, 1),
}
SCALE = {"tiny": 64}
"""Lengths are divided by this for a shape."""


class Recorded(NamedTuple):
    """64 rollouts: completion i continues prompt i // group."""

    prompts: list[tuple[int, ...]]
    completions: list[tuple[int, ...]]
    rewards: list[float]

    @property
    def tokens(self) -> int:
        """Real tokens: every completion with its own prompt, also where a stack runs a prompt once per group."""
        group = len(self.completions) // len(self.prompts)
        return group * sum(map(len, self.prompts)) + sum(map(len, self.completions))

    @property
    def padded(self) -> int:
        """Tokens when every row is as long as the longest, as in TRL's GRPO step."""
        return len(self.completions) * (max(map(len, self.prompts)) + max(map(len, self.completions)))


def recorded(work: Work, shape: str) -> Recorded:
    """The rollouts of a work, the same in every process: lengths lognormal with a mean of 1,000 tokens (1,113 drawn
    with seed 0), 16 to 8,000, random tokens, EOS at the end. shared/gpu/peer_grpo.py draws the same lengths."""
    scale, words = SCALE.get(shape, 1), min(150_000, SHAPES[shape]["vocab_size"])
    g = torch.Generator().manual_seed(work.seed)
    mean = 1000 / scale
    lengths = torch.exp(torch.randn(ROWS, generator=g) * 0.7 + math.log(mean) - 0.245)
    lengths = lengths.clamp(max(2, 16 // scale), 8 * mean).long()
    if work.outlier:
        lengths[5] = work.outlier // scale

    def drawn(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(10, words, (length,), generator=g).tolist())

    completions = [(*drawn(int(n) - 1), EOS) for n in lengths]
    prompts = [drawn(work.prompt // scale) for _ in range(ROWS // work.group)]
    rewards = {
        "grpo": [float((7 * i) % 3 == 0) for i in range(ROWS)],
        "dpo": [1.0, -1.0] * (ROWS // 2),
        "sft": [1.0] * ROWS,
    }
    return Recorded(prompts, completions, rewards[work.kind])


# ---- TRL and Unsloth -------------------------------------------------------------------------------------------------


def _text(ids: tuple[int, ...]) -> str:
    """What the tokenizer of `stacks` makes the ids of."""
    return " ".join("<eos>" if i == EOS else str(i) for i in ids)


def trainer_of(kind: str, shape: str, model: Any, desk: Desk, micro: int, **more: Any) -> Any:
    """TRL's trainer for a kind of step, which waits at the desk before each. micro: sequences, pairs or packs per
    micro-batch. more: other arguments of the trainer."""
    import trl
    from datasets import Dataset
    from transformers import TrainerCallback

    class Steps(TrainerCallback):
        """A step begins when the desk says so, and its end is handed in there."""

        handed = True
        """The recorded rollouts were taken, which a trainer that ignores `rollout_func` does not do."""

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            desk.wait()
            # TRL and Unsloth import vLLM where it is installed, and vLLM turns cuDNN's attention off, without which
            # padded rows take 1.3 to 1.6 times as long.
            torch.backends.cuda.enable_cudnn_sdp(True)
            self.handed = kind != "grpo"
            desk.start()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if not self.handed:
                raise RuntimeError("the trainer did not call rollout_func")
            desk.stop(note=note)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "grad_norm" in logs:
                desk.last = {"loss": float(logs["loss"]), "norm": float(logs["grad_norm"])}

    common: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": 1_000_000,
        "learning_rate": 1e-6,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "per_device_train_batch_size": micro,
        "use_cpu": DEVICE == "cpu",
    }
    steps = Steps()
    attention = getattr(model.config, "_attn_implementation", "its own")
    note = f"micro-batches of {micro} {UNITS[kind]}, attention {attention}"
    more |= {"callbacks": [steps], "processing_class": tokenizer_of(shape)}
    work = next(work for work in WORKS.values() if work.kind == kind)
    data = recorded(work, shape)
    if kind == "grpo":

        def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
            now = recorded(WORKS[desk.question["work"]], shape)
            found = {
                "prompt_ids": [list(now.prompts[i // work.group]) for i in range(ROWS)],
                "completion_ids": [list(ids) for ids in now.completions],
                "logprobs": [[-math.log(SHAPES[shape]["vocab_size"])] * len(ids) for ids in now.completions],
            }
            steps.handed = True
            desk.start()
            return found

        def reward(completions: list[Any], **columns: Any) -> list[float]:
            return data.rewards

        def refused(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("the trainer samples by itself: it did not call rollout_func")

        model.generate = refused
        config = trl.GRPOConfig(
            **common,
            gradient_accumulation_steps=ROWS // micro,
            num_generations=work.group,
            max_completion_length=32_768,
            shuffle_dataset=False,
        )
        rows = Dataset.from_dict({"prompt": [_text(ids) for ids in data.prompts]})
        return trl.GRPOTrainer(model, [reward], config, train_dataset=rows, rollout_func=rollout, **more)
    if kind == "dpo":
        config = trl.DPOConfig(**common, gradient_accumulation_steps=ROWS // 2 // micro, max_length=None)
        texts = [" " + _text(ids) for ids in data.completions]
        columns = {"prompt": [_text(ids) for ids in data.prompts], "chosen": texts[::2], "rejected": texts[1::2]}
        return trl.DPOTrainer(model, args=config, train_dataset=Dataset.from_dict(columns), **more)
    # More micro-batches than there are packs: a step is all of them, since the last of an epoch ends it.
    config = trl.SFTConfig(
        **common, gradient_accumulation_steps=ROWS, max_length=PACK // SCALE.get(shape, 1), packing=True
    )
    rows = Dataset.from_dict({"input_ids": [list(ids) for ids in data.completions]})
    trainer = trl.SFTTrainer(model, args=config, train_dataset=rows, **more)
    note += f", {len(trainer.train_dataset)} of them of {ROWS} texts"
    return trainer


def _run(trainer: Any, desk: Desk) -> None:
    desk.loaded()
    trainer.train()


def trl(kind: str, shape: str, desk: Desk) -> None:
    model = base_of(shape, DEVICE == "cuda")
    _run(trainer_of(kind, shape, model, desk, MICRO[kind], peft_config=lora()), desk)


def trl_tuned(kind: str, shape: str, desk: Desk) -> None:
    model = base_of(shape, DEVICE == "cuda", "flash_attention_4" if DEVICE == "cuda" else "sdpa")
    _run(trainer_of(kind, shape, model, desk, 1, peft_config=lora()), desk)


def unsloth(kind: str, shape: str, desk: Desk) -> None:
    _run(trainer_of(kind, shape, unsloths_model(shape, True), desk, MICRO[kind]), desk)


def unsloth_rows(kind: str, shape: str, desk: Desk) -> None:
    """One micro-batch per row; the loss of each is its mean, since labels give no other weights."""
    assert kind == "grpo", "labels give no pair's margin, and no mean over a pack"
    model = unsloths_model(shape, True)
    model.train()
    desk.loaded()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6, fused=True)
    while True:
        work = WORKS[desk.wait()["work"]]
        data = recorded(work, shape)
        desk.start()
        for i, completion in enumerate(data.completions):
            prompt = data.prompts[i // work.group]
            ids = torch.tensor([prompt + completion], device=DEVICE)
            labels = ids.clone()
            labels[:, : len(prompt)] = -100
            (model(input_ids=ids, labels=labels).loss * data.rewards[i] / ROWS).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        desk.stop()


# ---- rlft ------------------------------------------------------------------------------------------------------------


def rollouts_of(work: Work, shape: str, padded: bool = False) -> list[Any]:
    """The recorded rollouts as rlft's engines give them. padded: each made as long as the longest by tokens that are
    not trained, which is what a stack that pads runs."""
    from rlft.types import Prompt, Rollout

    data = recorded(work, shape)
    longest = max(map(len, data.completions)) if padded else 0
    prompts = [Prompt(ids, {}, i) for i, ids in enumerate(data.prompts)]
    made = []
    for i, ids in enumerate(data.completions):
        tail = max(0, longest - len(ids))
        mask, logprobs = (True,) * len(ids) + (False,) * tail, None
        if work.kind == "grpo":
            logprobs = (-math.log(SHAPES[shape]["vocab_size"]),) * len(mask)
        prompt, sample = prompts[i // work.group], i % work.group
        made.append(Rollout(prompt, ids + (0,) * tail, mask, logprobs, "", "stop", sample, 0, 0, data.rewards[i]))
    return made


class Replayed:
    """An engine that waits at the desk, sets how the step is to run, and returns the recorded rollouts."""

    SAMPLES = True
    memory: dict[str, int] = {}  # noqa: RUF012 (nobody writes to it)

    def __init__(self, desk: Desk, shape: str) -> None:
        self._desk, self._shape = desk, shape
        self.session: Any = None
        self._rollouts: dict[tuple[str, bool], list[Any]] = {}
        self._before: tuple[Any, ...] = ()
        """How the step before was to run."""

    def generate(
        self, prompts: Any, sampling: Any, seed: tuple[int, ...], finished: Any = None, first: int = 0
    ) -> list[Any]:
        question = self._desk.wait()
        name, padded = question["work"], question.get("padded", False)
        if (name, padded) not in self._rollouts:
            self._rollouts = {(name, padded): rollouts_of(WORKS[name], self._shape, padded)}
        found = [replace(r, policy_version=self.session.trainer.state.step) for r in self._rollouts[name, padded]]
        self._plan(question, [r.prompt for r in found] if WORKS[name].kind == "grpo" else [])
        self.session.recorder.writer.flush()  # the step before is written while a real engine samples
        self._desk.start()
        return found

    def _plan(self, question: dict[str, Any], prompts: list[Any]) -> None:
        """Memory, tokens per micro-batch and sharing as the question says; by default as a run has them."""
        from rlft.trainer.plans import pack_plan_of

        s, allowed = self.session.trainer, question.get("peak")
        tokens, share = question.get("tokens") or "auto", question.get("share", True)
        fused, now = s.policy.fused, (allowed, tokens, share, question.get("padded", False))
        if fused is not None and DEVICE == "cuda" and now != self._before:
            # Graphs of other micro-batches would take memory from these.
            fused.release()
            # Gradient and moments are there already; what a pass may take comes on top.
            rest = torch.cuda.memory_allocated() - self._desk.base
            fused.budget, self._before = None if allowed is None else allowed * GIB - rest, now
        cfg = replace(s.cfg, packing=replace(s.cfg.packing, tokens_per_micro_batch=tokens, share_prefix=share))
        # The plan of a run never changes; here every question has another one.
        object.__setattr__(s, "plan", pack_plan_of(cfg, s.algorithm, s.policy, prompts))

    def load_adapter(self, tensors: Any, version: int) -> None:
        if not version:
            return
        s = self.session.trainer
        fused = s.policy.fused
        graphs = fused.graphs.bytes if fused is not None and fused.graphs is not None else 0
        how = (
            f"{fused.last_plan}, {fused.last_plan.store}, {fused.shape.attention}"
            if fused is not None
            else "not planned"
        )
        self._desk.stop(graphs, note=f"micro-batches of {s.plan.budget} tokens; {how}")

    def sleep(self) -> None:
        """Nothing to give back."""

    def wake(self) -> None:
        """Nothing to take."""

    def close(self) -> None:
        """Nothing to free."""


def session_of(cfg: Any, rows: list[Any], policy: Any, engine: Any, tokenizer: Any, **more: Any) -> Any:
    """What `rlft.trainer.loop.loop` runs on, wired as by `rlft.trainer.setup.build_session`, around a policy and an
    engine that exist.

    rows: the prompts. more: `functions` that reward, `callbacks`."""
    from rlft.algos.algorithm import build_algorithm
    from rlft.config.files import to_toml
    from rlft.data.prompts import Prompts
    from rlft.monitor.background import Background
    from rlft.monitor.console import Console
    from rlft.monitor.health import HealthMonitor
    from rlft.monitor.token_text import TokenText
    from rlft.monitor.tracking import Tracking
    from rlft.rollout.engine import asleep
    from rlft.runs.folder import Run
    from rlft.trainer.callbacks import Callbacks
    from rlft.trainer.disagreement import Limit
    from rlft.trainer.optim import Optimizer
    from rlft.trainer.plans import pack_plan_of
    from rlft.trainer.progress import Progress
    from rlft.trainer.reference import Reference
    from rlft.trainer.session import Recorder, Sampler, Session, Trainer
    from rlft.types import State

    algorithm, run, console = build_algorithm(cfg.algo, 1), Run.create(cfg.out), Console(plain=True)
    run.write_config(to_toml(cfg))
    with asleep(engine):
        plan = pack_plan_of(cfg, algorithm, policy, rows if engine.SAMPLES else ())
    prompts, functions = Prompts(rows, cfg.seed, shuffle=False), more.get("functions", [])
    sampler = Sampler(engine, engine, prompts, [], False, functions, [])
    optimizer, reference = Optimizer(policy.adapter_params, cfg.optim, cfg.steps), Reference(policy, keep=False)
    state = State()
    trainer = Trainer(
        cfg=cfg,
        steps=cfg.steps,
        policy=policy,
        algorithm=algorithm,
        optimizer=optimizer,
        reference=reference,
        plan=plan,
        # The recorded log-probs are those of a uniform sampler, so engine and trainer are meant to disagree.
        limit=Limit.of(1e6, cfg.parity.factor),
        state=state,
        identity={},
        progress=Progress(state, policy, optimizer, reference, prompts),
    )
    tracking, health = Tracking(cfg, run, 0, False, console.note), HealthMonitor(cfg.algo.name)
    writer, callbacks = Background("rlft-writer"), Callbacks(more.get("callbacks", ()))
    recorder = Recorder(run, writer, console, health, tracking, TokenText(tokenizer), tokenizer, callbacks)
    return Session(sampler, trainer, recorder)


def rlft(kind: str, shape: str, desk: Desk) -> None:
    from rlft.config.data import Data, Sampling
    from rlft.config.run import Algo, Config, Lora, Optim
    from rlft.models.load import attach_lora, load_base
    from rlft.models.policy import Policy
    from rlft.trainer.loop import loop
    from rlft.types import Prompt

    work = next(work for work in WORKS.values() if work.kind == kind)
    quantised = {"quantization": "nf4", "dtype": "bfloat16"} if DEVICE == "cuda" else {}
    algo = Algo(kind, {"correction": "none"} if kind == "grpo" else {})
    cfg = Config(
        path_of(shape),
        Data("recorded"),
        tempfile.mkdtemp(),
        steps=1_000_000,
        prompts_per_step=ROWS // work.group,
        algo=algo,
        sampling=Sampling(group_size=work.group, max_tokens=32_768),
        lora=Lora(rank=16, alpha=32),
        optim=Optim(lr=1e-6),
        **quantised,
    )
    model = attach_lora(load_base(cfg, torch.device(DEVICE)), cfg.lora, cfg.seed)
    desk.loaded()

    def logged(state: Any, values: dict[str, float]) -> None:
        desk.last = {"loss": values["loss"], "norm": values["grad_norm"]}

    engine = Replayed(desk, shape)
    rows = [Prompt((EOS,), {}, i) for i in range(cfg.prompts_per_step)]  # taken, and not looked at
    engine.session = session_of(cfg, rows, Policy(model), engine, tokenizer_of(shape), callbacks=[logged])
    loop(engine.session)


STACKS: dict[str, Callable[[str, str, Desk], None]] = {
    "trl": trl,
    "trl-tuned": trl_tuned,
    "unsloth": unsloth,
    "unsloth-rows": unsloth_rows,
    "rlft": rlft,
}
