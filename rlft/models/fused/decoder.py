"""Run the decoder of a PEFT model by fused layers, for rlft's policy and for transformers' own callers.

Shapes: T packed rows (tokens), H hidden size, R rotary columns.

`fuse` checks whether `rlft.models.fused.layer` can run every layer and, if so, replaces `forward` on the decoder
*instance*. Trainer and TRL then run fused layers too: a padded batch is unpadded once at the entry and padded again at
the exit. Calls that need something else (a KV cache, a 4-D mask, hidden states per layer) run transformers' own
forward. Every call compares the modules with those of the last check, so that modules that were replaced, moved, cast
or written to are never run on outdated tensors.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from rlft.kernels import rms_norm
from rlft.kernels.attention import Sequences
from rlft.models import fusable, kv_cache
from rlft.models.device_memory import DeviceMemory, host_free
from rlft.models.families import Family
from rlft.models.fused import calls, memory
from rlft.models.fused.decoder_shape import DecoderShape
from rlft.models.fused.graphs import Graphs, Padded, copied_keys, count_keys, key_capacity, launch_bound, round_up
from rlft.models.fused.layer import run_layer
from rlft.models.fused.layer_modules import FusedLayer, describe_norm, describe_shape, graphless_of, mixers_of
from rlft.models.fused.layer_steps import Pass
from rlft.models.fused.mixer_shape import Recurrent
from rlft.models.fused.offload import Offload
from rlft.models.fused.ops import Places
from rlft.models.fused.per_layer import PerLayerInputs
from rlft.models.fused.placement import Placement
from rlft.models.fused.plan_search import GRAPH_MEMORY_SHARE, capturable, choose_plan
from rlft.models.fused.projection import Store
from rlft.models.fused.tables import rope_tables
from rlft.models.fused.unpad import padded_again, text_positions, unpadded, unpadded_ids
from rlft.models.vision import ImageRows

STEP = 64 * 2**20
"""Memory budgets are rounded down to a multiple of this number of bytes."""
MARGIN = 0.05
"""Share of the free memory that is left unused, for fragmentation in the allocator."""
LOWER = 0.1
"""By how much the margin grows after an out-of-memory error."""
KEYS = 1024
"""Numbers of copied keys are rounded up to a multiple of this."""


class FusedDecoder:
    """Fused layers over a decoder's modules: `hidden` for packed rows, `forward` for transformers' callers."""

    def __init__(
        self,
        model: PeftModel,
        decoder: nn.Module,
        family: Family,
        device_memory: DeviceMemory | None = None,
        placement: Placement | None = None,
    ) -> None:
        """Check the modules of `decoder` and take their tensors.

        device_memory, placement: as the attributes. Raises ValueError, with the reason, for a decoder that fused layers
        cannot run.
        """
        self.model, self.decoder, self.family = model, decoder, family
        self.plan: memory.MemoryPlan | None = None
        """The plan of every pass; None: chosen for each pass from the free memory."""
        self.budget: float | None = None
        """Bytes that a pass may take on the device; None: what is free."""
        self.device_memory = device_memory
        """Says what is free; None: the object of the device that the decoder is on."""
        self.placement = placement
        """Where the frozen weights of the layers lie; None: on the device."""
        self.margin = MARGIN
        """Share of that memory that is left unused."""
        self._micro_batch = 0
        """Rows of a full micro-batch, see `set_micro_batch`; 0: not known."""
        self.entropy_grad = False
        """Whether plans have room for the second Jacobian of an entropy bonus; set by `expect`."""
        self._reset()
        problem = self._check_modules()
        if problem is not None:
            raise ValueError(problem)

    def _reset(self) -> None:
        self._cache_name = kv_cache.name(self.decoder)
        self.store = Store(ring=self.placement.ring if self.placement is not None else None)
        self.offload = Offload()
        self._last_plan: memory.MemoryPlan | None = None
        self._warned: set[str] = set()
        self._parts: list[nn.Module] = []
        self._states: list[tuple] = []
        self._problem: str | None = None

    def _check_modules(self) -> str | None:
        """Take the decoder's modules as they are now and return why they cannot be run, or None."""
        parts = list(fusable.parts_of(self.decoder, self.family))
        states = [state for part in parts for state in fusable.state_of(part)]
        if parts == self._parts and states == self._states:
            return self._problem
        if self.placement is not None and self._parts:
            self._problem = f'base.place = "{self.placement.place}", and weights of the base were changed since'
            return self._problem
        self._parts, self._states = parts, states
        self.store.release()
        self.graphs: Graphs | None = None
        """CUDA graphs of short passes; None: passes are always launched kernel by kernel."""
        self.mixers: str | None = None
        """What layers have in place of attention; None: all have attention."""
        self.graphless: str | None = None
        """What no CUDA graph runs; None: graphs can run the layers."""
        self.inputs: PerLayerInputs | None = None
        """Makes what layers read beside the residual stream; None: they read nothing else."""
        config: Any = self.decoder.config
        final_norm = self.decoder.get_submodule(self.family.final_norm)
        like: Tensor = self.decoder.get_input_embeddings().weight  # type: ignore[operator,union-attr]
        factor = self.family.embedding_factor
        self._embedding_factor = float(getattr(config, factor)) if factor is not None else 1.0
        try:
            weight_of = self.placement.weight if self.placement is not None else None
            self.layers = [
                FusedLayer(module, i, self.family.of_layer(config, i), config, like, weight_of)
                for i, module in enumerate(self.decoder.layers)  # type: ignore[arg-type]
            ]
            if self.family.of_layer(config, 0).per_layer_input is not None:
                self.inputs = PerLayerInputs(self.decoder, self.family, like)
            self._problem = fusable.layers_problem(self.layers)
        except ValueError as error:
            self._problem = str(error)
        if self._problem is None and any(trained for *_, trained in states):
            self._problem = "weights of the base are trained"
        if self._problem is None:
            self.norm = describe_norm(final_norm, self.family.norm_style, like, config.hidden_size)
            self.shape = self._shape()
            graphable = self.norm.weight.is_cuda and self.shape.flash
            self.mixers, self.graphless = mixers_of(self.layers), graphless_of(self.layers)
            if graphable and self.placement is None and self.graphless is None:
                self.graphs = Graphs()
        return self._problem

    def problem(self) -> str | None:
        """Return why the fused layers cannot run the current modules and adapters; None if they can."""
        problem = self._check_modules() or fusable.hook_problem(self._parts)
        return problem or fusable.adapter_problem(self._adapted())

    def _adapted(self) -> list[fusable.Adapted]:
        """Return everything that adapters of layers may be on."""
        stacks = (stack for layer in self.layers if layer.experts is not None for stack in layer.experts.stacks)
        of_inputs = [] if self.inputs is None else [self.inputs.projection]
        return [*of_inputs, *(projection for layer in self.layers for projection in layer.projections), *stacks]

    def __getstate__(self) -> dict[str, Any]:
        # A copy of a model (deepcopy, pickle) has other modules, which are checked when it first runs.
        names = ("model", "decoder", "family", "plan", "budget", "margin", "_micro_batch", "entropy_grad")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, device_memory=None, placement=None)
        self._reset()

    # ---- packed rows -------------------------------------------------------------------------------------------------

    def hidden(
        self,
        embedded: Tensor,
        position_ids: Tensor,
        sequences: Sequences,
        gradients: dict[Tensor, Tensor] | None = None,
        plan: memory.MemoryPlan | None = None,
        padded_to: Tensor | None = None,
        ids: Tensor | None = None,
        images: ImageRows | None = None,
        routes: Tensor | None = None,
    ) -> tuple[Tensor, memory.PassRecord]:
        """Return the residual stream after the last layer, [T, H], before the final norm, and how the pass ran.

        embedded: [T, H]. position_ids: [T], or [3, T] with images. sequences: which rows attend to which. gradients:
        parameter -> fp32 buffer that the backward adds its gradient to; without it autograd returns the gradients.
        plan: from `plan_pass`; None: one for the memory that is free. Two passes with the same plan give bitwise equal
        results, with gradient and without. padded_to: positions of the padded call that the rows come from, which
        determine the rotary tables, as in transformers. ids: [T], of the tokens, for decoders with `inputs`. images:
        what is added behind the first layers. routes: [T, layers with experts, k] integers, the experts of each row;
        None: those that the routers choose.
        """
        if torch.is_inference_mode_enabled():
            # Buffers allocated in inference mode could not be written to outside it.
            with torch.inference_mode(False), torch.no_grad():
                return self.hidden(embedded, position_ids, sequences, gradients, plan, padded_to, ids, images, routes)
        hidden = embedded = self._entering(embedded)
        adapter, rows = self.adapter(), embedded.shape[0]
        if plan is None:
            plan = self.plan_for(rows, None, copied_keys(sequences, rows), None, self._recurrent(sequences))
        self._last_plan = plan
        self.store.use(plan.store)
        types = {layer.type for layer in self.layers if layer.mixer is None}
        tables = rope_tables(self.decoder, self.family, types, embedded, position_ids, padded_to)
        if plan.padded:
            # No graph runs experts; see `plan_pass` for the others.
            assert routes is None and sequences.blocks is None and not embedded.requires_grad
            batch = Padded.of(self.layers, embedded, tables, sequences, plan.padded)
            added = images is not None and bool(images.deep)  # between layers, which a graph has no place for
            if self.graphs is not None and not added and gradients and self._trains(adapter, gradients):
                limit = GRAPH_MEMORY_SHARE * (self.available() + self.graphs.bytes)
                result = self.graphs.run(self.layers, self.store, adapter, plan, gradients, batch, limit)
                if result is not None:
                    return result, memory.PassRecord(plan, self.store.scratch)
            bucket = batch.launched()
            hidden, tables, sequences = bucket.x, bucket.tables, bucket.sequences
        if self.graphs is not None and plan.peak > self.available():
            self.graphs.clear()
        more = (torch.is_grad_enabled(), gradients, self.offload, Places.of(sequences) if self.mixers else None)
        run = Pass(sequences, tables, self.store, adapter, plan.levels, plan.tile, *more, self._by_layer(routes))
        inputs: Sequence[Tensor | None] = [None] * len(self.layers)
        if self.inputs is not None:
            assert ids is not None, "layers read ids besides"
            inputs = self.inputs(ids, embedded, adapter)
        for layer, own in zip(self.layers, inputs, strict=True):
            hidden = run_layer(layer, hidden, run, own)
            hidden = hidden if images is None else images.behind(layer.index, hidden)
        self.offload.settle()
        return hidden[:rows], memory.PassRecord(plan, self.store.scratch)

    def _entering(self, embedded: Tensor) -> Tensor:
        """Return what the first layer reads, of the embedded tokens."""
        scaled = embedded if self._embedding_factor == 1 else embedded * self._embedding_factor
        return self.final_norm(scaled) if self.family.embedding_norm else scaled

    def _by_layer(self, routes: Tensor | None) -> dict[int, Tensor]:
        """Map layer -> the experts of each row, [T, k]. routes: as of `hidden`."""
        mixtures = [layer.index for layer in self.layers if layer.experts is not None]
        return {} if routes is None else dict(zip(mixtures, routes.unbind(1), strict=True))

    @property
    def last_plan(self) -> memory.MemoryPlan | None:
        """The plan of the last pass, one that ran out of memory included; None before the first."""
        return self._last_plan

    def final_norm(self, hidden: Tensor) -> Tensor:
        """Apply the norm before the head, with gradient."""
        return rms_norm.rms_norm(hidden, *self.norm)

    def plan_pass(self, rows: int, trained: int, sequences: Sequences, inputs: bool = False) -> memory.MemoryPlan:
        """Choose how a pass over packed rows runs in the memory that is free now.

        rows: tokens, of which `trained` reach the head, padded where a CUDA graph may run the pass; whether one does
        changes no bit of the result. inputs: embedded tokens have a gradient, which no graph gives."""
        keys, budget = count_keys(sequences, rows), self.available()
        graphs = self.graphs if sequences.blocks is None and not inputs else None
        if graphs is not None and launch_bound(self.shape, rows, keys):
            bucket = round_up(rows)
            plan = self.plan_for(bucket, trained, key_capacity(keys, bucket), budget)
            if capturable(self.shape, plan, budget + graphs.bytes):
                return replace(plan, padded=bucket)
        return self.plan_for(rows, trained, copied_keys(sequences, rows), budget, self._recurrent(sequences))

    def _recurrent(self, sequences: Sequences) -> Recurrent | None:
        """Return what the memory of the layers other than attention depends on; None without such layers."""
        return Recurrent.of(sequences) if self.mixers else None

    def plan_for(
        self,
        rows: int,
        trained: int | None = None,
        keys: int = 0,
        budget: float | None = None,
        recurrent: Recurrent | None = None,
    ) -> memory.MemoryPlan:
        """Choose how a pass over `rows` rows runs, of which `trained` (None: all) reach the head.

        keys: keys that are copied for sequences behind shared prefixes. budget: bytes; None: `available`. recurrent: as
        in `memory.evaluate`.
        """
        if self.plan is not None:
            return self.plan
        device = self.norm.weight.device
        host = host_free() if device.type == "cuda" else 0.0
        # Rounded up by at most 3% (to 64 rows for short passes), so that cached plans are reused: choosing one takes
        # milliseconds.
        step = max(64, 1 << max(0, rows.bit_length() - 6))
        sizes = ((rows, step), (rows if trained is None else trained, step), (keys, KEYS))
        rows, trained, keys = (-(-size // multiple) * multiple for size, multiple in sizes)
        budget = self.available() if budget is None else budget
        if self.placement is not None:
            return choose_plan(self.shape, rows, trained, budget, host, keys, False, recurrent)
        plan = choose_plan(self.shape, rows, trained, budget, host, keys, True, recurrent)
        full = self._micro_batch
        shadowed = plan.store == "shadow" and rows < full
        if shadowed and choose_plan(self.shape, full, full, budget, host).store != "shadow":
            return choose_plan(self.shape, rows, trained, budget, host, keys, False, recurrent)
        return plan

    def set_micro_batch(self, rows: int) -> None:
        """Set the rows of a full micro-batch; 0: not known.

        A shorter pass has a shadow store of the weights only if a full one has: allocating and releasing it in every
        step would cost the time it saves, and CUDA graphs would have to be captured again.
        """
        self._micro_batch = rows

    def expect(self, entropy_grad: bool) -> None:
        """Set whether plans make room for a loss with an entropy bonus.

        All passes get the same plan, so that log-probs without gradient are bitwise those with gradient.
        """
        if entropy_grad != self.entropy_grad:
            self.entropy_grad = entropy_grad
            self.shape = replace(self.shape, entropy_grad=entropy_grad)

    def available(self) -> float:
        """Return the bytes that a pass may take on the device now."""
        device_memory = self.device_memory or DeviceMemory.of(self.norm.weight.device)
        budget = device_memory.free() + self.store.bytes if self.budget is None else self.budget
        budget -= self.graphs.bytes if self.graphs is not None else 0
        # In steps, so that cached plans are reused.
        return budget * (1 - self.margin) // STEP * STEP

    def raise_margin(self) -> None:
        """Plan with less memory from now on, after an out-of-memory error."""
        self.margin = min(0.9, self.margin + LOWER)

    def release(self) -> None:
        """Free CUDA graphs and weight buffers. No backward may be due: that of a graph would raise RuntimeError."""
        if self.graphs is not None:
            self.graphs.clear()
        self.store.release()

    def adapter(self) -> str | None:
        """Return the name of the active adapter; None when adapters are off. Assumes that `problem` returned None."""
        module = next(fusable.adapted(self._adapted()), None)
        active = () if module is None or module.disable_adapters else module.active_adapters
        return active[0] if active else None

    def _trains(self, adapter: str | None, gradients: dict[Tensor, Tensor]) -> bool:
        """Return whether `gradients` are those of the active adapter."""
        tensors = (tensor for layer in self.layers for tensor in layer.adapter_tensors(adapter))
        return next(tensors, None) in gradients

    def _shape(self) -> DecoderShape:
        """Return the sizes that the memory plan is computed from."""
        vocab = self.decoder.config.vocab_size  # type: ignore[union-attr]
        shape = describe_shape(self.layers, self.adapter(), vocab, self.norm.weight, self.entropy_grad)  # type: ignore[arg-type]
        if self.inputs is None:
            return shape
        group = self.inputs.projection.bind(self.adapter()).group
        return replace(shape, per_layer_total=group.out, per_layer_trained=group.tail > 0)

    # ---- transformers' callers ---------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Replace the decoder's own forward: same arguments (the cache by either name), same result."""
        if cache is not None and past_key_values is not None:
            raise ValueError("give one of cache and past_key_values")
        cache = past_key_values if cache is None else cache
        text, alike = text_positions(position_ids)
        mask = calls.plain_mask(self.decoder.config, attention_mask)
        more = not alike or calls.asks_for_more(self.decoder.config, mask, cache, use_cache, kwargs)
        fallback = "" if more else calls.setting_problem(self.decoder, self.family) or self.problem()
        if fallback is None:
            fallback = calls.autocast_problem(self.norm.weight)
        if fallback is None and self.inputs is not None and input_ids is None:
            fallback = "the layers read ids, and the call has embedded tokens alone"
        if fallback is not None:
            if fallback and fallback not in self._warned:
                self._warned.add(fallback)
                warnings.warn(f"rlft: transformers' own layers run here, not the fused ones: {fallback}", stacklevel=2)
            given = (input_ids, attention_mask, position_ids, inputs_embeds, use_cache)
            return calls.own_forward(self.decoder, *given, **{self._cache_name: cache}, **kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if getattr(self.decoder, "gradient_checkpointing", False) and "checkpointing" not in self._warned:
            self._warned.add("checkpointing")
            warnings.warn(
                "rlft: gradient checkpointing has no effect, fused layers decide themselves what they keep",
                stacklevel=2,
            )
        embed: Any = self.decoder.get_input_embeddings()  # type: ignore[operator]
        embedded = embed(input_ids) if inputs_embeds is None else inputs_embeds
        rows, places, sequences, positions = unpadded(embedded, mask, text)
        padded_positions = text
        if padded_positions is None and places is not None:
            padded_positions = torch.arange(embedded.shape[1], device=embedded.device)
        ids = None if input_ids is None else unpadded_ids(input_ids, places)
        hidden = self.final_norm(self.hidden(rows, positions, sequences, padded_to=padded_positions, ids=ids)[0])
        return calls.result_class(self.decoder)(last_hidden_state=padded_again(hidden, places, embedded.shape))
