"""A Triton driver of an H100 that is not there: kernels are compiled, and launched nowhere."""

from __future__ import annotations

from typing import Any

from triton.backends.compiler import GPUTarget


class Nowhere:
    """`ran` is what was launched."""

    def __init__(self) -> None:
        self.ran: list[tuple[Any, ...]] = []
        self.utils = self

        class Launcher:
            def __init__(launcher, source: Any, metadata: Any) -> None:
                launcher.hash = metadata.hash

            def __call__(launcher, *arguments: Any) -> None:
                # Grid, stream, function, two of metadata and two hooks come first.
                self.ran.append((launcher.hash, *arguments[:3], *arguments[9:]))

        self.launcher_cls = Launcher

    def load_binary(self, *_: Any) -> tuple[Any, ...]:
        return object(), 1, 32, 0, 1024

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": 232_448}

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)
