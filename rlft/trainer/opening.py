"""What the start of a run shows: a few lines for every user, and details for who looks into a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from rlft import dist
from rlft.algos.algorithm import Algorithm, describe
from rlft.config.run import Config
from rlft.data.table import PromptTable
from rlft.models import experts, targets
from rlft.models.continued import changed_dropout
from rlft.models.fused.memory import weight_bytes
from rlft.models.load import resolve_dtype
from rlft.models.policy import Policy
from rlft.models.quantization import held_in
from rlft.runs.folder import Run
from rlft.trainer import engines

MIXED = (
    "int8: LLM.int8 finds its outlier columns over all rows of a micro-batch, so a row's log-probs depend a little on "
    'what it is packed with; quantization = "nf4" or "none" has no such dependence'
)
"""Shown at the start of a run over 8-bit weights."""


def title(cfg: Config, policy: Policy, rows: PromptTable, evals: PromptTable, steps: int, run: Run) -> list[str]:
    """Return the lines that every user sees: the model, what is trained and sampled, and where the run lies.

    A run over 8-bit weights, over a mixture of experts, or from an adapter that had another dropout, says so.
    """
    dtype = str(resolve_dtype(cfg, policy.device)).removeprefix("torch.")
    kind = held_in(policy.base)
    held = dtype if kind == "none" else f"{kind} (computed in {dtype})"
    seen = rows.with_images()
    shown = f" ({seen} with images)" if seen else ""
    size, trained = weight_bytes(policy.base)["parameters"], policy.adapter_params.numel()
    device = "GPU" if policy.device.type == "cuda" else "CPU"
    done = engines.describe(cfg, bool(rows[0].recorded), policy.device)
    done += "" if dist.is_alone() else f", divided over {dist.world()} ranks"
    return [
        f"{cfg.model}: {count(size)} parameters in {held} on the {device}; {cfg.algo.name} trains a LoRA adapter of "
        f"rank {cfg.lora.rank}, {count(trained)} parameters",
        f"{len(rows)} prompts{shown}, {len(evals)} held out; {steps} steps of {cfg.prompts_per_step} prompts x {done}",
        *experts_line(cfg, policy),
        *([MIXED] if policy.mixes_rows else []),
        *(line for line in [changed_dropout(cfg.lora)] if line),
        f"run folder: {run.path}",
    ]


def experts_line(cfg: Config, policy: Policy) -> list[str]:
    """Return the line about the adapters of a mixture of experts: their rank and bytes, and what is not trained."""
    trained = targets.expert_parameters(policy.model)
    if not trained:
        return []
    (rank,) = targets.expert_ranks(policy.model)
    each = policy.adapter_params.element_size()
    size = trained * (2 * each + (2 if cfg.optim.name == "adamw_8bit" else 2 * each)) / 2**30
    return [
        f"each expert has rank {rank} (lora.expert_rank): {count(trained)} of these parameters, {size:.2g} GiB with "
        f"gradient and moments; the router is frozen, and no auxiliary loss is added"
    ]


def details(cfg: Config, policy: Policy, algorithm: Algorithm, passes: str) -> list[str]:
    """Return how the run is computed. passes: from `rlft.trainer.plans.pass_summary`."""
    return [
        policy.path,
        targets.describe(policy.model),
        *experts.describe(policy.base, policy.fused is not None),
        *([str(policy.rope)] if policy.rope else []),
        f"memory: {weight_bytes(policy.base)['bytes'] / 2**30:.2f} GiB of weights; {passes}",
        *describe(algorithm),
    ]


def each(note: Callable[[str], None], lines: Iterable[str]) -> None:
    """Note each of the lines."""
    for line in lines:
        note(line)


def count(number: int) -> str:
    """Format a number of parameters: 135_000_000 -> "135 M", 8_030_000_000 -> "8.03 B"."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            value = number / size
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"
    return str(number)
