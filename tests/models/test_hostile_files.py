"""Files of a model or an adapter that are damaged, or made to do harm: one ConfigError that names the file, no code."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import base_of, save
from safetensors.torch import load_file
from tiny import tiny_model

from rlft.config.run import Lora
from rlft.errors import ConfigError
from rlft.models.continued import read_adapter_config
from rlft.models.load import attach_lora, load_tokenizer

RAN = "RAN"
CODE = f"import pathlib\npathlib.Path('{RAN}').touch()\nclass A: pass\n"


class Runs:
    """A pickle of it touches a file when it is loaded without care."""

    def __reduce__(self) -> Any:
        return os.system, (f"touch {RAN}",)


def edit(name: str, **changes: Any) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        table = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**table, **changes}))

    return do


def put(name: str, data: bytes | None) -> Callable[[Path], None]:
    """data: None cuts the file in half."""

    def do(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if data is None else data)

    return do


def pickled(name: str, instead_of: str) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        (folder / instead_of).unlink()
        torch.save({"model.norm.weight": Runs()}, folder / name)

    return do


def with_code(name: str, **changes: Any) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        (folder / "evil.py").write_text(CODE)
        edit(name, **changes)(folder)

    return do


AUTO = {"AutoConfig": "evil.A", "AutoModelForCausalLM": "evil.A"}
MODELS = {
    "pickle": (
        pickled("pytorch_model.bin", "model.safetensors"),
        "pytorch_model.bin is damaged (a pickle that is torn",
    ),
    "weights cut": (put("model.safetensors", None), "model.safetensors is damaged"),
    "weights empty": (put("model.safetensors", b""), "model.safetensors is damaged"),
    "code": (with_code("config.json", model_type="evil", auto_map=AUTO), "it wants code of its own to be run"),
    "code of the tokenizer": (
        with_code("tokenizer_config.json", tokenizer_class="E", auto_map={"AutoTokenizer": ["evil.A", "evil.A"]}),
        "cannot load its tokenizer (it wants code of its own to be run",
    ),
    "config cut": (put("config.json", None), "config.json is damaged"),
    "config of another kind": (put("config.json", b"[1]"), "config.json is damaged"),
    "layers as text": (edit("config.json", num_hidden_layers="2"), "cannot load its config.json"),
    "no heads": (edit("config.json", num_attention_heads=0), "cannot load its config.json"),
    "dtype": (edit("config.json", dtype="load"), "cannot load its config.json"),
    "quantization": (edit("config.json", quantization_config=[]), "cannot load its config.json"),
    "activation": (edit("config.json", hidden_act="evil"), "cannot load it (KeyError"),
    "vocabulary": (edit("config.json", vocab_size=50), "the weights have other shapes than config.json says"),
    "no layers": (edit("config.json", num_hidden_layers=0), "has no linear layer to adapt"),
    "tokenizer cut": (put("tokenizer.json", None), "tokenizer.json is damaged"),
    "tokenizer of another kind": (put("tokenizer.json", b"[]"), "tokenizer.json is damaged"),
    "end of text": (edit("tokenizer_config.json", eos_token=3), "cannot load its tokenizer (TypeError"),
    "template": (put("chat_template.jinja", b"{% for %}"), "the chat template, line 1: TemplateSyntaxError"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("name", MODELS)
def test_a_model(name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on stdin"))
    folder = Path(shutil.copytree(model, tmp_path / "m"))
    do, text = MODELS[name]
    do(folder)
    with pytest.raises(ConfigError) as error:
        attach_lora(base_of(folder), Lora(), 0)
        load_tokenizer(str(folder))
    assert text in str(error.value) and "\n" not in str(error.value)
    assert not Path(RAN).exists()


def test_templates_that_transformers_can_use_are_taken(model: Path, tmp_path: Path) -> None:
    text = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}"
    folder = Path(shutil.copytree(model, tmp_path / "m"))
    (folder / "chat_template.jinja").write_text(text)
    assert load_tokenizer(str(folder)).chat_template == text


SETTINGS = "adapter_config.json"
ADAPTERS = {
    "kind": (edit(SETTINGS, peft_type="EVIL"), f"{SETTINGS}: peft_type"),
    "rank as text": (edit(SETTINGS, r="4"), f'{SETTINGS}: r = "4"'),
    "rank of 0": (edit(SETTINGS, r=0), f"{SETTINGS}: r = 0"),
    "targets": (edit(SETTINGS, target_modules="((("), f'{SETTINGS}: target_modules = "(((": no regular expression'),
    "pattern": (edit(SETTINGS, rank_pattern={"(": 4}), f"{SETTINGS}: rank_pattern = "),
    "ranks that take the memory": (
        edit(SETTINGS, rank_pattern={".*": 10**9}),
        "adapter_model.safetensors has 4 at most",
    ),
    "a start that changes the base": (edit(SETTINGS, init_lora_weights="pissa"), 'init_lora_weights = "pissa" takes a'),
    "another one": (edit(SETTINGS, init_lora_weights="olora"), 'init_lora_weights = "olora" takes a'),
    "copied layers": (edit(SETTINGS, layer_replication=[[0, 2]]), "sets layer_replication"),
    "code": (with_code(SETTINGS, megatron_config={"a": 1}, megatron_core="evil"), "sets megatron_config"),
    "settings cut": (put(SETTINGS, None), f"{SETTINGS}: no JSON file"),
    "weights cut": (
        put("adapter_model.safetensors", None),
        "adapter_model.safetensors: damaged, or no file of tensors",
    ),
    "pickle": (
        pickled("adapter_model.bin", "adapter_model.safetensors"),
        "adapter_model.bin: damaged, or no file of te",
    ),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "safetensors is missing"),
}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    tiny_model().save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter(name: str, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path(shutil.copytree(adapter, tmp_path / "a"))
    do, text = ADAPTERS[name]
    do(folder)
    base = tiny_model().unload()
    before = {key: value.clone() for key, value in base.state_dict().items()}
    with pytest.raises(ConfigError) as error:
        attach_lora(base, Lora(rank=4, alpha=8, resume_from=str(folder)), 0)
    assert text in str(error.value) and "\n" not in str(error.value)
    assert not Path(RAN).exists() and all(value.equal(before[key]) for key, value in base.state_dict().items())


def test_an_adapter_in_the_older_format_is_read(adapter: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "a"))
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    model = attach_lora(tiny_model(seed=1).unload(), Lora(rank=4, alpha=8, resume_from=str(folder)), 0)
    held = {name.replace(".default", ""): value for name, value in model.state_dict().items() if "lora_" in name}
    assert held.keys() == tensors.keys() and all(value.equal(tensors[name]) for name, value in held.items())


def test_settings_of_a_harmless_start_are_taken(adapter: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "a"))
    edit(SETTINGS, init_lora_weights="gaussian", a_later_version_of_peft=1, loftq_config={})(folder)
    with pytest.warns(UserWarning, match="a_later_version_of_peft"):
        assert read_adapter_config(str(folder)).r == 4
