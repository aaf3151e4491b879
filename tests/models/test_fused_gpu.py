"""Fused layers on a GPU: against float64 beside transformers' own, levels, CUDA graphs, offloading, the memory plan,
shared prefixes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import records
import torch
from peft import PeftModel
from random_base import base_of, config_of
from test_families import FAMILIES, SIZES, eager, fused, run
from test_graphs import grouped, groups_of
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from rlft.algos.algorithm import Algorithm, build_algorithm
from rlft.config.run import Algo, Lora
from rlft.kernels.attention import Sequences
from rlft.kernels.logprobs import CHUNK_BYTES
from rlft.models.fused import memory
from rlft.models.fused.decoder import FusedDecoder
from rlft.models.fused.fuse import fuse
from rlft.models.fused.levels import L0, L4, L5, LEVELS, Level
from rlft.models.fused.mixer_shape import Recurrent
from rlft.models.load import attach_lora
from rlft.models.policy import Policy
from rlft.types import Batch, PackPlan, Rollout

# flash-attn-4 and CUTLASS warn about themselves, at their first compilation.
quiet = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "UserWarning")]
pytestmark = [pytest.mark.gpu, *quiet]
WIDE = SIZES | {
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "initializer_range": 0.05,
    "max_position_embeddings": 4096,
}
UNIFORM = ("helium",)
"""Families whose heads are as wide as hidden_size divided by their number."""


def model_of(name: str, dtype: torch.dtype, nf4: bool = False, tmp: Any = None, **more: Any) -> PeftModel:
    """A model on the GPU; float64 has the weights of bfloat16. tmp: a folder to save to and load from, which leaves
    the rotary frequencies in fp32."""
    kind, own = FAMILIES[name]
    if "vocab_size_per_layer_input" in own:
        more = {"vocab_size_per_layer_input": more.get("vocab_size", WIDE["vocab_size"])} | more
    torch.manual_seed(0)
    wide = WIDE | ({"head_dim": WIDE["hidden_size"] // WIDE["num_attention_heads"]} if kind in UNIFORM else {})
    base: Any = base_of(config_of(kind, **(wide | own | more))).bfloat16()
    if tmp is not None:
        base.save_pretrained(tmp)
        quantised = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        base = AutoModelForCausalLM.from_pretrained(
            tmp,
            quantization_config=quantised if nf4 else None,
            dtype=torch.bfloat16,
            device_map={"": 0},
            attn_implementation="sdpa",
        )
    else:
        base = base.to(dtype).cuda()
    model = attach_lora(base.eval().requires_grad_(False), Lora(rank=8, alpha=16), seed=1)
    g = torch.Generator().manual_seed(2)
    for parameter_name, parameter in model.named_parameters():
        if "lora_" in parameter_name:
            parameter.data = parameter.data.to(torch.promote_types(dtype, torch.float32))
        if "lora_B" in parameter_name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=g) * 0.05)
    return model


def data(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    ids, mask = torch.randint(3, 1000, (3, 150), generator=g), torch.ones(3, 150, dtype=torch.int64)
    mask[1, :40] = mask[2, 90:] = 0
    upstream = torch.randn(3, 150, 256, generator=g, dtype=torch.float64)
    return ids.cuda(), mask.cuda(), upstream.to(dtype).cuda()


def error(got: tuple[Tensor, dict[str, Tensor]], truth: tuple[Tensor, dict[str, Tensor]]) -> dict[str, float]:
    """Relative error in norm of the values, and of all gradients of one kind of module together."""
    found = {"hidden": float((got[0].double() - truth[0]).norm() / truth[0].norm())}
    for kind in sorted({".".join(n.split(".")[-5:-2]) + n.split(".")[-3] for n in truth[1]}):
        names = [n for n in truth[1] if ".".join(n.split(".")[-5:-2]) + n.split(".")[-3] == kind]
        off = sum(float((got[1][n].double() - truth[1][n]).norm()) ** 2 for n in names)
        found[kind] = (off / sum(float(truth[1][n].norm()) ** 2 for n in names)) ** 0.5
    return found


@pytest.mark.parametrize("name", [n for n in FAMILIES if "rope" not in n and "yarn" not in n])
def test_bf16_is_as_near_to_fp64_as_transformers(name: str) -> None:
    ids, mask, upstream = data(torch.float64)
    # transformers' padding on the left reaches the first tokens where a convolution has a bias.
    mask = None if eager(name) or "conv_bias" in FAMILIES[name][1] else mask
    truth = run(model_of(name, torch.float64), ids, mask, upstream)
    plain = error(run(model_of(name, torch.bfloat16), ids, mask, upstream.bfloat16()), truth)
    model = model_of(name, torch.bfloat16)
    decoder = fused(model)
    ours = error(run(model, ids, mask, upstream.bfloat16()), truth)
    assert decoder.last_plan is not None
    for kind, value in ours.items():
        # 1.5 times in norm: stricter than the kernels' rule, loose enough for the noise of one draw.
        assert value <= 1.5 * plain[kind], f"{kind}: {value:.2e} against transformers' {plain[kind]:.2e}"


def test_nf4_equals_its_own_decoded_weights(tmp_path: Any) -> None:
    """NF4 decoded by us equals the plain model of the decoded weights bit for bit, forward and backward without dQ."""
    model = model_of("qwen3", torch.bfloat16, nf4=True, tmp=tmp_path)
    plain = model_of("qwen3", torch.bfloat16, tmp=tmp_path)
    for (_, module), (_, other) in zip(model.named_modules(), plain.named_modules(), strict=True):
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            from bitsandbytes.functional import dequantize_4bit

            other.weight.data.copy_(dequantize_4bit(module.weight, state))
        elif isinstance(getattr(module, "weight", None), Tensor):
            other.weight.data.copy_(module.weight)
    with torch.no_grad():
        fused(model), fused(plain)
        ids, mask, _ = data(torch.bfloat16)
        outs = [m.get_base_model().get_decoder()(ids, mask, use_cache=False).last_hidden_state for m in (model, plain)]
    assert torch.equal(*outs)


@pytest.mark.parametrize("mode", ["layer", "group", "shadow"])
@pytest.mark.parametrize("level", LEVELS)
def test_levels_agree_within_rounding(level: Level, mode: str) -> None:
    runs = []
    for at, where in ((L0, "layer"), (level, mode)):
        model = model_of("qwen3", torch.bfloat16)
        fused(model, at, where)
        runs.append(run(model, *data(torch.bfloat16)))
    assert torch.equal(runs[0][0], runs[1][0])
    for name, gradient in runs[0][1].items():
        # dQ is summed by atomics: two runs of one level differ as much.
        off = float((runs[1][1][name] - gradient).norm() / gradient.norm())
        assert off < 5e-3, (name, off)


def batch_of(lengths: list[int], g: torch.Generator) -> Batch:
    """Sequences whose first three tokens are not trained, in one micro-batch."""
    return groups_of([(3, [n - 3]) for n in lengths], g, 1000)


def gradient_of(policy: Policy, batch: Batch) -> Tensor:
    policy.flat.zero_grad()
    logprobs, _ = policy.logprobs(batch)
    (logprobs * batch.weight.cuda()).sum().backward()
    return policy.flat.gradient.clone()


@pytest.mark.parametrize("nf4", [False, True])
def test_graphs_give_what_launches_give(nf4: bool, tmp_path: Any) -> None:
    """Over buckets used again, with other lengths and a changed adapter; and never two passes at once."""
    g = torch.Generator().manual_seed(5)
    policy = Policy(model_of("qwen3", torch.bfloat16, nf4=nf4, tmp=tmp_path))
    assert isinstance(policy.fused, FusedDecoder) and policy.fused.graphs is not None
    graphs = policy.fused.graphs
    for lengths in ([50, 61], [100], [9, 30, 20], [70, 41], [300, 200]):
        batch = batch_of(lengths, g)
        gradient_of(policy, batch)  # the first pass of a bucket is launched
        made = gradient_of(policy, batch)
        assert graphs._graphs
        policy.fused.graphs = None
        want = gradient_of(policy, batch)
        policy.fused.graphs = graphs
        assert float((made - want).norm() / want.norm()) < 5e-3
        policy.adapter_params.data.add_(torch.randn_like(policy.adapter_params) * 1e-3)
    assert len(graphs._graphs) == 2, "buckets are used again"
    assert graphs.bytes > 0
    first, second = batch_of([60, 50], g), batch_of([30, 80], g)
    want = gradient_of(policy, first) + gradient_of(policy, second)
    policy.flat.zero_grad()
    losses = [(policy.logprobs(b)[0] * b.weight.cuda()).sum() for b in (first, second)]
    for loss in losses:
        loss.backward()
    assert float((policy.flat.gradient - want).norm() / want.norm()) < 5e-3
    loss = (policy.logprobs(first)[0] * first.weight.cuda()).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward ran before"):
        loss.backward()


@pytest.mark.parametrize("level", [L4, L5])
def test_two_passes_under_way_do_not_mix_their_host_memory(level: Level) -> None:
    g = torch.Generator().manual_seed(6)
    policy = Policy(model_of("qwen3", torch.bfloat16))
    assert policy.fused is not None
    policy.fused.graphs, policy.fused.plan = None, memory.MemoryPlan((level,) * 2, 64, "layer", 2**20, 0, 0, 0)
    batches = [batch_of([60, 50], g), batch_of([30, 80], g), batch_of([200], g)]
    want = sum(gradient_of(policy, b) for b in batches)
    policy.flat.zero_grad()
    losses = [(policy.logprobs(b)[0] * b.weight.cuda()).sum() for b in batches]
    for loss in losses:
        loss.backward()
    assert float((policy.flat.gradient - want).norm() / want.norm()) < 5e-3
    del losses, loss
    again = policy.fused.offload.bytes
    gradient_of(policy, batches[0])
    assert policy.fused.offload.bytes == again, "arenas are used again"


BIG_LINEAR = {
    "linear_num_key_heads": 8,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}
PLANNED = (
    "qwen3",
    "gemma3",
    "arcee",
    "apertus",
    "granite_swa",
    "hunyuan",
    "nanochat",
    "gemma4",
    "qwen3_5",
    "lfm2",
    "olmo_hybrid",
)


@pytest.mark.parametrize("name", PLANNED)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bonus", [False, True], ids=["", "entropy bonus"])
def test_the_plan_is_within_5_percent_of_the_measured_peak(name: str, level: Level, bonus: bool) -> None:
    big = {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128 if name == "gemma3" else 64,
        "num_hidden_layers": 6,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
    }
    if name in ("gemma3", "granite_swa"):
        big |= {"layer_types": ["sliding_attention", "full_attention"] * 3}
    if name == "gemma4":
        big |= {"layer_types": ["sliding_attention", "full_attention"] * 3, "num_kv_shared_layers": 2}
        big |= {"hidden_size_per_layer_input": 64, "global_head_dim": 128}
    if name in ("qwen3_5", "olmo_hybrid"):
        big |= {"layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2, **BIG_LINEAR}
    if name == "lfm2":
        big |= {"layer_types": ["conv", "conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False}
    if name == "granite_swa":
        big |= {"layer_rope_theta": [500, 1e4] * 3}
    policy = Policy(model_of(name, torch.bfloat16, **big))
    decoder = policy.fused
    assert decoder is not None
    decoder.graphs = None
    batch = batch_of([9000, 7000], torch.Generator().manual_seed(1))
    rows = int(batch.cu_seqlens[-1])
    how = memory.PassOptions(4096, "layer", CHUNK_BYTES)
    decoder.expect(entropy_grad=bonus)
    recurrent = Recurrent.of(Sequences.of(batch.cu_seqlens, batch.prefix, "cpu")) if decoder.mixers else None
    decoder.plan = memory.evaluate(decoder.shape, rows, rows - 6, (6, level, level), how, 0, recurrent)
    gradient_of(policy, batch)
    decoder.store.release()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    policy.flat.zero_grad()
    logprobs, entropy = policy.logprobs(batch, bonus)
    loss = (logprobs * batch.weight.cuda()).sum()
    (loss + entropy.sum() if bonus else loss).backward()
    torch.cuda.synchronize()
    measured = torch.cuda.max_memory_allocated() - before
    assert abs(measured - decoder.plan.peak) <= 0.05 * measured, (
        f"{measured / 2**20:.0f} MiB, planned {decoder.plan.peak / 2**20:.0f}"
    )


@pytest.mark.parametrize("shared", [False, True])
def test_the_chosen_plan_stays_within_its_budget(shared: bool) -> None:
    """Of graphs, which are planned as they are padded, and of launches, where a pass is too large for a graph."""
    big = {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_hidden_layers": 6,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
    }
    policy = Policy(model_of("qwen3", torch.bfloat16, **big))
    assert isinstance(policy.fused, FusedDecoder) and fuse(policy.model) is policy.fused
    g = torch.Generator().manual_seed(1)
    batch = groups_of([(500, [900] * 4)] * 4, g, 1000) if shared else batch_of([9000, 7000], g)
    for budget in (16.0, 4.0, 2.0, 1.2, *(() if shared else (0.8,))):
        policy.fused.budget = budget * 2**30
        for _ in range(2):  # the second pass of a size is captured
            gradient_of(policy, batch)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        graphs = policy.fused.graphs.bytes if policy.fused.graphs is not None else 0
        before = torch.cuda.memory_allocated() - policy.fused.store.bytes
        gradient_of(policy, batch)
        measured = (torch.cuda.max_memory_allocated() - before + graphs) / 2**30
        assert measured <= budget, (budget, measured, graphs / 2**30, str(policy.fused.last_plan))
        assert (graphs > 0) == (budget == 16.0)
        if policy.fused.graphs is not None:
            policy.fused.graphs.clear()


def logprobs_and_gradient(
    policy: Policy, algorithm: Algorithm, rollouts: list[Rollout], budget: int, share: bool
) -> tuple[Tensor, Tensor]:
    """Log-probs of all completions and the adapter's gradient, in float64 on the CPU."""
    plan = PackPlan(algorithm.aggregation, budget, 512, 1.0, algorithm.loss.whole_groups, share)
    advantages = torch.tensor([1.0, -1.0] * (len(rollouts) // 2))
    found: list[Tensor] = [torch.empty(0)] * len(rollouts)
    policy.flat.zero_grad()
    for part in records.packed(rollouts, plan, advantages):
        assert bool((part.prefix >= 0).any()) == share
        logprobs, _ = policy.logprobs(part)
        reference = part.train_mask * -7.0
        there = replace(part, ref_logprobs=reference).to(policy.device)
        algorithm.loss(logprobs, there)[0].backward()
        own = part.group_ids[part.seq_ids] >= 0
        values = logprobs.detach().double().cpu()
        sequences = part.seq_ids[own].unique().tolist()
        for row, sequence in zip(records.rows(part, rollouts), sequences, strict=True):
            found[row] = values[(part.seq_ids == sequence) & part.train_mask]
    return torch.cat(found), policy.flat.gradient.double().cpu()


@pytest.mark.parametrize("algo", ["grpo", "dpo"])
@pytest.mark.parametrize("name", ["qwen3", "gemma3", "gemma4", "granite_swa", "qwen3_5", "lfm2", "olmo_hybrid"])
def test_shared_prefixes_are_as_near_to_fp64_as_rows_alone(name: str, algo: str) -> None:
    """Whole groups, in packed micro-batches: prompts longer and shorter than what continues them."""
    g, algorithm = torch.Generator().manual_seed(8), build_algorithm(Algo(algo), 1)
    group = 2 if algo == "dpo" else 4
    groups = [(200, [9, 70, 33, 150]), (30, [120, 64, 1, 90]), (129, [128, 128, 5, 17])]
    sampler = None if algo == "dpo" else -6.5
    rollouts = grouped([(prompt, lengths[:group]) for prompt, lengths in groups], g, 1000, sampler)
    truth_policy = Policy(model_of(name, torch.float64).cpu(), torch.float64)
    truth = logprobs_and_gradient(truth_policy, algorithm, rollouts, 1, False)
    policy = Policy(model_of(name, torch.bfloat16))
    assert isinstance(policy.fused, FusedDecoder)
    graphs, policy.fused.graphs = policy.fused.graphs, None

    def errors(budget: int, share: bool) -> list[float]:
        got = logprobs_and_gradient(policy, algorithm, rollouts, budget, share)
        return [float((a - b).norm() / b.norm()) for a, b in zip(got, truth, strict=True)]

    alone = errors(1, False)
    # The second pass over the same micro-batches is by graphs.
    for policy.fused.graphs, budget in ((None, 512), (None, 4096), *((graphs, 512), (graphs, 4096)) * 2):
        shared_errors = errors(budget, True)
        how = "launches" if policy.fused.graphs is None else f"{len(policy.fused.graphs._graphs)} graphs"
        print(name, algo, budget, how, "shared", shared_errors, "alone", alone)
        for ours, plain in zip(shared_errors, alone, strict=True):
            assert ours <= 1.5 * plain
    if policy.fused.graphless is None:
        assert graphs is not None and graphs._graphs
    else:
        assert graphs is None and policy.path == f"fused layers, without CUDA graphs: {policy.fused.graphless}"


@pytest.mark.parametrize("graphed", [False, True])
def test_the_host_never_waits_for_the_gpu_within_a_micro_batch(graphed: bool) -> None:
    """A GPU that has been waited for has nothing to do until the host has caught up."""
    g = torch.Generator().manual_seed(10)
    policy = Policy(model_of("qwen3", torch.bfloat16))
    assert isinstance(policy.fused, FusedDecoder) and policy.fused.graphs is not None
    batch = groups_of([(40, [90, 83, 76]), (30, [80, 73, 66])], g, 1000)
    if not graphed:
        policy.fused.graphs = None
    for _ in range(3):
        gradient_of(policy, batch)  # compiled, and captured
    torch.cuda.set_sync_debug_mode("error")
    try:
        logprobs, _ = policy.logprobs(batch)
        (logprobs * batch.to("cuda").weight).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool(policy.fused.graphs and policy.fused.graphs._graphs) == graphed


@pytest.mark.parametrize("store", ["layer", "shadow"])
@pytest.mark.parametrize("nf4", [False, True])
def test_graphs_outlive_passes_without_the_adapter(nf4: bool, store: Any, tmp_path: Any) -> None:
    """A loss with a reference scores with the adapter off, between two passes of a graph that reads its buffers."""
    g = torch.Generator().manual_seed(11)
    policy = Policy(model_of("qwen3", torch.bfloat16, nf4=nf4, tmp=tmp_path))
    assert isinstance(policy.fused, FusedDecoder) and policy.fused.graphs is not None
    graphs, batch = policy.fused.graphs, batch_of([60, 50], g)
    policy.fused.plan = memory.MemoryPlan((L0, L0), 8192, store, 2**20, 0, 0, 0)
    policy.fused.graphs = None
    want = gradient_of(policy, batch)
    policy.fused.graphs = graphs
    for _ in range(3):
        gradient_of(policy, batch)
        policy.score(batch, weights="reference")
        # Written over whatever was given back.
        torch.full((2**24,), float("nan"), device="cuda", dtype=torch.bfloat16)
    made = gradient_of(policy, batch)
    assert len(graphs._graphs) == 1
    assert float((made - want).norm() / want.norm()) < 5e-3


def test_graphs_outlive_passes_with_other_adapters() -> None:
    """More of them than tables are kept for."""
    g = torch.Generator().manual_seed(13)
    model = model_of("qwen3", torch.bfloat16)
    policy = Policy(model)
    assert isinstance(policy.fused, FusedDecoder) and policy.fused.graphs is not None
    graphs, batch = policy.fused.graphs, batch_of([60, 50], g)
    policy.fused.graphs = None
    want = gradient_of(policy, batch)
    policy.fused.graphs = graphs
    for name in "abc":
        model.add_adapter(name, model.peft_config["default"])
    for _ in range(3):
        model.set_adapter("default")
        made = gradient_of(policy, batch)
        for name in "abc":
            model.set_adapter(name)
            policy.score(batch)
    assert len(graphs._graphs) == 1
    assert float((made - want).norm() / want.norm()) < 5e-3


def test_graphs_that_are_given_up_hold_no_memory() -> None:
    """Also not by what cuBLAS keeps for each stream that it has run on."""
    g = torch.Generator().manual_seed(12)
    policy = Policy(model_of("qwen3", torch.bfloat16))
    assert isinstance(policy.fused, FusedDecoder) and policy.fused.graphs is not None
    batch, held = batch_of([60, 50], g), []
    for _ in range(4):
        for _ in range(2):
            gradient_of(policy, batch)
        assert policy.fused.graphs._graphs
        policy.fused.graphs.clear()
        torch.cuda.empty_cache()
        held.append(torch.cuda.memory_reserved())
    assert held[-1] - held[0] < 8 * 2**20, held


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_graphs_of_shared_prefixes_are_used_again(name: str) -> None:
    """Groups of other lengths in one bucket, a window among them in Gemma 3, and then no prefix in its place."""
    g = torch.Generator().manual_seed(9)
    policy = Policy(model_of(name, torch.bfloat16))
    assert isinstance(policy.fused, FusedDecoder) and policy.fused.graphs is not None
    graphs = policy.fused.graphs
    for groups in ([(40, 90), (30, 80)], [(44, 100), (20, 77)], [(120, 30), (130, 60)], [(1, 200)]):
        each = 3 if len(groups) > 1 else 1
        batch = groups_of([(prompt, [n - 7 * i for i in range(each)]) for prompt, n in groups], g, 1000)
        gradient_of(policy, batch)
        made = gradient_of(policy, batch)
        policy.fused.graphs = None
        want = gradient_of(policy, batch)
        policy.fused.graphs = graphs
        # Launches may take two calls where a graph has copies: two ways of rounding.
        assert float((made - want).norm() / want.norm()) < 2e-2
    assert len(graphs._graphs) == 3, "buckets are used again"
