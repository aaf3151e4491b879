"""Log-probs and gradients of prompts with images against transformers' own forward of each row with its pixels."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import seeing
import torch
from random_base import in_float64
from tiny import tiny_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

from rlft.batch import pack_rollouts
from rlft.config.data import Data, Sampling
from rlft.config.run import Lora
from rlft.data.encode import encode_prompt
from rlft.data.limits import Limits
from rlft.errors import ConfigError, DataError, UnsupportedModel
from rlft.models import vision
from rlft.models.fused.levels import LEVELS, Level
from rlft.models.load import Base, attach_lora, load_base
from rlft.models.policy import Policy
from rlft.models.vision import Vision, image_features, tower_bytes, trained_bytes
from rlft.positions import next_position, prompt_positions
from rlft.rollout.eager import EagerEngine
from rlft.rollout.vllm.memory import EngineMemory
from rlft.types import Batch, FinishReason, PackPlan, Prompt, Rollout

# transformers warns of the name of an argument by which it calls its own layers (Llama 3.2 Vision).
pytestmark = pytest.mark.filterwarnings("ignore:`hidden_state` is deprecated:FutureWarning")
PICTURES = (seeing.file_of(3), seeing.file_of(2, (16, 40)), seeing.file_of(4, (32, 24)))


def prompt_of(index: int, text: str, *images: bytes, kind: str = "qwen2_vl") -> Prompt:
    row = {"prompt": text, "images": list(images)}
    return encode_prompt(row, index, Data("no file"), seeing.tokenizer(kind), Limits(images=seeing.reader(kind)))


def rollouts_of(prompts: Sequence[Prompt], samples: int = 3) -> list[Rollout]:
    """Completions of different lengths, `samples` of each prompt."""
    made = []
    for prompt in prompts:
        for sample in range(samples):
            ids = tuple(10 + (7 * prompt.index + 3 * sample + 5 * i) % 60 for i in range(3 + 2 * sample + prompt.index))
            made.append(Rollout(prompt, ids, (True,) * len(ids), None, "", FinishReason.STOP, sample, 0, sample))
    return made


def some_rollouts(kind: str = "qwen2_vl") -> list[Rollout]:
    """Prompts with one image, with two of different sizes, without any, and with the first one again."""
    prompts = (("How many?", 0), ("Which has more?", 1, 2), ("Say 3.",), ("And here?", 0))
    return rollouts_of(
        [prompt_of(i, text, *(PICTURES[n] for n in shown), kind=kind) for i, (text, *shown) in enumerate(prompts)]
    )


def kind_of(policy: Policy) -> str:
    config: Any = policy.base.config
    return (
        "pixtral"
        if config.model_type == "llava" and config.vision_config.model_type == "pixtral"
        else config.model_type
    )


def packed(rollouts: Sequence[Rollout], share: bool = True, budget: int = 10**6) -> list[Batch]:
    plan = PackPlan("token_mean", budget, 64, 1.0, share_prefix=share)
    advantages = [0.3 + 0.1 * i for i in range(len(rollouts))]
    return pack_rollouts(rollouts, advantages, plan)


def loss_of(policy: Policy, batches: Sequence[Batch]) -> dict[int, Tensor]:
    """Log-probs of each rollout by its id; the gradient of the weighted sum is added to the policy's buffer."""
    found = {}
    for batch in batches:
        logprobs, _ = policy.logprobs(batch)
        (logprobs * (batch.weight * batch.advantages).to(logprobs.device)).sum().backward()
        sequences = [i for i, group in enumerate(batch.group_ids.tolist()) if group >= 0]
        for sequence, sample in zip(sequences, batch.samples, strict=True):
            found[id(sample.rollout)] = logprobs[(batch.seq_ids == sequence) & batch.train_mask].detach()
    return found


