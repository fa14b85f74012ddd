"""The plan finds what fits with the least harm, and says the cheapest change, and the least that there is."""

from dataclasses import replace

import pytest

from fedpeft.channel import CODECS
from fedpeft.errors import ConfigError
from fedpeft.training.plan import HARM, Choice, Link, Planner, coded, told
from fedpeft.training.predict import RUNTIME, Sizes

SIZES = Sizes.of(
    {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 200,
        "vocab_size": 3000,
        "tie_word_embeddings": True,
    },
    predicts=True,
)
WANTED = Choice("torch", "none", ("q_proj", "v_proj"), 4, 4, 8, 8, 64, False)
TORCH = Planner(SIZES, SIZES.parameters, engines=("torch",))
BOTH = replace(TORCH, engines=("torch", "onnx"))


def total(choice, planner=TORCH):
    return planner.taken(choice, WANTED).parts.total


def budget(choice, planner=TORCH):
    """The smallest in which it fits: 5 % are left over."""
    return total(choice, planner) / 0.95 + 1


def test_what_fits_stays_as_it_is():
    assert TORCH.plan(WANTED, budget(WANTED)).best.choice == WANTED
    assert TORCH.plan(WANTED, budget(WANTED)).best.harm == 0


@pytest.mark.parametrize(
    "change",
    [{"micro": 4}, {"micro": 1}, {"micro": 1, "checkpointing": True, "quantise": "int8"}],
    ids=str,
)
def test_the_least_harm_comes_first(change):
    want = replace(WANTED, **change)
    found = TORCH.plan(WANTED, budget(want)).best
    assert found.choice == want
    each = {"micro": HARM["micro"] * {8: 0, 4: 1, 1: 3}[want.micro]}
    each |= {
        "checkpointing": HARM["checkpointing"] * want.checkpointing,
        "int8": HARM["int8"] * (want.quantise == "int8"),
    }
    assert found.harm == sum(each.values())


def test_every_change_costs_what_is_written_down():
    for change, harm in (
        ({"length": 32}, HARM["length"]),
        ({"rank": 1}, 2 * HARM["rank"]),
        ({"layers": 2}, HARM["layers"]),
        ({"both": False}, HARM["ffa"]),
        ({"quantise": "nf4"}, HARM["4 bits"]),
        ({"engine": "onnx"}, HARM["engine"]),
        ({"up": "int8", "down": "bf16"}, 2 * (2 + 1)),
    ):
        assert BOTH.taken(replace(WANTED, **change), WANTED).harm == harm
    assert list(HARM.values()) == sorted(HARM.values())


def test_another_runtime_is_found_where_torch_alone_is_too_large():
    found = BOTH.plan(WANTED, 0.9 * RUNTIME["torch"]).best.choice
    assert found.engine == "onnx"
    with pytest.raises(
        ConfigError, match=r"^plan: nothing fits in 4\d\d MB; the least is 4\d\d MB, \d+ MB more, with "
    ):
        TORCH.plan(WANTED, 0.9 * RUNTIME["torch"])


def test_where_nothing_fits_the_error_says_what_does_and_by_how_much():
    least = min(BOTH.choices(WANTED), key=lambda x: total(x, BOTH))
    most = total(least, BOTH)
    with pytest.raises(ConfigError) as error:
        BOTH.plan(WANTED, 1e6)
    text = str(error.value)
    assert f"the least is {most / 1e6:.0f} MB, {(most - 1e6) / 1e6:.0f} MB more" in text
    assert "training.micro = 1" in text
    assert "adapter.rank = 1" in text
    assert 'runtime="onnx" in the node\'s config' in text


def test_families_that_can_t_be_exported_stay_on_torch():
    images = replace(BOTH, sizes=replace(SIZES, family="vit", words=0))
    assert {x.engine for x in images.choices(WANTED)} == {"torch"}
    assert {x.engine for x in BOTH.choices(WANTED)} == {"torch", "onnx"}


def test_a_link_chooses_the_first_codecs_that_it_holds_in_half_a_round():
    numbers = 4 * 4 * (2 * (64 + 64) - 32)
    plain = TORCH.taken(WANTED, WANTED)
    assert (plain.up, plain.down) == (4 * numbers, 4 * numbers)
    coarse = (CODECS["int8"].length(numbers) + CODECS["bf16"].length(numbers)) * 8
    room = budget(WANTED)
    found = TORCH.plan(WANTED, room, Link(2 * coarse / 10, 10.0)).best
    assert 8 * (found.up + found.down) <= coarse
    assert (found.up, found.down) == (coded(found.choice.up, numbers), coded(found.choice.down, numbers))
    assert found.choice == replace(WANTED, up=found.choice.up, down=found.choice.down)
    assert TORCH.plan(WANTED, room, Link(2 * 64 * numbers / 10, 10.0)).best.choice == WANTED
    with pytest.raises(
        ConfigError, match=r"^plan: nothing fits the link; the least that travels is 0 kB a round, with "
    ):
        TORCH.plan(WANTED, room, Link(1.0, 1.0))


def test_one_frozen_factor_halves_what_travels_and_a_head_travels_whole():
    half = replace(WANTED, both=False)
    assert TORCH.taken(half, WANTED).up == 4 * 4 * 4 * (64 + 32)
    head = replace(TORCH, classes=3)
    assert head.taken(WANTED, WANTED).up - TORCH.taken(WANTED, WANTED).up == 4 * 3 * 65


def test_a_choice_in_words_names_the_keys_that_it_changes():
    changed = replace(WANTED, engine="onnx", quantise="int8", micro=2, layers=2, both=False, up="int4")
    assert told(changed, WANTED) == (
        'training.micro = 2, model.quantise = "int8", adapter.layers = 2, rule.name = "ffa", compression.up = "int4", '
        'runtime="onnx" in the node\'s config'
    )
    assert told(WANTED, WANTED) == ""
