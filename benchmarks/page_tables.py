"""The tables of the pages: which values of which results files stand in which row and column."""

from __future__ import annotations

from collections.abc import Callable

from page_cells import Column, Table, gib, percent, seconds, share, thousands, times, whole

MEDIAN = "grpo-step/lognormal-median"
PEERS = {"TRL": "trl", "Unsloth": "unsloth", "rlft": "rlft"}
HEADS = {"rlft": "rlft", "TRL": "trl", "Liger": "liger", "cut-cross-entropy": "cce"}
"""Head of a column -> stack, of whole steps and of the head."""


def _stacks(stacks: dict[str, str], metric: str, how: Callable[[float], str], work: str = "{}") -> tuple[Column, ...]:
    """Columns of several stacks at the same work."""
    return tuple(Column(head, stack, metric, how, work) for head, stack in stacks.items())


def _slab(metric: str, how: Callable[[float], str]) -> tuple[Column, ...]:
    """Columns of one sequence through a slab of layers."""
    return (
        *_stacks(PEERS, metric, how, "slab/{}"),
        Column("rlft with FlashAttention 2", "rlft-fa2", metric, how, "slab/{}"),
        Column("rlft in Unsloth's memory", "rlft", metric, how, "slab-at-unsloths-memory/{}"),
        Column("rlft in the least memory", "rlft", metric, how, "slab-tight/{}"),
    )


def _step(metric: str, how: Callable[[float], str]) -> tuple[Column, ...]:
    """Columns of a whole step, with rlft held to the memory that TRL and Unsloth took."""
    return (
        *_stacks(PEERS, metric, how),
        Column("rlft in TRL's memory", "rlft-at-trl-memory", metric, how),
        Column("rlft in Unsloth's memory", "rlft-at-unsloth-memory", metric, how),
    )


STEPS = (
    ("GRPO, prompts of 256 tokens, longest completion 8,000", "grpo_step_lognormal", "grpo-step/lognormal"),
    ("GRPO, prompts of 1,024", "grpo_step_lognormal_p1024", "grpo-step/lognormal-p1024"),
    ("GRPO, longest completion 3,886", "grpo_step_lognormal_median", "grpo-step/lognormal-median"),
    ("GRPO, longest completion 16,384", "grpo_step_outlier", "grpo-step/outlier"),
    ("DPO, 32 pairs, longest side 8,000", "dpo_step_lognormal", "dpo-step/lognormal"),
    ("SFT, 64 texts, longest 8,000", "sft_step_packed", "sft-step/packed"),
)
SLAB = tuple((f"{tokens:,} tokens", "slab", str(tokens)) for tokens in (2048, 8192, 32768))
HEAD = tuple((f"{tokens:,} tokens", "logprobs", f"head/{tokens}") for tokens in (1024, 8192, 32768))
MODES = (("dequantized", "expanded"), ("shared", "lent"), ("merged", "merged"))
"""Modes of the engine, and what they are called in results of before they had these names."""
MODELS = ("Qwen3-0.6B", "Qwen3-1.7B", "Qwen3-4B", "Qwen3-8B", "Qwen3-14B", "Qwen3-32B", "Llama-3.3-70B")
SUMMARY = (STEPS[0], STEPS[3], STEPS[4], STEPS[5])

