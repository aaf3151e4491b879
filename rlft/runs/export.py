"""Export the adapter of a run: merged into a standalone model (`rlft merge`), or pushed to the hub (`rlft push`).

The base is loaded from its own files, never as a 4-bit copy: a run may have trained on one, but rounding twice would
give another model. W + scale B A is computed in fp32 and rounded once. Three checks follow: the fp32 sum has the
log-probs of base + adapter; the written files, loaded with plain transformers, equal the rounded sum bit for bit; and
their log-probs differ by no more than rounding explains.

Everything runs on the CPU, with 4 bytes of memory per parameter of the base plus one layer's product.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from rlft.config.paths import user_path
from rlft.config.run import Config
from rlft.errors import ConfigError, ParityError
from rlft.models.kind import class_of
from rlft.models.load import attach_lora, fingerprint, load_base, load_tokenizer
from rlft.models.vision import save_image_processor
from rlft.runs import checkpoint
from rlft.runs.card import adapter_card, merged_card
from rlft.runs.folder import Run, step_of

DTYPES = ("bfloat16", "float16", "float32")
SENTENCES = (
    "The capital of France is Paris, and the river that runs through it is the Seine.",
    "def add(a, b):\n    return a + b",
    "Seven plus eight is fifteen.",
)
"""Texts for the check when the run has no completions."""
FACTOR = 3.0
"""Largest difference of the merged model from fp32, in multiples of that of base + adapter in the same dtype."""
FLOOR = 1e-3
"""Mean difference in nats that another summation order in fp32 may cause."""


@dataclass(frozen=True)
class Merged:
    """Result of `merge`. Differences are means of |difference of log-prob| over `tokens`, in nats."""

    out: Path
    checkpoint: Path
    tokens: int
    difference: float
    """Between the written model and base + adapter in fp32."""
    noise: float
    """Between base + adapter in the requested dtype and in fp32: the effect of rounding alone."""
    shift: float
    """Between base + adapter and the base, in fp32: the effect of the adapter."""

    @property
    def limit(self) -> float:
        """Largest `difference` that passes."""
        return FACTOR * self.noise + FLOOR

    def summary(self) -> str:
        """Describe the check in one or two sentences."""
        text = (
            f"Over {self.tokens} tokens the merged log-probs differ from base + adapter in float32 by "
            f"{self.difference:.2g} nat on average, limit {self.limit:.2g}; the adapter moves them by {self.shift:.2g}."
        )
        if self.shift < self.noise:
            text += (
                " That is less than rounding to this type does to the model, so much of the training may be lost in "
                "it: keep the adapter beside the base, or merge with --dtype float32."
            )
        return text


def merge(
    run_folder: str | Path,
    out: str | Path,
    which: str = "latest",
    dtype: str = "bfloat16",
    push: str | None = None,
    private: bool = False,
    link: str | None = None,
) -> Merged:
    """Write base + adapter of a run as a standalone model: config, weights, tokenizer, README.md.

    which: "latest", "best" or the step of a checkpoint. dtype: of the written weights. push: hub id to upload `out` to.
    link: the run in a tracker, for the README. Raises ConfigError for what a user can fix, before the long work if
    possible, and ParityError when the written model is not base + adapter; `out` is then not created.
    """
    if dtype not in DTYPES:
        raise ConfigError(f'dtype = "{dtype}": want one of {", ".join(DTYPES)}')
    run, out = Run.resume(run_folder), user_path(out, "out")
    path = run.checkpoint(which)
    checkpoint.check(path)
    check_free(out)
    if push:
        check_hub(push)
    run_config = Config.load(run.config)
    cfg = _unquantised(run_config, path)
    checkpoint.check_named(path, cfg.model)
    tokenizer = load_tokenizer(cfg.model, checkpoint.given_tokenizer(path))
    texts = check_texts(run, tokenizer)
    with new_folder(out, "merging") as temporary:
        exact, shift, model = _merge(cfg, run_config, path, texts)
        config = model.config
        with writing(out):
            model.to(getattr(torch, dtype)).save_pretrained(temporary)
        difference = _mean(exact, token_logprobs(read_back(model, temporary, "not merged"), texts))
        del model
        noise = 0.0 if dtype == "float32" else _mean(exact, token_logprobs(_load(replace(cfg, dtype=dtype)), texts))
        result = Merged(out, path, len(exact), difference, noise, shift)
        if not difference <= result.limit:  # nan too
            raise ParityError(
                f"{out}: not written: the merged model is not base + adapter. {result.summary()} "
                + ("Weights beyond float16's range are the usual cause: use bfloat16." if dtype == "float16" else "")
            )
        with writing(out):
            tokenizer.save_pretrained(temporary)
            save_image_processor(cfg.model, config, cfg.data, temporary)
            card = merged_card(run, run_config, _step(path), push or str(out), dtype, result.summary(), link)
            (temporary / "README.md").write_text(card, encoding="utf-8")
    if push:
        upload(push, sorted(out.iterdir()), private, {}, f"the merged model is in {out}")
    return result


@contextlib.contextmanager
def new_folder(out: Path, doing: str) -> Iterator[Path]:
    """Create a hidden folder beside `out` and rename it to `out` when the block ends; remove it when the block raises.

    doing: what the block does, for the folder's name. Raises ConfigError when it cannot be written.
    """
    temporary = out.absolute().with_name(f".{doing}-{out.name}")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a process that was killed
    try:
        with writing(out):
            temporary.mkdir(parents=True)
        yield temporary
        with writing(out):
            temporary.rename(out.absolute())
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def writing(out: Path) -> Iterator[None]:
    """Raise ConfigError where the block cannot write."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f'out = "{out}": cannot be written: {why}; make room there or give another folder') from error


