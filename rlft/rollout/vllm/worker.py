"""vLLM's worker with what rlft asks of it: which model runner is active, and which tokens the rows of a pass are.

vLLM imports this module by its name (`worker_cls`) when an engine starts. The parts of a pass are read from the
scheduler's output, and their order from the model runner, which V1 has in `input_batch` and V2 in
`execute_model_state`.
"""

from __future__ import annotations

from typing import Any

from vllm.platforms import current_platform

from rlft.rollout.vllm.routes import RouteLog, Span

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker


class Worker(PlatformWorker):  # type: ignore[misc]  # one of two classes
    """vLLM's worker. Methods that begin with `rlft_` are called through `LLM.collective_rpc`."""

    rlft_log: RouteLog | None = None

    def execute_model(self, scheduler_output: Any) -> Any:
        """Launch a pass and, where there is a log, add the experts of its rows."""
        output = super().execute_model(scheduler_output)
        if self.rlft_log is not None and scheduler_output.total_num_scheduled_tokens:
            self.rlft_log.add(spans_of(self.model_runner, scheduler_output))
        return output

    def rlft_record(self, log: RouteLog | None) -> None:
        """Add the experts of all passes to a log from now on."""
        self.rlft_log = log

    def rlft_long_rope(self) -> list[bool]:
        """Return the distinct values of use_long_rope over the rotary modules; empty where none has it."""
        values = {getattr(module, "use_long_rope", None) for module in self.get_model().modules()}
        return sorted(bool(long) for long in values - {None})

    def rlft_runner(self) -> str:
        """Return the active model runner, "V1" or "V2"."""
        return "V2" if getattr(self, "use_v2_model_runner", False) else "V1"


def spans_of(runner: Any, scheduled: Any) -> list[Span]:
    """Return the tokens of a pass in the order of its rows. scheduled: vLLM's SchedulerOutput."""
    cached = scheduled.scheduled_cached_reqs
    starts = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    starts |= {new.req_id: new.num_computed_tokens for new in scheduled.scheduled_new_reqs}
    batch = runner.input_batch if hasattr(runner, "input_batch") else runner.execute_model_state.input_batch
    # vLLM appends random digits to the id that a request was added with.
    return [
        Span(int(name.partition("-")[0]), starts[name], scheduled.num_scheduled_tokens[name]) for name in batch.req_ids
    ]
