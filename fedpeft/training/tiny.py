"""Tiny random models, for tests and smoke runs: made on the spot, the same on every machine."""

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTModel,
)

_CHAT = (
    "{% for m in messages %}{{ '<user>' if m.role == 'user' else '<bot>' }}{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<bot>{% endif %}"
)
_SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<user>", "<bot>"]


def write(name: str, out: Path) -> None:
    """Write tiny-bert, tiny-llama or tiny-vit as a Hugging Face folder: under 100,000 random parameters.

    All sizes differ, so that a transposed factor crashes. Weights come from numpy's seeded generator and
    not from torch's, whose streams differ between versions and devices.
    """
    words = 256 + len(_SPECIAL)
    if name == "tiny-vit":
        vit = ViTConfig(
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=40,
            image_size=28,
            patch_size=7,
            num_channels=3,
        )
        _save(ViTModel(vit, add_pooling_layer=False), out)
        pixels = {"image_processor_type": "ViTImageProcessor", "size": {"height": 28, "width": 28}}
        (out / "preprocessor_config.json").write_text(json.dumps(pixels, indent=1))
        return
    if name == "tiny-bert":
        bert = BertConfig(
            vocab_size=words,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=40,
            max_position_embeddings=128,
            pad_token_id=0,
        )
        _save(BertModel(bert), out)
    else:
        llama = LlamaConfig(
            vocab_size=words,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=40,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=3,
        )
        _save(LlamaForCausalLM(llama), out)
    _tokenizer(chat=name == "tiny-llama").save_pretrained(out)


def _save(model: PreTrainedModel, out: Path) -> None:
    rng = np.random.default_rng(20)
    with torch.no_grad():
        for name, x in sorted(model.named_parameters()):
            norm = "norm" in name.lower()
            drawn = rng.standard_normal(tuple(x.shape)).astype(np.float32)
            # larger than usual: a random model of two layers should tell its inputs apart
            size = 0.02 if norm or x.ndim == 1 else 0.2
            x.copy_(torch.from_numpy(size * drawn + (norm and name.endswith("weight"))))
    model.save_pretrained(out)


def _tokenizer(chat: bool) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes: 256 of them, and the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {x: i for i, x in enumerate([*_SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A" if chat else "<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers' own
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<user>", "<bot>"],
        chat_template=_CHAT if chat else None,
        model_max_length=128,
    )
