"""Sample with vLLM in the trainer's process, on the trainer's base weights.

In mode "shared", linear layers and experts compute directly from the trainer's weights. In mode "dequantized", vLLM has
separate plain weights, which are freed while it sleeps and copied from the trainer's at each wake. Mode "merged" is the
same with the adapter added to those weights and no LoRA kernels. Embeddings, head and norms are the trainer's tensors
in all three. The adapter is copied in memory and read back.

This module handles the adapter, the memory and the read-back check. `rlft.rollout.vllm.hooks` has the extension points
of vLLM, `rlft.rollout.vllm.requests` the requests.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlft import dist
from rlft.config.data import Sampling
from rlft.config.run import Engine as Options
from rlft.errors import EngineError
from rlft.models import experts
from rlft.models.allocator import segments
from rlft.models.kind import sees
from rlft.models.policy import Policy
from rlft.rollout.engine import Finished, check_names, check_read_back, eos_ids
from rlft.rollout.routing import replays
from rlft.rollout.vllm import sleeping
from rlft.rollout.vllm import start as vllm_start
from rlft.rollout.vllm.memory import EngineMemory, EngineMode, choose_mode
from rlft.rollout.vllm.requests import VllmFailed, check_lengths, sample
from rlft.rollout.vllm.shared_weights import frozen_weights
from rlft.rollout.vllm.slots import Pair, adapted, module_of, ranks_of
from rlft.rollout.vllm.start import arguments, class_restored, defaults_restored, environment, model_folder, quiet
from rlft.types import Prompt, Rollout

NUMBERS = itertools.count(1)
"""Numbers of the engines of this process."""


class VllmEngine:
    """Sample with vLLM; implements `rlft.rollout.engine.Engine`."""

    SAMPLES: bool = True

    def __init__(
        self,
        policy: Policy,
        tokenizer: Any,
        options: Options,
        longest: int,
        sequences: int,
        progress: Callable[[int, int], None] | None = None,
        note: Callable[[str], None] = lambda _: None,
        detail: Callable[[str], None] = lambda _: None,
        trains: bool = True,
    ) -> None:
        """Start vLLM, which takes from 10 seconds to minutes, since it compiles and captures graphs.

        longest: tokens of the longest prompt plus completion. sequences: completions sampled together, for its cache.
        progress: called with (finished sequences, all). note: called with what went wrong and did not stop the engine.
        detail: called with a summary of how it runs. trains: whether completions are trained on. Raises EngineError.
        """
        self._policy, self._tokenizer, self._options = policy, tokenizer, options
        self._longest, self._sequences = longest, sequences
        self._progress, self._note, self._detail = progress, note, detail
        self._scales = dict(policy.scales)
        self._shapes = {name: tuple(tensor.shape) for name, tensor in policy.adapter().items()}
        self._adapted = adapted(policy.model)
        self._ranks = ranks_of(policy.model, policy.adapter())
        self._sees = sees(policy.base.config)
        self._eos = eos_ids(tokenizer, policy.base)
        self._dtype: torch.dtype = policy.base.get_input_embeddings().weight.dtype  # type: ignore[operator,union-attr]
        self._held: dict[str, Pair] = {}
        """Weight -> A and scaled B of the last loaded adapter, in the engine's dtype."""
        self._version, self._restarted, self._asleep = None, False, False
        self._reports, line = replays(policy, options, "vllm") if trains else (False, "")
        if line:
            detail(line)
        self._freed = 0
        """Bytes that the last sleep freed and the next wake allocates again."""
        self._start()

    # ---- start and end -----------------------------------------------------------------------------------------------

    def _start(self) -> None:
        options, device = self._options, self._policy.device
        weights = frozen_weights(self._policy.base)
        self._sizes = EngineMemory.of(
            self._policy, weights, self._dtype, self._longest, self._sequences, options.max_seqs
        )
        self.choice: EngineMode = choose_mode(self._sizes, options.mode, options.kv_gib, self._policy.device_memory)
        environment()
        if device.type == "cuda" and vllm_start.compiles(options, self._sizes.linear):
            self._detail("vLLM compiles this model, for minutes at its first start; see engine.compile")
        begin = time.perf_counter()
        decoder = type(self._policy.base.get_decoder())  # type: ignore[operator,union-attr]
        with quiet(), defaults_restored(), class_restored(decoder), segments(growing=False):
            from vllm import LLM
            from vllm.distributed.parallel_state import destroy_model_parallel

            from rlft.rollout.vllm import hooks

            merged, gates = self.choice.mode == "merged", experts.gates(self._policy.base)
            self._provider = hooks.WeightProvider(weights, self._ranks, merged, gates, self._reports)
            if self._sees:
                from rlft.rollout.vllm import images

                images.register(type(self._policy.base).__name__)
            number = next(NUMBERS)
            hooks.WeightProvider.waiting[number] = self._provider
            try:
                self._llm: Any = LLM(
                    model_folder(self._policy.base, self._tokenizer),
                    **arguments(options, self.choice, self._sizes, self._ranks, self._dtype, device, number),
                )
            except Exception as error:
                # Groups of a model without experts would serve the next one with.
                destroy_model_parallel()
                if device.type == "cuda":
                    hooks.release_pools(asleep=False)
                if isinstance(error, EngineError):
                    raise
                name = type(self._policy.base).__name__
                raise vllm_start.not_started(name, self._provider.stage, error) from error
            finally:
                del hooks.WeightProvider.waiting[number]
        (self.runner,) = self._llm.collective_rpc("rlft_runner")
        self._llm.collective_rpc("rlft_record", args=(self._provider.log,))
        self._check_rope()
        self._refill()
        tested = hooks.TESTED_ON_GPU if device.type == "cuda" else hooks.TESTED_ON_CPU
        new = "" if (vllm_start.minor(), self.runner) in tested else ", untested with rlft"
        self._detail(
            f"vLLM {vllm_start.version()} ({self.runner} model runner{new}) "
            f"up in {time.perf_counter() - begin:.0f} s: {self.choice}"
        )

    def _check_rope(self) -> None:
        """Raise EngineError when vLLM uses other longrope factors than the trainer."""
        rope = self._policy.rope
        if rope is None:
            return
        (long,) = self._llm.collective_rpc("rlft_long_rope")
        if rope.factors == "long factors" and long != [True]:
            here = "short factors" if long else "factors that depend on the batch"
        elif rope.factors == "short factors" and True in long:
            here = "long factors"
        else:
            return
        self.close()
        raise EngineError(
            f"vLLM computes with longrope's {here}, and the trainer with its {rope.factors}. vLLM decides by "
            f"max_model_len ({self._longest}), and some versions keep the choice of a process's first engine: start "
            f'the run in a process without another one, or set engine.name = "eager"'
        )

    def close(self) -> None:
        """Stop vLLM and free its memory."""
        llm, self._version, self._held = self.__dict__.pop("_llm", None), None, {}
        if llm is None:
            return
        from rlft.rollout.vllm import hooks

        gpu = self._policy.device.type == "cuda"
        self._provider.forget()
        try:
            if gpu and self._asleep and hooks.frees_itself():
                # Such a version unmaps all its memory in the shutdown, and must not find it unmapped already.
                torch.cuda.empty_cache()
                llm.wake_up()
                self._asleep = False
            with quiet():
                llm.llm_engine.engine_core.shutdown()
        except Exception as error:  # must not hide the error that led to the close
            self._note(f"vLLM did not shut down cleanly ({type(error).__name__}: {error})")
        del llm
        gc.collect()
        if gpu:
            hooks.release_pools(self._asleep)
            self._policy.device_memory.report_unmapped(hooks.unmapped())
            torch.cuda.empty_cache()

    @property
    def memory(self) -> dict[str, int]:
        """Bytes of the KV cache, the engine's own weights, and the adapter slots with their source copy."""
        slot = 0 if self.choice.mode == "merged" else self._sizes.slots
        weight_copy = self._provider.weight_copy
        return {
            "cache of the engine": self.choice.kv_bytes,
            "weights of the engine": weight_copy.bytes if weight_copy else 0,
            "adapter of the engine": slot,
        }

    # ---- adapter -----------------------------------------------------------------------------------------------------

    def load_adapter(self, named_tensors: Mapping[str, Tensor], version: int) -> None:
        """See `Engine.load_adapter`: copy, then read back and compare."""
        check_names(named_tensors, {name: torch.empty(shape, device="meta") for name, shape in self._shapes.items()})
        if self._asleep:
            raise EngineError("load_adapter while the engine sleeps: its slots have no memory; wake it first")
        self._version = None
        self._write(named_tensors)
        self._check(self._scaled(named_tensors, self._policy.scales), version)
        self._version = version

    def _scaled(self, named_tensors: Mapping[str, Tensor], scales: Mapping[str, float]) -> dict[str, Pair]:
        """Return weight -> (A, scale * B) in the engine's dtype. This is the only place that applies the scale."""
        names = [name for name in named_tensors if ".lora_B." in name]
        a_matrices = [named_tensors[name.replace(".lora_B.", ".lora_A.")] for name in names]
        b_matrices = [named_tensors[name] for name in names]
        tensors = [torch.empty_like(tensor, dtype=self._dtype) for tensor in a_matrices + b_matrices]
        scaled_b = torch._foreach_mul(b_matrices, [scales[name] for name in names])  # type: ignore[attr-defined]
        torch._foreach_copy_(tensors, [*a_matrices, *scaled_b])  # type: ignore[attr-defined]
        pairs = zip(tensors[: len(a_matrices)], tensors[len(a_matrices) :], strict=True)
        places = (self._adapted[module_of(name)] for name in names)
        return {place.weight: place.pair(*pair) for place, pair in zip(places, pairs, strict=True)}

    def _write(self, named_tensors: Mapping[str, Tensor]) -> None:
        self._held = self._scaled(named_tensors, self._scales)
        self._fill()

    def _refill(self) -> None:
        """Write the engine's own memory: the trainer's weights, and zeros."""
        assert self._provider.weight_copy is not None
        self._provider.weight_copy.run()
        for buffer in self._provider.zeros:
            buffer.zero_()

    def _fill(self) -> None:
        """Write the last loaded adapter to the engine's slots or, in mode "merged", into its weights."""
        if self.choice.mode == "merged":
            self._refill()
            assert self._provider.weight_copy is not None
            self._provider.weight_copy.merge(self._held)
        else:
            self._provider.put(self._held)

    def _check(self, want: Mapping[str, Pair], version: int) -> None:
        """Check that the engine's kernels read exactly `want`, an adapter scaled as the trainer scales it."""
        if self.choice.mode == "merged":
            assert self._provider.weight_copy is not None
            if (wrong := self._provider.weight_copy.differs(want)) is not None:
                raise EngineError(
                    f"after loading policy version {version} the engine does not hold the trainer's adapter: {wrong} "
                    f"is not the base with the adapter added. It would sample from another policy than the one that is "
                    f"trained."
                )
            return
        expected, actual, paddings = {}, {}, []
        for weight, slot_a, slot_b in self._provider.slots():
            rank = 0
            if weight in want:
                matrix_a, matrix_b = want[weight]
                rank = matrix_a.shape[-2]
                name_a, name_b = (f"{weight.removesuffix('.weight')}.lora_{side}.weight" for side in "AB")
                expected |= {name_a: matrix_a, name_b: matrix_b}
                actual |= {name_a: slot_a[..., :rank, :], name_b: slot_b[..., :rank]}
            paddings += [padding for padding in (slot_a[..., rank:, :], slot_b[..., rank:]) if padding.numel()]
        check_read_back(expected, actual, self._policy.scales, self._scales, version)
        if paddings and bool(torch.stack([padding.any() for padding in paddings]).any()):
            raise EngineError(
                f"after loading policy version {version} the engine holds something beside the adapter: this is a "
                f'fault of rlft or of vLLM {vllm_start.version()}; set engine.name = "eager", and report it'
            )

    # ---- sleep and wake ----------------------------------------------------------------------------------------------

    def sleep(self) -> None:
        """Free the KV cache, the engine's own weights and the slots on a GPU; on a CPU vLLM keeps them."""
        if self._asleep:
            return
        self._asleep = True
        device = self._policy.device
        if device.type == "cuda":
            from rlft.rollout.vllm import hooks

            self._freed = sleeping.sleep(self._llm, device)
            self._policy.device_memory.report_unmapped(hooks.unmapped())

    def wake(self) -> None:
        """Allocate the memory again, write weights and adapter, and read the adapter back."""
        if not self._asleep:
            return
        device = self._policy.device
        if device.type == "cuda":
            sleeping.wake(self._llm, device, self._freed, self.choice.kv_bytes, self._policy.release_memory)
        self._asleep = False
        if self.choice.mode != "merged" or self._version is None:
            self._refill()
        if self._version is not None:
            if device.type == "cuda":
                self._fill()
            try:
                self._check(self._held, self._version)
            except EngineError as error:
                version, self._version = self._version, None
                raise EngineError(
                    f"the engine's adapter changed while it slept (policy version {version}): {error}"
                ) from error

    # ---- sampling ----------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seed: tuple[int, ...],
        finished: Finished | None = None,
        first: int = 0,
    ) -> list[Rollout]:
        """See `Engine.generate`. If vLLM fails, restart it once; raise EngineError the second time."""
        if self._version is None:
            raise EngineError("generate before load_adapter: the engine has no adapter")
        self.wake()
        check_lengths(prompts, sampling.max_tokens, self._longest)
        # Prefixes of earlier generations are of another adapter, or were discarded in sleep. A cached prompt is rounded
        # differently from a computed one, too: the same seed is to give the same rollouts.
        if not self._llm.reset_prefix_cache():
            raise EngineError("vLLM does not empty its cache: requests of an earlier generation have not ended")
        if self._sees:
            # Features of an earlier step were computed together with other images, and are rounded differently.
            self._llm.llm_engine.reset_encoder_cache()
        try:
            with quiet():
                return sample(
                    self._llm.llm_engine,
                    self._tokenizer,
                    prompts,
                    sampling,
                    self._eos,
                    seed,
                    self._version,
                    self._policy.device,
                    self._policy.vision,
                    self._options.deadline,
                    self._progress,
                    finished,
                    first,
                    self._provider.log,
                )
        except VllmFailed as failure:
            # A new engine joins the process group at its start, which all ranks must do at the same moment.
            if self._restarted or failure.hangs or not dist.is_alone():
                raise EngineError(f"vLLM failed while sampling: {failure}") from failure
            self._restarted = True
            self._note(f"vLLM failed while sampling ({failure}); it is started once more")
        self._restart()
        return self.generate(prompts, sampling, seed, finished, first)

    def _restart(self) -> None:
        """Start a new engine with the last loaded adapter."""
        version, adapter = self._version, self._held
        self.close()
        self._asleep = False
        self._start()
        self._held = adapter
        self._fill()
        assert version is not None
        self._check(adapter, version)
        self._version = version
