"""Files in GGUF: decoded once into the user's cache, and read from there with equal weights, tokens and licence."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFWriter
from safetensors import SafetensorError
from transformers import PreTrainedModel

from rlft.models import gguf
from rlft.models.load import Base, load_base
from rlft.models.locate import load_tokenizer

HIDDEN, INNER, HEADS, LAYERS = 64, 128, 4, 1
TOKENS = ["<|endoftext|>", *map(chr, range(97, 123)), "ab", "abc", "Ġ"]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A random Llama of one layer, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "tiny.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_license("apache-2.0")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, *[1] * (len(TOKENS) - 1)])
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    shapes = {"token_embd": (len(TOKENS), HIDDEN), "output_norm": (HIDDEN,)}
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        shapes[f"blk.0.{name}"] = HIDDEN, HIDDEN
    shapes |= {"blk.0.ffn_gate": (INNER, HIDDEN), "blk.0.ffn_up": (INNER, HIDDEN), "blk.0.ffn_down": (HIDDEN, INNER)}
    shapes |= {"blk.0.attn_norm": (HIDDEN,), "blk.0.ffn_norm": (HIDDEN,)}
    g = torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", torch.randn(shape, generator=g).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def base_of(file: Path, quantization: str = "none", dtype: str = "float32") -> torch.nn.Module:
    base = Base(str(file), quantization, dtype, "cpu")  # type: ignore[arg-type]
    return load_base(base, torch.device("cpu"))


def kept(file: Path) -> list[Path]:
    return sorted(path for path in (file.parent / "cache").glob("rlft/gguf/*/*") if path.is_dir())


@pytest.mark.parametrize("quantization, dtype", [("none", "float32"), ("none", "bfloat16"), ("nf4", "bfloat16")])
def test_what_is_kept_is_what_was_decoded(
    file: Path, quantization: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept_weights = [base_of(file, quantization, dtype).state_dict() for _ in range(2)]
    assert [folder.name for folder in kept(file)] == [dtype]
    monkeypatch.setattr(gguf, "LARGEST", 0)
    decoded = base_of(file, quantization, dtype)
    assert decoded.name_or_path == str(file)  # type: ignore[comparison-overlap]
    for weights in kept_weights:
        assert weights.keys() == decoded.state_dict().keys()
        assert all(torch.equal(weights[name], value) for name, value in decoded.state_dict().items())


def test_the_tokenizer_is_the_files(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, first = "abcab zabc", load_tokenizer(str(file))
    again = load_tokenizer(str(file))
    monkeypatch.setattr(gguf, "LARGEST", 0)
    decoded = load_tokenizer(str(file))
    assert first(text)["input_ids"] == again(text)["input_ids"] == decoded(text)["input_ids"]
    assert again.eos_token_id == decoded.eos_token_id == 0 and again.get_vocab() == decoded.get_vocab()
    assert gguf.licence(file) == "apache-2.0"


def test_float64_reads_the_folder_of_float32(file: Path) -> None:
    weights = base_of(file, dtype="float64").state_dict()
    assert [folder.name for folder in kept(file)] == ["float32"]
    assert all(torch.equal(weights[name], value.double()) for name, value in base_of(file).state_dict().items())


def test_another_file_of_the_same_name_is_decoded_again(file: Path) -> None:
    before = base_of(file).state_dict()
    content = bytearray(file.read_bytes())
    content[-4:] = b"\0\0\0\0"  # the last weight
    time.sleep(0.01)
    file.write_bytes(content)
    after = base_of(file).state_dict()
    assert sum(not torch.equal(after[name], value) for name, value in before.items()) == 1


def test_without_a_place_to_keep_it_a_file_is_decoded_each_time(file: Path) -> None:
    (file.parent / "cache").mkdir()
    (file.parent / "cache" / "rlft").touch()  # so that no folder can be made
    assert base_of(file).state_dict()
    assert gguf.licence(file) == "apache-2.0" and kept(file) == []


def test_a_failure_of_decoding_is_raised_and_leaves_nothing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("stop")

    monkeypatch.setattr(gguf, "decode", fail)
    with pytest.raises(RuntimeError, match="stop"):
        gguf.model_folder(file, torch.float32)
    assert kept(file) == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error")])
def test_without_room_a_file_is_decoded_each_time(
    file: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(self: object, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", save)
        weights = base_of(file).state_dict()
    assert kept(file) == []
    assert all(torch.equal(weights[name], value) for name, value in base_of(file).state_dict().items())
    monkeypatch.setattr(gguf, "ROOM", 2**60)
    assert gguf.model_folder(file, torch.bfloat16) is None and [folder.name for folder in kept(file)] == ["float32"]


@pytest.mark.parametrize("damage", ["weights cut", "config.json", gguf.FILES])
def test_a_damaged_folder_is_written_again(file: Path, damage: str) -> None:
    weights = base_of(file).state_dict()
    (folder,) = kept(file)
    if damage == "weights cut":
        path = folder / "model.safetensors"  # which `weights` are mapped from, so that another takes its place
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content[:100])
    else:
        (folder / damage).unlink()
    again = base_of(file).state_dict()
    assert kept(file) == [folder] and all(torch.equal(again[name], value) for name, value in weights.items())


def test_what_a_killed_process_left_is_removed(file: Path) -> None:
    base_of(file)
    (folder,) = kept(file)
    left = folder.parent / "float32-abcd"
    folder.rename(left)
    base_of(file)
    assert kept(file) == [folder]


def test_a_file_that_changes_while_it_is_decoded_is_not_kept(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = gguf.decode

    def replaced(*args: Any) -> Any:
        file.write_bytes(file.read_bytes() + b"more")
        return decode(*args)

    monkeypatch.setattr(gguf, "decode", replaced)
    assert gguf.model_folder(file, torch.float32) is None and kept(file) == []


def test_two_processes_decode_it_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads with locks of their own, which exclude each other as those of processes do."""
    decode, runs = gguf.decode, []

    def counted(*args: Any) -> Any:
        runs.append(args)
        time.sleep(0.2)
        return decode(*args)

    monkeypatch.setattr(gguf, "decode", counted)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: gguf.model_folder(file, torch.float32), range(2))
    assert first == second and len(runs) == 1


def test_names_are_those_of_the_setting(file: Path) -> None:
    base: Any = base_of(file)
    assert base.name_or_path == base.config.name_or_path == str(file)
