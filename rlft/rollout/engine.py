"""The protocol of a rollout engine; tests/rollout/test_engines.py tests all implementations against it.

An engine owns a copy of the adapter, never the trainer's live tensors, so its policy changes only in `load_adapter`. It
returns G completions per prompt in the order of the prompts, and every Rollout records the policy version it was
sampled with. After each load and wake the engine reads its adapter back and compares it (`check_read_back`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from rlft.config.data import Sampling
from rlft.data.chat import end_id
from rlft.errors import EngineError, TrainError
from rlft.types import Prompt, Rollout

Finished = Callable[[Sequence[Rollout]], None]
"""Called with all rollouts of a prompt. Must return soon and raise nothing, since the engine waits for it."""


class Groups:
    """Rollouts as they end, in any order, by prompt and sample."""

    def __init__(self, prompts: int, size: int, finished: Finished | None = None) -> None:
        """Expect `size` rollouts of each prompt. finished: called with each group that is complete."""
        self._groups: list[dict[int, Rollout]] = [{} for _ in range(prompts)]
        self._size, self._finished = size, finished

    def put(self, slot: int, rollout: Rollout) -> None:
        """Add a rollout of the prompt at position `slot`."""
        group = self._groups[slot]
        group[rollout.sample_index] = rollout
        if len(group) == self._size and self._finished is not None:
            self._finished([group[i] for i in range(self._size)])

    def rollouts(self) -> list[Rollout]:
        """Return all rollouts in the order of the prompts."""
        return [group[i] for group in self._groups for i in range(self._size)]


class Engine(Protocol):
    """An engine that turns prompts into rollouts."""

    SAMPLES: bool
    """True for an engine that samples and returns sampler log-probs; False for one that replays recorded
    completions."""

    @property
    def memory(self) -> dict[str, int]:
        """Bytes of device memory in use while awake, by purpose."""
        ...

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seed: tuple[int, ...],
        finished: Finished | None = None,
        first: int = 0,
    ) -> list[Rollout]:
        """Sample `sampling.group_size` rollouts per prompt, in the order of the prompts.

        seed: (run seed, step) or longer; the same seed gives the same rollouts on the same machine. finished: called
        with the rollouts of a prompt as soon as the last of them ends; they are returned too, unless the engine failed
        and sampled them again. An engine that samples nothing does not call it. first: position of the first prompt in
        the step, where other ranks sample those before it.
        Raises EngineError before an adapter was loaded, and when the engine fails.
        """
        ...

    def load_adapter(self, named_tensors: Mapping[str, Tensor], version: int) -> None:
        """Copy the adapter (PEFT names, without alpha / rank) and sample with it from now on.

        Raises EngineError for a missing or unknown name, a wrong shape, and when the read-back differs.
        """
        ...

    def sleep(self) -> None:
        """Free the memory that only generation needs."""
        ...

    def wake(self) -> None:
        """Allocate the memory again. Raises EngineError when the adapter has changed."""
        ...

    def close(self) -> None:
        """Free everything."""
        ...


@contextmanager
def asleep(engine: Engine) -> Iterator[None]:
    """Let the engine sleep inside the block, and wake it even when the block fails."""
    engine.sleep()
    try:
        yield
    finally:
        engine.wake()


def rollout_seed(seed: tuple[int, ...], slot: int, sample: int) -> int:
    """Return the seed of one rollout: 63 bits from (run seed, step, position of the prompt in the step, sample).

    The position is used rather than the dataset row, because a row that occurs twice in a step must not give the same
    completions twice.
    """
    entropy = [value % 2**32 for value in (*seed, slot, sample)]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))


def eos_ids(tokenizer: Any, base: Any) -> set[int]:
    """Return the token ids that end a completion.

    These are the EOS ids of tokenizer, config and generation config, and the chat template's end of turn, which a base
    model with a template added to its tokenizer declares nowhere else.
    """
    end = end_id(tokenizer)
    return _declared(tokenizer, base) | (set() if end is None else {end})


def _declared(tokenizer: Any, base: Any) -> set[int]:
    ids: set[int] = set()
    for owner in (tokenizer, base.config, base.generation_config):
        value = getattr(owner, "eos_token_id", None)
        ids |= {value} if isinstance(value, int) else set(value or ())
    return ids


def undeclared_end(tokenizer: Any, base: Any) -> str:
    """Return a note for whoever serves the model if no file of it declares the template's end of turn; else ""."""
    end = end_id(tokenizer)
    if end is None or end in _declared(tokenizer, base):
        return ""
    token = tokenizer.convert_ids_to_tokens(end)
    return (
        f"the chat template ends a turn with {token}, which is an end neither in the tokenizer nor in the model's "
        f"configuration: rlft stops there; set it where the model is served (stop_token_ids = [{end}])"
    )


def check_names(adapter: Mapping[str, Tensor], slots: Mapping[str, Tensor]) -> None:
    """Raise EngineError unless `adapter` has exactly the engine's names and shapes."""
    missing, unknown = sorted(slots.keys() - adapter.keys()), sorted(adapter.keys() - slots.keys())
    if missing or unknown:
        what = f"misses {missing[0]}" if missing else f"has {unknown[0]}, which the engine does not know"
        raise EngineError(f"adapter handed to the engine {what} ({len(missing)} missing, {len(unknown)} unknown)")
    for name, tensor in adapter.items():
        if tensor.shape != slots[name].shape:
            raise EngineError(
                f"adapter tensor {name}: {tuple(tensor.shape)}, the engine has {tuple(slots[name].shape)}"
            )


def check_read_back(
    given: Mapping[str, Tensor],
    slots: Mapping[str, Tensor],
    given_scales: Mapping[str, float],
    slot_scales: Mapping[str, float],
    version: int,
) -> None:
    """Raise EngineError unless `slots` equal `given` exactly, after the cast to the engine's dtype, with equal scales.

    This check detects a stale, missing or doubly applied adapter even while B = 0, when log-probs would agree.
    """
    for name, scale in given_scales.items():
        if slot_scales.get(name) != scale:
            raise EngineError(
                f"after loading policy version {version} the engine scales {name} by {slot_scales.get(name)}, the "
                f"trainer by {scale}: alpha / rank must be applied exactly once"
            )
    # One result for all tensors, since each would make the host wait for the GPU. Equal values differ by exactly 0.
    expected = {name: tensor.to(dtype=slots[name].dtype, device=slots[name].device) for name, tensor in given.items()}
    actual = [slots[name] for name in expected]
    difference = torch._foreach_sub(actual, list(expected.values()))  # type: ignore[attr-defined]
    worst = torch.stack(torch._foreach_norm(difference, math.inf))  # type: ignore[attr-defined]
    wrong = (worst != 0).nonzero().flatten().tolist()
    if wrong:
        name = list(expected)[wrong[0]]
        if not given[name].isfinite().all():
            raise TrainError(
                f"the adapter of policy version {version} is not finite: {name} for one. An update has set it, or a "
                f"callback; go on from an earlier checkpoint with a lower optim.lr"
            )
        raise EngineError(
            f"after loading policy version {version} the engine does not hold the trainer's adapter: {name} differs by "
            f"up to {worst[wrong[0]].item():.3g}. It would sample from another policy than the one that is trained."
        )
