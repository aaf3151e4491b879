"""Which device the copies of kept tensors run on. What they hold is compared on a GPU, in test_fused_gpu.py."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from rlft.models.fused.offload import Offload, Stored


class Quiet:
    """In place of CUDA's streams and events, which need a GPU."""

    def __init__(self, device: Any = None) -> None:
        self.device = device

    def wait_event(self, event: Any) -> None:
        """Nothing runs, nothing is waited for."""

    def wait_stream(self, stream: Any) -> None:
        """Nothing runs, nothing is waited for."""

    def record(self, stream: Any) -> None:
        """Nothing runs, nothing is recorded."""


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """CUDA's streams and events without CUDA; the streams that were entered."""
    entered: list[Any] = []

    def enter(stream: Any) -> Any:
        entered.append(stream)
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.cuda, "Stream", Quiet)
    monkeypatch.setattr(torch.cuda, "Event", Quiet)
    monkeypatch.setattr(torch.cuda, "stream", enter)
    monkeypatch.setattr(torch.cuda, "current_stream", Quiet)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return entered


def test_each_device_has_streams(no_gpu: list[Any]) -> None:
    offload = Offload()
    first, second = (torch.device("cuda", i) for i in (0, 1))
    streams = [offload._stream(name, device) for name in ("in", "out") for device in (first, second)]
    assert [stream.device for stream in streams] == [first, second] * 2 and len(set(streams)) == 4
    assert offload._stream("in", second) is streams[1]


def test_tensors_go_back_to_the_device_that_they_came_from(no_gpu: list[Any]) -> None:
    """Whichever is current: "meta" stands for a second GPU."""
    home = torch.device("meta")
    record = Stored([torch.zeros(3, 2)], None, Quiet())  # type: ignore[arg-type]
    Offload().ahead({0: record}, 0, home)
    assert record.device is not None and [t.device for t in record.device] == [home]
    assert [stream.device for stream in no_gpu] == [home]


def test_on_a_cpu_nothing_is_moved() -> None:
    offload, x = Offload(), torch.zeros(2)
    records = {0: offload.put(0, x, None)}
    offload.ahead(records, 0, x.device)
    assert offload.get(records, 0) == (x, None) and offload.bytes == 0
