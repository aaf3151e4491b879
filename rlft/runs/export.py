"""What leaves a run: its adapter merged into a model of its own (`rlft merge`), or pushed to the hub (`rlft push`).

The base is loaded as its files have it, never as a 4-bit copy: a run may have trained on one, but what is rounded twice
is another model. W + scale B A is computed in fp32 and rounded once. Three checks follow: the sum in fp32 has the
log-probs of base + adapter; the files, loaded with plain transformers, are the rounded sum bit for bit; and their
log-probs are not further away than rounding explains.

Everything runs on the CPU. Memory: 4 bytes per parameter of the base, with one layer's product beside it.
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

from rlft.config.run import Config
from rlft.errors import ConfigError, ParityError
from rlft.models.load import attach_lora, fingerprint, load_base, load_tokenizer
from rlft.runs.card import adapter_card, merged_card
from rlft.runs.folder import Run, step_of

DTYPES = ("bfloat16", "float16", "float32")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
SENTENCES = (
    "The capital of France is Paris, and the river that runs through it is the Seine.",
    "def add(a, b):\n    return a + b",
    "Seven plus eight is fifteen.",
)
"""What the check reads when the run has no completions."""
FACTOR = 3.0
"""The files may be this many times as far from base + adapter in fp32 as base + adapter rounded to the same type is."""
FLOOR = 1e-3
"""Nats that two orders of the same sums in fp32 may differ by, on average."""


@dataclass(frozen=True)
class Merged:
    """What `merge` wrote and what it found. Means of |difference of log-prob| over `tokens`, in nats."""

    out: Path
    checkpoint: Path
    tokens: int
    difference: float
    """Between the written model and base + adapter in fp32."""
    noise: float
    """Between base + adapter in the type asked for and in fp32: what rounding alone does."""
    shift: float
    """Between base + adapter and the base, in fp32: what the adapter does."""

    @property
    def limit(self) -> float:
        """Largest `difference` that passes."""
        return FACTOR * self.noise + FLOOR

    def summary(self) -> str:
        """The check in a sentence or two."""
        told = (
            f"Over {self.tokens} tokens the merged log-probs differ from base + adapter in float32 by "
            f"{self.difference:.2g} nat on average, limit {self.limit:.2g}; the adapter moves them by {self.shift:.2g}."
        )
        if self.shift < self.noise:
            told += (
                " That is less than rounding to this type does to the model, so much of the training may be lost in "
                "it: keep the adapter beside the base, or merge with --dtype float32."
            )
        return told


def merge(
    run_folder: str | Path,
    out: str | Path,
    which: str = "latest",
    dtype: str = "bfloat16",
    push: str | None = None,
    private: bool = False,
    link: str | None = None,
) -> Merged:
    """Write base + adapter of a run as a model of its own: config, weights, tokenizer, README.md.

    which: "latest", "best" or the step of a checkpoint. dtype: of the written weights. push: hub id to upload `out` to.
    link: the run in a tracker, for the README. Raises ConfigError for what a user can mend, before the long work where
    that is possible, and ParityError when the written model is not base + adapter; then `out` is not there.
    """
    if dtype not in DTYPES:
        raise ConfigError(f'dtype = "{dtype}": want one of {", ".join(DTYPES)}')
    run, out = Run.resume(run_folder), Path(out).expanduser()
    path = run.checkpoint(which)
    _check_free(out)
    if push:
        check_hub(push)
    told = Config.load(run.config)
    cfg = _unquantised(told, path)
    tokenizer = load_tokenizer(cfg.model)
    texts = check_texts(run, tokenizer)
    temporary = out.absolute().with_name(f".merging-{out.name}")
    shutil.rmtree(temporary, ignore_errors=True)  # of a merge that was killed
    try:
        with _writing(out):
            temporary.mkdir(parents=True)
        exact, shift, model = _merge(cfg, told, path, texts)
        with _writing(out):
            model.to(getattr(torch, dtype)).save_pretrained(temporary)
        difference = _read_back(model, temporary, texts, exact)
        del model
        noise = 0.0 if dtype == "float32" else _mean(exact, token_logprobs(_load(replace(cfg, dtype=dtype)), texts))
        merged = Merged(out, path, len(exact), difference, noise, shift)
        if not difference <= merged.limit:  # nan too
            raise ParityError(
                f"{out}: not written: the merged model is not base + adapter. {merged.summary()} "
                + ("Weights beyond float16's range are the usual cause: use bfloat16." if dtype == "float16" else "")
            )
        with _writing(out):
            tokenizer.save_pretrained(temporary)
            card = merged_card(run, told, _step(path), push or str(out), dtype, merged.summary(), link)
            (temporary / "README.md").write_text(card, encoding="utf-8")
            temporary.rename(out.absolute())
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if push:
        upload(push, sorted(out.iterdir()), private, {}, f"the merged model is in {out}")
    return merged


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
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


def _check_free(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f'out = "{out}": is there already and not an empty folder; give another one')


def _unquantised(cfg: Config, checkpoint: Path) -> Config:
    """The run's config, for loading base and adapter as their files have them ("auto" on a CPU), on the CPU."""
    lora = replace(cfg.lora, resume_from=str(checkpoint))
    return replace(cfg, lora=lora, quantization="auto", device="cpu", dtype="float32")


