"""Continue a PEFT adapter: read its files, which may be anybody's, and attach it to the base it fits.

Names of fields are PEFT's: r is the rank.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from annotated_types import Ge
from peft import LoraConfig, PeftConfig, PeftModel
from pydantic import AfterValidator
from torch import nn

from rlft.config.paths import user_path
from rlft.config.run import Lora
from rlft.config.section import shown
from rlft.errors import ConfigError
from rlft.models import targets
from rlft.models.adapter import lora_parameters
from rlft.models.files import read_object, reading, tensor_shapes

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
"""Names of the file of tensors, in the order in which PEFT looks for them."""
PLAIN = (
    "task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode r "
    "target_modules exclude_modules lora_alpha lora_dropout fan_in_fan_out use_rslora init_lora_weights "
    "layers_to_transform layers_pattern rank_pattern alpha_pattern megatron_core loftq_config eva_config "
    "corda_config lora_ga_config runtime_config target_parameters ensure_weight_tying qalora_group_size"
)
"""Fields of a `LoraConfig` with which it is still plain LoRA. Those about the start of an adapter do not count, since
its tensors are in the file."""
STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights that leave the base as it is."""


def _compiles(pattern: Any) -> Any:
    for each in [pattern] if isinstance(pattern, str) else pattern if isinstance(pattern, dict) else ():
        try:
            re.compile(each)
        except re.error as error:
            raise ValueError(f"no regular expression: {error}") from None
    return pattern


Pattern = AfterValidator(_compiles)
Rank = Annotated[int, Ge(1)]


class Saved(pydantic.BaseModel, strict=True, extra="allow"):
    """What PEFT and rlft read of an adapter_config.json, with the types that it must have."""

    peft_type: Literal["LORA"]
    r: Rank
    lora_alpha: int | float
    lora_dropout: int | float = 0.0
    use_rslora: bool = False
    target_modules: Annotated[str | list[str] | None, Pattern] = None
    exclude_modules: Annotated[str | list[str] | None, Pattern] = None
    target_parameters: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: Annotated[dict[str, Rank] | None, Pattern] = None
    alpha_pattern: Annotated[dict[str, int | float] | None, Pattern] = None
    init_lora_weights: bool | str = True


def read_adapter_config(folder: str) -> LoraConfig:
    """Return the settings of the adapter in a folder. Raises ConfigError for files that are missing or damaged, and for
    an adapter that is no plain LoRA."""
    setting = f'lora.resume_from = "{folder}"'
    place = user_path(folder, "lora.resume_from")
    path = place / CONFIG
    if not path.is_file():
        raise ConfigError(f"{setting}: no PEFT adapter there ({CONFIG} is missing)")
    table = read_object(path)
    try:
        Saved.model_validate(table)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(step) for step in first["loc"][:1])
        what = first["msg"].removeprefix("Value error, ")
        raise ConfigError(
            f"{setting}: {path}: {name} = {shown(first['input'])}: {what}; give an adapter that PEFT saved for LoRA"
        ) from None
    with reading(setting, place, f"PEFT cannot read {path}", "give an adapter that PEFT saved"), _quiet():
        saved: Any = PeftConfig.from_pretrained(str(place))
    others = not_plain(saved)
    if others:
        raise ConfigError(
            f"{setting}: want a plain LoRA adapter (no DoRA, bias or modules_to_save), and {path} sets "
            f"{', '.join(others)}"
        )
    start = saved.init_lora_weights
    if start not in STARTS:
        raise ConfigError(
            f'{setting}: {path}: init_lora_weights = "{start}" takes a part out of the base while the adapter is '
            f"loaded, and rlft keeps the base as it is; convert the adapter to plain LoRA with PEFT "
            f"(save_pretrained with path_initial_model_for_weight_conversion)"
        )
    return saved


def not_plain(config: Any) -> list[str]:
    """Return the fields of a LoRA adapter's settings that make it something else than plain LoRA."""
    plain = LoraConfig()
    fields = {name: getattr(config, name, None) for name in vars(plain) if name not in PLAIN.split()}
    return [name for name, value in fields.items() if value and value != getattr(plain, name)]


