"""Batched sampling with a KV cache on the policy's own modules: the default engine on a CPU, and the test reference.

The base weights are the trainer's. The adapter is a second PEFT adapter ("engine") with its own tensors, filled by
`load_adapter` and active only during `generate`. Each prompt is prefilled once, its cache is repeated for the G
completions, and finished rows leave the batch. Where the cache cannot be repeated (recurrent state), each of the G rows
prefills the prompt, and finished rows stay until all have finished. Where transformers returns no cache, each token
recomputes whole rows. Prompts of different lengths share a batch where padding is known to be safe.

Every rollout has its own random stream with one uniform number per token, mapped to a token through the cumulative
distribution. A completion therefore depends on its seed and not on the rest of the batch (up to the rounding of matrix
products of another size).
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from rlft.config.data import Sampling
from rlft.errors import EngineError
from rlft.models import kv_cache, packed
from rlft.models.adapter import lora_parameters, lora_scales
from rlft.models.continued import peft_wraps
from rlft.models.cross import CrossStates, last_token
from rlft.models.policy import Policy
from rlft.positions import next_position, on_axes, prompt_positions
from rlft.rollout.engine import Finished, Groups, check_names, check_read_back, eos_ids, rollout_seed
from rlft.types import FinishReason, Prompt, Rollout

SLOT = "engine"
"""Name of the engine's adapter in the PEFT model."""


@dataclass
class _Row:
    """The state of one completion during generation."""

    prompt: Prompt
    slot: int
    sample: int
    seed: int
    uniforms: np.ndarray
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: bool = False
    text: str | None = None
    """Text up to a stop string; None without one."""

    def live(self, sampling: Sampling) -> bool:
        """Return True until the completion is finished."""
        return not self.finished and len(self.ids) < sampling.max_tokens


class _Job(NamedTuple):
    """What a generation is to sample, and where its rollouts go."""

    sampling: Sampling
    stops: set[int]
    """Token ids that end a completion."""
    groups: Groups


