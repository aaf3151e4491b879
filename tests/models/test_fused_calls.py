"""What callers other than trainers do with a fused model, against the same model unfused: generate, switch adapters,
merge, cast, copy, ask for hidden states.

What fused layers cannot do runs transformers' own forward, with a warning in words where a setting is the reason.
"""

from __future__ import annotations

import copy
import pickle
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from fused_pair import IDS, MASK, gradients, logits, model_of, near, one_thread, pair, ran, same  # noqa: F401
from peft import LoraConfig, PeftModel
from tiny import tiny_model
from torch import Tensor
from transformers import LlamaConfig

from rlft.config.run import Lora
from rlft.kernels.lora_group import AdapterWriteTables, write_adapters_reference
from rlft.models import kv_cache
from rlft.models.fused.calls import plain_mask
from rlft.models.fused.decoder import FusedDecoder
from rlft.models.fused.fuse import fuse
from rlft.models.fused.levels import L0
from rlft.models.fused.memory import MemoryPlan

OWN = "transformers' own layers run here, not the fused ones: "


def results(model: Any, **inputs: Any) -> dict[str, Tensor]:
    return gradients(model, **inputs) if torch.is_grad_enabled() else {"logits": logits(model, **inputs)}


def falls_back(plain: Any, fused: Any, reason: str | None, **inputs: Any) -> None:
    """transformers' forward runs, bit for bit, and the reason is said once; None: it is not said."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            torch.manual_seed(1)
            want = results(plain, **inputs)
            torch.manual_seed(1)
            got, was_fused = ran(fused, lambda: results(fused, **inputs))
            assert not was_fused and got.keys() == want.keys()
            assert all(torch.equal(got[n], v) for n, v in want.items())
    assert [str(w.message) for w in said] == ([] if reason is None else [f"rlft: {OWN}{reason}"])


def add(model: Any, name: str = "second", **options: Any) -> None:
    """A second adapter, random in A and B."""
    settings: dict[str, Any] = {"r": 3, "target_modules": "all-linear", "init_lora_weights": False} | options
    torch.manual_seed(3)
    model.add_adapter(name, LoraConfig(**settings))


# ---- generate and the adapters -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": True}, {"num_beams": 2}])
@pytest.mark.parametrize("use_cache", [True, False])
def test_generate(use_cache: bool, options: dict[str, Any]) -> None:
    """With a cache transformers' forward runs, without one the fused layers do."""
    ends = []
    for model in pair():
        torch.manual_seed(2)
        call = {"input_ids": IDS, "attention_mask": MASK, "max_new_tokens": 6, "use_cache": use_cache}
        if "forward" in vars(model.get_base_model().get_decoder()):
            out, was_fused = ran(model, lambda: model.generate(**call, **options))  # noqa: B023
            assert was_fused != use_cache
        else:
            out = model.generate(**call, **options)
        ends.append(out)
    assert torch.equal(*ends)


def test_a_disabled_adapter_leaves_the_base() -> None:
    plain, fused = pair()
    base = plain.unload()
    with fused.disable_adapter():
        off, was_fused = ran(fused, lambda: logits(fused))
        assert was_fused and not off.requires_grad
    near(off, logits(base))
    for name, p in fused.named_parameters():
        if "lora_" in name:
            p.data.mul_(3)
    with fused.disable_adapter():
        assert torch.equal(logits(fused), off)
    assert (logits(fused) - off).abs().max() > 0.1