def of_tiles(given: dict[str, Tensor], ids: list[int], prompt: Prompt, policy: Policy) -> dict[str, Tensor]:
    """The arguments of Llama 3.2 Vision's own forward for one row, as its processor makes them."""
    seen = get_cross_attention_token_mask(ids, policy.base.config.image_token_index)  # type: ignore[union-attr]
    tiles = [[image.width for image in prompt.images]]
    mask = convert_sparse_cross_attention_mask_to_dense([seen], tiles, 4, len(ids))
    row = {name: tensor.transpose(0, 1) for name, tensor in given.items()}  # images of one row
    return {**row, "cross_attention_mask": torch.from_numpy(mask)}


def reference(policy: Policy, rollout: Rollout) -> Tensor:
    """transformers' own log-probs of a completion, with gradient: one row with its pixels."""
    prompt = rollout.prompt
    ids = torch.tensor([prompt.ids + rollout.completion_ids])
    given: dict[str, Tensor] = {}
    if prompt.images:
        assert policy.vision is not None
        kinds = (ids == policy.base.config.image_token_id).int()
        given = policy.vision.reader.given(prompt.images)
        if kind_of(policy) in ("gemma3", *seeing.GRIDS):
            given["token_type_ids" if kind_of(policy) == "gemma3" else "mm_token_type_ids"] = kinds
        if kind_of(policy) == "mllama":
            given = of_tiles(given, ids[0].tolist(), prompt, policy)
    # A call that asks for hidden states bypasses the fused layers.
    logits = policy.model(input_ids=ids, use_cache=False, output_hidden_states=True, **given).logits[0]
    policy.base.model.rope_deltas = None  # of the last images, which transformers would use for text
    start = len(prompt.ids)
    return logits[start - 1 : -1].log_softmax(-1).gather(1, ids[0, start:, None]).squeeze(1)


@contextmanager
def exact(policy: Policy) -> Iterator[None]:
    """Tower and layers without transformers' roundings to fp32, in both forwards."""
    with in_float64(policy.decoder):
        yield


def check(policy: Policy, batches: Sequence[Batch]) -> None:
    """Log-probs and gradients of batches against the reference, both to 1e-6."""
    with exact(policy):
        policy.flat.zero_grad()
        found = loss_of(policy, batches)
        gradient = policy.flat.gradient.clone()
        policy.flat.zero_grad()
        for batch in batches:
            sequences = [i for i, group in enumerate(batch.group_ids.tolist()) if group >= 0]
            for sequence, sample in zip(sequences, batch.samples, strict=True):
                expected = reference(policy, sample.rollout)
                torch.testing.assert_close(found[id(sample.rollout)], expected.detach(), rtol=0, atol=1e-6)
                mask = (batch.seq_ids == sequence) & batch.train_mask
                (expected * (batch.weight * batch.advantages)[mask]).sum().backward()
    torch.testing.assert_close(gradient, policy.flat.gradient, rtol=1e-6, atol=1e-6)
    assert policy.flat.gradient.abs().max() > 1e-3


@pytest.fixture(scope="module", params=seeing.FUSED)
def policy(request: pytest.FixtureRequest) -> Policy:
    return seeing.policy_of(request.param)


@pytest.mark.parametrize("share", [True, False])
def test_fused_layers_agree_with_transformers_and_its_pixels(policy: Policy, share: bool) -> None:
    assert policy.fused is not None
    check(policy, packed(some_rollouts(kind_of(policy)), share))