def _step(path: Path) -> int:
    step = step_of(path)
    assert step is not None, path
    return step


def check_free(out: Path) -> None:
    """Raise ConfigError unless `out` is missing or an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f'out = "{out}": is there already and not an empty folder; give another one')


def _unquantised(cfg: Config, checkpoint: Path) -> Config:
    """Return the run's config, changed to load base and adapter unquantised ("auto" on a CPU) on the CPU."""
    lora = replace(cfg.lora, resume_from=str(checkpoint))
    return replace(cfg, lora=lora, quantization="auto", device="cpu", dtype="float32")


def check_texts(run: Run, tokenizer: Any) -> list[list[int]]:
    """Return token ids for the check: eight of the run's last completions with their prompts, or SENTENCES."""
    steps = run.rollout_steps()
    rows = run.read_rollouts(steps[-1]) if steps else []
    rows.sort(key=lambda row: (row["sample"], row["group"]))
    sequences = [tokenizer.encode(row["prompt"])[-64:] + list(row["completion_ids"])[:64] for row in rows]
    return [ids for ids in sequences if len(ids) > 1][:8] or [tokenizer.encode(text) for text in SENTENCES]


@torch.no_grad()
def token_logprobs(model: nn.Module, texts: Sequence[Sequence[int]]) -> Tensor:
    """Return the log-prob of every token except each text's first, from the model's own forward: [tokens] fp32."""
    logprobs = []
    for ids in texts:
        row = torch.tensor([ids])
        logits = model(input_ids=row).logits[0, :-1].float()
        logprobs.append(logits.log_softmax(-1).gather(1, row[0, 1:, None]).squeeze(1))
    return torch.cat(logprobs)


def _mean(first: Tensor, second: Tensor) -> float:
    return float((first - second).abs().mean())


def _load(cfg: Config) -> PeftModel:
    """Load base and adapter in `cfg.dtype`. Raises ConfigError when the base's own files are quantised."""
    base = load_base(cfg, torch.device("cpu"))
    if hasattr(base.config, "quantization_config"):
        raise ConfigError(
            f'model = "{cfg.model}": its files are quantised, and merging into them would round twice; merge the '
            f"adapter in {cfg.lora.resume_from} into the plain model it was made from, with PEFT's merge_and_unload"
        )
    return attach_lora(base, cfg.lora, cfg.seed)