def check_texts(run: Run, tokenizer: Any) -> list[list[int]]:
    """Token ids to compare log-probs on: eight of the run's last completions with their prompts, or SENTENCES."""
    steps = run.rollout_steps()
    rows = run.read_rollouts(steps[-1]) if steps else []
    rows.sort(key=lambda row: (row["sample"], row["group"]))
    made = [tokenizer.encode(row["prompt"])[-64:] + list(row["completion_ids"])[:64] for row in rows]
    return [ids for ids in made if len(ids) > 1][:8] or [tokenizer.encode(text) for text in SENTENCES]


@torch.no_grad()
def token_logprobs(model: nn.Module, texts: Sequence[Sequence[int]]) -> Tensor:
    """Log-prob of every token but each text's first, by the model's own forward: [tokens] fp32."""
    found = []
    for ids in texts:
        row = torch.tensor([ids])
        logits = model(input_ids=row).logits[0, :-1].float()
        found.append(logits.log_softmax(-1).gather(1, row[0, 1:, None]).squeeze(1))
    return torch.cat(found)


def _mean(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().mean())


def _load(cfg: Config) -> PeftModel:
    """Base and adapter in `cfg.dtype`. Raises ConfigError when the base's own files are quantised."""
    base = load_base(cfg, torch.device("cpu"))
    if hasattr(base.config, "quantization_config"):
        raise ConfigError(
            f'model = "{cfg.model}": its files are quantised, and merging into them would round twice; merge the '
            f"adapter in {cfg.lora.resume_from} into the plain model it was made from, with PEFT's merge_and_unload"
        )
    return attach_lora(base, cfg.lora, cfg.seed)


def _merge(cfg: Config, told: Config, checkpoint: Path, texts: list[list[int]]) -> tuple[Tensor, float, Any]:
    """Log-probs of base + adapter in fp32, how far they are from the base's, and the merged model, in fp32."""
    model = _load(cfg)
    _check_base(model, told, checkpoint)
    exact = token_logprobs(model, texts)
    with model.disable_adapter():
        shift = _mean(exact, token_logprobs(model, texts))
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except ValueError as error:  # what PEFT raises for weights that are not finite
        raise ConfigError(f"{checkpoint}: the adapter cannot be merged: {error}") from error
    found = _mean(exact, token_logprobs(merged, texts))
    if not found <= FLOOR:
        raise ParityError(
            f"{checkpoint}: not merged: in float32 the merged log-probs differ from base + adapter by {found:.3g} nat "
            f"on average, and at most {FLOOR:g} is rounding"
        )
    return exact, shift, merged


def _read_back(model: Any, folder: Path, texts: list[list[int]], exact: Tensor) -> float:
    """Load what was written, check that it is `model` bit for bit, and return its mean |difference| to `exact`."""
    from transformers import AutoModelForCausalLM

    written = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype)
    theirs = written.state_dict()
    wrong = [n for n, t in model.state_dict().items() if n not in theirs or not t.equal(theirs[n].to(t.dtype))]
    if wrong:
        raise ParityError(f"not merged: {len(wrong)} tensors read back are not what was written, {wrong[0]} for one")
    return _mean(exact, token_logprobs(written, texts))


def _check_base(model: PeftModel, told: Config, checkpoint: Path) -> None:
    """Raise ConfigError when the base is not the run's, as far as its fingerprint can tell. told: the run's config."""
    theirs = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["identity"]["base"]
    types = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    ours = [fingerprint(model.get_base_model(), dtype) for dtype in types]
    # A quantised run's fingerprint is that of its packed bytes, which only bitsandbytes where it ran can make again.
    plain = told.quantization == "none" or (told.quantization == "auto" and told.device == "cpu")
    if theirs not in ours and plain:
        raise ConfigError(
            f'model = "{told.model}": not the base that {checkpoint} was trained on, whose fingerprint is {theirs} '
            f"(here {ours[0]}); put that model back"
        )


# ---- the hub -----------------------------------------------------------------------------------------------------


def push_adapter(
    run_folder: str | Path, repo: str, which: str = "latest", private: bool = False, link: str | None = None
) -> str:
    """Upload a run's adapter and its card to the hub; returns the address. Raises ConfigError when that cannot be."""
    run = Run.resume(run_folder)
    path = run.checkpoint(which)
    check_hub(repo)
    card = adapter_card(run, Config.load(run.config), _step(path), repo, link)
    files = [path / name for name in ADAPTER_FILES]
    return upload(repo, files, private, {"README.md": card}, f"the adapter is in {path}")


def check_hub(repo: str) -> None:
    """Raise ConfigError unless `repo` is a hub id, there is a token, and the hub knows whose it is."""
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
    """One commit of files and texts to a hub repository, which is made if missing; returns its address."""
    from huggingface_hub import CommitOperationAdd, HfApi

    added = [CommitOperationAdd(file.name, file) for file in files]
    added += [CommitOperationAdd(name, text.encode()) for name, text in texts.items()]
    with _hub_errors(repo, kept):
        api = HfApi()
        address = str(api.create_repo(repo, private=private, exist_ok=True))
        api.create_commit(repo, added, commit_message="From rlft")
    return address


@contextlib.contextmanager
def _hub_errors(repo: str, kept: str) -> Iterator[None]:
    # HTTPError is that of the HTTP client the hub's library uses; a refused connection is one, and no OSError.
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    try:
        yield
    except (OSError, HTTPError) as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigError(f'push to "{repo}": the hub refused or could not be reached ({first}); {kept}') from error
