"""The errors that rlft raises on purpose.

RlftError
├── ConfigError (also ValueError)   a setting is wrong, unknown, or cannot be honoured here        exit code 2
├── DataError (also ValueError)     a dataset, row, chat template or recorded completion is wrong   exit code 2
├── RewardError                     a reward function is wrong, or too many of its calls failed     exit code 2 or 3
├── EngineError                     the rollout engine failed or does not hold the right adapter    exit code 1
│   └── UnsupportedModel            vLLM has no model for the trainer's, or one of another structure
├── ParityError                     engine and trainer disagree about log-probabilities             exit code 3
├── TrainError                      the step itself went wrong: non-finite gradients, out of memory exit code 3
└── ElsewhereError                  any of these on another rank of the run                         its exit code

A message names the field, its value, and what to do. Conditions that only a bug in rlft can violate are asserted.
"""


class RlftError(Exception):
    """Root of all errors raised on purpose."""

    exit_code = 1


class ConfigError(RlftError, ValueError):
    """A setting is wrong, unknown, or cannot be honoured on this machine."""

    exit_code = 2


class DataError(RlftError, ValueError):
    """A dataset, a row of it, or the chat template is wrong.

    reason: one word or two for the kind of fault, by which dropped rows are counted: "row", "template", "too long".
    """

    exit_code = 2

    def __init__(self, *args: object, reason: str = "row") -> None:
        """Take the message, and the reason for counts."""
        super().__init__(*args)
        self.reason = reason


class RewardError(RlftError):
    """A reward function is wrong (its first call), or too many of its calls failed (later: exit_code 3)."""

    exit_code = 2


class EngineError(RlftError):
    """The rollout engine failed, or does not hold the adapter it was given."""

    exit_code = 1


class UnsupportedModel(EngineError):
    """The installed vLLM cannot sample this model; the eager engine can, and does for engine.name = "auto".

    reason: the message without what to do.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f'{reason}; set engine.name = "eager"')
        self.reason = reason


class ParityError(RlftError):
    """Engine and trainer disagree about the log-probabilities of the same tokens."""

    exit_code = 3


class TrainError(RlftError):
    """The optimiser step went wrong: non-finite loss or gradients, out of memory, nothing left to train on."""

    exit_code = 3


class ElsewhereError(RlftError):
    """An error of rlft on another rank, which that rank reports."""

    def __init__(self, rank: int, message: str, exit_code: int) -> None:
        super().__init__(f"rank {rank}: {message}")
        self.exit_code = exit_code
