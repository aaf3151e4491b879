"""Send a step's requests to vLLM: sampling parameters, the loop that runs them, and the resulting rollouts."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence, Set
from contextlib import nullcontext
from typing import Any

import torch

from rlft.config.data import Sampling
from rlft.errors import EngineError
from rlft.models.vision import Vision
from rlft.rollout.engine import Finished, Groups, rollout_seed
from rlft.rollout.vllm.routes import RouteLog, fill
from rlft.routes import Routes
from rlft.types import FinishReason, Prompt, Rollout


class VllmFailed(Exception):
    """vLLM failed. hangs: it also occupies a thread that cannot be stopped."""

    def __init__(self, text: str, hangs: bool = False) -> None:
        super().__init__(text)
        self.hangs = hangs


def parameters(sampling: Sampling, ends: set[int], seed: int) -> Any:
    """Return vLLM's SamplingParams of one completion. ends: token ids that end it, besides those of `sampling`.

    Every field that affects the distribution is set, so that no default of the model or of vLLM applies. vLLM
    detokenizes token by token, which is enabled only where it must look for a stop string.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        n=1,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=0.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        repetition_penalty=1.0,
        logit_bias=None,
        bad_words=None,
        max_tokens=sampling.max_tokens,
        min_tokens=0,
        ignore_eos=False,
        stop=list(sampling.stop),
        stop_token_ids=sorted(ends | set(sampling.stop_token_ids)),
        seed=seed,
        logprobs=0,
        flat_logprobs=True,
        detokenize=bool(sampling.stop),
        skip_special_tokens=True,
        include_stop_str_in_output=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def check_lengths(prompts: Sequence[Prompt], max_tokens: int, longest: int) -> None:
    """Raise EngineError for an empty prompt, and for one too long for an engine of sequences of `longest` tokens."""
    for prompt in prompts:
        if not prompt.ids:
            raise EngineError(f"row {prompt.index} has an empty prompt: there is nothing to continue")
        if len(prompt.ids) + max_tokens > longest:
            raise EngineError(
                f"row {prompt.index} has {len(prompt.ids)} tokens and max_tokens is {max_tokens}, and the engine was "
                f"started for {longest} together: set engine.max_model_len, or drop long prompts with "
                f"data.max_prompt_tokens"
            )


def sample(
    engine: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    ends: set[int],
    seed: tuple[int, ...],
    version: int,
    device: torch.device,
    vision: Vision | None,
    deadline: float,
    progress: Callable[[int, int], None] | None,
    finished: Finished | None = None,
    first: int = 0,
    log: RouteLog | None = None,
) -> list[Rollout]:
    """Sample `sampling.group_size` rollouts per prompt, in order.

    engine: vLLM's LLMEngine. version: of the policy. vision: computes the features of images. deadline: seconds without
    a finished step. finished, first: as in `Engine.generate`. log: of experts, for rollouts with routes. Raises
    VllmFailed, and EngineError for images without `vision` and for experts that were not reported.
    """
    if log is not None:
        log.clear()
    samples = []
    for slot, prompt in enumerate(prompts):
        for i in range(sampling.group_size):
            samples.append((slot, prompt, i, rollout_seed(seed, first + slot, i)))
    given = inputs(prompts, vision)
    requests = [(given[slot], parameters(sampling, ends, seed_of_sample)) for slot, _, _, seed_of_sample in samples]
    places = frozenset[int]() if vision is None else vision.reader.places
    groups = Groups(len(prompts), sampling.group_size, finished)

    def ended(number: int, output: Any) -> None:
        slot, prompt, i, seed_of_sample = samples[number]
        completion, routes = output.outputs[0], None if log is None else Routes()
        text = (
            completion.text if sampling.stop else tokenizer.decode(list(completion.token_ids), skip_special_tokens=True)
        )
        groups.put(slot, _rollout(completion, text, prompt, i, seed_of_sample, version, places, routes))

    # On a CPU vLLM compiles the computation of token ranks, which takes 18 s at the first call and needs a C++
    # compiler.
    with torch.compiler.set_stance("force_eager") if device.type == "cpu" else nullcontext():
        _run(engine, requests, device, deadline, progress, ended)
    rollouts = groups.rollouts()
    if log is not None:
        fill(log, rollouts, sampling.group_size)
    return rollouts