TABLES: dict[str, Table] = {
    "summary": Table(
        "one optimiser step",
        SUMMARY,
        (
            *_stacks(PEERS, "seconds", seconds),
            Column("against TRL in its memory", "rlft", "times_trl_at_its_memory", times),
            Column("against Unsloth in its memory", "rlft", "times_unsloth_at_its_memory", times),
        ),
        bold="rlft",
    ),
    "step-seconds": Table("seconds", STEPS, _step("seconds", seconds), bold="rlft"),
    "step-memory": Table("GiB above the loaded model", STEPS, _step("peak_GiB", gib)),
    "step-times": Table(
        "rlft is faster",
        STEPS,
        (
            Column("than TRL", "rlft", "times_trl", times),
            Column("than TRL, in its memory", "rlft", "times_trl_at_its_memory", times),
            Column("than Unsloth", "rlft", "times_unsloth", times),
            Column("than Unsloth, in its memory", "rlft", "times_unsloth_at_its_memory", times),
        ),
    ),
    "step-why": Table(
        "where it comes from",
        STEPS[:3],
        (
            Column("kernels", "rlft", "times_kernels", times),
            Column("no padding", "rlft", "times_packing", times),
            Column("a prompt runs once per group", "rlft", "times_prefix", times),
            Column("product", "rlft", "times_trl", times),
        ),
    ),
    "iteration": Table(
        "seconds",
        (("8B shape, 32 prompts of 256 tokens, 8 completions of 512", "grpo_iteration_8b", "grpo-iteration/8b"),),
        (
            *(
                Column(f"TRL: {part}", "trl", f"{metric}seconds")
                for part, metric in (
                    ("all", ""),
                    ("sampling", "rollout_"),
                    ("old log-probs", "old_"),
                    ("training", "train_"),
                )
            ),
            *(
                Column(f"rlft: {part}", "rlft", f"{metric}seconds")
                for part, metric in (("all", ""), ("sampling", "rollout_"), ("training", "train_"))
            ),
        ),
        bold="rlft: all",
    ),
    "slab": Table("tokens/s", SLAB, _slab("tokens_per_s", whole), bold="rlft"),
    "slab-memory": Table("GiB above the loaded model", SLAB, _slab("peak_GiB", seconds)),
    "small": Table(
        "tokens/s",
        tuple(
            (
                f"{size.upper()} shape in {kind.upper() if kind == 'nf4' else kind}, {tokens:,} tokens",
                "small",
                f"small/{size}-{kind}/{tokens}",
            )
            for size in ("0.6b", "1.7b")
            for kind in ("nf4", "bf16")
            for tokens in (512, 1024)
        ),
        (
            Column("transformers + PEFT", "peft", "tokens_per_s", whole),
            Column("Unsloth", "unsloth", "tokens_per_s", whole),
            Column("rlft", "rlft", "tokens_per_s", whole),
        ),
        bold="rlft",
    ),
    "engine-modes": Table(
        "tokens/s sampled",
        tuple((f"`{mode}`", "rollout", old) for mode, old in MODES),
        (
            *(
                Column(f"{count} sequences", "rlft", "tokens_per_s", whole, f"rollout-{{}}/{count}")
                for count in (16, 64, 256)
            ),
        ),
    ),
    "engine-run": Table(
        "medians of a run of ten steps",
        tuple((f"`{mode}`", "grpo_run", f"grpo-run/{old}") for mode, old in MODES),
        (
            Column("sampling, s", "rlft", "time_generate"),
            Column("training, s", "rlft", "time_train"),
            Column("hand-over, s", "rlft", "time_sync"),
            Column("tokens/s sampled", "rlft", "rollout_tokens_per_s", whole),
            Column("mean difference to the trainer, nat", "rlft", "mismatch_mean_size", share),
            Column("ratio outside [0.9, 1.1]", "rlft", "mismatch_outside", percent),
        ),
    ),
    "longest": Table(
        "one step of the whole 8B shape",
        (("SFT, one sequence", "longest", "longest/sft"), ("GRPO, two completions", "longest", "longest/grpo")),
        (
            Column("tokens each", "rlft", "tokens", whole),
            Column("seconds", "rlft", "seconds", seconds),
            Column("GiB above the model", "rlft", "peak_GiB", gib),
            Column("GiB planned", "rlft", "planned_GiB", gib),
            Column("GiB on the host", "rlft", "host_GiB", gib),
        ),
    ),
    "padded": Table(
        "one GRPO step",
        tuple(
            (f"{name} of 8 layers, median of the drawn lengths", f"grpo_step_lognormal_median_{shape}", MEDIAN)
            for name, shape in (("LFM2", "lfm2"), ("Qwen3.5", "qwen3_5"))
        ),
        (
            Column("TRL: seconds", "trl", "seconds"),
            Column("rlft: seconds", "rlft", "seconds"),
            Column("TRL: GiB above the model", "trl", "peak_GiB", seconds),
            Column("rlft: GiB above the model", "rlft", "peak_GiB", seconds),
        ),
    ),
    "longest-70b": Table(
        "70B shape, SFT, one sequence",
        (
            ("4,096 tokens", "longest_70b", "sft70b/sft"),
            ("8,192", "longest_70b", "sft70b/sft#2"),
            ("16,384", "longest_70b", "sft70b/sft#3"),
            ("65,536, its first step", "longest_70b_65536", "sft70b/sft"),
            (
                "4,096, beside a sleeping engine, all but 48 GiB of the card taken",
                "longest_70b",
                "ballast48/sft/beside-engine",
            ),
        ),
        (
            Column("seconds", "rlft", "seconds", seconds),
            Column("GiB above the model", "rlft", "peak_GiB", gib),
            Column("GiB planned", "rlft", "planned_GiB", gib),
            Column("GiB on the host", "rlft", "host_GiB", gib),
        ),
    ),
    "memory": Table(
        "memory of the card, GB",
        tuple((model, "memory_plan", f"memory-plan/{model}") for model in MODELS),
        tuple(Column(str(card), f"{card} GB", "longest_completion", thousands) for card in (16, 24, 48, 80, 141)),
        source=False,
    ),
    "scaling": Table(
        "ranks",
        tuple((str(ranks), "scaling", str(ranks)) for ranks in (1, 2, 4, 8, 16, 64, 256)),
        (
            Column("256 prompts, NVLink: seconds", "rlft", "step_seconds", seconds, "strong/NVLink/{}"),
            Column("waiting", "rlft", "idle_share", share, "strong/NVLink/{}"),
            Column("10 GbE: seconds", "rlft", "step_seconds", seconds, "strong/10 GbE/{}"),
            Column("32 prompts per rank, NVLink: seconds", "rlft", "step_seconds", seconds, "weak/NVLink/{}"),
            Column("waiting ", "rlft", "idle_share", share, "weak/NVLink/{}"),
            Column("10 GbE: seconds ", "rlft", "step_seconds", seconds, "weak/10 GbE/{}"),
        ),
        source=False,
    ),
    "grpo-70b": Table(
        "70B shape, first GRPO iteration",
        (
            (
                "2 sequences of 2,048 tokens, all but 48 GiB of the card taken",
                "ballast48_70b_grpo",
                "ballast48-70b/grpo",
            ),
        ),
        (
            Column("seconds of vLLM's start", "rlft", "start_seconds", whole),
            Column("of sampling", "rlft", "generate_seconds", whole),
            Column("of training", "rlft", "train_seconds", whole),
            Column("GiB of the card in use at most", "rlft", "train_GiB", gib),
        ),
    ),
    "ranks-train": Table(
        "training phase of one step, 8B shape",
        (("1 GPU", "ranks_train_1", "ranks/8b/1"), ("2 GPUs", "ranks_train_2", "ranks/8b/2")),
        (
            Column("seconds", "rlft", "train_seconds", seconds),
            Column("ms for the sum of the gradient", "rlft", "sum_ms", seconds),
        ),
    ),
    "place": Table(
        "8B shape, one sequence of",
        tuple((f"{tokens:,} tokens", "place_host", f"place/8b/{tokens}") for tokens in (1024, 4096, 8192, 16384)),
        (
            Column("seconds from the device", "device", "seconds", seconds),
            Column("from host memory", "host", "seconds", seconds),
        ),
    ),
    "place-70b": Table(
        "70B shape, one sequence of",
        tuple((f"{tokens:,} tokens", "place_host_70b", f"place/70b/{tokens}") for tokens in (1024, 4096)),
        (
            Column("seconds from the device", "device", "seconds", seconds),
            Column("from host memory", "host", "seconds", seconds),
        ),
    ),
    "place-sharded": Table(
        "8B shape on two GPUs, one sequence of",
        tuple((f"{tokens:,} tokens", "place_sharded", f"place/8b/2-ranks/{tokens}") for tokens in (1024, 4096, 8192)),
        (
            Column("seconds from the device", "device", "seconds", seconds),
            Column("from both GPUs", "sharded", "seconds", seconds),
        ),
    ),
    "place-24": Table(
        "70B shape in host memory",
        (("4,096 tokens, all but 24 GiB of the card taken", "place_host_24gib", "place/70b/24-GiB/4096"),),
        (
            Column("seconds of a step", "host", "seconds", seconds),
            Column("GiB of the card in use", "host", "driver_GiB", gib),
        ),
    ),
    "demo": Table(
        "held-out accuracy on two-digit sums",
        (("seed 42", "demo", "seed 42; 60"), ("seed 1", "demo", "seed 1; 60"), ("seed 2", "demo", "seed 2; 60")),
        (
            Column("before", "rlft", "accuracy_before", share, "demo/sums", "{}"),
            Column("after", "rlft", "accuracy_after", share, "demo/sums", "{}"),
            Column("seconds of training", "rlft", "seconds", whole, "demo/sums", "{}"),
        ),
    ),
    "quick-start": Table(
        "the example above",
        (("SmolLM2-135M in NF4", "quick_start", "quick-start"),),
        (
            Column("accuracy before", "rlft", "accuracy_before", share),
            Column("after", "rlft", "accuracy_after", share),
            Column("seconds, all", "rlft", "seconds", whole),
        ),
    ),
    "head": Table("ms, forward and backward", HEAD, _stacks(HEADS, "ms", seconds), bold="rlft"),
    "head-memory": Table("GiB beyond the inputs", HEAD, _stacks(HEADS, "peak_GiB", seconds)),
}
