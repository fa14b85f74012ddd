"""Training by forward passes alone: a walk by hand, its slope, its replay, and what it can't do."""

from dataclasses import replace

import numpy as np
import pytest

from fedpeft.adapters import Adapter, LowRank, Pool, flat, places, walked
from fedpeft.data import Encoded, Store
from fedpeft.rounds import Done, Failed, Job, Metrics
from fedpeft.rules import FedKSeed
from fedpeft.training.batches import collate
from fedpeft.training.forward_only import refused, walk
from fedpeft.training.objectives import outcome
from fedpeft.training.passes import groups
from fedpeft.training.settings import Method, Training
from tests.training.cohort_cases import TRAINING, distance, jobs, trainers, with_tails

WALK = Training(optimiser="sgd", lr=0.05, batch=2, accumulate=2, clip=None)
POOL = Pool(seed=2, size=5, epsilon=1e-2)
REPLAY = 1e-6
"""What the server may be off by: it adds up in another order, in fp64, and rounds to fp32 once, numbers below 4."""
COUNT = 7  # rows
N = 6 + 8 + 3


def rows():
    lengths = np.arange(1, COUNT + 1)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    whole = np.ones(COUNT, np.uint8)
    return Encoded(Store(np.zeros(offsets[-1], np.int32), offsets, None, np.arange(COUNT), whole), np.arange(COUNT))


def start():
    rng = np.random.default_rng(8)
    a, b, head = (rng.normal(size=s).astype(np.float32) for s in ((2, 3), (4, 2), (3,)))
    return Adapter({"w": LowRank(a, b, 0.5)}, {"head": head}, {"drawn": np.arange(3)})


def job(pool=POOL, seed=11):
    return Job(4, 2, seed, start(), pool=pool)


def linear(tensors, batch, seen=None):
    """A loss that is linear in the tensors, of another slope for each row; a row's loss counts twice if it is odd."""
    x = np.concatenate([tensors[n].ravel() for n in sorted(tensors)]).astype(np.float64)
    if seen is not None:
        seen.append((tuple(batch.tolist()), {n: (v.dtype, v.shape) for n, v in tensors.items()}))
    units = [1 + i % 2 for i in batch.tolist()]
    slopes = [np.random.default_rng([5, i]).normal(size=N) for i in batch.tolist()]
    loss = sum(u * (3 + s @ x) for u, s in zip(units, slopes, strict=True))
    return Metrics(float(loss), sum(units), len(batch) if x[0] > 0 else 0)


def slope_of(group, z):
    """The slope along z of the mean of these rows' losses."""
    every = [i for batch in group for i in batch.tolist()]
    weights = [1 + i % 2 for i in every]
    slopes = [np.random.default_rng([5, i]).normal(size=N) for i in every]
    return sum(w * (s @ z) for w, s in zip(weights, slopes, strict=True)) / sum(weights)


def by_hand(training, seed=11, pool=POOL):
    """The walk again, with slopes that are exact: where it ends, its moves, and the directions that were drawn."""
    draw, x = np.random.default_rng([seed, 1]), flat(start().tensors())
    begun, moves, drawn = x.copy(), np.zeros(pool.size), []
    for group in groups(rows(), training, np.random.default_rng(seed)):
        drawn.append(int(draw.integers(pool.size)))
        z = pool.direction(drawn[-1], N)
        g = slope_of(group, z) + training.prox * ((x - begun) @ z)
        if training.clip is not None:
            g = np.clip(g, -training.clip, training.clip)
        x = x - training.lr * g * z
        moves[drawn[-1]] -= training.lr * g
    return x, moves, drawn


@pytest.mark.parametrize(
    "change", [{}, {"epochs": 3}, {"steps": 9}, {"prox": 0.3, "steps": 9}, {"clip": 0.4, "steps": 9}, {"accumulate": 1}]
)
def test_a_walk_is_the_one_by_hand_and_its_moves_say_all_of_it(change):
    training = replace(WALK, **change)
    done, (ends, moves, drawn) = walk(job(), rows(), training, linear), by_hand(training)
    np.testing.assert_allclose(done.moves, moves, atol=2e-6)  # fp32 of numbers below 4, over 2 · 0.01, times lr
    np.testing.assert_allclose(flat(done.trained.tensors()), ends, atol=5e-6)
    assert done.moves.shape == (5,)
    again = POOL.moved(start().tensors(), done.moves)
    assert distance(done.trained, done.trained.put(again)) <= REPLAY
    assert set(np.flatnonzero(done.moves)) == set(drawn)
    assert distance(done.trained, start()) > 0.01
    assert done.trained.fixed.keys() == {"drawn"}
    assert (done.travel, done.kept) == (0.0, {})
    if "clip" in change:
        assert np.abs(moves).max() <= len(drawn) * 0.4 * 0.05
        assert not np.allclose(by_hand(replace(training, clip=None))[1], moves, atol=1e-3)


