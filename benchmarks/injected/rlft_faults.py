"""Faults in runs of rlft: the parts of a session are wrapped, as instances, between `build` and `loop`."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from material import (
    AT,
    GROUP,
    LR,
    PROMPTS,
    STEPS,
    TIMEOUT,
    TOKENS,
    Outcome,
    finite,
    home,
    lora_layers,
    no_sinks,
    raise_ours,
    rendered_twice,
    short,
    with_nan_weight,
    with_two_bos,
    wrong_weight,
)
from torch import Tensor

from rlft.config.data import Data, Reward, Sampling
from rlft.config.run import Algo, Config, Engine, Lora, Optim, Packing
from rlft.errors import RlftError
from rlft.rollout.eager import SLOT
from rlft.trainer.loop import loop
from rlft.trainer.out_of_memory import what_to_lower
from rlft.trainer.session import Session
from rlft.trainer.setup import build_session
from rlft.types import Prompt, Rollout

Inject = Callable[[Session], None]
Values = list[Mapping[str, float]]


def config(folder: Path, recorded: bool = False, reward: str = "digits", **changes: Any) -> Config:
    """A run of GRPO with the eager engine, or of SFT on recorded completions, in fp32 on a GPU too."""
    base = Config(
        model=str(folder / "model"),
        data=Data(str(folder / ("recorded.jsonl" if recorded else "prompts.jsonl"))),
        out=str(folder / "run"),
        steps=STEPS,
        prompts_per_step=PROMPTS,
        lora=Lora(rank=4, alpha=16),
        sampling=Sampling(group_size=GROUP, max_tokens=TOKENS),
        optim=Optim(lr=LR),
        engine=Engine("replay" if recorded else "eager"),
        quantization="none",
        dtype="float32",
    )
    if recorded:
        base = replace(base, algo=Algo("sft"))
    else:
        base = replace(base, rewards=(Reward(f"{folder}/rewards.py:{reward}", timeout=TIMEOUT),))
        base = replace(base, data=replace(base.data, chat="never"))
    return replace(base, **changes)


def run(cfg: Config, inject: Inject | None = None, right: Callable[[Session, Values], str] | None = None) -> Outcome:
    """Train with a fault. right: what a run that ends has to say about its numbers."""
    values: Values = []
    started: list[Session] = []
    try:
        with what_to_lower(cfg) as sessions, build_session(cfg, callbacks=[lambda _, v: values.append(v)]) as s:
            sessions.append(s)
            if inject is not None:
                inject(s)
            started.append(s)
            loop(s)
            said = (
                right(s, values)
                if right
                else "adapter finite"
                if finite(s.trainer.policy.model)
                else "adapter NOT finite"
            )
            return Outcome("finished", s.trainer.state.step, f"trains on; {said}")
    except (RlftError, RuntimeError, AssertionError, ValueError) as error:
        raise_ours(error)
        # The check of the last update comes after the callbacks of the last step, all others before their step's.
        looked = any(f.name == "check_end" for f in traceback.extract_tb(error.__traceback__))
        step = len(values) + (not looked) if started else 0
        code = error.exit_code if isinstance(error, RlftError) else 1
        return Outcome("stopped_at_step", step, f"{short(error)}; exit code {code}")


def now(s: Session) -> int:
    """The step in flight, from 1."""
    return s.trainer.state.step + 1


# ---- the sampler ---------------------------------------------------------------------------------------------------


def sampling_within(enter: Callable[[Session], Any]) -> Inject:
    """Completions are sampled inside of a context."""

    def inject(s: Session) -> None:
        generate = s.sampler.engine.generate

        def wrapped(prompts: Sequence[Prompt], sampling: Sampling, seed: tuple[int, ...], **rest: Any) -> list[Rollout]:
            with enter(s):
                return generate(prompts, sampling, seed, **rest)

        s.sampler.engine.generate = wrapped  # type: ignore[method-assign]

    return inject


def sampled(change: Callable[[list[Rollout]], list[Rollout]], since: int = AT) -> Inject:
    """The rollouts of every step from `since` on are changed."""

    def inject(s: Session) -> None:
        generate = s.sampler.engine.generate

        def wrapped(prompts: Sequence[Prompt], sampling: Sampling, seed: tuple[int, ...], **rest: Any) -> list[Rollout]:
            rollouts = generate(prompts, sampling, seed, **rest)
            return change(rollouts) if now(s) >= since else rollouts

        s.sampler.engine.generate = wrapped  # type: ignore[method-assign]

    return inject


def stale_write(s: Session) -> None:
    """The engine's writing of the adapter does nothing from the end of step `AT` - 1 on."""
    engine: Any = s.sampler.engine
    write = engine._write
    engine._write = lambda tensors: write(tensors) if now(s) < AT else None


