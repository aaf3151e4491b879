"""What a run does differently on several ranks: one run folder, one state, the same plan and limits on all of them."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path

import torch

from rlft import __version__, dist
from rlft.config.files import to_toml
from rlft.config.run import Config, Track
from rlft.dist import Value
from rlft.errors import ConfigError
from rlft.runs.claim import Claim, claim
from rlft.runs.folder import Run
from rlft.trainer.progress import Progress
from rlft.types import PackPlan, State

SAME = "start every rank with the same config, data, model and version of rlft"


@contextlib.contextmanager
def claimed_by_lead(cfg: Config, resume: bool) -> Iterator[Claim]:
    """Claim the run folder on the lead. The other ranks get an empty folder that is removed when the block ends.

    They write there what the lead writes to the run folder, so that the same code runs on all ranks. Raises on every
    rank what the lead raises.
    """
    with contextlib.ExitStack() as stack:
        taken: list[Claim] = []

        def take() -> tuple[str, dict[str, bytes]]:
            if not dist.lead():
                return "", {}
            taken.append(stack.enter_context(claim(cfg.out, resume, cfg.if_exists, cfg.share)))
            # Which evaluations there were, and what tells that the folder is ours.
            files = (taken[0].run.metrics_file, taken[0].run.config) if taken[0].resumed else ()
            return taken[0].action, {file.name: file.read_bytes() for file in files if file.is_file()}

        action, files = dist.gather_results(take)[0]
        if taken:
            yield taken[0]
            return
        run = Run(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rlft-rank-"))))
        for name, data in files.items():
            (run.path / name).write_bytes(data)
        yield Claim(run, action, [])  # type: ignore[arg-type]


def config_here(cfg: Config, run: Run) -> Config:
    """Return the config of this rank: on ranks other than the lead without trackers, and with their own folder."""
    return cfg if dist.lead() else replace(cfg, out=str(run.path), track=Track())


def check_config(cfg: Config) -> None:
    """Raise ConfigError for a setting that cannot be honoured on this number of ranks, TrainError for odd ranks."""
    if dist.is_alone():
        if cfg.base.place == "sharded":
            raise ConfigError(
                'base.place = "sharded" in one process: there is no rank to share with; start several with torchrun, '
                'or set base.place = "host"'
            )
        return
    if dist.world() > cfg.prompts_per_step:
        raise ConfigError(
            f"prompts_per_step = {cfg.prompts_per_step} on {dist.world()} ranks: a rank samples whole prompts, so some "
            f"would have none; raise prompts_per_step or start fewer ranks"
        )
    dist.check_same("the version of rlft", __version__, SAME)
    dist.check_same("the config (its digest)", digest(to_toml(cfg)), SAME)


def digest(text: str) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def same_plan(plan: PackPlan) -> PackPlan:
    """Return the plan with the smallest budget of all ranks, whose cards may have different amounts of free memory."""
    return replace(plan, budget=min(dist.gather(plan.budget)))


def on_lead(function: Callable[[], Value]) -> Value:
    """Call a function on the lead; return its result on every rank, or raise there what it raises."""
    return dist.gather_results(lambda: function() if dist.lead() else None)[0]  # type: ignore[return-value]


def send_progress(progress: Progress) -> None:
    """Give every rank the state, the adapter, the optimiser and the reference log-probs that the lead has."""
    if dist.is_alone():
        return
    policy = progress.policy
    tensors = {"adapter": policy.adapter_params.detach(), "start": policy.flat.start}
    parts = [tensors, progress.optimizer.tensors(), progress.reference.tensors()]
    state = {entry.name: getattr(progress.state, entry.name) for entry in fields(State)}
    sent = [{name: tensor.cpu() for name, tensor in part.items()} for part in parts]
    sent, state = dist.from_lead((sent, state))
    if dist.lead():
        return
    policy.adapter_params.data.copy_(sent[0]["adapter"])
    policy.flat.start.copy_(sent[0]["start"])
    progress.optimizer.load_tensors(sent[1])
    progress.reference.load_tensors(sent[2])
    progress.go_to(State(**state))


def check_adapter_is_same(adapter: torch.Tensor) -> None:
    """Raise TrainError naming a rank whose adapter [numel] differs from the lead's in a bit of a 64-bit sum."""
    if not dist.is_alone():
        bits = adapter.detach().view(torch.int32 if adapter.element_size() == 4 else torch.int64)
        places = torch.arange(1, len(bits) + 1, device=bits.device)
        total = int((bits.long() * places).sum())
        dist.check_same("the adapter (sum of its bits)", total, "the machine is at fault; go on with --resume")
