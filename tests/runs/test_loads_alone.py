"""The folder of a checkpoint is enough: transformers and PEFT load adapter, tokenizer and chat template from it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoTokenizer

from rlft.config.run import Config
from rlft.trainer.loop import train
from rlft.trainer.reopen import open_run


def test_peft_and_transformers_load_a_checkpoint_alone(tmp_path: Path) -> None:
    base = tiny_model(seed=3).unload()
    base.save_pretrained(tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"say {i}", "completion": f"it is {i}"} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    cfg = Config(
        model=str(tmp_path / "model"),
        data=str(tmp_path / "rows.jsonl"),
        out=str(tmp_path / "run"),
        algo="sft",
        steps=1,
        prompts_per_step=4,
        lora={"rank": 4},
        optim={"lr": 1e-2},
    )
    folder = train(cfg).adapter
    modules = json.loads((folder / "adapter_config.json").read_text())["target_modules"]
    assert modules == sorted(modules) and len(modules) > 8, "PEFT writes a set, in the order of this process"
    alone = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "say 3"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert alone.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == text
    ids = torch.tensor([alone.encode(text)])
    assert ids.tolist() == [tokenizer.encode(text)]
    model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with open_run(tmp_path / "run") as run, torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits, run.policy.model(input_ids=ids).logits, atol=1e-5)
        with model.disable_adapter():
            assert not torch.allclose(model(input_ids=ids).logits, run.policy.model(input_ids=ids).logits, atol=1e-5)
