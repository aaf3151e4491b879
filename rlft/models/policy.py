"""Compute log-probs of a packed batch under the policy (base with adapter) and under the reference.

Fused layers run the packed rows (`rlft.models.fused.decoder`). For an architecture without them, transformers' own
decoder runs: packed with rlft's attention (`rlft.models.packed`) if only attention mixes tokens, and otherwise with one
padded row per sequence (`rlft.models.padded`). rlft's head turns the states that predict a trained token into
log-probs.

Shapes: T packed tokens, N trained tokens, H hidden size.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Literal

import torch
from peft import PeftModel
from torch import Tensor, nn

from rlft.data.image_readers import ImageReader
from rlft.errors import ConfigError, EngineError
from rlft.kernels.attention import Sequences
from rlft.kernels.logprobs import CHUNK_BYTES, linear_logprobs
from rlft.models import experts, packed, padded, rope, routing
from rlft.models.adapter import FlatAdapter
from rlft.models.cross import CrossStates
from rlft.models.device_memory import DeviceMemory, host_free
from rlft.models.fused import memory
from rlft.models.fused.decoder import FusedDecoder
from rlft.models.fused.fuse import fuse
from rlft.models.fused.placement import Place
from rlft.models.fused.token_budget import ALONE, BUDGETS, Group, token_budget
from rlft.models.head import append_ones, head_matrix, scale_of, softcap_of
from rlft.models.load import fingerprint
from rlft.models.quantization import mixes_rows
from rlft.models.structure import decoder_of, unpackable
from rlft.models.vision import Seen, Vision, adapted_tower
from rlft.types import Batch
from rlft.upload import upload


class Policy:
    """A PEFT model as a policy. `adapter()` is what training changes, `base` what it does not."""

    def __init__(
        self,
        model: PeftModel,
        dtype: torch.dtype = torch.float32,
        device_memory: DeviceMemory | None = None,
        place: Place = "device",
        images: ImageReader | None = None,
    ) -> None:
        """Fuse the decoder and flatten the adapter.

        dtype: of the adapter's master copy (fp32; fp64 in exactness tests). device_memory: what the plans of passes are
        chosen from, and what an engine reports to; None: the object of the model's device. place: where the frozen
        weights of the layers are moved to, as `base.place`. images: reads the images of prompts, from
        `rlft.models.vision.image_reader`; None: prompts are text. Raises ConfigError when only transformers' own layers
        can run a base that is to lie off the device.
        """
        packed.register()
        self.model = model
        self.flat = FlatAdapter(model, dtype=dtype)
        self.device = self.flat.values.device
        self.device_memory = device_memory or DeviceMemory.of(self.device)
        self.base: nn.Module = model.get_base_model()
        if place != "device":
            _ = self.fingerprint  # while the weights are whole
        fused = fuse(model, self.device_memory, place)
        self.fused = fused if isinstance(fused, FusedDecoder) else None
        """The fused decoder; None if transformers' own layers run."""
        if self.fused is None and place != "device":
            raise ConfigError(f'base.place = "{place}": only fused layers read weights from there, and here {fused}')
        problem = None if self.fused else unpackable(self.base)
        self.packed = problem is None
        """Whether sequences share a row, also behind a common prompt; else each has a padded row that includes its
        prompt."""
        batching = f"padded: {problem}; {fused}" if problem else f"packed: {fused}"
        self.path = f"transformers' own layers, {batching}"
        if self.fused is not None:
            graphless = self.fused.graphless if self.device.type == "cuda" else None
            self.path = f"fused layers, without CUDA graphs: {graphless}" if graphless else "fused layers"
        """Which layers run, how and why; logged at the start of a run."""
        self.mixes_rows = mixes_rows(self.base)
        """Whether a row's log-probs depend on what it is packed with, so that they cannot be reused for another
        micro-batch."""
        self.vision = None if images is None else Vision(self.base, images, trained=adapted_tower(model))
        """The vision tower; None where prompts are text."""
        self.decoder = decoder_of(self.base)
        """The text decoder, which turns embedded tokens into the head's input."""
        self.rope: rope.Regime | None = None
        """The longrope factors that `fix_rope` has set; None if the model has none."""
        self._same_tables = rope.limit(self.decoder)
        head: nn.Linear = self.base.get_output_embeddings()  # type: ignore[operator]
        self._head, self._bias = head_matrix(head), head.bias is not None
        text = self.base.config.get_text_config()  # type: ignore[union-attr,operator]
        self._softcap, self._logit_scale = softcap_of(text), scale_of(text)
        self._dropouts = [
            module
            for module_name, module in model.named_modules()
            if ".lora_dropout." in module_name and isinstance(module, nn.Dropout)
        ]

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits that identify the base."""
        return fingerprint(self.base)

    @functools.cached_property
    def fixed_routing(self) -> str | None:
        """Why no pass takes the experts of a batch in place of those that its routers choose; None if passes do."""
        return self._routers if isinstance(self._routers, str) else None

    @functools.cached_property
    def _routers(self) -> tuple[routing.Router, ...] | str:
        """The routers of transformers' layers, or why they cannot be given experts; () where fused layers run."""
        return () if self.fused is not None else routing.routers_of(self.base)

    @functools.cached_property
    def mixtures(self) -> int:
        """Number of layers that have experts."""
        return len(list(experts.layers(self.base)))

    @functools.cached_property
    def experts(self) -> int:
        """Number of experts of a layer; 0 where no layer has any."""
        return max((module.num_experts for _, module in experts.layers(self.base)), default=0)

    def logprobs(self, batch: Batch, entropy_grad: bool = False) -> tuple[Tensor, Tensor]:
        """Return the log-prob of every trained token, with gradient to the adapter, and the entropy of its
        distribution, without.

        Both are [T] in max(fp32, model dtype), 0 where `batch.train_mask` is False. entropy_grad: the entropy has a
        gradient too, which takes one more product with the head and a second Jacobian; from the first such call on, the
        memory plan of every pass includes it.
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
        """All parameters of the adapter in one tensor [numel], whose `.grad` holds all their gradients."""
        return self.flat.values

    def planned(self, batch: Batch) -> Batch:
        """Return the batch with a plan for every pass over it, chosen for the memory that is free now.

        `score` and `logprobs` of such a batch give bitwise equal results while the adapter stays the same, whatever
        else allocates or frees memory in between.
        """
        if self.fused is None:
            return batch
        sequences = self._sequences(batch)
        return replace(batch, plan=self._plan(batch, len(batch.input_ids), int(batch.train_mask.sum()), sequences))

    def score(self, batch: Batch, weights: Literal["policy", "reference"] = "policy") -> Tensor:
        """Return log-probs [T] without gradient. "reference": under the adapter that training started from (the base,
        if new), whose routers choose the experts."""
        batch = batch if weights == "policy" else replace(batch, routes=None)
        # transformers and PyTorch choose other kernels without gradient; the fused layers do not.
        graph = torch.set_grad_enabled(self.fused is None and weights == "policy")
        with graph, self._reference() if weights == "reference" else nullcontext():
            return self._forward(batch)[0].detach()

    @torch.no_grad()
    def entropy(self, batch: Batch) -> Tensor:
        """Return the entropy [T] of each trained token's distribution, in nats, without gradient; 0 elsewhere."""
        return self._forward(batch)[1]

    def token_budget(self, group: Group = ALONE) -> int:
        """Return the tokens per micro-batch that take the least time within the memory that is free now.

        Used for `packing.tokens_per_micro_batch = "auto"`. group: a typical group of rows.
        """
        if self.fused is None or self.device.type == "cpu":
            return BUDGETS[-1]
        return token_budget(self.fused.shape, self.fused.available(), host_free(), group, self.fused.graphs is not None)

    def set_micro_batch(self, tokens: int) -> None:
        """Set the tokens of a full micro-batch, by which the plans of shorter ones choose where weights are held."""
        if self.fused is not None:
            self.fused.set_micro_batch(tokens)

    def release_memory(self) -> None:
        """Free what passes leave allocated: CUDA graphs, weight buffers, and blocks that PyTorch has cached.

        The next pass allocates it again. Call it between passes, with no backward due.
        """
        if self.fused is not None:
            self.fused.release()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def forget_images(self) -> None:
        """Free the features of images, at the start of a step: a resumed run has none either."""
        if self.vision is not None:
            self.vision.clear()

    def lower(self) -> str:
        """Free memory and plan later passes with less, after an out-of-memory error; return a description."""
        self.release_memory()
        if self.fused is None:
            return "tried once more without what PyTorch had cached"
        self.fused.raise_margin()
        return f"planned again with {1 - self.fused.margin:.0%} of the memory that is free"

    def fix_rope(self, longest: int, long: bool = False) -> None:
        """Use one rotary table for all sequences, whatever they are packed with; see `rlft.models.rope.fix`."""
        self.rope = rope.fix(self.decoder, longest, long)
        self._same_tables = rope.limit(self.decoder)

    def check_length(self, tokens: int) -> None:
        """Assert that calls with sequences of up to `tokens` tokens all have the same rotary tables."""
        limit = self._same_tables
        assert limit is None or tokens <= limit, f"{tokens} tokens, and rotary tables were fixed for {limit}: fix_rope"

    def adapter(self) -> dict[str, Tensor]:
        """Map PEFT name -> live tensor of the adapter, without the scale alpha / rank (see `scales`)."""
        return self.flat.tensors()

    @property
    def scales(self) -> dict[str, float]:
        """PEFT name of each lora_B -> factor on its product."""
        return self.flat.scales

    def _forward(self, batch: Batch, entropy_grad: bool = False) -> tuple[Tensor, Tensor]:
        """Return log-prob and entropy, [T] each, of every trained token."""
        self.flat.attach()
        if self._same_tables is not None:
            self.check_length(int(batch.position_ids.max()) + 1)
        # From the batch on the CPU, as packing returns it: nothing has to wait for the GPU.
        sequences = self._sequences(batch)
        trained = batch.train_mask.nonzero().squeeze(1)
        ids, rows = (upload(tensor, self.device) for tensor in (batch.input_ids, trained))
        plan = batch.plan
        if self.fused is not None and plan is None:
            plan = self._plan(batch, len(ids), len(rows), sequences)
        hidden, record = self._hidden(batch, trained, ids, sequences, plan)
        chunk_bytes, workspace = (CHUNK_BYTES, None) if record is None else (record.plan.chunk_bytes, record.workspace)
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
    ) -> tuple[Tensor, memory.PassRecord | None]:
        """Return the head's input [N, H] where each of `trained` is predicted; also how fused layers ran, if they did.

        batch, trained: in host memory.
        """
        seen, routes = self._seen(batch), self._routes(batch)
        choice = routing.NO_CHOICE
        if routes is not None and not isinstance(self._routers, str):
            choice = routing.Choice(self._routers, routes)
        if not self.packed:
            positions = upload(batch.position_ids, self.device) if seen is not None else None
            states = padded.Rows.of(batch, trained, self.device).hidden(self.decoder, positions, seen, choice)
            states = states.to(self._head.dtype)
            return (append_ones(states, self._head.shape[1]) if self._bias else states), None
        assert not isinstance(seen, CrossStates), "see `unpackable`"
        positions, rows = (upload(tensor, self.device) for tensor in (batch.position_ids, batch.source[trained]))
        if self.fused is None:
            states = packed.hidden(self.decoder, ids, positions, sequences, rows, seen, choice)
            return (append_ones(states, self._head.shape[1]) if self._bias else states), None
        embedded = self.decoder.get_input_embeddings()(ids)
        embedded = embedded if seen is None else seen.embedded(embedded)
        gradients = self.flat.gradients
        more = (plan, None, ids, seen, routes)
        hidden, record = self.fused.hidden(embedded, positions, sequences, gradients, *more)
        # The norm acts on each row alone, so only the selected rows need it.
        return self.fused.final_norm(hidden[rows]), record

    def _plan(self, batch: Batch, rows: int, trained: int, sequences: Sequences) -> memory.MemoryPlan:
        """Choose how a pass runs: no CUDA graph has a gradient of what it reads, which a trained tower needs."""
        assert self.fused is not None
        inputs = bool(batch.images) and self.vision is not None and self.vision.trained
        return self.fused.plan_pass(rows, trained, sequences, inputs)

    def _sequences(self, batch: Batch) -> Sequences:
        """Return which rows of a batch attend to which."""
        blocks = [(row, row + image.tokens) for image, row in batch.images if image.layout == "block"]
        return Sequences.of(batch.cu_seqlens, batch.prefix, self.device, blocks=sorted(blocks))

    def _seen(self, batch: Batch) -> Seen | None:
        """Return the features of the images of a batch; None without images."""
        if not batch.images:
            return None
        if self.vision is None:
            raise ConfigError(
                "the prompts have images, and the policy was made without what reads them; give Policy(model, "
                "images=rlft.models.vision.image_reader(name, model.config))"
            )
        return self.vision.rows(batch.images, self.device)

    def _routes(self, batch: Batch) -> Tensor | None:
        """Return the experts of a batch on the policy's device; None where routers choose. Raises EngineError."""
        if batch.routes is None:
            return None
        if self.fixed_routing is not None or batch.routes.shape[1] != self.mixtures:
            why = self.fixed_routing or f"it has {self.mixtures} layers with experts"
            raise EngineError(
                f"the rollouts have the experts of {batch.routes.shape[1]} layers, which the policy cannot take: {why}"
            )
        return upload(batch.routes, self.device)

    @contextmanager
    def _reference(self) -> Iterator[None]:
        """Run the block with the starting adapter, and restore the current one bitwise.

        If the start was the base, the adapter is switched off instead.
        """
        if self.flat.fresh:
            with self.model.disable_adapter():
                yield
            return
        flat = self.flat.values.data
        current = flat.clone()
        flat.copy_(self.flat.start)
        try:
            yield
        finally:
            flat.copy_(current)