@pytest.mark.parametrize("level", LEVELS, ids=str)
def test_what_is_added_between_layers_survives_every_level_of_saved_activations(level: Level) -> None:
    policy = seeing.policy_of("qwen3_vl")
    fused = policy.fused
    assert fused is not None
    batches = packed(some_rollouts())
    loss_of(policy, batches)
    expected = policy.flat.gradient.clone()
    plan = fused.plan_for(len(batches[0].input_ids))
    fused.plan = replace(plan, levels=(level,) * len(fused.layers), tile=7)
    policy.flat.zero_grad()
    loss_of(policy, batches)
    torch.testing.assert_close(policy.flat.gradient, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_layers_of_transformers_take_the_same_images(layout: str) -> None:
    """As where a module cannot be fused, or where something else than attention mixes tokens."""
    for kind in ("qwen2_5_vl", "qwen3_vl", "gemma3", "mistral3"):
        policy = seeing.policy_of(kind)
        del policy.decoder.forward
        policy.fused, policy.packed = None, layout == "packed"
        check(policy, packed(some_rollouts(kind), share=layout == "packed"))


@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_masks_of_a_model_with_images_say_no_more_for_text(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers of others call the whole model, which makes masks by type of layer for its decoder."""
    policy = seeing.policy_of("gemma3")
    assert policy.fused is not None
    ids, mask = torch.arange(5, 41).view(2, 18), torch.ones(2, 18, dtype=torch.long)
    if side != "none":
        mask[1, slice(0, 7) if side == "left" else slice(11, None)] = 0
    given = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    own, runs = policy.fused.hidden, list[int]()
    monkeypatch.setattr(
        policy.fused, "hidden", lambda rows, *args, **named: runs.append(len(rows)) or own(rows, *args, **named)
    )
    with exact(policy):
        found, expected = (policy.model(**given, output_hidden_states=each).logits for each in (False, True))
        torch.testing.assert_close(found[mask > 0], expected[mask > 0], rtol=0, atol=1e-6)
        assert runs == [int(mask.sum())]
        policy.model(**given, token_type_ids=(ids % 9 > 5).int())  # as of images
        assert len(runs) == 1


@pytest.mark.parametrize("share", [True, False])
def test_cross_attention_reads_the_images_of_its_row(share: bool) -> None:
    """Rows with two images, one and none, in padded forwards; images whose tokens are neighbours are seen together."""
    policy = seeing.policy_of("mllama")
    assert policy.path.startswith("transformers' own layers, padded: layers that attend to images")
    apart = [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]
    row = {"prompt": [{"role": "user", "content": apart}], "images": list(PICTURES[1:])}
    given = (Data("no file"), seeing.tokenizer("mllama"), Limits(images=seeing.reader("mllama")))
    rollouts = [*some_rollouts("mllama"), *rollouts_of([encode_prompt(row, 4, *given)])]
    assert {image.width for rollout in rollouts for image in rollout.prompt.images} == {2, 3, 4}
    names = list(policy.adapter())
    assert any("layers.1.cross_attn.k_proj" in name for name in names) and not any("vision" in name for name in names)
    batches = packed(rollouts, share)
    check(policy, batches)
    images, rows = zip(*batches[0].images, strict=True)
    turned = replace(batches[0], images=tuple(zip(images[::-1], rows, strict=True)))
    with pytest.raises(AssertionError):
        check(policy, [turned])


def test_a_policy_that_reads_no_images_says_so() -> None:
    policy = seeing.policy_of("qwen2_vl")
    policy.vision = None
    with pytest.raises(ConfigError, match="the prompts have images, and the policy was made without what reads them"):
        loss_of(policy, packed(some_rollouts()))


def test_the_order_of_images_matters(policy: Policy) -> None:
    kind = kind_of(policy)
    there = rollouts_of([prompt_of(0, "a", PICTURES[0], PICTURES[2], kind=kind)], 1)
    back = rollouts_of([prompt_of(0, "a", PICTURES[2], PICTURES[0], kind=kind)], 1)
    (first,), (second,) = (loss_of(policy, packed(rollouts)).values() for rollouts in (there, back))
    assert (first - second).abs().max() > 1e-3


def test_a_split_into_micro_batches_leaves_the_gradient_alone(policy: Policy) -> None:
    gradients = []
    for budget in (10**6, 60):
        policy.flat.zero_grad()
        batches = packed(some_rollouts(kind_of(policy)), budget=budget)
        loss_of(policy, batches)
        gradients.append(policy.flat.gradient.clone())
    assert len(batches) > 3
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-12)


def test_positions_are_those_of_transformers(policy: Policy) -> None:
    for rollout in some_rollouts(kind_of(policy))[::3]:
        prompt = rollout.prompt
        if kind_of(policy) not in seeing.GRIDS:
            assert next_position(prompt) == len(prompt.ids)
        if not prompt.images or kind_of(policy) not in seeing.GRIDS:
            assert prompt_positions(prompt).tolist() == [list(range(len(prompt.ids)))] * 3
            continue
        assert policy.vision is not None
        ids = torch.tensor([prompt.ids])
        grid = policy.vision.reader.given(prompt.images)["image_grid_thw"]
        kinds = (ids == policy.base.config.image_token_id).int()
        expected, delta = policy.base.model.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=grid)
        assert torch.equal(torch.from_numpy(prompt_positions(prompt)), expected[:, 0])
        assert next_position(prompt) == len(prompt.ids) + int(delta)


# ---- features ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deep() -> Policy:
    return seeing.policy_of("qwen3_vl")


class Counted(Vision):
    """A vision tower that says which images it ran over together."""

    def __init__(self, policy: Policy, limit: int = 10**9) -> None:
        assert policy.vision is not None
        super().__init__(policy.base, policy.vision.reader, limit)
        self.runs: list[int] = []

    def _computed(self, images: Any) -> Any:
        self.runs.append(len(images))
        return super()._computed(images)


def test_the_tower_runs_once_per_image_and_step(deep: Policy) -> None:
    vision = deep.vision = Counted(deep)
    batches = packed(some_rollouts(), budget=60)
    assert sum(len(batch.images) for batch in batches) > 3
    for _ in range(2):
        loss_of(deep, batches)
    assert sum(vision.runs) == 3  # of four images in the prompts, two are the same
    deep.forget_images()
    loss_of(deep, batches)
    assert sum(vision.runs) == 6


def test_features_beyond_the_limit_are_computed_again_and_the_same(deep: Policy) -> None:
    images = [image for rollout in some_rollouts()[:4:3] for image in rollout.prompt.images]
    wanted = [features.rows for features in Counted(deep).features(images)]
    vision = Counted(deep, limit=1)
    found = [vision.features([image])[0].rows for image in images * 2]
    assert vision.runs == [1] * 6
    for one, other in zip(wanted * 2, found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_other_bytes_under_the_same_digest_are_found(deep: Policy, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(PICTURES[0])
    prompt = encode_prompt(
        {"prompt": "a", "image": str(path)}, 0, Data("x"), seeing.tokenizer(), Limits(images=seeing.reader())
    )
    vision = Counted(deep)
    assert prompt.images[0].source == str(path) and vision.features(prompt.images)
    path.write_bytes(seeing.file_of(5))
    assert vision.features(prompt.images)  # held
    vision.clear()
    with pytest.raises(DataError, match=r"a\.png has changed since its row was read: its bytes have another digest"):
        vision.features(prompt.images)


@pytest.mark.parametrize("kind", seeing.KINDS)
def test_the_tower_is_not_quantized_with_the_decoder(kind: str, tmp_path: Path) -> None:
    base: Any = load_base(Base(str(seeing.save(tmp_path, kind)), "nf4", device="cpu"), torch.device("cpu"))
    names = {name for name, module in base.named_modules() if type(module).__name__ == "Linear4bit"}
    assert len(names) == 3 * 7 and all(".language_model." in name for name in names)
    policy = Policy(attach_lora(base, Lora(rank=4), 0), images=seeing.reader(kind))
    assert (policy.fused is not None) == (kind in seeing.FUSED)
    found = loss_of(policy, packed(some_rollouts(kind)[:4]))
    assert all(logprobs.isfinite().all() for logprobs in found.values()) and policy.flat.gradient.any()


class Peak(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, while they are alive."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.held = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
        self.live: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage._cdata not in (*self.live, *self.held):
                self.live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, storage._cdata)
        self.most = max(self.most, sum(self.live.values()))
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", seeing.KINDS)
def test_the_plan_knows_what_the_tower_takes(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind in seeing.GRIDS:
        width = {"embed_dim": 128, "mlp_ratio": 4} if kind == "qwen2_vl" else {"hidden_size": 128}
        inner = {"qwen2_5_vl": {"intermediate_size": 342}, "qwen3_vl": {"intermediate_size": 480}}.get(kind, {})
        monkeypatch.setitem(seeing.VISION, kind, seeing.VISION[kind] | width | inner)
        pixels = torch.randn(512, 96)
        given = {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 64, 8]])}
    else:
        monkeypatch.setattr(seeing, "SQUARE", seeing.SQUARE | {"hidden_size": 128, "intermediate_size": 480})
        lines = kind in ("pixtral", "mistral3")  # two images of any size, or 32 of one
        pixels = torch.randn(2, 3, 64, 64) if lines else torch.randn(32, 3, 16, 16)
        given = {"pixel_values": pixels} | ({"image_sizes": torch.tensor([[64, 64]] * 2)} if lines else {})
    patches = 512
    if kind == "mllama":  # 8 images of 4 tiles with 17 states, and as many for a multiple of 8
        pixels, patches = torch.randn(8, 1, 4, 3, 16, 16), 8 * 4 * 17
        given = {"pixel_values": pixels, "aspect_ratio_mask": torch.ones(8, 1, 4, dtype=torch.long)}
        given["aspect_ratio_ids"] = torch.full((8, 1), 6)
    base = seeing.base_of(kind, dtype, head=64)
    with torch.no_grad(), Peak(base) as peak:
        image_features(base, given)
    taken = peak.most + pixels.nbytes
    planned = tower_bytes(base.config, patches, dtype.itemsize)
    assert taken <= planned < 1.5 * taken


# ---- an adapter on the tower -------------------------------------------------------------------------------------


def of_tower(policy: Policy) -> list[str]:
    """PEFT names of the tensors of the adapter that are not the decoder's."""
    return [name for name in policy.adapter() if ".language_model." not in name]


QUICK = ("qwen2_5_vl", "qwen3_vl", "gemma3", "mllama")


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[] if k in QUICK else pytest.mark.slow) for k in seeing.KINDS])
def test_an_adapter_on_the_tower_has_the_gradient_of_transformers(kind: str) -> None:
    """Images that several rows show, and behind Qwen3-VL's first layers."""
    policy = seeing.policy_of(kind, vision=True)
    assert policy.vision is not None and policy.vision.trained
    # Gemma 3's projector is a parameter, which no adapter is on.
    assert kind == "gemma3" or any("projector" in name or "merger" in name for name in of_tower(policy))
    check(policy, packed(some_rollouts(kind)))
    gradients = {name: policy.flat.parameters[name].grad for name in of_tower(policy)}
    unread = [name for name, gradient in gradients.items() if gradient is None or not gradient.any()]
    # LLaVA reads the last layer but one.
    assert all(kind in ("llava", "pixtral") and ".1." in name for name in unread)


