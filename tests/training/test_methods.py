"""The [adapter] section: what it sets in peft's configurations, what it refuses, and whether the reasons are true."""

import subprocess
import sys
from collections.abc import Mapping

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora.config import KasaConfig

from fedpeft.errors import ConfigError
from fedpeft.training import refusals
from fedpeft.training.bridge import Bridge
from fedpeft.training.methods import VIRTUAL_TOKENS, Method
from tests.training.peft_cases import CASES, METHODS, PEFT_WARNINGS, TASKS, build, changed

pytestmark = [pytest.mark.filterwarnings(x) for x in PEFT_WARNINGS]
KINDS = {str(k.value).lower() for k in PEFT_TYPE_TO_CONFIG_MAPPING}


def test_every_method_that_peft_has_either_federates_or_is_refused_with_a_reason() -> None:
    assert set(METHODS) | set(refusals.METHODS) == KINDS
    assert set(METHODS) & set(refusals.METHODS) == set()
    assert {x.method.name for x in CASES} == set(METHODS)
    assert len({x.name for x in CASES}) == len(CASES)


def test_a_method_is_tested_on_every_task_that_it_is_not_refused_for() -> None:
    tested = {(x.method.name, x.task) for x in CASES}
    for method in METHODS:
        tasks, _ = refusals.TASKS.get(method, (("classify", "lm", "image"), ""))
        assert {t for m, t in tested if m == method} == set(tasks), method


@pytest.mark.parametrize("name", refusals.METHODS)
def test_a_method_that_cannot_federate_is_refused_with_its_reason(name: str) -> None:
    with pytest.raises(ValueError, match=r"method: got .*, which can't be federated: ") as error:
        Method(name.upper())
    assert refusals.METHODS[name] in str(error.value)


OPTIONS: tuple[tuple[str, str, object], ...] = (
    *(
        ("lora", "init_lora_weights", x)
        for x in ("pissa", "pissa_niter_4", "OLoRA", "corda", "eva", "lora_ga", "loftq")
    ),
    ("dora", "init_lora_weights", "pissa"),
    ("adalora", "init_lora_weights", "pissa"),
    *(("lora", x, {"set": 1}) for x in ("corda_config", "eva_config", "lora_ga_config", "loftq_config")),
    *(("lora", x, {"set": 1}) for x in ("kasa_config", "arrow_config")),
    ("pvera", "sample_at_inference", True),
)


@pytest.mark.parametrize(("method", "option", "value"), OPTIONS)
def test_an_option_that_cannot_federate_is_refused_with_its_reason(method: str, option: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"options\.{option}: got .*, which can't be federated: ") as error:
        Method(method, options={option: value})
    assert any(str(error.value).endswith(x.reason) for x in refusals.OPTIONS if x.option == option)


def test_every_refused_option_is_tested_and_exists_in_peft() -> None:
    tested = {(Method(m).name, o) for m, o, _ in OPTIONS}
    fields = {str(k.value).lower(): v.__dataclass_fields__ for k, v in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    for refused in refusals.OPTIONS:
        assert any((m, refused.option) in tested for m in refused.methods)
        assert all(refused.option in fields[m] for m in refused.methods)


@pytest.mark.parametrize("value", ["gaussian", "orthogonal", True, False])
def test_other_values_of_those_options_are_not_refused(value: object) -> None:
    assert Method(options={"init_lora_weights": value}).config("lm").init_lora_weights == value  # type: ignore[attr-defined]  # of LoRA


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize(
    "settings", [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"kasa_config": KasaConfig()}]
)
def test_peft_does_change_the_base_where_that_is_the_reason(settings: Mapping[str, object]) -> None:
    model = build("llama")
    before = {n: x.detach().clone() for n, x in model.named_parameters()}
    own = dict(model.named_parameters())
    get_peft_model(model, LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, target_modules=["q_proj"], **settings))
    assert changed(before, own) == [f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)]


@pytest.mark.parametrize("name", sorted(refusals.TASKS))
def test_a_method_is_refused_for_the_tasks_it_cannot_do(name: str) -> None:
    tasks, reason = refusals.TASKS[name]
    for model, task in TASKS.items():
        if task not in tasks:
            with pytest.raises(ConfigError, match=f"adapter.method: {name} can't be used to .*: {reason}; use it to "):
                Bridge.attach(build(model), Method(name), task, seed=1)