def stale_blind(s: Session) -> None:
    """The engine says that it holds the new adapter, without a look: only its log-probs tell."""
    engine: Any = s.sampler.engine
    load = engine.load_adapter

    def wrapped(tensors: Mapping[str, Tensor], version: int) -> None:
        if now(s) < AT:
            return load(tensors, version)
        engine._version = version

    engine.load_adapter = wrapped


def temperature(s: Session) -> None:
    """The engine samples at 0.6 whatever it is asked for."""
    generate = s.sampler.engine.generate
    s.sampler.engine.generate = lambda prompts, sampling, seed, **rest: generate(  # type: ignore[method-assign]
        prompts, replace(sampling, temperature=0.6), seed, **rest
    )


def scale(s: Session) -> None:
    """alpha / rank twice in the engine's adapter, from the start."""
    for layer in lora_layers(s.trainer.policy.model, SLOT):
        layer.scaling[SLOT] **= 2


def few_off(rollouts: list[Rollout]) -> list[Rollout]:
    """One of 20 sequences has log-probs 2 nat off."""
    first, *rest = rollouts
    assert first.sampler_logprobs is not None
    return [replace(first, sampler_logprobs=tuple(v - 2 for v in first.sampler_logprobs)), *rest]


def few_off_under_the_ceiling(s: Session) -> None:
    """With the largest limit that a run can have, as on noisy hardware: the mean over tokens is half of it."""
    from rlft.trainer import parity

    object.__setattr__(s.trainer, "limit", parity.limit(None, s.trainer.cfg.parity))
    sampled(few_off)(s)


def emptied(rollouts: list[Rollout]) -> list[Rollout]:
    """Completions of no token."""
    return [replace(r, completion_ids=(), completion_mask=(), sampler_logprobs=(), text="") for r in rollouts]


# ---- the trainer ---------------------------------------------------------------------------------------------------


def after_update(change: Inject) -> Inject:
    """`change` after the optimiser's update of step `AT`."""

    def inject(s: Session) -> None:
        step = s.trainer.optimizer.step

        def wrapped(update: int, skipped: int) -> Any:
            done = step(update, skipped)
            if now(s) == AT:
                change(s)
            return done

        s.trainer.optimizer.step = wrapped  # type: ignore[method-assign]

    return inject


def between(change: Inject) -> Inject:
    """`change` between the forward and the backward of step `AT`."""

    def inject(s: Session) -> None:
        scaled = s.trainer.optimizer.scaled

        def wrapped(loss: Tensor) -> Tensor:
            if now(s) == AT:
                change(s)
            return scaled(loss)

        s.trainer.optimizer.scaled = wrapped  # type: ignore[method-assign]

    return inject


def last_b(s: Session) -> Tensor:
    return [t for n, t in s.trainer.policy.adapter().items() if ".lora_B." in n][-1]


def nan_adapter(s: Session) -> None:
    with torch.no_grad():
        last_b(s)[0, 0] = float("nan")


def moved_out(s: Session) -> None:
    """A tensor of the adapter has separate memory, so that what runs on the buffers would be stale."""
    parameter = list(s.trainer.policy.flat.parameters.values())[-1]
    parameter.data = parameter.data.clone()


def nan_loss(s: Session) -> None:
    """The loss of the first micro-batch of step `AT` is nan."""
    loss, seen = s.trainer.algorithm.loss, []

    class Wrapped(type(loss)):
        def __call__(self, logprobs: Tensor, batch: Any) -> Any:
            value, stats = loss(logprobs, batch)
            if now(s) == AT and not seen:
                seen.append(1)
                value = value * float("nan")
            return value, stats

    object.__setattr__(s.trainer, "algorithm", replace(s.trainer.algorithm, loss=Wrapped(**vars(loss))))


def early_update(s: Session) -> None:
    """An update of the optimiser before the backward, with a gradient of ones."""
    grad = s.trainer.policy.adapter_params.grad
    assert grad is not None
    grad.fill_(1.0)
    s.trainer.optimizer.step(s.trainer.state.updates, 0)
    grad.zero_()


def packed(s: Session) -> None:
    """transformers' layers on packed rows where the policy has chosen others, with the check that every start makes."""
    from rlft.trainer.selfcheck import check

    fused, s.trainer.policy.fused = s.trainer.policy.fused, None
    if fused is not None:
        del fused.decoder.forward
    s.trainer.policy.packed = True
    s.trainer.policy.path = "transformers' own layers, packed (forced)"
    check(s.trainer.policy)


