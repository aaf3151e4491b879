"""Reference log-probs of recorded completions, computed once per row instead of once per step.

The reference (the base, or the adapter that training started from) never changes, and neither does a recorded
completion: in the second epoch its reference log-probs are those of the first (TRL's `precompute_ref_log_probs`,
without a pass before the first step). They are kept on the CPU, 4 bytes per trained token, and saved with every
checkpoint: computed again in another packing they could differ in the last bits, and a resumed run would not equal a
whole one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from rlft.models.policy import Policy
from rlft.types import Batch


class Reference:
    """Fills `Batch.ref_logprobs`."""

    def __init__(self, policy: Policy, keep: bool) -> None:
        """keep: hold what was computed for recorded completions. False for a run that sees no row twice (lengthened
        past its first epoch when it is resumed, such a run equals a whole one up to the last bits), and for a policy
        whose rows depend on their micro-batch: there both sides of a log-ratio must come from the same one."""
        self._policy = policy
        self._keep = keep
        self._known: dict[int, Tensor] = {}
        """Key of a completion -> [trained tokens], on the CPU."""

    def fill(self, batch: Batch) -> Batch:
        """The batch with `ref_logprobs` [T], 0 where `train_mask` is False.

        A forward is run when the completions were sampled, or one of them was not seen before. They are on the policy's
        device then, unless they are kept: the host waits for none of the micro-batches.
        """
        if not self._keep or batch.sampler_logprobs is not None:
            return replace(batch, ref_logprobs=self._policy.score(batch, weights="reference"))
        keys = _keys(batch)
        if any(key not in self._known for key in keys):
            self._learn(keys, batch)
        values = torch.cat([self._known[key] for key in keys]).to(batch.train_mask.device)
        filled = values.new_zeros(len(batch.input_ids)).index_put((batch.train_mask.nonzero().squeeze(1),), values)
        return replace(batch, ref_logprobs=filled)

    def _learn(self, keys: list[int], batch: Batch) -> None:
        """Score the batch, and keep what was not known: a row has the value it got first for the whole run."""
        scored = self._policy.score(batch, weights="reference").cpu()[batch.train_mask.cpu()]
        tokens = torch.bincount(batch.seq_ids[batch.train_mask], minlength=len(batch.prefix))
        # Trained tokens lie in the order of the sequences.
        own = tokens[batch.group_ids >= 0].tolist()
        for key, values in zip(keys, scored.split(own), strict=True):
            self._known.setdefault(key, values.clone())

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: `keys` and `tokens` [rows] int64, `logprobs` [sum of tokens]; or nothing."""
        if not self._known:
            return {}
        return {
            "keys": torch.tensor(list(self._known)),
            "tokens": torch.tensor([len(values) for values in self._known.values()]),
            "logprobs": torch.cat(list(self._known.values())),
        }

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` gave."""
        if tensors:
            values = tensors["logprobs"].split(tensors["tokens"].tolist())
            self._known = dict(zip(tensors["keys"].tolist(), values, strict=True))


def _keys(batch: Batch) -> list[int]:
    """For each sequence that is no prefix, 63 bits of all that its log-probs depend on besides the weights.

    Not the number of its row: data may be edited before a run is resumed.
    """
    bounds, ids, mask = batch.cu_seqlens.tolist(), batch.input_ids.cpu().numpy(), batch.train_mask.cpu().numpy()
    keys = []
    for s, (prefix, group) in enumerate(zip(batch.prefix.tolist(), batch.group_ids.tolist(), strict=True)):
        if group < 0:
            continue
        digest = hashlib.blake2b(repr(batch.temperature).encode(), digest_size=8)
        # Prompt and completion make the same key whether the prompt is shared or not.
        parts = [slice(bounds[i], bounds[i + 1]) for i in (prefix, s) if i >= 0]
        for values in (ids, mask):
            digest.update(np.concatenate([values[part] for part in parts]).tobytes())
        keys.append(int.from_bytes(digest.digest(), "little") >> 1)
    return keys
