"""vLLM in the trainer's process, on the trainer's own base.

Modes: "shared", linear layers are computed from the trainer's weights where they lie; "dequantized", vLLM has plain
weights in memory of its own, given back while it sleeps and written again from the trainer's at each wake; "merged",
the same with the adapter added to them and no LoRA kernels. Embeddings, head and norms are the trainer's tensors in all
three. The adapter is handed over in memory and read back.

Everything that reaches into vLLM is in `rlft.rollout.vllm.hooks`, requests are in `vllm_requests`; here are adapter,
memory and the first guard.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlft.config.data import Sampling
from rlft.config.run import Engine as Options
from rlft.errors import EngineError
from rlft.models.allocator import segments
from rlft.models.fused import memory
from rlft.models.policy import Policy
from rlft.rollout.engine import check_names, check_read_back, eos_ids
from rlft.rollout.vllm import start as vllm_start
from rlft.rollout.vllm.memory import EngineMemory, EngineMode, choose_mode
from rlft.rollout.vllm.requests import Failed, sample
from rlft.rollout.vllm.shared_weights import frozen, module_of
from rlft.rollout.vllm.start import arguments, defaults_restored, environment, model_folder, quiet
from rlft.types import Prompt, Rollout

NUMBERS = itertools.count(1)
"""Of the engines of this process."""


class VllmEngine:
    """Samples with vLLM; the protocol of `rlft.rollout.engine`."""

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
    ) -> None:
        """longest: tokens of the longest prompt with its completion. sequences: completions that are sampled together,
        for the size of the cache. progress: called with (sequences done, all). note: told how the engine runs.

        Takes from 10 seconds to minutes, since vLLM compiles and captures graphs. Raises EngineError.
        """
        self._policy, self._tokenizer, self._options = policy, tokenizer, options
        self._longest, self._sequences = longest, sequences
        self._progress, self._note = progress, note
        self._scales = dict(policy.scales)
        self._shapes = {name: tuple(t.shape) for name, t in policy.adapter().items()}
        self._ranks = {module_of(name): shape[0] for name, shape in self._shapes.items() if ".lora_A." in name}
        self._eos = eos_ids(tokenizer, policy.base)
        self._dtype: torch.dtype = policy.base.get_input_embeddings().weight.dtype  # type: ignore[operator,union-attr]
        self._held: dict[str, tuple[Tensor, Tensor]] = {}
        """Module -> A and scaled B of the adapter that was loaded last, in the engine's dtype."""
        self._version, self._restarted = None, False
        self._asleep = False
        self._freed = 0
        """Bytes that the last sleep gave back, which the wake takes again."""
        self._start()

    # ---- start and end -----------------------------------------------------------------------------------------------

    def _start(self) -> None:
        options, device = self._options, self._policy.device
        weights = frozen(self._policy.base)
        self._sizes = EngineMemory.of(
            self._policy, weights, self._dtype, self._longest, self._sequences, options.max_seqs
        )
        self.choice: EngineMode = choose_mode(self._sizes, options.mode, options.kv_gib, device)
        environment()
        begin = time.perf_counter()
        with quiet(), defaults_restored(), segments(growing=False):
            from vllm import LLM

            from rlft.rollout.vllm import hooks

            self._provider = hooks.WeightProvider(weights, self._ranks, self.choice.mode == "merged")
            number = next(NUMBERS)
            hooks.WeightProvider.waiting[number] = self._provider
            try:
                self._llm: Any = LLM(
                    model_folder(self._policy.base, self._tokenizer),
                    **arguments(options, self.choice, self._sizes, self._ranks, self._dtype, device, number),
                )
            except Exception as error:
                if device.type == "cuda":
                    hooks.release_pools(asleep=False)
                if isinstance(error, EngineError):
                    raise
                first = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise EngineError(
                    f"vLLM {vllm_start.version()} did not start ({type(error).__name__}: {first}); run with "
                    f'VLLM_LOGGING_LEVEL=DEBUG to see why, or set engine.name = "eager"'
                ) from error
            finally:
                del hooks.WeightProvider.waiting[number]
        # Architectures that vLLM runs on transformers' own classes get a wrapper for its compiler around those, and it
        # looks for this on every instance, the trainer's too.
        self._policy.base.get_decoder().do_not_compile = True  # type: ignore[operator,union-attr]
        (self.runner,) = self._llm.collective_rpc("rlft_runner")
        self._check_rope()
        self._refill()
        tested = hooks.TESTED_ON_GPU if device.type == "cuda" else hooks.TESTED_ON_CPU
        known = (vllm_start.minor(), self.runner) in tested
        self._note(
            f"vLLM {vllm_start.version()} ({self.runner} model runner{'' if known else ', untested with rlft'}) up in "
            f"{time.perf_counter() - begin:.0f} s: {self.choice}"
        )

    def _check_rope(self) -> None:
        """Raise EngineError where vLLM has other longrope factors than the trainer."""
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
        """Stop vLLM and give its memory back."""
        llm, self._version, self._held = self.__dict__.pop("_llm", None), None, {}
        if llm is None:
            return
        from rlft.rollout.vllm import hooks

        gpu = self._policy.device.type == "cuda"
        self._provider.forget()
        try:
            if gpu and self._asleep and hooks.frees_itself():
                # Such a version unmaps all of its memory in the shutdown, once.
                torch.cuda.empty_cache()
                llm.wake_up()
                self._asleep = False
            with quiet():
                llm.llm_engine.engine_core.shutdown()
        except Exception as error:  # an error that led here must not be hidden by this one
            self._note(f"vLLM did not shut down cleanly ({type(error).__name__}: {error})")
        del llm
        gc.collect()
        if gpu:
            hooks.release_pools(self._asleep)
            memory.unmapped = hooks.unmapped()
            torch.cuda.empty_cache()

    @property
    def memory(self) -> dict[str, int]:
        """The cache, weights of its own, and the adapter's slots with the copy that fills them."""
        slot = 0 if self.choice.mode == "merged" else self._sizes.slots
        weight_copy = self._provider.weight_copy
        return {
            "cache of the engine": self.choice.kv_bytes,
            "weights of the engine": weight_copy.bytes if weight_copy else 0,
            "adapter of the engine": slot,
        }

    # ---- adapter -----------------------------------------------------------------------------------------------------

    def load_adapter(self, named_tensors: Mapping[str, Tensor], version: int) -> None:
        """As the protocol: copy, then read back and compare."""
        check_names(named_tensors, {n: torch.empty(s, device="meta") for n, s in self._shapes.items()})
        if self._asleep:
            raise EngineError("load_adapter while the engine sleeps: its slots have no memory; wake it first")
        self._version = None
        self._write(named_tensors)
        self._check(self._scaled(named_tensors, self._policy.scales), version)
        self._version = version

    def _scaled(
        self, named_tensors: Mapping[str, Tensor], scales: Mapping[str, float]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Module -> A and scale * B, in the engine's dtype: the scale is applied here, once, and nowhere else."""
        names = [name for name in named_tensors if ".lora_B." in name]
        a = [named_tensors[name.replace(".lora_B.", ".lora_A.")] for name in names]
        b = [named_tensors[name] for name in names]
        made = [torch.empty_like(t, dtype=self._dtype) for t in a + b]
        scaled = torch._foreach_mul(b, [scales[name] for name in names])  # type: ignore[attr-defined]
        torch._foreach_copy_(made, [*a, *scaled])  # type: ignore[attr-defined]
        pairs = zip(made[: len(a)], made[len(a) :], strict=True)
        return {module_of(name): pair for name, pair in zip(names, pairs, strict=True)}

    def _write(self, named_tensors: Mapping[str, Tensor]) -> None:
        self._held = self._scaled(named_tensors, self._scales)
        self._fill()

    def _refill(self) -> None:
        """The trainer's weights into the engine's own memory."""
        assert self._provider.weight_copy is not None
        self._provider.weight_copy.run()

    def _fill(self) -> None:
        """The held adapter into the engine: its slots, or, merged, the weights themselves."""
        if self.choice.mode == "merged":
            self._refill()
            assert self._provider.weight_copy is not None
            self._provider.weight_copy.merge({f"{module}.weight": pair for module, pair in self._held.items()})
        else:
            self._provider.put(self._held)

    def _check(self, want: Mapping[str, tuple[Tensor, Tensor]], version: int) -> None:
        """The first guard: what the engine's kernels will read is `want`, which was scaled as the trainer does."""
        if self.choice.mode == "merged":
            assert self._provider.weight_copy is not None
            pairs = {f"{module}.weight": pair for module, pair in want.items()}
            if (wrong := self._provider.weight_copy.differs(pairs)) is not None:
                raise EngineError(
                    f"after loading policy version {version} the engine does not hold the trainer's adapter: {wrong} "
                    f"is not the base with the adapter added. It would sample from another policy than the one that is "
                    f"trained."
                )
            return
        given, held, rest = {}, {}, []
        for module, slot_a, slot_b in self._provider.slots():
            rank = 0
            if module in want:
                a, b = want[module]
                rank = len(a)
                given |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
                held |= {f"{module}.lora_A.weight": slot_a[:rank], f"{module}.lora_B.weight": slot_b[:, :rank]}
            rest += [beside for beside in (slot_a[rank:], slot_b[:, rank:]) if beside.numel()]
        check_read_back(given, held, self._policy.scales, self._scales, version)
        if rest and bool(torch.stack([beside.any() for beside in rest]).any()):
            raise EngineError(
                f"after loading policy version {version} the engine holds something beside the adapter: this is a "
                f'fault of rlft or of vLLM {vllm_start.version()}; set engine.name = "eager", and report it'
            )

    # ---- sleep and wake ----------------------------------------------------------------------------------------------

    def sleep(self) -> None:
        """Give back the cache, the engine's own weights and the slots (on a GPU; on a CPU vLLM keeps them)."""
        if self._asleep:
            return
        self._asleep = True
        if self._policy.device.type == "cuda":
            from rlft.rollout.vllm import hooks

            before = torch.cuda.mem_get_info(self._policy.device)[0]
            # 2: nothing is kept, since all of it is written again. Shared weights lie outside of vLLM's memory.
            try:
                self._llm.sleep(level=2)
            except AssertionError as error:
                # vLLM compares what is free on the whole card before and after.
                if "increased" not in str(error):
                    raise
                raise EngineError(
                    f"vLLM did not go to sleep ({error}): another process took memory of this card at that moment; "
                    f"give the run a card of its own and go on with --resume"
                ) from error
            self._freed = torch.cuda.mem_get_info(self._policy.device)[0] - before
            memory.unmapped = hooks.unmapped()

    def wake(self) -> None:
        """Take it again, write weights and adapter, and read the adapter back."""
        if not self._asleep:
            return
        if self._policy.device.type == "cuda":
            self._make_room()
            self._llm.wake_up()
        self._asleep = False
        if self.choice.mode != "merged" or self._version is None:
            self._refill()
        if self._version is not None:
            if self._policy.device.type == "cuda":
                self._fill()
            try:
                self._check(self._held, self._version)
            except EngineError as error:
                version, self._version = self._version, None
                raise EngineError(
                    f"the engine's adapter changed while it slept (policy version {version}): {error}"
                ) from error

    def _make_room(self) -> None:
        """Give blocks that PyTorch caches back to the driver, then the trainer's graphs and buffers where it takes
        that. Raises EngineError when there is still too little."""
        device, fused = self._policy.device, self._policy.fused
        torch.cuda.empty_cache()
        # vLLM takes what it gave back; a little is for its own blocks.
        want = self._freed + 64 * 2**20
        if torch.cuda.mem_get_info(device)[0] < want and fused is not None:
            if fused.graphs is not None:
                fused.graphs.clear()
            fused.store.release()
            gc.collect()
            torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(device)[0]
        if free < self._freed:
            raise EngineError(
                f"the engine wants {self._freed / 2**30:.2f} GiB back to wake and {free / 2**30:.2f} GiB are free: "
                f"something took memory while it slept; lower engine.kv_gib ({self.choice.kv_bytes / 2**30:.2f})"
            )

    # ---- sampling ----------------------------------------------------------------------------------------------------

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, seed: tuple[int, ...]) -> list[Rollout]:
        """As the protocol. Starts the engine anew once if vLLM fails; raises EngineError the second time."""
        if self._version is None:
            raise EngineError("generate before load_adapter: the engine has no adapter")
        self.wake()
        for prompt in prompts:
            if not prompt.ids:
                raise EngineError(f"row {prompt.index} has an empty prompt: there is nothing to continue")
            if len(prompt.ids) + sampling.max_tokens > self._longest:
                raise EngineError(
                    f"row {prompt.index} has {len(prompt.ids)} tokens and max_tokens is {sampling.max_tokens}, and the "
                    f"engine was started for {self._longest} together: set engine.max_model_len, or drop long prompts "
                    f"with data.max_prompt_tokens"
                )
        # What vLLM's cache holds of earlier generations was computed with another adapter, or is gone in sleep; and a
        # prompt that is found there is rounded otherwise than one that is computed, so that with an empty one the same
        # seed gives the same rollouts. The completions of a prompt share it all the same.
        if not self._llm.reset_prefix_cache():
            raise EngineError("vLLM does not empty its cache: requests of an earlier generation have not ended")
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
                    self._options.deadline,
                    self._progress,
                )
        except Failed as failure:
            if self._restarted or failure.hangs:
                raise EngineError(f"vLLM failed while sampling: {failure}") from failure
            self._restarted = True
            self._note(f"vLLM failed while sampling ({failure}); it is started once more")
        self._restart()
        return self.generate(prompts, sampling, seed)

    def _restart(self) -> None:
        """A new engine with the adapter that was loaded last."""
        version, held = self._version, self._held
        self.close()
        self._asleep = False
        self._start()
        self._held = held
        self._fill()
        assert version is not None
        self._check(held, version)
        self._version = version
