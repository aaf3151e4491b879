"""The exported base is what a run over 4-bit weights computes with, for plain transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_placement import save_blocks
from tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlft.cli.main import main
from rlft.errors import ConfigError
from rlft.models.load import Base, load_base, resolve_device
from rlft.runs.export_base import export_base


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "model"
    save_blocks(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_logits_are_those_of_the_quantized_base(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export-base", str(model), str(tmp_path / "out"), "--dtype", "float32"]) == 0
    assert "28 weights decoded from 4 bits to float32" in capsys.readouterr().out
    cfg = Base(str(model), "nf4", "float32")
    ids = torch.arange(3, 40)[None]
    quantized = load_base(cfg, resolve_device(cfg))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    original = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        want, found, other = (net(ids).logits for net in (quantized, plain, original))
    assert torch.allclose(want, found, atol=1e-5) and not torch.allclose(found, other, atol=1e-2)
    assert not hasattr(plain.config, "quantization_config")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tiny_tokenizer().chat_template
    with pytest.raises(ConfigError, match="out"):
        export_base(str(model), tmp_path / "out")


def test_a_plain_base_is_written_as_it_is(model: Path, tmp_path: Path) -> None:
    exported = export_base(str(model), tmp_path / "out", "none", "float32")
    weights = AutoModelForCausalLM.from_pretrained(model).state_dict()
    for name, tensor in AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict().items():
        assert torch.equal(tensor, weights[name])
    assert exported.decoded == 0
