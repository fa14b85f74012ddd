"""Tiny models, and every peft configuration that can be made for them: shared by the tests of the bridge."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from fedpeft.adapters import Adapter, Update
from fedpeft.channel import PlainChannel
from fedpeft.rounds import Metrics, SumRound, contribute
from fedpeft.rules import FactorMean, ServerState, Task
from fedpeft.training.bridge import Bridge
from fedpeft.training.methods import Method, TaskName

TASKS: Mapping[str, TaskName] = {"bert": "classify", "llama": "lm", "gpt2": "lm", "vit": "image"}

# What peft says of a layer or machine, none of it about us: these run as they should.
PEFT_WARNINGS = (
    "ignore:Failed to load the CUDA extension",
    "ignore:Setting boft_n_butterfly_factor to 1",
    "ignore:Detected that the base layer has no bias term",
    "ignore:Unsupported layer type",
    "ignore:Sparse invariant checks",
    "ignore:Model has `tie_word_embeddings=True`",
    "ignore:Model with `tie_word_embeddings=True`",
    "ignore:Specified to not save vera_A",
)


@dataclass(frozen=True, slots=True)
class Case:
    """One configuration on one tiny model."""

    name: str
    model: str
    method: Method

    @property
    def task(self) -> TaskName:
        return TASKS[self.model]


def build(model: str, seed: int = 0) -> PreTrainedModel:
    """The tiny model of this name: sizes that all differ, weights large enough for an adapter to matter."""
    common = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 24}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        made: PreTrainedModel
        if model == "bert":
            still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
            made = BertForSequenceClassification(
                BertConfig(
                    vocab_size=50, intermediate_size=36, num_labels=3, max_position_embeddings=40, **common, **still
                )
            )
        elif model == "llama":
            made = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=50,
                    intermediate_size=36,
                    num_key_value_heads=1,
                    max_position_embeddings=64,
                    tie_word_embeddings=True,
                    pad_token_id=0,
                    **common,
                )
            )
        elif model == "gpt2":
            still = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
            made = GPT2LMHeadModel(
                GPT2Config(vocab_size=50, n_embd=24, n_layer=2, n_head=2, n_inner=36, n_positions=40, **still)
            )
        else:
            made = ViTForImageClassification(
                ViTConfig(intermediate_size=36, image_size=16, patch_size=4, num_labels=5, **common)
            )
        for x in made.parameters():
            if x.ndim > 1:
                x.data.mul_(6.0)
    return made.eval()


def batch(model: str, seed: int, rows: int = 4) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs and labels of one client."""
    draw = torch.Generator().manual_seed(seed)
    if model == "vit":
        return {"pixel_values": torch.randn(rows, 3, 16, 16, generator=draw)}, torch.randint(
            0, 5, (rows,), generator=draw
        )
    tokens = torch.randint(3, 50, (rows, 7), generator=draw)
    tokens[:, 2] = 5  # aLoRA's invocation token
    labels = torch.randint(0, 3, (rows,), generator=draw) if model == "bert" else tokens
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, labels


def train(bridge: Bridge, model: str, seed: int, parts: str = "ab", lr: float = 0.05) -> None:
    """Two real gradient steps on one client's batch."""
    inputs, labels = batch(model, seed)
    bridge.model.train()
    optimiser = torch.optim.SGD(bridge.trainable(parts).values(), lr=lr)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for _ in range(2):
            scores = bridge.model(**inputs).logits
            if scores.ndim == 3:
                scores, want = scores[:, bridge.prompt_length : -1].flatten(0, 1), labels[:, 1:].flatten()
            else:
                want = labels
            optimiser.zero_grad()
            functional.cross_entropy(scores, want).backward()
            optimiser.step()


@torch.no_grad()
def logits(model: torch.nn.Module, name: str, seed: int = 99) -> Tensor:
    """What a model says of one fixed batch."""
    scores: Tensor = model.eval()(**batch(name, seed)[0]).logits
    return scores


