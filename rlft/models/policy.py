"""The policy: log-probabilities of a packed batch under the base with the adapter, and under the reference.

Fused layers run the packed rows (`rlft.models.fused.decoder`), or, for an architecture without them, transformers' own
decoder does: packed with our attention (`rlft.models.packed`) where nothing but attention mixes tokens, and otherwise a
padded row per sequence (`rlft.models.padded`). Our head turns the states that predict a trained token into log-probs.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Literal

import torch
from peft import PeftModel
from torch import Tensor, nn

from rlft.kernels.attention import Sequences
from rlft.kernels.logprobs import CHUNK_BYTES, linear_logprobs
from rlft.models import packed, padded, rope
from rlft.models.adapter import FlatAdapter
from rlft.models.fused import memory
from rlft.models.fused.decoder import FusedDecoder, fuse
from rlft.models.fused.token_budget import ALONE, BUDGETS, Group, token_budget
from rlft.models.head import head_matrix, scale_of, softcap_of, with_one
from rlft.models.quantization import mixes_rows
from rlft.models.structure import decoder_of, unpackable
from rlft.types import Batch
from rlft.upload import upload


class Policy:
    """A PEFT model seen as a policy. `adapter()` is what training changes, `base` what it does not."""

    def __init__(self, model: PeftModel, dtype: torch.dtype = torch.float32) -> None:
        """dtype: type of the adapter's master copy (fp32; fp64 in tests of exact laws)."""
        packed.register()
        self.model = model
        self.flat = FlatAdapter(model, dtype=dtype)
        fused = fuse(model)
        self.fused = fused if isinstance(fused, FusedDecoder) else None
        """The fused decoder; None where transformers' own layers run."""
        self.base: nn.Module = model.get_base_model()
        why = None if self.fused else unpackable(self.base)
        self.packed = why is None
        """Whether sequences share a row, behind a common prompt too; else each has a padded row with its prompt."""
        own = f"padded: {why}" if why else f"packed: {fused}"
        self.path = "fused layers" if self.fused else f"transformers' own layers, {own}"
        """Which layers run, how and why, for the start of a run."""
        self.device = self.flat.values.device
        self.mixes_rows = mixes_rows(self.base)
        """A row's log-probs depend on what it is packed with, so none are kept for another micro-batch."""
        self._decoder = decoder_of(self.base)
        self.rope: rope.Regime | None = None
        """The longrope factors that `fix_rope` has set; None: the model has none."""
        self._same_tables = rope.limit(self._decoder)
        head: nn.Linear = self.base.get_output_embeddings()  # type: ignore[operator]
        self._head, self._bias = head_matrix(head), head.bias is not None
        text = self.base.config.get_text_config()  # type: ignore[union-attr,operator]
        self._softcap, self._logit_scale = softcap_of(text), scale_of(text)
        self._dropouts = [m for n, m in model.named_modules() if ".lora_dropout." in n and isinstance(m, nn.Dropout)]

    def logprobs(self, batch: Batch, entropy_grad: bool = False) -> tuple[Tensor, Tensor]:
        """Log-prob of every trained token, with gradient to the adapter, and entropy of its distribution, without.

        Both [T] in max(fp32, model dtype), 0 where `batch.train_mask` is False. entropy_grad: a gradient for the
        entropy too, for one more product with the head and a second jacobian, which is in the memory plan of every
        pass from the first such call on.
        """
        if self.fused is not None and entropy_grad:
            self.fused.expect(entropy_grad=True)
        for module in self._dropouts:
            module.train()
        try:
            return self._forward(batch, entropy_grad)
        finally:
            for module in self._dropouts:
                module.eval()

    @property
    def adapter_params(self) -> nn.Parameter:
        """[numel]: all parameters of the adapter in one tensor, whose `.grad` is that of all of them."""
        return self.flat.values

    def planned(self, batch: Batch) -> Batch:
        """The batch with how every pass over it runs, chosen for the memory that is free now.

        `score` and `logprobs` of such a batch give the same bits while the adapter stays the same, whatever else takes
        or gives back memory in between.
        """
        if self.fused is None:
            return batch
        sequences = Sequences.of(batch.cu_seqlens, batch.prefix, self.device)
        return replace(batch, plan=self.fused.plan_pass(len(batch.input_ids), int(batch.train_mask.sum()), sequences))

    def score(self, batch: Batch, weights: Literal["policy", "reference"] = "policy") -> Tensor:
        """Log-probs [T] without gradient. "reference": the adapter that training started from (the base, if new)."""
        # transformers and PyTorch choose other kernels where there is no gradient. Ours do not.
        graph = torch.set_grad_enabled(self.fused is None and weights == "policy")
        with graph, self._reference() if weights == "reference" else nullcontext():
            return self._forward(batch)[0].detach()

    @torch.no_grad()
    def entropy(self, batch: Batch) -> Tensor:
        """Entropy [T] of each trained token's distribution, in nats, without gradient; 0 elsewhere."""
        return self._forward(batch)[1]

    def token_budget(self, group: Group = ALONE) -> int:
        """Tokens per micro-batch that take the least time in the memory that is free (`packing.tokens_per_micro_batch =
        "auto"`), where rows come in such groups."""
        if self.fused is None or self.device.type == "cpu":
            return BUDGETS[-1]
        return token_budget(self.fused.shape, self.fused.available(), memory.host_free(), group)

    def lower(self) -> str:
        """Give memory back and plan later passes with less of it, after an out-of-memory error; says what was done."""
        if self.fused is not None:
            self.fused.lower()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.fused is None:
            return "tried once more without what PyTorch had cached"
        return f"planned again with {1 - self.fused.margin:.0%} of the memory that is free"

    def fix_rope(self, longest: int, long: bool = False) -> None:
        """Give all sequences one rotary table, whatever they are packed with: `rlft.models.rope.fix`."""
        self.rope = rope.fix(self._decoder, longest, long)
        self._same_tables = rope.limit(self._decoder)

    def check_length(self, tokens: int) -> None:
        """Assert that the rotary tables of a call with sequences up to so many tokens are those of any other call."""
        most = self._same_tables
        assert most is None or tokens <= most, f"{tokens} tokens, and rotary tables were fixed for {most}: fix_rope"

    def adapter(self) -> dict[str, Tensor]:
        """PEFT name -> live tensor of the adapter, without alpha / rank (`scales` has that)."""
        return self.flat.tensors()

    @property
    def scales(self) -> dict[str, float]:
        """PEFT name of each lora_B -> the factor its product is scaled by."""
        return self.flat.scales

    def _forward(self, batch: Batch, entropy_grad: bool = False) -> tuple[Tensor, Tensor]:
        if self._same_tables is not None:
            self.check_length(int(batch.position_ids.max()) + 1)
        # From the batch as it came, on the CPU where pack made it: nothing has to wait for the GPU.
        sequences = Sequences.of(batch.cu_seqlens, batch.prefix, self.device)
        trained = batch.train_mask.nonzero().squeeze(1)
        ids, rows = (upload(t, self.device) for t in (batch.input_ids, trained))
        plan = batch.plan
        if self.fused is not None and plan is None:
            plan = self.fused.plan_pass(len(ids), len(rows), sequences)
        hidden = self._hidden(batch, trained, ids, sequences, plan)
        chunk_bytes = CHUNK_BYTES if plan is None else plan.chunk_bytes
        workspace = None if self.fused is None else self.fused.store.scratch
        logprobs, entropy = linear_logprobs(
            hidden,
            self._head,
            ids[rows],
            batch.temperature,
            self._softcap,
            self._logit_scale,
            chunk_bytes,
            entropy_grad,
            workspace,
        )
        zeros = torch.zeros(ids.shape, dtype=logprobs.dtype, device=self.device)
        return zeros.index_put((rows,), logprobs), zeros.index_put((rows,), entropy)

    def _hidden(
        self, batch: Batch, trained: Tensor, ids: Tensor, sequences: Sequences, plan: memory.MemoryPlan | None
    ) -> Tensor:
        """The head's input [N, H] where each of `trained` is predicted. batch, trained: in host memory."""
        if not self.packed:
            states = padded.Rows.of(batch, trained, self.device).hidden(self._decoder).to(self._head.dtype)
            return with_one(states, self._head.shape[1]) if self._bias else states
        positions, rows = (upload(t, self.device) for t in (batch.position_ids, batch.source[trained]))
        if self.fused is None:
            states = packed.hidden(self._decoder, ids, positions, sequences, rows)
            return with_one(states, self._head.shape[1]) if self._bias else states
        embedded = self._decoder.get_input_embeddings()(ids)
        hidden = self.fused.hidden(embedded, positions, sequences, self.flat.gradients, plan)
        # A norm is of one row: only the rows that are asked for need it.
        return self.fused.final_norm(hidden[rows])

    @contextmanager
    def _reference(self) -> Iterator[None]:
        """The starting adapter for the current one, restored bit for bit; the adapter off where that is the base."""
        if self.flat.fresh:
            with self.model.disable_adapter():
                yield
            return
        flat = self.flat.values.data
        now = flat.clone()
        flat.copy_(self.flat.start)
        try:
            yield
        finally:
            flat.copy_(now)