@pytest.mark.parametrize("mode", ["layer", "group", "shadow"])
def test_weights_stay_where_they_are_while_the_adapter_is_off(mode: Any) -> None:
    """A CUDA graph reads them there afterwards. The first pass without it has weights of its own, which then move."""
    plain, model = pair()
    fused: FusedDecoder = fuse(model)  # type: ignore[assignment]
    layers = len(fused.layers)
    fused.plan = MemoryPlan((L0,) * layers, 64, mode, 2**20, 0, 0, 0)

    def places() -> tuple[int, list[int]]:
        return fused.store.version, [b.data_ptr() for held in fused.store._layer_weights.values() for b in held.buffers]

    with torch.no_grad():
        with model.disable_adapter():
            off = logits(model)
        before = places()
        on = logits(model)
        first = places()
        assert first[0] > before[0] and (mode != "shadow" or first[1] != before[1])
        for _ in range(2):
            with model.disable_adapter():
                near(logits(model), off)
            assert torch.equal(logits(model), on) and places() == first
    near(on, logits(plain))


def test_a_second_adapter_trains_on_the_fused_path() -> None:
    plain, fused = pair()
    for model in (plain, fused):
        add(model)
        model.set_adapter("second")
    same(plain, fused)
    assert all(".second." in n for n in gradients(fused))
    for model in (plain, fused):
        model.set_adapter("default")
    same(plain, fused)


def test_an_adapter_on_modules_that_had_none_when_the_model_was_fused() -> None:
    targets = ("q_proj", "k_proj", "v_proj", "o_proj")
    plain, fused = pair(lora=Lora(rank=4, alpha=8, targets=targets))
    for model in (plain, fused):
        add(model)
        model.set_adapter("second")
    same(plain, fused)
    assert sum("mlp" in n for n in gradients(fused)) == 12


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("k_proj", "up_proj"), ("down_proj",)])
def test_an_adapter_on_some_modules_only(targets: tuple[str, ...]) -> None:
    """Of the modules that read the same input, some have no adapter. q and v alone are what most examples train."""
    same(*pair(lora=Lora(rank=4, alpha=8, targets=targets)))


def test_deleted_adapters() -> None:
    plain, fused = pair()
    for model in (plain, fused):
        add(model)
        model.set_adapter("second")
        model.delete_adapter("default")
    same(plain, fused)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_dora": True}, "the adapter is a variant of LoRA (DoRA or the like)"),
        ({"lora_dropout": 0.5}, "lora dropout is 0.5"),
        ({"lora_bias": True}, "the adapter has biases"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*merging LoRA weights won't be possible")
def test_what_an_adapter_can_have_that_fused_layers_cannot(options: dict[str, Any], reason: str) -> None:
    """Added later: own forward, said once. There from the start: `fuse` says it and changes nothing."""
    plain, fused = pair()
    for model in (plain, fused):
        add(model, **options)
        model.set_adapter("second")
        model.train()
    falls_back(plain, fused, reason)
    assert fuse(plain) == reason == fuse(fused)
    assert "forward" not in vars(plain.get_base_model().get_decoder())
    for model in (plain, fused):
        model.set_adapter("default")
    same(plain, fused)


def test_two_adapters_at_once_and_adapters_by_row() -> None:
    plain, fused = pair()
    for model in (plain, fused):
        add(model)
        model.base_model.set_adapter(["default", "second"])
    falls_back(plain, fused, "2 adapters are active at once")
    for model in (plain, fused):
        model.set_adapter("default")
        model.eval()
    with torch.no_grad():
        falls_back(plain, fused, "a Linear has a hook", adapter_names=["default", "second", "__base__"])
    same(plain, fused)


# ---- modules that change -----------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kernel", [False, True])
def test_an_adapter_that_moves_is_read_where_it_is(kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fills the weights' buffers holds addresses: kept for the last two adapters that were used."""
    if kernel:
        monkeypatch.setattr(AdapterWriteTables, "run", AdapterWriteTables.launch)
    _, model = pair()
    model.add_adapter("other", model.peft_config["default"])
    fused: Any = fuse(model)
    layer, like = fused.layers[0], torch.empty(0)
    mine, theirs = (layer.bind(name)[0].A[0] for name in ("default", "other"))

    def filled(name: str) -> AdapterWriteTables:
        bound = layer.bind(name)
        weights = fused.store.weights(0, layer.projections, bound, like)
        for i, b in enumerate(bound):
            got = (weights(i).b, weights(i).a)
            want = [torch.empty_like(t) for t in got]
            write_adapters_reference(b.group, b.A, b.B, *want)
            assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))
        return fused.store.write_tables[0]

    first, second = filled("default"), filled("other")
    version = fused.store.version
    assert (filled("default"), filled("other")) == (first, second)
    mine.data, theirs.data = theirs.data, mine.data  # now what is at either's place is the other's
    assert filled("default") is not first
    mine.data, theirs.data = theirs.data, mine.data
    assert filled("other") is second, "one of the last two"
    assert filled("default") is not first, "given up"
    assert fused.store.version == version, "no buffer moved"