def test_features_of_a_trained_tower_are_held_for_no_other_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under another adapter, and under none, they are others."""
    policy = seeing.policy_of("qwen2_5_vl", vision=True)
    monkeypatch.setattr(vision, "TRAINED", 1)  # each image alone
    batch = packed(some_rollouts())[0]
    with exact(policy):
        before, base = policy.score(batch), policy.score(batch, "reference")
        torch.testing.assert_close(policy.logprobs(batch)[0].detach(), before, rtol=0, atol=1e-9)
        for name in of_tower(policy):
            policy.adapter()[name].mul_(0.5)
        after = policy.score(batch)
    shown = torch.tensor([bool(sample.rollout.prompt.images) for sample in batch.samples])
    sequences = torch.tensor([group >= 0 for group in batch.group_ids.tolist()]).nonzero().flatten()
    for sequence, images in zip(sequences.tolist(), shown.tolist(), strict=True):
        rows = (batch.seq_ids == sequence) & batch.train_mask
        assert ((before - after)[rows].abs().max() > 1e-4) == images
    assert (before - base).abs().max() > 1e-3


def test_an_engine_samples_with_its_own_adapter_on_the_tower() -> None:
    policy = seeing.policy_of("qwen3_vl", torch.float32, vision=True)
    engine = EagerEngine(policy, seeing.tokenizer(), batch_size=5)
    prompts = [rollout.prompt for rollout in some_rollouts()[::3]]
    found = []
    for version in range(2):
        engine.load_adapter(policy.adapter(), version)
        rollouts = engine.generate(prompts, Sampling(group_size=2, max_tokens=6), (1, 2))
        expected = loss_of(policy, packed(rollouts))
        for rollout in rollouts:
            sampled = torch.tensor(rollout.sampler_logprobs)[list(rollout.completion_mask)]
            torch.testing.assert_close(expected[id(rollout)], sampled, rtol=0, atol=2e-5)
        found.append([rollout.sampler_logprobs for rollout in rollouts])
        for name in of_tower(policy):
            policy.adapter()[name].mul_(-1.0 if ".lora_B." in name else 1.0)
    assert found[0][0] != found[1][0] and found[0][-3] == found[1][-3]
    engine.close()


def test_where_the_tower_can_have_no_adapter_is_named() -> None:
    with pytest.raises(ConfigError, match=r"lora.dropout = 0.1 with lora.vision = true: the tower runs again"):
        Lora(dropout=0.1, vision=True)
    with pytest.raises(ConfigError, match=r"lora.vision = true: the model takes text alone"):
        attach_lora(tiny_model(), Lora(rank=4, vision=True), 0)
    base = seeing.base_of("qwen2_vl")
    names = list(Policy(attach_lora(base, Lora(rank=4, targets=("qkv",), vision=True), 0)).adapter())
    assert names and all("visual.blocks" in name and ".attn.qkv." in name for name in names)
    policy = seeing.policy_of("gemma3", torch.float32, vision=True)
    with pytest.raises(UnsupportedModel, match=r"vLLM has no vision tower for an adapter \(lora.vision = true\)"):
        EngineMemory.of(policy, {}, torch.float32, 64, 4, 4)


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3", "llava", "mistral3"])
def test_the_plan_knows_what_a_trained_tower_takes(kind: str) -> None:
    policy = seeing.policy_of(kind, torch.float32, vision=True)
    assert policy.vision is not None
    pixels = torch.randn(512, 96) if kind in seeing.GRIDS else torch.randn(32, 3, 16, 16)
    given: dict[str, Tensor] = {"pixel_values": pixels}
    if kind in seeing.GRIDS:
        given["image_grid_thw"] = torch.tensor([[1, 64, 8]])
    elif kind == "mistral3":
        given["image_sizes"] = torch.tensor([[16, 16]] * 32)
    with Peak(policy.model) as peak:
        out = image_features(policy.base, given)
        outputs = tree_leaves((out.pooler_output, getattr(out, "deepstack_features", None) or ()))
        torch.stack([each.sum() for each in outputs]).sum().backward()
    taken = peak.most + pixels.nbytes
    planned = trained_bytes(policy.base.config, 512, 4)
    assert taken <= planned < 3 * taken


# ---- engine ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", seeing.KINDS)
def test_sampled_log_probs_are_the_trainers(kind: str) -> None:
    policy = seeing.policy_of(kind, torch.float32)
    engine = EagerEngine(policy, seeing.tokenizer(kind), batch_size=5)
    engine.load_adapter(policy.adapter(), 0)
    prompts = [rollout.prompt for rollout in some_rollouts(kind)[::3]]
    rollouts = engine.generate(prompts, Sampling(group_size=3, max_tokens=12), (1, 2))
    assert policy.vision is not None
    places = policy.vision.reader.places
    for rollout in rollouts:
        assert rollout.completion_mask == tuple(token not in places for token in rollout.completion_ids)
    sampled_places = any(places & set(rollout.completion_ids) for rollout in rollouts)
    # To see it left out; the head of Llama 3.2 Vision has no place.
    assert sampled_places == (kind != "mllama")
    found = loss_of(policy, packed(rollouts))
    for rollout in rollouts:
        sampled = torch.tensor(rollout.sampler_logprobs)[list(rollout.completion_mask)]
        torch.testing.assert_close(found[id(rollout)], sampled, rtol=0, atol=2e-5)
    again = engine.generate(prompts[::-1], Sampling(group_size=3, max_tokens=1), (1, 2))
    assert [rollout.prompt.index for rollout in again[::3]] == [3, 2, 1, 0]
    engine.close()