def one_round(bridge: Bridge, model: str, clients: int = 3) -> ServerState:
    """The server's state after a round of FedIT in which each client trained from the same start."""
    start = bridge.read()
    state = ServerState(Task(start.spec), start)
    rule, channel = FactorMean(), PlainChannel()
    running = SumRound(state, dict.fromkeys(range(clients), 10**6), quorum=clients, channel=channel, rule=rule)
    for client, broadcast in running.outbox().items():
        bridge.write(broadcast.adapter)
        train(bridge, model, seed=client)
        update = Update(broadcast.adapter, bridge.read())
        weight = 1.0 + client
        term = contribute(rule, channel, update, weight, Metrics(examples=4.0), broadcast.task)
        running.receive(client, term, broadcast.task.round, broadcast.task.pass_)
    running.close()
    return running.result().state


def without_head(trained: Adapter, start: Adapter) -> Adapter:
    """The trained adapter with the start's classification head: what the method itself has learned."""
    heads = {n: x for n, x in start.dense.items() if "modules_to_save" in n}
    return trained.put(heads)


def save_bare(model: str, folder: Path) -> None:
    """The tiny model's files as one finds them: an encoder without a head, a language model whole."""
    whole = build(model)
    (whole if TASKS[model] == "lm" else whole.base_model).save_pretrained(folder)


_OPTIONS: Mapping[str, Mapping[str, object]] = {
    "adaption_prompt": {"adapter_len": 5, "adapter_layers": 1},
    "c3a": {"block_size": 4},
    "fourierft": {"n_frequency": 10},
    "road": {"group_size": 4},
    "tinylora": {"u": 5},
    "trainable_tokens": {"token_indices": [3, 4, 7, 9]},
    "vblora": {"num_vectors": 5, "vector_length": 4},
    "waveft": {"n_frequency": 10},
}
_ONLY = {"adaption_prompt": ("llama",), "shadow": ("llama",), "trainable_tokens": ("llama",)}
_PROMPTS = ("cartridge", "p_tuning", "prefix_tuning", "prompt_tuning")
_EVERYWHERE = (
    *("lora", "adalora", "beft", "boft", "c3a", "deft", "delora", "fourierft", "frod", "glora", "gralora", "hira"),
    *("hra", "ia3", "lily", "ln_tuning", "loha", "lokr", "miss", "oft", "osf", "peanut", "psoft", "pvera", "randlora"),
    *("road", "shira", "supertuning", "tinylora", "unilora", "vblora", "vera", "waveft"),
)

METHODS: tuple[str, ...] = (*_EVERYWHERE, *_PROMPTS, *_ONLY)
"""The methods that federate."""


def _plain() -> list[Case]:
    models: dict[str, tuple[str, ...]] = {}
    models |= dict.fromkeys(_EVERYWHERE, ("bert", "llama", "vit")) | dict.fromkeys(_PROMPTS, ("bert", "llama")) | _ONLY
    return [
        Case(f"{m}-{model}", model, Method(m, rank=4, options=_OPTIONS.get(m, {})))
        for m, on in models.items()
        for model in on
    ]


def _variant(name: str, model: str = "llama", method: str = "lora", rank: int = 4, **options: object) -> Case:
    return Case(f"{name}-{model}", model, Method(method, rank=rank, options=options))


