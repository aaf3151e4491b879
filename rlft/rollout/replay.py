"""An engine that replays recorded completions, for SFT, DPO and debugging a loss on fixed data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from rlft.config.data import Sampling
from rlft.errors import EngineError
from rlft.rollout.engine import Finished
from rlft.types import FinishReason, Prompt, Rollout


class ReplayEngine:
    """Return `Prompt.recorded` in order, without sampler log-probs. The adapter is ignored."""

    SAMPLES: bool = False

    @property
    def memory(self) -> dict[str, int]:
        """Empty: it uses no device memory."""
        return {}

    def __init__(self) -> None:
        self._version: int | None = None

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seed: tuple[int, ...],
        finished: Finished | None = None,
        first: int = 0,
    ) -> list[Rollout]:
        """Return every recorded completion of every prompt at once; the other arguments are ignored.

        Raises EngineError for a prompt without recorded completions, and before an adapter was loaded.
        """
        if self._version is None:
            raise EngineError("generate before load_adapter: the engine has no adapter")
        rollouts = []
        for prompt in prompts:
            if not prompt.recorded:
                raise EngineError(f"row {prompt.index} has no recorded completion to replay; use a sampling engine")
            for sample, recorded in enumerate(prompt.recorded):
                rollouts.append(
                    Rollout(
                        prompt=prompt,
                        completion_ids=recorded.ids,
                        completion_mask=recorded.mask,
                        sampler_logprobs=None,
                        text=recorded.text,
                        finish_reason=FinishReason.STOP,
                        sample_index=sample,
                        policy_version=self._version,
                        seed=0,
                        recorded_reward=recorded.reward,
                    )
                )
        return rollouts

    def load_adapter(self, named_tensors: Mapping[str, Tensor], version: int) -> None:
        """Store the version; recorded completions do not depend on the adapter."""
        if not named_tensors:
            raise EngineError("an empty adapter was handed to the engine")
        self._version = version

    def sleep(self) -> None:
        """Do nothing: there is no memory to free."""

    def wake(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""