@pytest.mark.parametrize("safe", [False, True])
def test_merging_and_unmerging(safe: bool) -> None:
    plain, fused = pair()
    for model in (plain, fused):
        model.merge_adapter(safe_merge=safe)
    with torch.no_grad():
        falls_back(plain, fused, "an adapter is merged into the base")
    for model in (plain, fused):
        model.unmerge_adapter()
    same(plain, fused)


@pytest.mark.parametrize("how", ["unload", "merge_and_unload"])
def test_a_model_without_its_adapter_again(how: str) -> None:
    plain, fused = pair()
    near(logits(getattr(fused, how)()), logits(getattr(plain, how)()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_that_is_cast_after_it_was_fused(dtype: torch.dtype) -> None:
    plain, fused = (model.to(dtype) for model in pair())
    out, was_fused = ran(fused, lambda: logits(fused))
    assert was_fused and out.dtype == dtype
    near(out, logits(plain), 1e-6 if dtype == torch.float64 else 0.03)


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict(assign: bool) -> None:
    plain, fused = pair()
    for model in (plain, fused):
        model.load_state_dict({k: v * 0.7 for k, v in model.state_dict().items()}, assign=assign)
        model.train(False)
        for name, p in model.named_parameters():
            p.requires_grad_("lora_" in name)
    same(plain, fused)


def test_a_base_that_is_trained_too() -> None:
    plain, fused = pair()
    for model in (plain, fused):
        model.get_submodule("base_model.model.model.layers.1.input_layernorm").requires_grad_(True)
    falls_back(plain, fused, "weights of the base are trained")
    assert any("input_layernorm" in n for n in gradients(fused))


def test_hooks_on_modules_that_fused_layers_do_not_call() -> None:
    fused, seen = model_of(True), []
    handle = fused.get_submodule("base_model.model.model.layers.1.mlp").register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(UserWarning, match="a LlamaMLP has a hook"):
        assert not ran(fused, lambda: logits(fused))[1] and seen == [1]
    handle.remove()
    assert ran(fused, lambda: logits(fused))[1]
    norm = fused.get_submodule("base_model.model.model.layers.0.input_layernorm")
    norm.forward = lambda x: x
    with pytest.warns(UserWarning, match="the forward of a LlamaRMSNorm was replaced"):
        assert not ran(fused, lambda: logits(fused))[1]


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_run_on_modules_of_their_own(how: Callable[[Any], Any]) -> None:
    plain, fused = pair()
    logits(fused).sum().backward()
    fused.zero_grad()
    assert len(pickle.dumps(fused)) < 1.01 * len(pickle.dumps(plain)) + 1000
    other, before = how(fused), logits(fused)
    same(plain, other)
    with torch.no_grad():
        for p in (*other.parameters(), *plain.parameters()):
            p.mul_(0.5)
    same(plain, other)
    assert torch.equal(logits(fused), before)


def test_save_pretrained_of_a_fused_model_is_that_of_a_plain_one(tmp_path: Path) -> None:
    plain, fused = pair()
    assert fused.state_dict().keys() == plain.state_dict().keys()
    for name, model in (("plain", plain), ("fused", fused)):
        model.save_pretrained(str(tmp_path / name))
    names = [f"{name}/adapter_model.safetensors" for name in ("plain", "fused")]
    assert (tmp_path / names[0]).read_bytes() == (tmp_path / names[1]).read_bytes()
    near(logits(PeftModel.from_pretrained(tiny_model().unload(), str(tmp_path / "fused"))), logits(fused))


# ---- other inputs and outputs ------------------------------------------------------------------------------------


def test_rows_whose_positions_start_again_are_several_sequences() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 4, 0, 1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11, 12]])
    same(*pair(), attention_mask=None, position_ids=positions)
    same(*pair(), attention_mask=None, position_ids=positions[:1], input_ids=IDS[:1])


