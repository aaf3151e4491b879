"""vLLM's own models as vLLM builds them for rlft's engine, without the engine: a second for all that it imports, and
a tenth for each model.

Of vLLM's CPU build, which stands in for the one of a GPU, two things are missing at import and at construction alone.
"""

from __future__ import annotations

import importlib
import itertools
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny import tiny_tokenizer
from torch import nn

from rlft.config.run import Engine
from rlft.models import experts
from rlft.models.kind import sees
from rlft.models.policy import Policy
from rlft.rollout.vllm import start as vllm_start
from rlft.rollout.vllm.engine import EngineMemory
from rlft.rollout.vllm.memory import EngineMode
from rlft.rollout.vllm.shared_weights import frozen_weights
from rlft.rollout.vllm.slots import ranks_of

NUMBERS = itertools.count(10**6)
SEEING = ("Qwen2VL", "Qwen2_5_VL", "Qwen3VL")
READS_PIXELS = ("Qwen3_5", *SEEING, "Gemma3ForConditionalGeneration", "Llava", "Mistral3")
"""Models of vLLM whose files import torchvision."""
VISION = ("torchvision", "torchvision.transforms", "torchvision.transforms.v2", "torchvision.transforms.v2.functional")


@contextmanager
def no_torchvision() -> Iterator[None]:
    """Empty modules of its name while vLLM's Qwen3.5 and vision-language models are imported.

    torchvision has no build beside PyTorch's for CPUs. What calls it reads pixels, which vLLM never gets from rlft.
    """
    missing = [name for name in VISION if name not in sys.modules]
    try:
        for name in missing:
            module: Any = ModuleType(name)
            module.__spec__, module.__path__ = ModuleSpec(name, None), []
            sys.modules[name] = module
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, module)
        yield
    finally:
        for name in missing:
            del sys.modules[name]


def register(*architectures: str) -> None:
    """Import vLLM's classes of these models. vLLM would start a process to look at each, 10 s where it never ran."""
    from vllm import ModelRegistry

    for name in architectures:
        known: Any = ModelRegistry.models.get(name)
        if hasattr(known, "load_model_cls"):
            with no_torchvision() if name.startswith(READS_PIXELS) else ExitStack():
                ModelRegistry.register_model(name, known.load_model_cls())


@contextmanager
def parallel_state() -> Iterator[None]:
    """What vLLM wants around its models: a group of one process, and of Triton an allocator."""
    from vllm import distributed
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    olmo: Any = importlib.import_module("vllm.model_executor.layers.mamba.gdn.olmo_gdn_linear_attn")
    cleanup_dist_env_and_memory()  # of an engine that ran before
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(olmo, "set_triton_allocator", lambda device: None)
        with set_current_vllm_config(VllmConfig()):
            distributed.init_distributed_environment(1, 0, f"file://{Path(folder) / 'store'}", 0, "gloo")
            distributed.initialize_model_parallel(1, 1)
        try:
            yield
        finally:
            cleanup_dist_env_and_memory()


def build(policy: Policy, mode: str) -> tuple[nn.Module, Any]:
    """vLLM's model over the policy's weights, and the WeightProvider that gave them."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    from rlft.rollout.vllm import hooks

    dtype = policy.base.get_input_embeddings().weight.dtype  # type: ignore[operator,union-attr]
    weights, options = frozen_weights(policy.base), Engine("vllm", max_seqs=4)
    ranks = ranks_of(policy.model, policy.adapter())
    sizes = EngineMemory.of(policy, weights, dtype, 64, 4, options.max_seqs)
    number = next(NUMBERS)
    provider = hooks.WeightProvider(weights, ranks, mode == "merged", experts.gates(policy.base))
    hooks.WeightProvider.waiting[number] = provider
    choice = EngineMode(mode, sizes.min_cache, "test")  # type: ignore[arg-type]
    try:
        decoder = type(policy.base.get_decoder())  # type: ignore[operator,union-attr]
        with vllm_start.quiet(), vllm_start.defaults_restored(), vllm_start.class_restored(decoder):
            register(type(policy.base).__name__)
            if sees(policy.base.config):
                from rlft.rollout.vllm import images

                images.register(type(policy.base).__name__)
            folder = vllm_start.model_folder(policy.base, tiny_tokenizer())
            values = vllm_start.arguments(options, choice, sizes, ranks, dtype, torch.device("cpu"), number)
            config = EngineArgs(folder, **{n: v for n, v in values.items() if n != "use_tqdm_on_load"})
            engine_config = config.create_engine_config()
            with set_current_vllm_config(engine_config):
                loader: Any = get_model_loader(engine_config.load_config)
                with set_default_torch_dtype(dtype):
                    model = initialize_model(engine_config)
                loader.load_weights(model, engine_config.model_config)
                return model, provider
    finally:
        del hooks.WeightProvider.waiting[number]