def test_a_step_takes_two_passes_over_its_batches_from_copies_in_fp32():
    seen = []
    walk(job(), rows(), WALK, lambda tensors, batch: linear(tensors, batch, seen))
    batches = [tuple(x.tolist()) for group in groups(rows(), WALK, np.random.default_rng(11)) for x in group]
    steps = [list(group) for group in groups(rows(), WALK, np.random.default_rng(11))]
    assert len(seen) == 2 * len(batches)
    at = 0
    for group in steps:
        want = [tuple(x.tolist()) for x in group]
        assert [x for x, _ in seen[at : at + 2 * len(group)]] == want * 2
        at += 2 * len(group)
    shapes = {n: (np.dtype(np.float32), x.shape) for n, x in start().tensors().items()}
    assert all(x == shapes for _, x in seen)


def test_losses_are_the_means_of_both_sides():
    first = next(iter(groups(rows(), WALK, np.random.default_rng(11))))
    done = walk(job(), rows(), replace(WALK, steps=1), linear)
    both = [
        linear(
            places(start().tensors()).unflatten(
                flat(start().tensors()) + side * 0.01 * POOL.direction(by_hand(replace(WALK, steps=1))[2][0], N)
            ),
            np.concatenate(first),
        )
        for side in (1, -1)
    ]
    assert done.metrics.loss == pytest.approx((both[0].loss + both[1].loss) / 2, abs=1e-4)
    assert done.metrics.units == both[0].units
    assert done.metrics.correct == (both[0].correct + both[1].correct) / 2
    assert done.metrics.examples == COUNT


@pytest.mark.parametrize("prox", [0.0, 0.3])
def test_a_step_on_texts_that_have_no_loss_is_along_no_gradient(prox):
    training = replace(WALK, prox=prox, steps=4, batch=1, accumulate=1)
    without = next(iter(groups(rows(), training, np.random.default_rng(11))))[0].item()

    def losses(tensors, batch):
        return linear(tensors, batch) if without not in batch.tolist() else Metrics()

    done = walk(job(), rows(), training, losses)
    left = walk(job(), rows(), replace(training, steps=1), losses)
    assert np.isfinite(done.moves).all()
    assert np.any(done.moves)
    assert not np.any(left.moves)
    assert (left.metrics.loss, left.metrics.units, left.metrics.examples) == (0, 0, COUNT)


def test_a_walk_depends_on_its_job_alone():
    one, two, other = (walk(job(seed=s), rows(), WALK, linear) for s in (11, 11, 12))
    np.testing.assert_array_equal(one.moves, two.moves)
    assert distance(one.trained, two.trained) == 0
    assert not np.array_equal(one.moves, other.moves)


def test_what_can_not_be_walked_is_refused():
    with pytest.raises(ValueError, match=r"^the job has no pool of directions; want one"):
        walk(job(pool=None), rows(), WALK, linear)
    with pytest.raises(ValueError, match=r"^no rows to train on$"):
        walk(job(), Encoded(rows().store, np.zeros(0, np.int64)), WALK, linear)
    for value in (np.nan, np.inf):
        with pytest.raises(FloatingPointError, match=r"^the loss is (nan|inf) at step 1: lower training.lr"):
            walk(job(), rows(), WALK, lambda *_, value=value: Metrics(value, 1, 0))
    batches, sides = len(next(iter(groups(rows(), WALK, np.random.default_rng(11))))), []
    with pytest.raises(FloatingPointError, match=r"^the loss is inf at step 1"):  # behind, and not ahead
        walk(job(), rows(), WALK, lambda *_: sides.append(0) or Metrics(2.0 if len(sides) <= batches else np.inf, 1, 0))
    for key, value, want in (("optimiser", "adamw", '"sgd"'), ("momentum", 0.5, "0.0"), ("weight_decay", 0.1, "0.0")):
        training = replace(WALK, **{key: value})
        said = refused(training)
        assert said.startswith(f"{key}: got ")
        assert said.endswith(f"want {want}")
        with pytest.raises(ValueError, match=f"^{key}: got "):
            walk(job(), rows(), training, linear)
    assert refused(WALK) == ""


FORWARD = replace(TRAINING, optimiser="sgd", lr=0.02, steps=6, clip=None)
WIDE = Pool(seed=9, size=40, epsilon=1e-3)


