"""Write the model card (README.md) of an adapter or a merged model: training, measurements, and how to load it.

Every number comes from the run's config and metrics.jsonl; unknown ones are omitted. The YAML block at the top is for
the hub (library_name, base_model, tags, license).
"""

from __future__ import annotations

import functools
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

from rlft.algos.algorithm import build_algorithm, describe
from rlft.config import secrets
from rlft.config.data import Source
from rlft.config.resolve import names_user_code
from rlft.config.run import Config
from rlft.data.sources import FILES
from rlft.environment import version
from rlft.models.kind import SEEING
from rlft.models.load import locate
from rlft.runs.folder import Run

METRICS = ("loss", "rewards/accuracies", "rewards/margins", "entropy", "mean_token_accuracy")
"""Metrics shown with their first and last value, where the run has them."""
SAMPLED = ("reward", "completions/mean_length", "completions/clipped_ratio")
"""Further such metrics, where completions were sampled."""
MEASURED = ("eval/loss", "eval/perplexity")
"""Metrics of held-out rows, besides all those with a standard error."""
LICENCE = ("license", "license_name", "license_link")
"""Fields of the hub's YAML block for the licence."""


def adapter_card(run: Run, cfg: Config, step: int, where: str, link: str | None = None) -> str:
    """Return the card of the adapter after `step`.

    where: folder or hub id to load it from. link: the run in a tracker.
    """
    lines = [
        f"A LoRA adapter for {_base_words(cfg)}, rank {cfg.lora.rank}, alpha {cfg.lora.alpha:g}, trained with rlft.",
        "",
        "## Use",
        *_code(cfg, where, merged=False),
        *_training(run, cfg, step, link),
    ]
    return _card(cfg, {"library_name": "peft", "base_model_relation": "adapter"}, ("lora",), run, lines)


def merged_card(run: Run, cfg: Config, step: int, where: str, dtype: str, check: str, link: str | None = None) -> str:
    """Return the card of the merged model of `step`. check: result of the comparison of log-probs."""
    lines = [
        f"{_base_words(cfg)} with a LoRA adapter (rank {cfg.lora.rank}, alpha {cfg.lora.alpha:g}) trained with rlft "
        f"and merged in: W + scale B A in float32, rounded once to {dtype}. {check}",
        "",
        "## Use",
        *_code(cfg, where, merged=True),
        *_training(run, cfg, step, link),
    ]
    return _card(cfg, {"library_name": "transformers", "base_model_relation": "finetune"}, (), run, lines)


def _card(cfg: Config, block: dict[str, str], tags: tuple[str, ...], run: Run, lines: list[str]) -> str:
    import yaml

    hub = {"base_model": cfg.model} if on_hub(cfg.model) else {}
    if not hub:  # the relation is meaningless without the base's hub id
        block = {name: value for name, value in block.items() if name != "base_model_relation"}
    algorithm = [] if names_user_code(cfg.algo.name) else [cfg.algo.name]
    sources = [source.path for source in _sources(cfg) if on_hub(source.path)]
    task = "image-text-to-text" if _sees(cfg.model) else "text-generation"
    fields: dict[str, Any] = {**licence(cfg.model), **hub, **block, "pipeline_tag": task}
    fields |= {"tags": ["rlft", *tags, *algorithm], **({"datasets": sources} if sources else {})}
    front = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)
    return "\n".join(["---", front.rstrip(), "---", f"# {run.path.resolve().name}", "", *lines]) + "\n"


def on_hub(name: str) -> bool:
    """Return True for a hub id: "owner/name" that is not a local path."""
    owner, slash, rest = name.partition("/")
    plain = bool(slash and owner and rest) and "/" not in rest and not name.startswith((".", "~"))
    return plain and not Path(name).exists() and Path(name).suffix not in (".gguf", *FILES)


