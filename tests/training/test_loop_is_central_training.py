"""One client with all the data is plain centralised training: torch and peft by hand, sharing no code with the loop."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fedpeft.adapters import Update
from fedpeft.channel import PlainChannel
from fedpeft.rounds import Job, SumRound, contribute, derive
from fedpeft.rules import FactorMean, ServerState, Task
from fedpeft.training import packaged
from fedpeft.training.loop import TorchTrainer
from fedpeft.training.settings import Method, Model, Training

ROUNDS, SEED = 3, 5


def federated(found, channel):
    """The adapter after three rounds of ``fedit`` with one client."""
    rule = FactorMean()
    state = ServerState(Task(found.start().spec), found.start())
    for number in range(ROUNDS):
        round_ = SumRound(state, {0: found.start().spec.layers[0].rank}, 1, rule=rule)
        sent = round_.outbox()[0]
        (done,) = found.train_many([Job(0, number, derive(SEED, "train", number, 0), sent.adapter)])
        update = Update(sent.adapter, done.trained)
        term = contribute(rule, channel, update, done.metrics.examples, done.metrics, sent.task)
        round_.receive(0, term, number, 0)
        round_.close()
        state = round_.result().state
    return state.adapter


def epochs_by_hand(lengths, batch, epochs, seed):
    """The rows of each batch, from what the documentation of the order says."""
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        rows = list(rng.permutation(len(lengths)))
        pools = [rows[i : i + 16 * batch] for i in range(0, len(rows), 16 * batch)]
        batches = []
        for pool in pools:
            pool = sorted(pool, key=lambda row: lengths[row])
            batches += [pool[i : i + batch] for i in range(0, len(pool), batch)]
        yield from (batches[i] for i in rng.permutation(len(batches)))


def by_hand(model, start, rows, loss_of, training):
    """The named parameters after the same steps, of a peft model that starts from the same tensors."""
    live = {n: x for n, x in model.named_parameters() if x.requires_grad}
    with torch.no_grad():
        for name, value in start.tensors().items():
            live[live_name(name)].copy_(torch.from_numpy(value))
    model.train()
    for number in range(ROUNDS):
        received = {n: x.detach().clone() for n, x in live.items()}
        if training.optimiser == "sgd":
            optimiser = torch.optim.SGD(live.values(), training.lr, momentum=training.momentum)
        else:
            optimiser = torch.optim.AdamW(live.values(), training.lr, weight_decay=training.weight_decay)
        seed = derive(SEED, "train", number, 0)
        for batch in epochs_by_hand(rows, training.batch, training.epochs, seed):
            optimiser.zero_grad()
            loss = loss_of(model, batch)
            loss = loss + training.prox / 2 * sum(((x - received[n]) ** 2).sum() for n, x in live.items())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(list(live.values()), training.clip)
            optimiser.step()
    return live


def live_name(name):
    """peft's own name of a tensor of the adapter."""
    for part, factor in (("/a", "lora_A"), ("/b", "lora_B")):
        if name.endswith(part):
            return f"{name.removesuffix(part)}.{factor}.default.weight"
    return name


def alone(found):
    """The adapter after three rounds that start where the last one ended, with no server."""
    adapter = found.start()
    for number in range(ROUNDS):
        (done,) = found.train_many([Job(0, number, derive(SEED, "train", number, 0), adapter)])
        adapter = done.trained
    return adapter


def assert_equal(found, live, training):
    """Training itself: bit for bit, as it is the same operations in the same order.

    With ``exact`` a round changes no bit of it. Else it sends trained − start in fp32, which is off by half a unit in
    the last place where a number changed sign or more than doubled. With sgd that is all. AdamW divides each
    gradient by its own size, so that where a gradient is next to nothing that half unit may grow, to a part of lr.
    """
    trained, sent = alone(found).tensors(), federated(found, PlainChannel()).tensors()
    exact = federated(found, PlainChannel(exact=True)).tensors()
    assert {live_name(n) for n in trained} == set(live)
    want = {n: live[live_name(n)].detach().numpy() for n in trained}
    for name, x in trained.items():
        np.testing.assert_array_equal(x, want[name], err_msg=name)
        np.testing.assert_array_equal(exact[name], x, err_msg=name)
    off = np.concatenate([np.abs(x - want[n]).ravel() for n, x in sent.items()])
    if training.optimiser == "sgd":
        assert off.max() <= 1e-6
    else:
        assert np.quantile(off, 0.997) <= 1e-6
        assert off.max() <= training.lr / 200
    start = found.start().tensors()
    assert max(np.abs(x - start[n]).max() for n, x in want.items()) > training.lr / 10, "nothing was trained"


def classifier(name, table, share, training):
    found = TorchTrainer.load(
        Model(name), Method(rank=3, alpha=6.0, targets=("query", "value")), training, share(table, len(table) - 2), 3
    )
    folder = packaged.folder(name)
    words = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=3, lora_alpha=6, target_modules=["query", "value"])
    texts, labels = list(table.texts[:-2]), torch.from_numpy(table.labels[:-2])
    lengths = [len(words(x, truncation=True, max_length=training.length)["input_ids"]) for x in texts]

    def loss_of(model, batch):
        inputs = words(
            [texts[i] for i in batch], truncation=True, max_length=training.length, padding=True, return_tensors="pt"
        )
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        return cross_entropy(logits, labels[torch.tensor(batch)])

    live = by_hand(get_peft_model(base, config), found.start(), lengths, loss_of, training)
    assert_equal(found, live, training)


PLAIN = Training(lr=3e-3, batch=6, epochs=2, length=32, clip=0.5, device="cpu")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"weight_decay": 0.1, "prox": 0.5},
        {"optimiser": "sgd", "lr": 0.1, "momentum": 0.5, "prox": 0.3},
    ],
)
def test_a_federation_of_one_is_central_training_of_a_classifier(sentences, share, changes):
    classifier("tiny-bert", sentences, share, replace(PLAIN, **changes))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("changes", [{}, {"optimiser": "sgd", "lr": 0.1, "momentum": 0.5}])
def test_a_federation_of_one_is_central_training_of_minilm(sentences, share, changes):
    classifier("minilm", sentences, share, replace(PLAIN, batch=15, epochs=1, **changes))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_federation_of_one_is_central_training_of_a_language_model(dialogues, share):
    training = replace(PLAIN, batch=5, length=24)
    method = Method(rank=3, alpha=6.0, targets=("q_proj", "v_proj"))
    found = TorchTrainer.load(Model("tiny-llama"), method, training, share(dialogues, 12), 3)
    folder = packaged.folder("tiny-llama")
    words = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder)
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"])
    rows, labels = [], []
    for prompt, reply in zip(dialogues.texts[:12], dialogues.replies[:12], strict=True):
        before = words(f"<user>{prompt}</s><bot>", add_special_tokens=False)["input_ids"]
        whole = (before + words(f"{reply}</s>", add_special_tokens=False)["input_ids"])[:24]
        rows.append(whole)
        labels.append([-100] * len(before) + whole[len(before) :])

    def loss_of(model, batch):
        longest = max(len(rows[i]) for i in batch)
        pad = lambda x, value: x + [value] * (longest - len(x))  # noqa: E731
        ids = torch.tensor([pad(rows[i], 0) for i in batch])
        mask = torch.tensor([pad([1] * len(rows[i]), 0) for i in batch])
        return model(
            input_ids=ids, attention_mask=mask, labels=torch.tensor([pad(labels[i], -100) for i in batch])
        ).loss

    live = by_hand(get_peft_model(base, config), found.start(), [len(x) for x in rows], loss_of, training)
    assert_equal(found, live, training)