def test_an_unknown_method_is_refused_with_those_there_are() -> None:
    with pytest.raises(
        ConfigError, match=r"adapter\.method: got 'lorra'; want one of adalora, .*, dora, .*, lora, "
    ) as error:
        Method("lorra").config("lm")
    assert "xlora" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"rank": 0}, "rank: got 0; want at least 1"),
        ({"alpha": 0.0}, "alpha: got 0.0; want more than 0"),
        ({"alpha": float("inf")}, "alpha: got inf; want more than 0"),
        ({"dropout": 1.0}, "dropout: got 1.0; want at least 0 and less than 1"),
        ({"dropout": -0.1}, "dropout: got -0.1; want at least 0 and less than 1"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(settings: dict[str, float], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Method(**settings)  # type: ignore[arg-type]  # as a user's file would


@pytest.mark.parametrize(
    ("method", "text"),
    [
        (Method(options={"rnak": 3}), r"adapter\.options\.rnak: lora has no such option; it has .*use_rslora"),
        (Method("ia3", options={"use_rslora": True}), r"adapter\.options\.use_rslora: ia3 has no such option; it has"),
        (Method(options={"r": 3}), r"adapter\.options\.r: this is set by adapter\.rank"),
        (Method(options={"lora_alpha": 3}), r"adapter\.options\.lora_alpha: this is set by adapter\.alpha"),
        (Method(options={"target_modules": ["q"]}), r"this is set by adapter\.targets"),
        (Method(options={"modules_to_save": ["q"]}), r"this is set by adapter\.save"),
        (Method(options={"task_type": "SEQ_CLS"}), r"adapter\.options\.task_type: lora has no such option"),
        (Method("ia3", dropout=0.1), r"adapter\.dropout: got 0\.1; ia3 has no dropout"),
        (Method("prefix_tuning", targets=("q",)), r"adapter\.targets: prefix_tuning adapts no modules by name"),
        (Method("adaption_prompt", targets=("q",)), r"adapter\.targets: adaption_prompt adapts no modules by name"),
        (Method("trainable_tokens", save=("q",)), r"adapter\.save: trainable_tokens can't train further modules"),
        (Method("oft", options={"oft_block_size": 0}), r"adapter\.options: peft refused the settings of oft: "),
    ],
)
def test_an_option_that_peft_does_not_have_or_we_set_is_refused_by_its_key(method: Method, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        method.config("lm")


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        (Method(rank=5, alpha=12.0, dropout=0.2), {"r": 5, "lora_alpha": 12, "lora_dropout": 0.2}),
        (Method(alpha=12.5), {"lora_alpha": 12.5}),
        (Method("DoRA", rank=5), {"use_dora": True, "r": 5}),
        (Method("rslora"), {"use_rslora": True}),
        (Method("adalora", rank=5), {"init_r": 5, "target_r": 5}),
        (
            Method("loha", rank=5, alpha=3.0, dropout=0.2),
            {"r": 5, "alpha": 3, "module_dropout": 0.2, "rank_dropout": 0.0},
        ),
        (Method("boft", dropout=0.2), {"boft_dropout": 0.2}),
        (Method("oft", rank=5), {"r": 5, "oft_block_size": 0}),
        (Method("oft", options={"oft_block_size": 6}), {"r": 0, "oft_block_size": 6}),
        (Method("shadow"), {"shadow_dropout": 0.0}),
        (Method("supertuning", rank=5), {"r": None}),
        (Method("p-tuning", dropout=0.2), {"num_virtual_tokens": VIRTUAL_TOKENS, "encoder_dropout": 0.2}),
        (Method("prompt_tuning", options={"num_virtual_tokens": 3}), {"num_virtual_tokens": 3}),
        (Method(targets=("all-linear",)), {"target_modules": "all-linear"}),
        (Method(targets=("q", "v"), save=("pooler",)), {"target_modules": {"q", "v"}, "modules_to_save": ["pooler"]}),
    ],
)
def test_settings_reach_pefts_own_fields(method: Method, fields: Mapping[str, object]) -> None:
    config = method.config("lm")
    assert {n: getattr(config, n) for n in fields} == dict(fields)
    assert config.task_type == TaskType.CAUSAL_LM


def test_reading_settings_needs_no_torch_and_no_peft() -> None:
    code = (
        "import sys; from fedpeft.training.methods import Method; Method('lora', options={'use_rslora': True}); "
        "print(sorted({'torch', 'peft', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_dropout_is_on_in_training_and_off_in_evaluation() -> None:
    bridge = Bridge.attach(build("bert"), Method(rank=4, dropout=0.5), "classify", seed=1)
    drops = [x for n, x in bridge.model.named_modules() if n.endswith("lora_dropout.default")]
    assert [x.p for x in drops if isinstance(x, torch.nn.Dropout)] == [0.5] * 4
