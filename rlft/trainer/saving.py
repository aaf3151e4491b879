"""Save a run to a checkpoint and restore it: adapter, optimiser, reference log-probs, progress."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from rlft import dist
from rlft.config.run import Config
from rlft.errors import ConfigError
from rlft.runs import checkpoint
from rlft.runs.card import adapter_card
from rlft.runs.disk import replace_file
from rlft.runs.folder import Run, is_evaluation
from rlft.trainer.progress import Progress
from rlft.trainer.session import Recorder, Session, check_adapter


def save(session: Session, keep: int = 0) -> Path:
    """Write all pending completions, then a checkpoint of the current state; return the checkpoint's folder.

    The lead alone writes.
    keep: checkpoints to keep; 0: `checkpoint.keep`.
    """
    _, trainer, recorder = session
    policy, state, run = trainer.policy, trainer.state, recorder.run
    final = run.checkpoints / f"step-{state.step:06d}"
    if not dist.lead():
        return final
    recorder.writer.flush()
    run.sync()
    check_adapter(
        policy,
        f"nothing was saved. An update has set them (optim.lr = {trainer.cfg.optim.lr}), or a callback; go on from an "
        f"earlier checkpoint",
    )
    # No random state is saved: every random number is seeded by (seed, step, ...).
    tensors = {"adapter": policy.adapter_params.detach(), "adapter_start": policy.flat.start}
    tensors |= {f"optim.{name}": value for name, value in trainer.optimizer.tensors().items()}
    tensors |= {f"reference.{name}": value for name, value in trainer.reference.tensors().items()}

    def write_adapter(folder: Path) -> None:
        # The embedding is never trained; without the flag PEFT looks up the base's config to find out.
        policy.model.save_pretrained(str(folder), selected_adapters=["default"], save_embedding_layers=False)
        _sort_targets(folder / "adapter_config.json")
        recorder.tokenizer.save_pretrained(str(folder))
        write_card(recorder, trainer.cfg, state.step, folder, final)

    return checkpoint.save_checkpoint(
        run.checkpoints,
        state,
        tensors,
        trainer.identity,
        write_adapter,
        keep or trainer.cfg.checkpoint.keep,
        run.best(also=state.step),
        trainer.cfg.checkpoint.every,
    )


def _sort_targets(path: Path) -> None:
    """Write PEFT's sets of modules in order, so that equal runs save equal bytes, whatever the hashes of strings."""
    config = json.loads(path.read_bytes())
    for name in ("target_modules", "exclude_modules"):
        if isinstance(config.get(name), list):
            config[name].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def write_card(recorder: Recorder, cfg: Config, step: int, folder: Path, final: Path) -> None:
    """Replace the model card template that PEFT wrote with our own. final: the checkpoint's final folder."""
    card = adapter_card(recorder.run, cfg, step, str(final), recorder.tracking.link)
    with recorder.run.writing(f"{final.name}/README.md"):
        replace_file(folder / "README.md", card.encode())


def resume(
    run: Run, cfg: Config, progress: Progress, identity: dict[str, str], held_out: bool, note: Callable[[str], None]
) -> None:
    """Continue from the newest checkpoint, or start again where the run stopped before saving one.

    progress: of a start; state, adapter, optimiser, reference log-probs and data cursor are restored in place.
    held_out: whether rows are evaluated on. Raises ConfigError if the checkpoint does not fit.
    """
    if not run.has_checkpoint():
        aside = run.set_aside(-1)
        lost = f"; what it had done is in {aside.path}" if aside else ""
        note(f"{run.path} holds no checkpoint yet, so the run starts again from step 0{lost}")
        return
    path, steps, data = run.latest_checkpoint(), progress.state.steps, progress.state.data
    state, tensors, notes = checkpoint.load_checkpoint(path, identity)
    if state.step > steps:
        raise ConfigError(
            f"steps = {steps}: the newest checkpoint of {run.path} is of step {state.step} already; raise steps to go "
            f"on, or give another folder with --out"
        )
    if state.data != data:
        if held_out and cfg.eval.data is None:
            raise ConfigError(
                f"{path}: its run had other training rows, so rows held out now may have been trained on; resume "
                f"with the data, seed and eval.rows it was made with, or give eval.data"
            )
        notes.append("the training rows are not those of the checkpoint; the data cursor goes on among the new ones")
        state = replace(state, data=data, solved=[])
    progress.policy.flat.restore(tensors["adapter"], tensors["adapter_start"])
    progress.optimizer.load_tensors(_under("optim.", tensors))
    progress.reference.load_tensors(_under("reference.", tensors))
    progress.go_to(replace(state, steps=steps))
    aside = run.set_aside(state.step)
    if aside and aside.damaged:
        lines = ", ".join(map(str, aside.damaged))
        notes.append(f"metrics.jsonl: unreadable lines ({lines}) are set aside in {aside.path}")
    if missing := state.step - len({row["step"] for row in run.metrics() if row["step"] and not is_evaluation(row)}):
        notes.append(
            f"metrics.jsonl has no row of {missing} of the {state.step} finished steps: their numbers are lost"
        )
    checkpoint.mark_best(run.checkpoints, run.best())
    for text in notes:
        note(text)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose name begins with `prefix`, named without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