def test_calls_that_want_something_else_run_transformers_own_forward() -> None:
    plain, fused = pair()
    mask = torch.ones(9, 9, dtype=torch.bool).tril()[None, None].expand(3, 1, 9, 9)
    for inputs in (
        {"output_hidden_states": True},
        {"attention_mask": mask},
        {"use_cache": True},
        {"is_causal": False},
        {kv_cache.name(plain.get_base_model()): transformers.DynamicCache},
    ):
        falls_back(plain, fused, None, **inputs)
    got, want = (m(IDS, output_hidden_states=True, use_cache=False).hidden_states for m in (fused, plain))
    assert len(got) == 3 and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    same(plain, fused)
    with torch.no_grad():
        assert len(fused(IDS)[kv_cache.name(plain.get_base_model())]) == 2  # as the config says where nothing is said
        assert ran(fused, lambda: fused(IDS, use_cache=False))[1]


def test_a_cache_reaches_the_decoder_by_either_name() -> None:
    decoder = pair()[1].get_base_model().get_decoder()
    for name in kv_cache.NAMES:
        cache = transformers.DynamicCache()
        with torch.no_grad():
            decoder(IDS, **{name: cache})
        assert cache.get_seq_length() == IDS.shape[1]
    with pytest.raises(ValueError, match="give one of cache and past_key_values"):
        decoder(IDS, cache=transformers.DynamicCache(), past_key_values=transformers.DynamicCache())


def test_masks_with_a_row_of_padding_only_and_without_padding() -> None:
    plain, fused = pair()
    mask = MASK.clone()
    mask[1] = 0
    same(plain, fused, attention_mask=mask)
    same(plain, fused, attention_mask=torch.ones_like(MASK))
    same(plain, fused, attention_mask=MASK.float())
    same(plain, fused, attention_mask=None)
    fused(IDS, attention_mask=MASK * 0, use_cache=False).logits.sum().backward()  # no token at all


def test_fusing_and_training_patch_nothing() -> None:
    """Modules and classes of the libraries have the same attributes afterwards; what is replaced is on the instance."""
    import trl

    model = tiny_model()
    kinds = {type(m) for m in model.modules()} | {PeftModel, trl.SFTTrainer, trl.DPOTrainer, trl.GRPOTrainer}
    places = [torch, torch.nn, torch.nn.functional, transformers, peft, trl, *kinds]
    places += [sys.modules[k.__module__] for k in kinds]
    before = [dict(vars(place)) for place in places]
    fused = fuse(model)
    assert isinstance(fused, FusedDecoder)
    gradients(model)
    model.generate(IDS, attention_mask=MASK, max_new_tokens=2)
    for place, was in zip(places, before, strict=True):
        assert all(vars(place).get(name) is value for name, value in was.items()), place
    touched = [n for n, m in model.named_modules() if "forward" in vars(m)]
    assert touched == ["base_model.model.model"]


def test_masks_that_differ_by_head_are_not_plain() -> None:
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    config = LlamaConfig()
    assert torch.equal(plain_mask(config, {"full_attention": mask}), torch.ones(2, 5, dtype=torch.bool))
    by_head = {"full_attention": mask.repeat(1, 4, 1, 1)}
    by_head["full_attention"][:, 1] = True
    assert plain_mask(config, by_head) is by_head
