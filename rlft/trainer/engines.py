"""Choose and start the engine that a run samples with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rlft.config.run import Config
from rlft.data.table import table_of
from rlft.environment import install, version
from rlft.errors import ConfigError, UnsupportedModel
from rlft.models.policy import Policy
from rlft.models.rope import context_of
from rlft.monitor.console import Console
from rlft.rollout.eager import EagerEngine
from rlft.rollout.engine import Engine
from rlft.rollout.routing import replays
from rlft.trainer.evaluate import sampling_of
from rlft.types import Prompt

INSTALL = install("vllm")


def sampler_name(cfg: Config, device: torch.device) -> str:
    """Return the engine that samples, "vllm" or "eager", where completions are not recorded."""
    if cfg.engine.name in ("vllm", "eager"):
        return cfg.engine.name
    return "vllm" if device.type == "cuda" and version("vllm") is not None else "eager"


def engine_name(cfg: Config, recorded: bool, device: torch.device) -> str:
    """Return "vllm", "eager" or "replay": `engine.name` with "auto" resolved. recorded: the data has completions."""
    if cfg.engine.name == "replay" or (cfg.engine.name == "auto" and recorded):
        return "replay"
    return sampler_name(cfg, device)


def start(
    cfg: Config,
    policy: Policy,
    tokenizer: Any,
    console: Console,
    rows: Sequence[Prompt],
    images: bool = False,
    trains: bool = True,
) -> Engine:
    """Start the engine that samples.

    rows: every prompt it will sample from, for the length of the longest. images: whether prompts have images. trains:
    whether completions are trained on, not only evaluated.

    For engine.name = "auto", the eager engine samples a model that vLLM cannot, and a warning says why. Raises
    ConfigError for prompts too long for the model's context, and EngineError when vLLM does not start.
    """
    longest = _max_model_len(cfg, policy, rows)
    if sampler_name(cfg, policy.device) == "vllm":
        from rlft.rollout.vllm.engine import VllmEngine

        console.phase("starting vLLM")
        sequences, saying = cfg.prompts_per_step * cfg.sampling.group_size, (console.warn, console.detail)
        try:
            _check_images(policy, images)
            more = (console.generating, *saying, trains)
            return VllmEngine(policy, tokenizer, cfg.engine, longest, sequences, *more)
        except UnsupportedModel as error:
            if cfg.engine.name != "auto":
                raise
            console.warn(f"sampling with the trainer's own modules: {error.reason}")
            # The length that a longrope model's factors and the memory plan were chosen for.
            _check_fits(cfg, longest_of(cfg, policy, rows))
    elif cfg.engine.name == "auto" and policy.device.type == "cuda":
        console.warn(f"sampling with the trainer's own modules, since vLLM is not installed: {INSTALL}")
    if trains and (line := replays(policy, cfg.engine, "eager")[1]):
        console.detail(line)
    return EagerEngine(policy, tokenizer, cfg.engine.batch_size, console.generating)


def _check_images(policy: Policy, images: bool) -> None:
    """Raise UnsupportedModel for prompts with images that vLLM does not get of this model."""
    if images and policy.vision is not None and not policy.vision.seeing.vllm:
        raise UnsupportedModel(f"images of {type(policy.base).__name__} are not handed to vLLM")


def _check_fits(cfg: Config, longest: int) -> None:
    """Raise ConfigError for an `engine.max_model_len` below the tokens of the longest prompt plus completion."""
    most = cfg.engine.max_model_len
    if most is not None and longest > most:
        raise ConfigError(
            f"engine.max_model_len = {most}: the longest prompt and max_tokens are {longest} tokens; raise it, or drop "
            f"long prompts with data.max_prompt_tokens"
        )


def describe(cfg: Config, recorded: bool, device: torch.device) -> str:
    """Describe what is trained on and which engine samples it, for the start of a run. recorded: as `engine_name`."""
    name = engine_name(cfg, recorded, device)
    if name == "replay":
        return "recorded completions"
    return f"{cfg.sampling.group_size} completions, sampled with {'vLLM' if name == 'vllm' else 'the eager engine'}"


def longest_of(cfg: Config, policy: Policy, rows: Sequence[Prompt]) -> int:
    """Return the tokens of the longest prompt plus completion. Raises ConfigError above the model's context."""
    completion, prompt = _completion(cfg), int(table_of(rows).lengths().max())
    context = context_of(policy.base.config)
    if context is not None and prompt + completion > context:
        raise ConfigError(
            f"sampling.max_tokens = {completion}: with the longest prompt, {prompt} tokens, that is more than the "
            f"model's context of {context}; lower it, or drop long prompts with data.max_prompt_tokens"
        )
    return prompt + completion


def _completion(cfg: Config) -> int:
    """Return the largest number of tokens of a sampled completion."""
    return max(cfg.sampling.max_tokens, sampling_of(cfg).max_tokens if cfg.eval.rows else 0)


def _max_model_len(cfg: Config, policy: Policy, rows: Sequence[Prompt]) -> int:
    """Return vLLM's max_model_len, chosen so that vLLM uses the policy's longrope factors.

    Raises ConfigError when `engine.max_model_len` rules that out.
    """
    longest, rope = cfg.engine.max_model_len or longest_of(cfg, policy, rows), policy.rope
    if rope is None or rope.factors == "short factors" or longest > rope.original:
        return longest
    if cfg.engine.max_model_len is not None:
        raise ConfigError(
            f"engine.max_model_len = {longest}: vLLM would take longrope's short factors, and the trainer has the long "
            f"ones ({rope}); set it above {rope.original}, or leave it out"
        )
    return rope.original + 1


def longest_sequence(cfg: Config, policy: Policy, rows: Sequence[Prompt], held: Sequence[Prompt], scored: bool) -> int:
    """Return the tokens of the longest sequence that a run can have.

    held: held-out prompts. scored: the evaluation has reward functions, so it samples. Where vLLM samples,
    `engine.max_model_len` bounds the sampled sequences.
    """
    replay = engine_name(cfg, bool(rows[0].recorded), policy.device) == "replay"
    parts = [table_of(prompts) for prompts in (rows, held) if len(prompts)]
    recorded_lengths = [int(part.longest().max()) for part in parts] if replay else []
    sampled = [part for part, samples in ((rows, not replay), (held, scored or not replay)) if samples and len(part)]
    prompts = [int(table_of(part).lengths().max()) for part in sampled]
    if prompts and cfg.engine.max_model_len is not None and sampler_name(cfg, policy.device) == "vllm":
        return max([cfg.engine.max_model_len, *recorded_lengths])
    return max([*recorded_lengths, *(length + _completion(cfg) for length in prompts)])
