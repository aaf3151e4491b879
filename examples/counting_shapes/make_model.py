"""Write a vision-language model with random weights, small enough for a CPU: Qwen2-VL's modules, a token per letter.

python examples/counting_shapes/make_model.py runs/data/counting_shapes/model

No package holds a small vision-language model. This one knows nothing: SFT teaches it first, and RL goes on from there.
Its tower and embeddings keep their random weights, of which an adapter on the decoder makes something.
"""

from __future__ import annotations

import argparse
import json
import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration

MARKS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PATCH = 8
"""Pixels to a side of a patch; a token has 2 x 2 patches."""


def tokenizer() -> PreTrainedTokenizerFast:
    """A token per printable character, and those of turns and images."""
    words = ["<pad>", "<|im_start|>", "<|im_end|>", *MARKS, *string.printable]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # type: ignore[assignment]
    made.decoder = decoders.Fuse()  # type: ignore[assignment]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token=words[0], eos_token=words[2], unk_token="?", chat_template=TEMPLATE
    )
    fast.add_special_tokens({"additional_special_tokens": [words[1], *MARKS]})
    return fast


def model(words: PreTrainedTokenizerFast) -> Qwen2VLForConditionalGeneration:
    """The model, its weights drawn from seed 0."""
    hidden = 128
    start, end, image, video = (words.vocab[mark] for mark in MARKS)
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(words),
            "hidden_size": hidden,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 512,
            "initializer_range": 0.1,
            "bos_token_id": None,
            "eos_token_id": words.eos_token_id,
            "pad_token_id": words.pad_token_id,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        },
        vision_config={
            "depth": 1,
            "embed_dim": 64,
            "hidden_size": hidden,
            "num_heads": 4,
            "mlp_ratio": 2,
            "patch_size": PATCH,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "initializer_range": 0.1,
        },
        vision_start_token_id=start,
        vision_end_token_id=end,
        image_token_id=image,
        video_token_id=video,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    return Qwen2VLForConditionalGeneration(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    words = tokenizer()
    model(words).save_pretrained(args.out)
    words.save_pretrained(args.out)
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": PATCH,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": (2 * PATCH) ** 2, "longest_edge": 64 * (2 * PATCH) ** 2},
    }
    (args.out / "preprocessor_config.json").write_text(json.dumps(processor))
    print(args.out)


if __name__ == "__main__":
    main()