class EagerEngine:
    """Sample with the policy's modules and a separate copy of the adapter."""

    SAMPLES: bool = True

    def __init__(self, policy: Policy, tokenizer: Any, batch_size: int = 64, progress: Any = None) -> None:
        """Add the engine's adapter to the model.

        batch_size: sequences decoded at a time. progress: called with (finished sequences, all) during generation.
        """
        self._policy, self._model, self._device = policy, policy.model, policy.device
        self._tokenizer, self._batch_size, self._progress = tokenizer, batch_size, progress
        self._scales = dict(policy.scales)
        with peft_wraps():
            self._model.add_adapter(SLOT, self._model.peft_config["default"])
        self._slots: dict[str, Tensor] = {
            name: parameter.detach() for name, parameter in lora_parameters(self._model, SLOT).items()
        }
        # PEFT makes the new adapter trainable and puts it in training mode; only the trainer's adapter may be so.
        self._model.eval()
        for parameter in lora_parameters(self._model, SLOT).values():
            parameter.requires_grad_(False)
        base = self._model.get_base_model()
        self._eos, self._cache_name = eos_ids(tokenizer, base), kv_cache.name(base)
        self._places = policy.vision.reader.places if policy.vision is not None else frozenset[int]()
        self._version: int | None = None
        self._digest = ""
        self._pads = policy.packed and self._pads_safely()
        self._cache: str | None = None
        """What the KV cache supports: "select" rows, only "append" tokens, or "none" for no cache. None: not known
        yet."""

    @property
    def memory(self) -> dict[str, int]:
        """Bytes of the engine's adapter; the KV cache is added during generation."""
        return {"adapter of the engine": sum(tensor.numel() * tensor.element_size() for tensor in self._slots.values())}

    @torch.no_grad()
    def _pads_safely(self) -> bool:
        """Return whether a left-padded row gives finite logits.

        In some attention implementations a position that attends to nothing becomes nan, which reaches the row's real
        tokens in the next layer as 0 * nan.
        """
        ids, mask = torch.ones(2, 6, dtype=torch.long), torch.ones(2, 6, dtype=torch.long)
        mask[1, :3] = 0
        logits = self._step(ids, mask, (mask.cumsum(1) - 1).clamp(min=0), None).logits
        return bool(logits[:, -1].isfinite().all())

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seed: tuple[int, ...],
        finished: Finished | None = None,
        first: int = 0,
    ) -> list[Rollout]:
        """See `Engine.generate`. Temperature 0 is greedy, with log-prob 0 for the chosen token."""
        if self._version is None:
            raise EngineError("generate before load_adapter: the engine has no adapter")
        self._policy.check_length(max((len(prompt.ids) for prompt in prompts), default=0) + sampling.max_tokens)
        groups = Groups(len(prompts), sampling.group_size, finished)
        job = _Job(sampling, self._eos | set(sampling.stop_token_ids), groups)
        rows = []
        for slot, prompt in enumerate(prompts):
            for sample in range(sampling.group_size):
                row_seed = rollout_seed(seed, first + slot, sample)
                uniforms = np.random.Generator(np.random.PCG64(row_seed)).random(sampling.max_tokens)
                rows.append(_Row(prompt, slot, sample, row_seed, uniforms))
        with self._switched(), torch.inference_mode():
            self._run_tower(prompts)
            count = 0
            for batch in self._batches(rows):
                complete = self._rerun if self._cache == "none" else self._complete
                complete(batch, job)
                count += len(batch)
                if self._progress is not None:
                    self._progress(count, len(rows))
        return groups.rollouts()

    def load_adapter(self, named_tensors: Mapping[str, Tensor], version: int) -> None:
        """See `Engine.load_adapter`: copy, then read back and compare."""
        check_names(named_tensors, self._slots)
        self._write(named_tensors)
        check_read_back(named_tensors, self._slots, self._scales, lora_scales(self._model, SLOT), version)
        self._version, self._digest = version, self._slots_digest()

    def sleep(self) -> None:
        """Do nothing: the KV cache exists only inside `generate`."""

    def wake(self) -> None:
        """Check that the adapter is unchanged since it was loaded."""
        if self._version is not None and self._slots_digest() != self._digest:
            raise EngineError(f"the engine's adapter changed while it slept (policy version {self._version})")

    def close(self) -> None:
        """Remove the engine's adapter from the model."""
        self._model.delete_adapter(SLOT)
        self._version = None

    def _write(self, named_tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in named_tensors.items():
            self._slots[name].copy_(tensor)

    def _slots_digest(self) -> str:
        digest = hashlib.sha256()
        for tensor in self._slots.values():
            digest.update(tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes())
        return digest.hexdigest()

    @contextmanager
    def _switched(self) -> Iterator[None]:
        """Activate the engine's adapter; afterwards the trainer's is active and trainable again."""
        self._model.set_adapter(SLOT, inference_mode=True)
        try:
            yield
        finally:
            self._model.set_adapter("default")

    def _batches(self, rows: list[_Row]) -> Iterator[list[_Row]]:
        """Split the rows into decoding batches: neighbours, with prompts of equal length unless padding is safe."""
        for row in rows:
            if not row.prompt.ids:
                raise EngineError(f"row {row.prompt.index} has an empty prompt: there is nothing to continue")
        self._cache = self._cache or self._cache_kind(rows[0].prompt.ids[:1])
        pads = self._pads and self._cache == "select"
        # Cross-attention reads the same number of images in all rows, and such a model does not pad.
        key = (lambda row: (0, 0)) if pads else (lambda row: (len(row.prompt.ids), len(row.prompt.images)))
        for _, group in itertools.groupby(sorted(rows, key=key), key):
            members = list(group)
            yield from (members[start : start + self._batch_size] for start in range(0, len(members), self._batch_size))

    def _cache_kind(self, ids: Sequence[int]) -> str:
        """Return what the cache supports (`_cache`), from running the model on a few ids."""
        out = self._model(input_ids=torch.tensor([ids], device=self._device), use_cache=True)
        cache = getattr(out, self._cache_name, None)
        if cache is None:
            return "none"
        # Subclasses and layers with additional state inherit an operation that ignores this state.
        plain = type(cache) is DynamicCache and not any(hasattr(layer, "update_conv_state") for layer in cache.layers)
        return "select" if plain and all(hasattr(layer, "batch_select_indices") for layer in cache.layers) else "append"

    def _complete(self, rows: list[_Row], job: _Job) -> None:
        """Fill `ids` and `logprobs` of the rows in one decoding batch. Rows of one prompt must be adjacent."""
        select = self._cache == "select"
        heads = [i for i, row in enumerate(rows) if i == 0 or rows[i - 1].slot != row.slot or not select]
        mask, logits, cache, cross = self._prefill([rows[i].prompt for i in heads])
        if select:
            line_of = torch.tensor([sum(head <= i for head in heads) - 1 for i in range(len(rows))])
            logits = logits[line_of.to(self._device)]
            cache.batch_select_indices(line_of.to(self._device))
            mask, cross = mask[line_of], {name: masks[line_of.to(masks.device)] for name, masks in cross.items()}
        positions, live = torch.tensor([next_position(row.prompt) - 1 for row in rows]), rows
        while True:
            # Finished rows that stay get a dummy token, so that the batch keeps its shape; it is not recorded.
            tokens = self._advance(logits, live, job)
            keep = [i for i, row in enumerate(live) if row.live(job.sampling)]
            if not keep:
                return
            if select and len(keep) < len(live):
                indices = torch.tensor(keep)
                live, mask, positions, tokens = (
                    [live[i] for i in keep],
                    mask[indices],
                    positions[indices],
                    tokens[indices],
                )
                cache.batch_select_indices(indices.to(self._device))
                cross = {name: masks[indices.to(masks.device)] for name, masks in cross.items()}
            mask = torch.cat([mask, torch.ones(len(live), 1, dtype=torch.long)], dim=1)
            positions = positions + 1
            logits = self._step(tokens[:, None], mask, positions[:, None], cache, cross).logits[:, -1]

    def _run_tower(self, prompts: Sequence[Prompt]) -> None:
        """Compute the features of all images together."""
        images = [image for prompt in prompts for image in prompt.images]
        if not images:
            return
        self._cache = self._cache or self._cache_kind(prompts[0].ids[:1])
        if self._policy.vision is None or self._cache == "none":
            base = type(self._policy.base).__name__
            raise EngineError(f"prompts with images need a policy that reads them, and a KV cache of {base}")
        if not self._policy.vision.trained:
            self._policy.vision.features(images)

    def _prefill(self, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor, Any, dict[str, Tensor]]:
        """Run the model on prompts. Returns the mask [rows, longest] on the CPU, the next logits [rows, V], the cache,
        and masks by which later tokens see images in cross-attention."""
        longest = max(len(prompt.ids) for prompt in prompts)
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros(len(prompts), longest, dtype=torch.long)
        positions = torch.zeros(3, len(prompts), longest, dtype=torch.long)
        placed = []
        for line, prompt in enumerate(prompts):
            # Left padding, so that all rows write their next token to the same column of the cache.
            start = longest - len(prompt.ids)
            ids[line, start:] = torch.tensor(prompt.ids)
            mask[line, start:] = 1
            positions[:, line, start:] = torch.from_numpy(prompt_positions(prompt))
            placed += [(image, line * longest + start + image.start) for image in prompt.images]
        if not placed:
            out = self._step(ids, mask, positions[0], None)
            return mask, out.logits[:, -1], getattr(out, self._cache_name), {}
        assert self._policy.vision is not None, "see `_run_tower`"
        axes = on_axes(placed[0][0])
        ids, positions, on_device = (
            tensor.to(self._device) for tensor in (ids, positions if axes else positions[0], mask)
        )
        seen, number = self._policy.vision.rows(placed, self._device), itertools.count()
        if isinstance(seen, CrossStates):
            shown = [[(next(number), image.start) for image in prompt.images] for prompt in prompts]
            given = {"input_ids": ids, "position_ids": positions, "attention_mask": on_device}
            given |= seen.arguments(shown, longest)
        else:
            given = packed.inputs(self._policy.decoder, ids, positions, seen, on_device)
        out = self._policy.decoder(**given, use_cache=True)
        return mask, self._logits(out)[:, -1], getattr(out, self._cache_name), last_token(given)

    def _logits(self, out: Any) -> Tensor:
        """Return the logits [rows, 1, V] behind the last column of a decoder's result."""
        base: Any = self._model.get_base_model()
        return base.get_output_embeddings()(out.last_hidden_state[:, -1:])

    def _step(
        self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any, cross: Mapping[str, Tensor] | None = None
    ) -> Any:
        """Run the model on the next columns of the rows. ids, mask and positions are in host memory.

        cross: masks of images for the next token, where cross-attention reads them.
        """
        given = {
            "input_ids": ids.to(self._device),
            "attention_mask": mask.to(self._device),
            "position_ids": positions.to(self._device),
            "use_cache": True,
            self._cache_name: cache,
        }
        if not cross:
            return self._model(**given, logits_to_keep=1)
        out = self._policy.decoder(**given, **cross)
        return SimpleNamespace(logits=self._logits(out))

    def _rerun(self, rows: list[_Row], job: _Job) -> None:
        """Fill `ids` and `logprobs` of the rows without a cache: each token recomputes whole, right-padded rows."""
        live = rows
        while live:
            last = torch.tensor([len(row.prompt.ids) + len(row.ids) for row in live]) - 1
            ids = torch.zeros(len(live), int(last.max()) + 1, dtype=torch.long)
            for line, row in enumerate(live):
                ids[line, : last[line] + 1] = torch.tensor([*row.prompt.ids, *row.ids])
            logits = self._model(input_ids=ids.to(self._device), use_cache=False).logits
            self._advance(logits[torch.arange(len(live)), last], live, job)
            live = [row for row in live if row.live(job.sampling)]

    def _advance(self, logits: Tensor, rows: list[_Row], job: _Job) -> Tensor:
        """Sample the next token of each unfinished row and collect the row if it ends there; 0 for the others."""
        sampling = job.sampling
        indices = [i for i, row in enumerate(rows) if row.live(sampling)]
        tokens = torch.zeros(len(rows), dtype=torch.long)
        unfinished = [rows[i] for i in indices]
        tokens[indices] = self._draw(logits if len(indices) == len(rows) else logits[indices], unfinished, sampling)
        for row, token in zip(unfinished, tokens[indices].tolist(), strict=True):
            row.finished = token in job.stops or self._stopped(row, sampling.stop)
            if not row.live(sampling):
                job.groups.put(row.slot, self._rollout(row))
        return tokens

    def _draw(self, logits: Tensor, rows: list[_Row], sampling: Sampling) -> Tensor:
        """Sample the next token of each row, append it with its log-prob, and return the tokens [rows] on the CPU.

        logits: [rows, V] in the model's dtype; probabilities are computed in at least fp32.
        """
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if sampling.temperature == 0:
            best, tokens = logits.max(-1)
            logprobs = torch.where(best.isfinite(), 0.0, torch.nan)
        else:
            log_p = _truncate(logits / sampling.temperature, sampling.top_k, sampling.top_p).log_softmax(-1)
            cumulative = log_p.double().exp().cumsum(-1)
            uniform = torch.tensor([row.uniforms[len(row.ids)] for row in rows], device=logits.device)
            # right=True gives the first token whose cumulative probability is above u; its probability is never 0.
            tokens = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)
            tokens = tokens.clamp(max=logits.shape[1] - 1)
            logprobs = log_p.gather(1, tokens).squeeze(1)
            tokens = tokens.squeeze(1)
        for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
            row.ids.append(token)
            row.logprobs.append(logprob)
        return tokens.cpu()

    def _stopped(self, row: _Row, stop: Sequence[str]) -> bool:
        """Return whether the row's text contains a stop string, and cut the text before it; the tokens include it."""
        if not stop:
            return False
        text = self._tokenizer.decode(row.ids, skip_special_tokens=True)
        starts = [text.index(string) for string in stop if string in text]
        row.text = text[: min(starts)] if starts else None
        return bool(starts)

    def _rollout(self, row: _Row) -> Rollout:
        assert self._version is not None
        text = self._tokenizer.decode(row.ids, skip_special_tokens=True) if row.text is None else row.text
        return Rollout(
            prompt=row.prompt,
            completion_ids=tuple(row.ids),
            # A sampled place of an image has no image: its token is one as any other, and is not trained.
            completion_mask=tuple(token not in self._places for token in row.ids),
            sampler_logprobs=tuple(row.logprobs),
            text=text,
            finish_reason=FinishReason.STOP if row.finished else FinishReason.LENGTH,
            sample_index=row.sample,
            policy_version=self._version,
            seed=row.seed,
        )


def _truncate(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set the logits [rows, V] outside the top k tokens and the top-p nucleus to -inf."""
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p < 1:
        sorted_logits, order = logits.sort(dim=-1, descending=True)
        probabilities = sorted_logits.softmax(-1)
        # A token stays while the mass before it is below top_p.
        outside = probabilities.cumsum(-1) - probabilities >= top_p
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(1, order, outside), float("-inf"))
    return logits