def other_tile(s: Session) -> None:
    """Old log-probs by tiles of another size than those that are trained."""
    score = s.trainer.policy.score

    def wrapped(batch: Any, weights: Any = "policy") -> Tensor:
        plan = batch.plan and replace(batch.plan, tile=max(16, batch.plan.tile // 2), padded=0)
        return score(replace(batch, plan=plan), weights)

    s.trainer.policy.score = wrapped  # type: ignore[method-assign]


# ---- what runs that end say ------------------------------------------------------------------------------------------


def moved(s: Session, values: Values) -> str:
    """Whether the run that was hurt in step `AT` went on."""
    skipped = sum(v.get("skipped_updates", 0) > 0 for v in values)
    state = "adapter finite" if finite(s.trainer.policy.model) else "adapter NOT finite"
    return f"{skipped} updates skipped and counted, {state}"


def losses(s: Session, values: Values) -> str:
    return f"first loss {values[0]['loss']:.6f}"


def clipped(s: Session, values: Values) -> str:
    return f"clip_ratio/region_mean {values[0].get('clip_ratio/region_mean', float('nan')):.3g} in step 1, must be 0"


def hot(folder: Path) -> Outcome:
    """SFT with a temperature left in [sampling], beside the same run without."""
    found = []
    for name, value in (("a", 1.0), ("b", 0.6)):
        cfg = config(folder, True, sampling=Sampling(temperature=value), out=str(folder / name), steps=1)
        found.append(run(cfg, right=losses))
    same = found[0].note == found[1].note
    return replace(found[1], note=f"{'right' if same else 'WRONG'}: {found[1].note}; without it {found[0].note}")


def on_gpu(call: Callable[[], Outcome]) -> Outcome:
    if not torch.cuda.is_available():
        return Outcome("not_injected", 0, "not on a CPU: no CUDA graphs and one plan")
    return call()


def tiles(folder: Path) -> Outcome:
    """A policy that does not move, with gspo's narrow band."""
    optim = Optim(lr=1e-12, minibatches=2)
    cfg = config(folder, algo=Algo("gspo", {"clip_low": 3e-4, "clip_high": 4e-4}), optim=optim)
    return on_gpu(lambda: run(cfg, other_tile, clipped))


def small_batches(folder: Path) -> Config:
    return config(folder, packing=Packing(tokens_per_micro_batch=128, share_prefix=False))


RUNS: dict[str, Callable[[Path], Outcome]] = {
    "none": lambda f: run(config(home(f))),
    "stale_adapter": lambda f: run(config(home(f)), stale_write),
    "stale_adapter_unseen": lambda f: run(config(home(f)), stale_blind),
    "scaled_twice": lambda f: run(config(home(f)), scale),
    "sampler_temperature": lambda f: run(config(home(f)), temperature),
    "sampler_weight": lambda f: run(config(home(f)), sampling_within(lambda s: wrong_weight(s.trainer.policy.model))),
    "few_sequences_off": lambda f: run(config(home(f)), few_off_under_the_ceiling),
    "no_sinks": lambda f: run(config(home(f, "gpt_oss")), sampling_within(lambda s: no_sinks(s.trainer.policy.model))),
    "two_bos": lambda f: run(config(with_two_bos(f))),
    "rendered_twice": lambda f: run(config(rendered_twice(f), data=Data(str(f / "prompts.jsonl")))),
    "packed_hybrid": lambda f: run(config(home(f, "lfm2"), True), packed),
    "packed_sinks": lambda f: run(config(home(f, "gpt_oss"), True), packed),
    "recorded_temperature": lambda f: hot(home(f)),
    "dropout": lambda f: run(config(home(f), lora=Lora(rank=4, alpha=16, dropout=0.05))),
    "update_before_backward": lambda f: run(config(home(f)), between(early_update)),
    "buffer_left": lambda f: run(config(home(f)), between(moved_out)),
    "other_tile": lambda f: tiles(home(f)),
    "nan_adapter": lambda f: run(config(home(f)), after_update(nan_adapter)),
    "nan_adapter_recorded": lambda f: run(config(home(f), True), after_update(nan_adapter)),
    "nan_weight": lambda f: run(config(with_nan_weight(f), True)),
    "nan_loss": lambda f: run(small_batches(home(f)), nan_loss, moved),
    "nan_rewards": lambda f: run(config(home(f), reward="nan")),
    "reward_raises": lambda f: run(config(home(f), reward="raises")),
    "infinite_reward": lambda f: run(config(home(f), reward="infinite")),
    "reward_hangs": lambda f: run(config(home(f), reward="hangs")),
    "reward_dies": lambda f: run(config(home(f), reward="dies")),
    "empty_completions": lambda f: run(config(home(f)), sampled(emptied, since=1)),
}
"""Fault -> its run in a folder."""