def slope_by_torch(loop, some, group, z):
    """The slope along z of the mean loss, by torch's own gradients."""
    loop.bridge.write(some.start)
    live = loop.bridge.trainable("ab")
    loop.bridge.model.eval()
    rows = loop.rows(some.client, "train")
    batches = [collate(rows, index, loop.frozen, loop.training.image_size, loop.place.device) for index in group]
    each = [outcome(loop.bridge.model, loop.frozen.head, x, loop.frozen.vocabulary)[0].sum() for x in batches]
    (sum(each) / sum(x.units for x in batches)).backward()
    slopes = {n: x.grad.numpy().astype(np.float64).ravel() for n, x in live.items()}
    return float(np.concatenate([slopes[n] for n in sorted(slopes)]) @ z)


@pytest.mark.parametrize("model", ["tiny-bert", "tiny-llama", "tiny-vit"])
def test_torchs_walk_is_along_the_gradient_and_replayed_by_its_moves(model):
    loop, cohort = trainers(model, training=FORWARD)
    # At a rank below the model's, and beside a tail.
    some = with_tails([replace(x, pool=WIDE, start=x.start.cut(2)) for x in jobs(loop, 0, 2)], 1, 2)
    some[0] = replace(some[0], tail={})
    found = list(loop.train_many(some))
    for x, done in zip(some, found, strict=True):
        assert isinstance(done, Done), done
        assert done.trained.spec == x.start.spec
        replayed = x.start.put(WIDE.moved(x.start.tensors(), done.moves))
        assert distance(replayed, done.trained) <= REPLAY
        assert 0 < np.count_nonzero(done.moves) <= 6
        assert distance(x.start, done.trained) > 1e-3
    # A server whose one client this is has what it trained: by scalars alone, to 1e-6.
    rule = FedKSeed(seed=9, size=40)
    for x, done in zip(some, found, strict=True):
        assert distance(walked(x.start, rule.pool, done.moves.astype(np.float32)), done.trained) <= REPLAY

    one = replace(loop.training, steps=1)
    (done,) = loop.over(loop.federation, one).train_many(some[:1])
    (group,) = groups(loop.rows(0, "train"), one, np.random.default_rng(some[0].seed))
    (chosen,) = np.flatnonzero(done.moves)
    z = WIDE.direction(int(chosen), flat(some[0].start.tensors()).size)
    want = slope_by_torch(loop, replace(some[0], start=some[0].start), group, _padded(loop, some[0], z))
    # A central difference is off by ε²/6 of a third derivative, and by fp32's 1e-7 of the loss, over 2ε.
    assert done.moves[chosen] == pytest.approx(-0.02 * want, rel=0.01, abs=0.02 * 3e-4)

    alone = list(cohort.train_many(some))
    for mine, theirs in zip(found, alone, strict=True):
        np.testing.assert_array_equal(mine.moves, theirs.moves)
        assert distance(mine.trained, theirs.trained) == 0
    assert [x.metrics for x in found] == [x.metrics for x in alone]


def _padded(loop, some, z):
    """A direction of a client's tensors, as one of the model's, which are larger."""
    mine = some.start.put(places(some.start.tensors()).unflatten(z))
    whole = loop.bridge.padded(mine).tensors()
    return np.concatenate([whole[n].ravel() for n in sorted(whole)])


def test_a_model_is_walked_without_dropout_and_one_that_breaks_is_one_failure():
    loop, _ = trainers("tiny-bert", Method(rank=3, targets=("query",), dropout=0.5), FORWARD)
    (first,) = (replace(x, pool=WIDE) for x in jobs(loop, 1))
    broken = replace(
        first, start=first.start.put({n: np.full_like(x, np.nan) for n, x in first.start.tensors().items()})
    )
    results = list(loop.train_many([first, broken, first]))
    assert isinstance(results[1], Failed)
    assert results[1].reason.startswith("client 1: the loss is nan at step 1")
    np.testing.assert_array_equal(results[0].moves, results[2].moves)
    (other,) = loop.over(loop.federation, replace(FORWARD, optimiser="adamw")).train_many([first])
    assert isinstance(other, Failed)
    assert "optimiser: got" in other.reason


def test_gradients_are_estimated_without_bias():
    """The mean of g·z over all of a large pool nears the gradient: cosine 1/√(1 + n/K), here 0.99."""
    size, slopes = 20, np.random.default_rng(1).normal(size=20)
    pool = Pool(3, 1000, 1e-3)
    found = np.zeros(size)
    for i in range(pool.size):
        z = pool.direction(i, size)
        found += (slopes @ z) * z / pool.size
    cosine = found @ slopes / np.linalg.norm(found) / np.linalg.norm(slopes)
    assert cosine == pytest.approx(1 / np.sqrt(1 + size / pool.size), abs=0.01)
    np.testing.assert_allclose(found, slopes, atol=5 * np.linalg.norm(slopes) / np.sqrt(pool.size))