def _merge(cfg: Config, run_config: Config, checkpoint: Path, texts: list[list[int]]) -> tuple[Tensor, float, Any]:
    """Merge in fp32. Returns the log-probs of base + adapter, their mean difference from the base, and the model."""
    model = _load(cfg)
    _check_base(model, run_config, checkpoint)
    exact = token_logprobs(model, texts)
    with model.disable_adapter():
        shift = _mean(exact, token_logprobs(model, texts))
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except ValueError as error:  # PEFT raises it for weights that are not finite
        raise ConfigError(f"{checkpoint}: the adapter cannot be merged: {error}") from error
    difference = _mean(exact, token_logprobs(merged, texts))
    if not difference <= FLOOR:
        raise ParityError(
            f"{checkpoint}: not merged: in float32 the merged log-probs differ from base + adapter by "
            f"{difference:.3g} nat on average, and at most {FLOOR:g} is rounding"
        )
    return exact, shift, merged


def read_back(model: Any, folder: Path, failed: str) -> nn.Module:
    """Load the written files with plain transformers, and return them.

    failed: begins the message of the ParityError that is raised where they are not `model`, bit for bit.
    """
    written = class_of(model.config).from_pretrained(folder, dtype=model.dtype)
    read = written.state_dict()
    wrong = [
        name
        for name, tensor in model.state_dict().items()
        if name not in read or not tensor.cpu().equal(read[name].to(tensor.dtype))
    ]
    if wrong:
        raise ParityError(f"{failed}: {len(wrong)} tensors read back are not what was written, {wrong[0]} for one")
    return written


def _check_base(model: PeftModel, run_config: Config, checkpoint: Path) -> None:
    """Raise ConfigError when the fingerprint shows that the base is not the run's."""
    expected = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["identity"]["base"]
    types = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    fingerprints = [fingerprint(model.get_base_model(), dtype) for dtype in types]
    # The fingerprint of a quantised run is that of its packed bytes, which cannot be recomputed here.
    plain = run_config.quantization == "none" or (run_config.quantization == "auto" and run_config.device == "cpu")
    if expected not in fingerprints and plain:
        raise ConfigError(
            f'model = "{run_config.model}": not the base that {checkpoint} was trained on, whose fingerprint is '
            f"{expected} (here {fingerprints[0]}); put that model back"
        )


# ---- the hub -----------------------------------------------------------------------------------------------------


def push_adapter(
    run_folder: str | Path, repo: str, which: str = "latest", private: bool = False, link: str | None = None
) -> str:
    """Upload a run's adapter and its card to the hub, and return the URL. Raises ConfigError on failure."""
    run = Run.resume(run_folder)
    path = run.checkpoint(which)
    checkpoint.check(path)
    check_hub(repo)
    card = adapter_card(run, Config.load(run.config), _step(path), repo, link)
    return upload(repo, checkpoint.portable(path), private, {"README.md": card}, f"the adapter is in {path}")


def check_hub(repo: str) -> None:
    """Raise ConfigError unless `repo` is a hub id and there is a valid token."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f'push to "{repo}": not a hub id like "you/model" ({error})') from error
    if get_token() is None:
        raise ConfigError(f'push to "{repo}": no Hugging Face token; run `hf auth login`, or set HF_TOKEN')
    with _hub_errors(repo, "nothing was done"):
        HfApi().whoami()


def upload(repo: str, files: list[Path], private: bool, texts: dict[str, str], kept: str) -> str:
    """Commit files and texts to a hub repository, created if missing, and return its URL.

    kept: end of the error message, which says where the files are.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    operations = [CommitOperationAdd(file.name, file) for file in files]
    operations += [CommitOperationAdd(name, text.encode()) for name, text in texts.items()]
    with _hub_errors(repo, kept):
        api = HfApi()
        url = str(api.create_repo(repo, private=private, exist_ok=True))
        api.create_commit(repo, operations, commit_message="From rlft")
    return url


@contextlib.contextmanager
def _hub_errors(repo: str, kept: str) -> Iterator[None]:
    # A refused connection is an HTTPError of the hub library's HTTP client, and not an OSError.
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    try:
        yield
    except (OSError, HTTPError) as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigError(f'push to "{repo}": the hub refused or could not be reached ({first}); {kept}') from error
