"""The operations that the benchmarks count are those that torch counts, to the last one."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from tests.benchmarks.scripts import script

flops = script("flops")

ROWS, LENGTH, RANK = 3, 7, 2
SIZES = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 31}


def counted(model: torch.nn.Module, targets: list[str]) -> int:
    """What torch counts in a step forward and back, all positions predicted."""
    wrapped = get_peft_model(model, LoraConfig(r=RANK, target_modules=targets, init_lora_weights=False))
    ids = torch.arange(ROWS * LENGTH).reshape(ROWS, LENGTH) % 31
    with FlopCounterMode(display=False) as seen:
        wrapped(input_ids=ids)[0].sum().backward()
    return seen.get_total_flops()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_encoder_needs_what_torch_counts():
    config = BertConfig(**SIZES, attn_implementation="eager")
    model = BertModel(config, add_pooling_layer=False)
    sizes = flops.Sizes.of(config, RANK, is_dialogue=False)
    assert sizes.step([LENGTH] * ROWS, ROWS * LENGTH) == counted(model, ["query", "value"])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_decoder_with_shared_keys_needs_what_torch_counts():
    config = LlamaConfig(**SIZES, num_key_value_heads=2, use_cache=False, attn_implementation="eager")
    model = LlamaForCausalLM(config)
    sizes = flops.Sizes.of(config, RANK, is_dialogue=True)
    assert sizes.step([LENGTH] * ROWS, ROWS * LENGTH) == counted(model, ["q_proj", "v_proj"])


def test_a_row_costs_the_same_beside_another():
    sizes = flops.Sizes(layers=2, width=8, inner=20, gates=3, heads=8, keys=4, rank=2, words=11)
    assert sizes.step([5, 9], 6) == sizes.step([5], 2) + sizes.step([9], 4)
