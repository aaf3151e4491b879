"""Objects that a run is given from Python in place of what its config names: model, tokenizer, optimiser."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlft.config.files import read
from rlft.config.run import Config, config_from
from rlft.data.limits import Limits
from rlft.errors import ConfigError
from rlft.models.given_model import GivenModel
from rlft.models.load import load_tokenizer
from rlft.models.policy import Policy
from rlft.runs import checkpoint
from rlft.runs.folder import Run
from rlft.trainer.given_optimizer import GivenOptimizer
from rlft.trainer.limits import limits_of, limits_of_files


@dataclass(frozen=True)
class Given:
    """The objects of a run; None for what its config names."""

    model: GivenModel | None = None
    tokenizer: Any = None
    optimizer: GivenOptimizer | None = None
    notes: tuple[str, ...] = ()
    """What the start of a run says about them."""

    @staticmethod
    def of(
        cfg: Config | str | Path, settings: Mapping[str, Any], model: Any, tokenizer: Any, optimizer: Any
    ) -> tuple[Config, Given]:
        """Return the config of a run with what the objects decide in it, and the objects.

        model: a name, as a setting, or an object. Raises ConfigError for objects that cannot be used.
        """
        if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ConfigError(
                f"tokenizer: {type(tokenizer).__name__} is not a tokenizer of transformers; give what "
                f"AutoTokenizer.from_pretrained returns"
            )
        given = Given(
            None if model is None or isinstance(model, str) else GivenModel(model),
            tokenizer,
            None if optimizer is None else GivenOptimizer(optimizer),
        )
        if isinstance(model, str):
            settings = {**settings, "model": model}
        if given.model is None:
            return config_from(cfg, settings), given
        if isinstance(cfg, str | Path) and "model" not in read(cfg):
            settings = {**settings, "model": given.model.name or type(given.model.base).__name__}
        cfg, notes = given.model.settled(config_from(cfg, settings))
        if not given.model.name:
            if tokenizer is None:
                raise ConfigError(
                    f"tokenizer: the model given does not say where its tokenizer is (config._name_or_path is empty), "
                    f'and model = "{cfg.model}" is only its name here; give tokenizer= too'
                )
            notes.append(f'model = "{cfg.model}" is only a name: the model given does not say what it was loaded from')
        return cfg, replace(given, notes=tuple(notes))

    def __str__(self) -> str:
        parts = [] if self.model is None else ["model" if self.model.name else checkpoint.UNNAMED]
        parts += [] if self.tokenizer is None else ["tokenizer"]
        parts += [] if self.optimizer is None else [f"optimizer {self.optimizer.name}"]
        return ", ".join(parts) or "nothing"

    @property
    def identity(self) -> dict[str, str]:
        """The entry of a checkpoint's identity; empty where nothing is given."""
        return {} if str(self) == "nothing" else {checkpoint.GIVEN: str(self)}

    def check_resume(self, run: Run) -> None:
        """Raise ConfigError if the run to resume was given other objects."""
        if not run.has_checkpoint():
            return
        before = checkpoint.continued_from(run.latest_checkpoint()).get(checkpoint.GIVEN, "nothing")
        if before != str(self):
            arguments = ", ".join(f"{part.split()[0]}=..." for part in before.split(", ") if part != "nothing")
            raise ConfigError(
                f"{run.path}: the run was given {before}, and is resumed with {self}; resume it with "
                f"rlft.train(cfg, {arguments or 'without objects'}, resume=True)"
            )

    def limits_of(self, cfg: Config) -> Limits:
        """Return what the model takes."""
        if self.model is None:
            return limits_of_files(cfg)
        return limits_of(self.model.base.config)._replace(images=self.model.reader(cfg.data))

    def tokenizer_of(self, cfg: Config) -> Any:
        """Return the tokenizer given, or else load the model's."""
        return load_tokenizer(cfg.model) if self.tokenizer is None else self.tokenizer

    def policy_of(self, cfg: Config, stack: contextlib.ExitStack, load: Callable[[], Policy]) -> Policy:
        """Return a policy over the model given, which is as before when `stack` closes; without one, call `load`."""
        if self.model is None:
            return load()
        if cfg.base.place != "device":
            raise ConfigError(
                f'base.place = "{cfg.base.place}": a model given keeps its weights where they are; name the model'
            )
        return Policy(stack.enter_context(self.model.borrowed(cfg)), images=self.model.reader(cfg.data))

    def state_bytes(self, policy: Policy) -> dict[str, int]:
        """Return the memory that the optimiser given takes, by its name in the memory plan; empty without one."""
        given = self.optimizer
        return {} if given is None else {"optimiser moments": given.state_bytes(policy.adapter_params.numel())}