def inputs(prompts: Sequence[Prompt], vision: Vision | None) -> list[Any]:
    """Return vLLM's input of each prompt; the features of all images are computed together. Raises EngineError."""
    from vllm.inputs import tokens_input

    seen = [prompt for prompt in prompts if prompt.images]
    if not seen:
        return [tokens_input(list(prompt.ids)) for prompt in prompts]
    if vision is None:
        raise EngineError(f"row {seen[0].index} has images, and the policy was made without what reads them")
    if not vision.seeing.vllm:
        raise EngineError(
            f'row {seen[0].index} has images, which vLLM does not get of this model; set engine.name = "eager"'
        )
    from rlft.rollout.vllm import images

    features = iter(vision.features([image for prompt in prompts for image in prompt.images]))
    return [
        images.request(prompt, [next(features) for _ in prompt.images], vision.reader)
        if prompt.images
        else tokens_input(list(prompt.ids))
        for prompt in prompts
    ]


def _run(
    engine: Any,
    requests: Sequence[tuple[Any, Any]],
    device: torch.device,
    deadline: float,
    progress: Callable[[int, int], None] | None,
    ended: Callable[[int, Any], None],
) -> None:
    """Run the requests, and call `ended` with the number and vLLM's output of each that ends, in this thread.

    Raises VllmFailed on an error or after the deadline.
    """
    outputs: deque[tuple[int, Any]] = deque()
    count = 0
    last_step, errors, stop = [time.monotonic()], [], threading.Event()

    def work() -> None:
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            for i, (prompt, params) in enumerate(requests):
                engine.add_request(str(i), prompt, params)
            while engine.has_unfinished_requests() and not stop.is_set():
                for output in engine.step():
                    if output.finished:
                        outputs.append((int(output.request_id), output))
                last_step[0] = time.monotonic()
        except Exception as error:  # raised below, in the caller's thread
            errors.append(error)

    # In a separate thread, since a step that never returns cannot be interrupted.
    thread = threading.Thread(target=work, name="rlft-vllm", daemon=True)
    thread.start()
    try:
        running = True
        while running:
            thread.join(0.05)
            running = thread.is_alive()  # asked before the outputs are taken, so that none is left
            while outputs:
                ended(*outputs.popleft())
                count += 1
            if progress is not None:
                progress(count, len(requests))
            if thread.is_alive() and time.monotonic() - last_step[0] > deadline:
                raise VllmFailed(f"no step ended for {deadline:g} s (engine.deadline)", hangs=True)
    except BaseException:
        # vLLM keeps requests until they are aborted. A thread that hangs still uses the engine, so it is left alone.
        stop.set()
        thread.join(1.0)
        if not thread.is_alive():
            engine.abort_request([str(i) for i in range(len(requests))])
        raise
    if errors:
        raise VllmFailed(f"{type(errors[0]).__name__}: {errors[0]}") from errors[0]
    if count < len(requests):
        raise VllmFailed(f"{len(requests) - count} of {len(requests)} requests came back without an end")


def _rollout(
    output: Any,
    text: str,
    prompt: Prompt,
    sample: int,
    seed: int,
    version: int,
    places: Set[int],
    routes: Routes | None = None,
) -> Rollout:
    """Return a completion as a rollout.

    places: tokens that stand for images, and are not trained. routes: filled once all completions have ended.
    """
    ids, logprobs = tuple(output.token_ids), tuple(float(value) for value in output.logprobs.logprobs)
    if output.finish_reason not in ("stop", "length") or len(ids) != len(logprobs):
        raise VllmFailed(
            f"row {prompt.index}: finish reason {output.finish_reason!r}, {len(ids)} tokens and {len(logprobs)} "
            f"log-probs"
        )
    return Rollout(
        prompt=prompt,
        completion_ids=ids,
        completion_mask=tuple(
            math.isfinite(value) and token not in places for token, value in zip(ids, logprobs, strict=True)
        ),
        sampler_logprobs=logprobs,
        text=text,
        finish_reason=FinishReason(output.finish_reason),
        sample_index=sample,
        policy_version=version,
        seed=seed,
        routes=routes,
    )
