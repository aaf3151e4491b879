"""Rollouts of a model that its user trains: an engine and the hand-over of the adapter, for a loop of one's own."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from peft import PeftModel

from rlft.config.data import Data, Sampling
from rlft.config.run import Engine as Options
from rlft.data.encode import encode_prompt
from rlft.data.limits import Limits
from rlft.environment import version
from rlft.errors import ConfigError, UnsupportedModel
from rlft.models.given_model import GivenModel
from rlft.models.policy import Policy
from rlft.models.rope import context_of
from rlft.rollout.eager import EagerEngine
from rlft.rollout.engine import Engine
from rlft.rollout.routing import replays
from rlft.types import Prompt, Rollout

if TYPE_CHECKING:
    from peft import PeftMixedModel
    from transformers import PreTrainedTokenizerBase

PROMPT = 1024
"""Tokens of the longest prompt, where `engine.max_model_len` does not say."""


class Sampler:
    """A context manager over a running engine. `generate` samples, `update` hands the adapter over."""

    def __init__(
        self,
        model: PeftModel | PeftMixedModel | Policy,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling = Sampling(),  # noqa: B008 (it is frozen)
        engine: Options = Options(),  # noqa: B008 (it is frozen)
        data: Data = Data("no file"),  # noqa: B008 (it is frozen)
        seed: int = 42,
    ) -> None:
        """Start the engine that `engine` names, with the adapter as it is now.

        model: a PEFT model with one LoRA adapter, or an `rlft.Policy`. Its adapter moves into one block of memory, and
        the parameters stay the same objects, so an optimiser over them remains right. data: how prompts are put into
        the chat template. For engine.name = "auto", the eager engine samples a model that vLLM cannot, and a warning
        says why. Raises ConfigError, and EngineError when vLLM does not start.
        """
        self.sampling, self._data, self._seed = sampling, data, seed
        self.tokenizer: Any = tokenizer
        self.policy = model if isinstance(model, Policy) else policy_over(model)
        """The model as a policy, whose log-probs of packed batches `policy.logprobs` computes."""
        self.version = 0
        """Number of the adapter that is sampled with: of the calls of `update`."""
        self._calls = 0
        context = context_of(self.policy.base.config)
        longest = engine.max_model_len or min(context or PROMPT * 4, PROMPT + sampling.max_tokens)
        self.policy.fix_rope(longest)
        self.engine = self._started(engine, longest)
        """The engine, as training uses it (`rlft.rollout.engine.Engine`)."""
        self.engine.load_adapter(self.policy.adapter(), self.version)

    def _started(self, options: Options, longest: int) -> Engine:
        name = options.name
        if name == "replay":
            raise ConfigError('engine.name = "replay": it samples nothing; give "eager" or "vllm"')
        if name == "auto":
            name = "vllm" if self.policy.device.type == "cuda" and version("vllm") is not None else "eager"
        if name == "eager":
            return self._eager(options)
        from rlft.rollout.vllm.engine import VllmEngine

        try:
            return VllmEngine(self.policy, self.tokenizer, options, longest, options.max_seqs)
        except UnsupportedModel as error:
            if options.name != "auto":
                raise
            warnings.warn(f"rlft: sampling with the model's own modules: {error.reason}", stacklevel=3)
            return self._eager(options)

    def _eager(self, options: Options) -> Engine:
        """Return the eager engine. Raises ConfigError for a setting of `options` that it cannot honour."""
        replays(self.policy, options, "eager")
        return EagerEngine(self.policy, self.tokenizer, options.batch_size)

    def __enter__(self) -> Sampler:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Free everything that sampling takes; the model stays as it is trained."""
        self.engine.close()

    def generate(self, prompts: Sequence[str | Sequence[dict[str, Any]] | dict[str, Any] | Prompt]) -> list[Rollout]:
        """Sample `sampling.group_size` completions of each prompt, in the order of the prompts.

        prompts: texts, message lists, rows with a `prompt` and any columns that rewards take, or `rlft.Prompt`s. The
        engine sleeps afterwards, so that its memory is free for training. Raises DataError and EngineError.
        """
        rows = [self._encoded(prompt, i) for i, prompt in enumerate(prompts)]
        self.engine.wake()
        rollouts = self.engine.generate(rows, self.sampling, (self._seed, self._calls))
        self._calls += 1
        self.engine.sleep()
        return rollouts

    def update(self) -> None:
        """Hand the adapter over as it is now, and check that the engine holds it. Raises EngineError."""
        self.version += 1
        self.engine.wake()
        self.engine.load_adapter(self.policy.adapter(), self.version)

    def _encoded(self, prompt: Any, index: int) -> Prompt:
        if isinstance(prompt, Prompt):
            return prompt
        row = dict(prompt) if isinstance(prompt, dict) else {"prompt": prompt}
        vision = self.policy.vision
        limits = Limits(images=None if vision is None else vision.reader)
        return encode_prompt(row, index, self._data, self.tokenizer, limits)


_POLICIES: weakref.WeakKeyDictionary[Any, weakref.ref[Policy]] = weakref.WeakKeyDictionary()
"""Model -> the policy over it, as long as somebody has that."""


def policy_over(model: Any) -> Policy:
    """Return the policy over a PEFT model, the same one as before while it is in use: an optimiser may be over its
    `adapter_params`. Raises ConfigError for a model that has not one plain LoRA adapter."""
    known = _POLICIES[model]() if isinstance(model, PeftModel) and model in _POLICIES else None
    if known is not None and known.flat.holds():
        return known
    given = GivenModel(model)
    if given.model is given.base:
        raise ConfigError(
            f"model: {type(model).__name__} has no adapter; give a PEFT model with one LoRA adapter (rlft.load, or "
            f"peft.get_peft_model)"
        )
    policy = Policy(model, images=given.reader())
    _POLICIES[model] = weakref.ref(policy)
    return policy


sampler = Sampler
"""The name it has in `rlft`."""