def continue_adapter(base: nn.Module, lora: Lora) -> PeftModel:
    """Attach the adapter in the folder `lora.resume_from`. Raises ConfigError for one that does not fit `base`."""
    folder = str(lora.resume_from)
    saved = read_adapter_config(folder)
    place = user_path(folder, "lora.resume_from")
    for field, ours, theirs in (
        ("rank", lora.rank, saved.r),
        ("alpha", lora.alpha, saved.lora_alpha),
        ("rslora", lora.rslora, saved.use_rslora),
    ):
        if ours != theirs:
            raise ConfigError(
                f"lora.{field} = {ours}, but the adapter in {folder} has {theirs}: set lora.{field} = {theirs}"
            )
    stored = _stored(place, saved)
    # Dropout affects training from here on, not the saved weights; `changed_dropout` reports a change. The start of an
    # adapter is overwritten by the file.
    saved.lora_dropout, saved.init_lora_weights = lora.dropout, True
    wanted = targets.resolve(base, lora)
    misfit = "the adapter does not fit this base"
    with (
        reading(f'lora.resume_from = "{folder}"', place, misfit, "give one that was trained on it"),
        peft_wraps(),
        _quiet(),
    ):
        options: Any = {"is_trainable": True, "config": saved}
        model = PeftModel.from_pretrained(base, str(place), **options).eval()  # type: ignore[arg-type]
    slots = set(lora_parameters(model, "default"))
    if stored != slots:
        raise ConfigError(
            f'lora.resume_from = "{folder}": the adapter does not fit this base: {len(stored - slots)} of its tensors '
            f"have no place in it and {len(slots - stored)} of the base's are missing, {min(stored ^ slots)} for one"
        )
    _check_targets(model, lora, wanted)
    _check_expert_rank(model, lora, wanted)
    return model


def _check_expert_rank(model: PeftModel, lora: Lora, wanted: LoraConfig) -> None:
    """Raise ConfigError if the experts of a continued adapter have another rank than a new one's would. wanted: from
    `resolve`."""
    for ours in {targets.rank_of(wanted, name) for name in wanted.target_parameters or ()}:
        for theirs in targets.expert_ranks(model) - {ours}:
            divided = "" if lora.expert_rank else f" (lora.rank = {lora.rank} divided)"
            raise ConfigError(
                f"lora.expert_rank = {ours}{divided}, but the experts of the adapter in {lora.resume_from} have "
                f"{theirs}: set lora.expert_rank = {theirs}"
            )


def _stored(place: Path, saved: LoraConfig) -> set[str]:
    """Return the names of the tensors of an adapter. Raises ConfigError where the file is missing or damaged, and for
    ranks that no tensor in it has, for which PEFT would take the memory."""
    paths = [place / name for name in WEIGHTS if (place / name).is_file()]
    if not paths:
        # PEFT would ask the hub for a model of this name.
        raise ConfigError(f'lora.resume_from = "{place}": no PEFT adapter there ({WEIGHTS[0]} is missing)')
    shapes = tensor_shapes(paths[0])
    largest = max((shape[0] for name, shape in shapes.items() if ".lora_A" in name and shape), default=0)
    for pattern, rank in (saved.rank_pattern or {}).items():
        if rank > largest:
            raise ConfigError(
                f"{place / CONFIG}: rank_pattern gives {pattern} the rank {rank}, and {paths[0].name} has {largest} at "
                f"most; give an adapter that PEFT saved"
            )
    return set(shapes)


def changed_dropout(lora: Lora) -> str | None:
    """Return a sentence if the adapter of `lora.resume_from` was saved with another dropout; else None."""
    if lora.resume_from is None:
        return None
    saved = read_adapter_config(lora.resume_from)
    if saved.lora_dropout == lora.dropout:
        return None
    return (
        f"lora.dropout = {lora.dropout:g} from here on; the adapter in {lora.resume_from} was trained with "
        f"{saved.lora_dropout:g}"
    )


@contextlib.contextmanager
def peft_wraps() -> Iterator[None]:
    """Suppress warnings that a user cannot act on: PEFT 0.21 reads an attribute that transformers 5.24 deprecates, and
    calls a rank of experts ignored that it honours."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "The following rank_pattern keys did not match any targeted", RuntimeWarning)
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress what PEFT warns of and rlft raises: tensors without a place, and settings that it ignores."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found missing adapter keys")
        warnings.filterwarnings("ignore", message="The configuration file contains a `runtime_config` key")
        yield


def _check_targets(model: PeftModel, lora: Lora, wanted: LoraConfig) -> None:
    """Raise ConfigError if a continued adapter is on other weights than a new one would be. wanted: from `resolve`."""
    requested, attached = targets.requested_and_attached(model, wanted)
    if attached == requested:
        return
    leaves = [
        sorted({name.removesuffix(".weight").rpartition(".")[2] for name in names}) for names in (requested, attached)
    ]
    raise ConfigError(
        f"lora.targets = {lora.targets!r} is {len(requested)} layers of this model ({', '.join(leaves[0])}), but the "
        f"adapter in {lora.resume_from} is on {len(attached)} ({', '.join(leaves[1])}): set "
        f"lora.targets = {leaves[1]}, or continue an adapter that is on the same layers"
    )