_TARGETS: tuple[tuple[str, str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("convolution", "vit", ("projection", "q_proj"), ()),
    ("embedding", "llama", ("embed_tokens",), ()),
    ("output-layer", "llama", ("lm_head",), ()),
    ("all-linear", "bert", ("all-linear",), ()),
    ("conv1d-all", "gpt2", ("c_attn", "c_proj", "c_fc"), ()),
    ("whole-output-layer", "llama", ("q_proj",), ("lm_head",)),
    ("whole-pooler", "bert", ("query",), ("pooler",)),
)

CASES: tuple[Case, ...] = (
    *_plain(),
    *(Case(f"lora-{n}-{m}", m, Method(rank=4, targets=t, save=s)) for n, m, t, s in _TARGETS),
    Case("dropout-bert", "bert", Method(rank=4, dropout=0.2)),
    Case("dora-alias-bert", "bert", Method("DoRA", rank=4)),
    Case("dora-convolution-vit", "vit", Method("dora", rank=4, targets=("projection",))),
    Case("dora-embedding-llama", "llama", Method("dora", rank=4, targets=("embed_tokens",))),
    _variant("dora", "gpt2", use_dora=True),
    _variant("rslora", "gpt2", use_rslora=True),
    _variant("rank-pattern", rank_pattern={"layers.0.self_attn.q_proj": 7}),
    _variant("alpha-pattern", alpha_pattern={"layers.1.self_attn.v_proj": 3}),
    _variant("bias-all", "bert", bias="all"),
    _variant("bias-lora", "bert", bias="lora_only"),
    _variant("lora-bias", "bert", lora_bias=True),
    *(_variant(f"init-{x}", init_lora_weights=x) for x in (False, "gaussian", "orthogonal", "mica")),
    _variant("qalora", use_qalora=True, qalora_group_size=4),
    _variant("alora", alora_invocation_tokens=[5]),
    _variant("layer-replication", layer_replication=[[0, 2], [1, 2]]),
    _variant("layers", layers_to_transform=[1]),
    _variant("parameters", target_parameters=["q_proj.weight"]),
    _variant("tokens", trainable_token_indices=[3, 4]),
    _variant("velora", velora_config={}),
    _variant("rslora", method="adalora", use_rslora=True),
    _variant("boft-2", method="boft", boft_block_size=2, boft_n_butterfly_factor=2),
    _variant("deft-qr", method="deft", decomposition_method="qr"),
    _variant("deft-para", method="deft", para=True),
    _variant("glora-vector", method="glora", config_A_B="vector", config_C="vector", config_D_E="vector"),
    _variant("gralora-hybrid", method="gralora", hybrid_r=2),
    _variant("hira-gaussian", method="hira", init_weights="gaussian"),
    _variant("hra-gs", method="hra", apply_GS=True, init_weights=False),
    _variant("hra-random", method="hra", init_weights=False),
    _variant("lokr-lycoris", method="lokr", init_weights="lycoris"),
    _variant("lokr-both", method="lokr", rank=2, decompose_both=True),
    _variant("miss-bat", method="miss", init_weights="bat"),
    _variant("miss-mini", method="miss", init_weights="mini", mini_r=2),
    _variant("oft-block", method="oft", oft_block_size=6),
    _variant("oft-constrained", method="oft", coft=True, eps=1.0),
    _variant("oft-shared", method="oft", block_share=True),
    _variant("oft-exact", method="oft", use_cayley_neumann=False),
    _variant("osf-rank", method="osf", effective_rank=5),
    _variant("p-tuning-lstm", method="p_tuning", encoder_reparameterization_type="LSTM", encoder_hidden_size=10),
    _variant("prefix-projected", method="prefix_tuning", prefix_projection=True, encoder_hidden_size=10),
    _variant("prefix-projected", "bert", method="prefix_tuning", prefix_projection=True, encoder_hidden_size=10),
    _variant("prompt-vocabulary", method="prompt_tuning", prompt_tuning_init="SAMPLE_VOCAB"),
    _variant("psoft-pissa", method="psoft", ab_svd_init="pissa_init"),
    _variant("psoft-lowrank", method="psoft", psoft_svd="lowrank"),
    _variant("randlora-sparse", method="randlora", sparse=True),
    _variant("road-2", method="road", variant="road_2", group_size=4),
    _variant("shira-seed", method="shira", random_seed=3),
    _variant("supertuning-rank", method="supertuning", r=5, lora_alpha=6),
    _variant("tinylora-tied", method="tinylora", u=5, weight_tying=1.0),
    _variant("unilora-saved", method="unilora", save_indices=True),
    _variant("vblora-top", method="vblora", num_vectors=5, vector_length=4, save_only_topk_weights=True),
    _variant("vera-projection", method="vera", save_projection=False),
    _variant("waveft-proportional", method="waveft", n_frequency=10, proportional_parameters=True),
)
"""Every configuration that is tested, each name once."""


def attach(case: Case, seed: int) -> Bridge:
    """The case's method on its tiny model, with its own random draws from ``seed``."""
    return Bridge.attach(build(case.model), case.method, case.task, seed)


def changed(before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> list[str]:
    """Names in ``now`` of tensors that are not as they were ``before``."""
    return [n for n, x in now.items() if not torch.equal(x, before[n])]


def rescaled(adapter: Adapter, factor: float) -> Adapter:
    """The adapter with other scales."""
    return replace(adapter, layers={n: replace(x, scale=x.scale * factor) for n, x in adapter.layers.items()})


def spread(adapter: Adapter, seed: int) -> Adapter:
    """The adapter with every trained tensor drawn anew, of both signs, so that nothing is zero."""
    rng = np.random.default_rng(seed)
    return adapter.put({n: rng.normal(0, 0.3, x.shape).astype(np.float32) for n, x in adapter.tensors().items()})
