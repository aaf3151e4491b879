"""Reference log-probs of recorded completions, computed once per row instead of once per step.

The reference (the base, or the adapter that training started from) never changes, and neither does a recorded
completion, so its reference log-probs are the same in every epoch. They are cached when first needed, unlike TRL's
`precompute_ref_log_probs`, which runs a pass before the first step. The cache is on the CPU, 4 bytes per trained token,
and is saved with every checkpoint: recomputed in another packing, log-probs could differ in the last bits, and a
resumed run would not equal an uninterrupted one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from rlft import dist
from rlft.models.policy import Policy
from rlft.types import Batch


class Reference:
    """Compute and cache `Batch.ref_logprobs`."""

    def __init__(self, policy: Policy, keep: bool) -> None:
        """Create an empty cache.

        keep: cache the log-probs of recorded completions. False for a run that sees no row twice; resumed for more than
        one epoch, such a run equals an uninterrupted one up to the last bits. Also False for a policy whose log-probs
        depend on the other rows of a micro-batch, where both sides of a log-ratio must come from the same micro-batch.
        """
        self._policy = policy
        self._keep = keep
        self._cache: dict[int, Tensor] = {}
        """Key of a completion -> its log-probs [trained tokens], on the CPU."""
        self._new: list[int] = []
        """Keys that other ranks do not have yet."""

    def __len__(self) -> int:
        """Return the number of cached completions."""
        return len(self._cache)

    def forget_after(self, count: int) -> None:
        """Remove all cached completions but the first `count`."""
        for key in list(self._cache)[count:]:
            del self._cache[key]

    def fill(self, batch: Batch) -> Batch:
        """Return the batch with `ref_logprobs` [T], 0 where `train_mask` is False.

        Runs a forward when the completions were sampled, or when one of them is not in the cache. Without caching the
        result stays on the policy's device, so that the host does not wait for the GPU.
        """
        if not self._keep or batch.sampler_logprobs is not None:
            return replace(batch, ref_logprobs=self._policy.score(batch, weights="reference"))
        keys = _keys(batch)
        if any(key not in self._cache for key in keys):
            self._add(keys, batch)
        values = torch.cat([self._cache[key] for key in keys]).to(batch.train_mask.device)
        filled = values.new_zeros(len(batch.input_ids)).index_put((batch.train_mask.nonzero().squeeze(1),), values)
        return replace(batch, ref_logprobs=filled)

    def _add(self, keys: list[int], batch: Batch) -> None:
        """Score the batch and cache new rows. The first value of a row is used for the whole run."""
        logprobs = self._policy.score(batch, weights="reference").cpu()[batch.train_mask.cpu()]
        tokens = torch.bincount(batch.seq_ids[batch.train_mask], minlength=len(batch.prefix))
        # Trained tokens are in the order of the sequences; prefixes (group -1) have none.
        lengths = tokens[batch.group_ids >= 0].tolist()
        for key, values in zip(keys, logprobs.split(lengths), strict=True):
            if key not in self._cache:
                self._cache[key] = values.clone()
                self._new.append(key)

    def share(self) -> None:
        """Send the completions that were scored since the last call to all ranks, so that every cache is the same.

        Called once per step by every rank.
        """
        if self._keep and not dist.is_alone():
            own = {key: self._cache.pop(key) for key in self._new}
            for rows in dist.gather(own):  # in the order of ranks, so that all caches are in the same order
                for key, values in rows.items():
                    self._cache.setdefault(key, values)
        self._new = []

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors to save: `keys` and `tokens` [rows] int64, `logprobs` [sum of tokens]; maybe empty."""
        if not self._cache:
            return {}
        return {
            "keys": torch.tensor(list(self._cache)),
            "tokens": torch.tensor([len(values) for values in self._cache.values()]),
            "logprobs": torch.cat(list(self._cache.values())),
        }

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the result of `tensors`."""
        if tensors:
            values = tensors["logprobs"].split(tensors["tokens"].tolist())
            self._cache = dict(zip(tensors["keys"].tolist(), values, strict=True))


def _keys(batch: Batch) -> list[int]:
    """Return a 63-bit hash per sequence (prefixes excluded) of all that its log-probs depend on besides the weights.

    The row number would not do, because data may be edited before a run is resumed.
    """
    bounds, ids, mask = batch.cu_seqlens.tolist(), batch.input_ids.cpu().numpy(), batch.train_mask.cpu().numpy()
    keys = []
    for sequence, (prefix, group) in enumerate(zip(batch.prefix.tolist(), batch.group_ids.tolist(), strict=True)):
        if group < 0:
            continue
        digest = hashlib.blake2b(repr(batch.temperature).encode(), digest_size=8)
        # The key is the same whether the prompt is a shared prefix or not.
        parts = [slice(bounds[i], bounds[i + 1]) for i in (prefix, sequence) if i >= 0]
        for values in (ids, mask):
            digest.update(np.concatenate([values[part] for part in parts]).tobytes())
        keys.append(int.from_bytes(digest.digest(), "little") >> 1)
    return keys
