"""Score completions with a reward model: a sequence classification model of transformers.

    [[rewards]]
    use = "reward_model"
    timeout = 600       # seconds for all completions of a step, and for loading the model in the first
    args = { model = "Skywork/Skywork-Reward-V2-Qwen3-0.6B", device = "cuda", batch_size = 16 }

The reward is the logit of the model's one label, unscaled: models differ by orders of magnitude, so look at
`rewards/reward_model/std` before you weigh it against another reward. The text is the conversation with the completion
as its last message, in the reward model's own chat template; a prompt that is a string becomes a user message. A
tokenizer without a chat template gets prompt and completion as a pair of texts.

The model runs in the reward's process, beside the trainer: on "cuda" both need room on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from rlft.rewards.builtin.exact import text_of


class Loaded(NamedTuple):
    """A reward model and what scoring needs of it."""

    model: Any
    tokenizer: Any
    column: int
    """Index of the label that is the reward."""
    longest: int | None
    """Tokens of the longest text it takes; None where the config does not say."""


def reward_model(
    prompts: list[Any],
    completions: list[Any],
    model: str,
    device: str = "cpu",
    batch_size: int = 8,
    dtype: str = "auto",
    label: int | str | None = None,
    max_tokens: int | None = None,
    **_: Any,
) -> list[float]:
    """Return the model's logit for each conversation.

    model: a folder or a model of the hub. device: "cpu", "cuda" or "cuda:1". batch_size: texts of one forward pass; a
    model without a padding token gets one at a time. dtype: "auto" is the checkpoint's. label: index or name of the
    label that is the reward, for a model with several. max_tokens: longest text; None is the model's own limit.

    Raises ValueError for a model with several labels and no `label`, for one whose head was never trained, and for a
    text that is too long, which is then left out.
    """
    loaded = _load(model, device, dtype, label)
    if isinstance(loaded, Exception):
        raise loaded
    limit = min((each for each in (max_tokens, loaded.longest) if each is not None), default=None)
    rows = [
        _encode(loaded.tokenizer, prompt, text_of(completion))
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    for ids in rows:
        if limit is not None and len(ids) > limit:
            raise ValueError(f"prompt and completion have {len(ids)} tokens, and {model} takes {limit}")
    # Texts of like length share a batch, so that little is spent on padding.
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    size = batch_size if loaded.model.config.pad_token_id is not None else 1
    scores = [0.0] * len(rows)
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        for row, score in zip(batch, _scores(loaded, [rows[row] for row in batch]), strict=True):
            scores[row] = score
    return scores


@lru_cache(maxsize=1)
def _load(name: str, device: str, dtype: str, label: int | str | None) -> Loaded | Exception:
    """Load a model once; what it raises is returned, so that a failed batch does not load it for each of its rows."""
    try:
        return _opened(name, device, dtype, label)
    except (ValueError, OSError, RuntimeError) as error:
        return error


def _opened(name: str, device: str, dtype: str, label: int | str | None) -> Loaded:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name)
    model, info = AutoModelForSequenceClassification.from_pretrained(name, dtype=dtype, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(
            f"{name} is no reward model: it has no trained weights for {', '.join(sorted(info['missing_keys'])[:3])}"
        )
    config = model.config.get_text_config()
    model.config.pad_token_id = config.pad_token_id
    return Loaded(
        model.eval().to(device),
        tokenizer,
        _column(name, dict(model.config.id2label), label),
        getattr(config, "max_position_embeddings", None),
    )


def _column(name: str, labels: dict[int, str], label: int | str | None) -> int:
    """Return the index of a label. Raises ValueError when it is missing where there are several, or unknown."""
    named = {**{text: index for index, text in labels.items()}, **{index: index for index in labels}}
    if label is None and len(labels) == 1:
        return 0
    if label is None or label not in named:
        known = ", ".join(f"{index} ({text})" for index, text in sorted(labels.items())[:10])
        raise ValueError(
            f"label = {label!r}: {name} has {len(labels)} labels; name the one that is the reward: {known}"
        )
    return named[label]


def _encode(tokenizer: Any, prompt: Any, completion: str) -> list[int]:
    if not isinstance(prompt, str) and any(isinstance(message.get("content"), list) for message in prompt):
        raise ValueError("the prompt has images, and the reward model reads text alone: use a reward of your own")
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        text = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": completion}], tokenize=False)
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    if not isinstance(prompt, str):
        raise ValueError(
            "the reward model's tokenizer has no chat template, and the prompts are messages; give prompts as strings, "
            "or add a chat_template to the reward model's folder"
        )
    return tokenizer(prompt, completion)["input_ids"]


def _scores(loaded: Loaded, rows: Sequence[Sequence[int]]) -> list[float]:
    """Run one batch, padded on the right: the head of a causal model reads the last token that is no padding."""
    import torch

    width = max(map(len, rows))
    pad = loaded.model.config.pad_token_id or 0
    ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], device=loaded.model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=loaded.model.device)
    with torch.inference_mode():
        logits = loaded.model(input_ids=ids, attention_mask=mask).logits
    return logits[:, loaded.column].float().tolist()