@functools.lru_cache(maxsize=4)  # a card is written with every checkpoint
def licence(model: str) -> dict[str, Any]:
    """Return the licence fields of the base from its local card or .gguf file; empty if there is none."""
    where = locate(model)
    if where.gguf_file:
        from rlft.models import gguf

        named = gguf.licence(where.gguf_file)
        return {"license": named} if named else {}
    from huggingface_hub import ModelCard, try_to_load_from_cache

    readme = Path(where.path) / "README.md"
    if not Path(where.path).is_dir():
        cached_card = try_to_load_from_cache(where.path, "README.md") if on_hub(model) else None
        readme = Path(cached_card) if isinstance(cached_card, str) else readme
    if not readme.is_file():
        return {}
    try:
        data = ModelCard(readme.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except ValueError:  # a third-party README whose block cannot be parsed
        return {}
    return {name: data[name] for name in LICENCE if data.get(name)}


def _sees(model: str) -> bool:
    """Return whether the base takes images, by its config on this machine."""
    where = locate(model)
    found: Any = Path(where.path) / "config.json"
    if not Path(where.path).is_dir() and on_hub(model):
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(where.path, "config.json")
    if where.gguf or not isinstance(found, str | Path) or not Path(found).is_file():
        return False
    return json.loads(Path(found).read_text(encoding="utf-8")).get("model_type") in SEEING


def _base_words(cfg: Config) -> str:
    where = locate(cfg.model)
    return f"`{cfg.model}`" + (f" ({where.gguf}, dequantised)" if where.gguf else "")


def _sources(cfg: Config) -> list[Source]:
    return list(cfg.data.sources) or [Source(cfg.data.path)]


def _code(cfg: Config, where: str, merged: bool) -> list[str]:
    """Return Python code that loads the model and samples from it with the prompt format of training."""
    place, base = locate(cfg.model), f'"{cfg.model}"'
    lines, folder = ["```python"], ""
    if place.gguf and not merged:
        if cfg.model.isidentifier() and importlib.util.find_spec(cfg.model):
            lines += ["from importlib.util import find_spec", ""]
            folder = f'find_spec("{cfg.model}").submodule_search_locations[0]'
        else:
            folder = f'"{place.path}"'
        base = f'folder, gguf_file="{place.gguf}"'
    target = f'"{where}"' if merged else base
    kind = ', dtype="auto"' if merged or not place.gguf else ""
    lines += ["from peft import PeftModel"] if not merged else []
    automatic = "AutoModelForImageTextToText" if _sees(cfg.model) else "AutoModelForCausalLM"
    lines += [
        f"from transformers import {automatic}, AutoTokenizer",
        "",
        *([f"folder = {folder}"] if folder else []),
        f"tokenizer = AutoTokenizer.from_pretrained({target})",
        f"model = {automatic}.from_pretrained({target}{kind})",
    ]
    lines += [] if merged else [f'model = PeftModel.from_pretrained(model, "{where}")']
    lines += ['text = "Your prompt"']
    if cfg.data.chat != "never":
        system = [{"role": "system", "content": cfg.data.system}] if cfg.data.system else []
        extra = "".join(f", {name}={value!r}" for name, value in secrets.masked(cfg.data.chat_template_kwargs).items())
        messages = "".join(f"{message!r}, " for message in system) + '{"role": "user", "content": text}'
        lines += [
            "if tokenizer.chat_template:",
            f"    messages = [{messages}]",
            f"    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True{extra})",
        ]
    lines += [
        'inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not tokenizer.chat_template)',
        f"made = model.generate(**inputs, max_new_tokens={cfg.sampling.max_tokens})",
        'print(tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
        "```",
    ]
    return lines


def _training(run: Run, cfg: Config, step: int, link: str | None) -> list[str]:
    rows = [row for row in run.metrics() if row.get("step", math.inf) <= step]
    train_rows = [row for row in rows if "loss" in row]
    made_with = [f"{name} {version(name) or 'from a checkout'}" for name in ("rlft", "torch", "transformers", "peft")]
    completions = f" with {cfg.sampling.group_size} completions each" if _sampled(train_rows) else ""
    return [
        "",
        "## Training",
        f"- data: {', '.join(map(_data_words, _sources(cfg)))}",
        *_rewards(cfg, train_rows),
        *(f"- algorithm: {line}" if not i else f"  {line}" for i, line in enumerate(_algorithm(cfg))),
        f"- {step} steps of {cfg.prompts_per_step} prompts{completions}, learning rate {cfg.optim.lr:g}",
        *([f"- {train_rows[-1]['num_tokens']:,.0f} tokens"] if train_rows and train_rows[-1].get("num_tokens") else []),
        *([f"- every step: {link}"] if link else []),
        f"- {', '.join(made_with)}",
        *_held_out(rows, step),
        *_first_and_last(train_rows),
    ]


def _sampled(train_rows: list[dict[str, Any]]) -> bool:
    return bool(train_rows) and "sampling/sampling_logp_difference/mean" in train_rows[-1]


def _data_words(source: Source) -> str:
    # A local path is useless to a reader and private.
    local = Path(source.path).is_absolute() or source.path.startswith((".", "~"))
    return f"`{Path(source.path).name if local else source.path}`"


def _rewards(cfg: Config, train_rows: list[dict[str, Any]]) -> list[str]:
    names = [
        f"`{Path(reward.use).name}`" + (f" x {reward.weight:g}" if reward.weight != 1 else "") for reward in cfg.rewards
    ]
    if not names and train_rows:  # rewards from Python: take their names from the metrics
        names = [
            f"`{parts[1]}`"
            for key in train_rows[-1]
            if (parts := key.split("/"))[0] == "rewards" and len(parts) == 3 and parts[2] == "mean"
        ]
    return [f"- rewards: {', '.join(names)}"] if names else []


def _algorithm(cfg: Config) -> list[str]:
    """Describe the algorithm. A loss in a user's file is not imported for a card, since the file may be gone."""
    if names_user_code(cfg.algo.name) or ":" in str(cfg.algo.options.get("advantage", "")):
        options = ", ".join(f"{name} = {value}" for name, value in secrets.masked(cfg.algo.options).items())
        return [f"`{Path(cfg.algo.name).name}`" + (f" ({options})" if options else "")]
    return describe(build_algorithm(cfg.algo, cfg.optim.updates))


def _held_out(rows: list[dict[str, Any]], step: int) -> list[str]:
    """List the evaluations before the first and after the last step, each mean with its 95% interval."""
    evaluations = {row["step"]: row for row in rows if any(name.startswith("eval/") for name in row)}
    selected = {at: evaluations[at] for at in (0, step) if at in evaluations}
    if not selected:
        return []
    first, titles = selected[min(selected)], {0: "before", step: f"after {step} steps"}
    names = [name for name in first if name.startswith("eval/") and (f"{name}_stderr" in first or name in MEASURED)]
    head = f"{first['eval/rows']:.0f} rows that were not trained on; means, with 95% intervals where there are any."
    count = sum(at > 0 for at in evaluations)
    if count > 1:
        head += (
            f" {count} checkpoints of the run were evaluated on them; one that was chosen by that looks too good here."
        )
    return [
        "",
        "## Held out",
        head,
        "",
        *_table(
            ["", *(titles[at] for at in selected)],
            [[name.removeprefix("eval/"), *(_interval(row, name) for row in selected.values())] for name in names],
        ),
    ]


def _interval(row: dict[str, Any], name: str) -> str:
    mean, error, low, high = (row.get(f"{name}{end}") for end in ("", "_stderr", "_low", "_high"))
    if mean is None:
        return ""
    if low is not None and high is not None:
        return f"{mean:.3f} ({low:.3f} to {high:.3f})"
    return f"{mean:.3f}" + (f" ± {1.96 * error:.3f}" if error is not None else "")


def _first_and_last(train_rows: list[dict[str, Any]]) -> list[str]:
    if not train_rows:
        return []
    first, last = train_rows[0], train_rows[-1]
    candidates = (*SAMPLED, *METRICS) if _sampled(train_rows) else METRICS
    names = [name for name in candidates if first.get(name) is not None and last.get(name) is not None]
    return [
        "",
        "## In training",
        "",
        *_table(
            ["metric", f"step {first['step']}", f"step {last['step']}"],
            [[name, f"{first[name]:.4g}", f"{last[name]:.4g}"] for name in names],
        ),
    ]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
