"""Shared-work evaluation: logits equal one-by-one evaluation bit for bit, whatever is shared, kept or given up."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from encoder_reference import TRUNCATE, architecture, random_architecture, randomize, small_config

from engine.data import EncodedDataset, TaskSpec
from engine.errors import UserError
from engine.evaluation.evaluation import evaluate, predict, predict_batches
from engine.evaluation.kept_activations import ActivationStore
from engine.evaluation.shared import SharedEvaluator
from engine.evaluation.trie import Work, build_trie, work_apart, work_shared
from engine.student import FFNASForSequenceClassification
from engine.student.ffn import FFNStack
from kernels import use_backend

TASK = TaskSpec("toy", "classification", ("text",), "label", ("bad", "so-so", "good"))


def supernet(layers=3, seed=0, **changes):
    stored = architecture([(TRUNCATE[0], 4, 1)] * layers)
    config = small_config(layers=stored, num_hidden_layers=layers, num_labels=3, **changes)
    return randomize(FFNASForSequenceClassification(config), seed).eval()


def dataset(rows=70, seed=0, longest=20, vocab=53):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, longest + 1, rows)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = rng.integers(1, vocab, offsets[-1]).astype(np.int32)
    return EncodedDataset(tokens, offsets, lengths.astype(np.int32), rng.integers(0, 3, rows))


def candidates(count, seed=0, layers=3, texts=TRUNCATE[:3]):
    rng = np.random.default_rng(seed)
    return [random_architecture(rng, layers, 4, texts) for _ in range(count)]


def one_by_one(model, batches, chosen, precision="fp32"):
    return np.stack([predict_batches(model, batches, precision=precision, architecture=a)[0] for a in chosen])


@pytest.mark.parametrize("texts", [TRUNCATE[:1], TRUNCATE], ids=["one expression", "five expressions"])
@pytest.mark.parametrize("sizes", [(15, 13), (48, 48)], ids=str)
def test_logits_equal_one_by_one_evaluation_bit_for_bit(texts, sizes):
    model = supernet(hidden_size=sizes[0], intermediate_size=sizes[1])
    chosen = candidates(40, texts=texts)
    evaluator = SharedEvaluator(model, dataset(), batch_size=32)
    logits = evaluator.logits(chosen)
    assert np.array_equal(logits, one_by_one(model, evaluator.batches, chosen))
    assert np.array_equal(logits[3], predict(model, dataset(), batch_size=32, architecture=chosen[3])[0])


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": 1},
        {"layers": 2, "embedding_type": "full"},
        {"attn_implementation": "eager"},
        {"width_policy": "pad"},
        {"pooling": "mean"},
        {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2},
    ],
    ids=lambda c: ",".join(c),
)
def test_every_kind_of_model(changes):
    model = supernet(**changes).train()
    chosen = candidates(12, layers=changes.get("layers", 3))
    evaluator = SharedEvaluator(model, dataset(20), batch_size=16)
    logits = evaluator.logits(chosen)
    assert not model.training
    assert np.array_equal(logits, one_by_one(model, evaluator.batches, chosen))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_backend_and_precision(backend, precision):
    model, chosen = supernet(hidden_size=48, intermediate_size=48), candidates(12)
    with use_backend(backend):
        evaluator = SharedEvaluator(model, dataset(40), batch_size=16, precision=precision)
        logits = evaluator.logits(chosen)
        assert np.array_equal(logits, one_by_one(model, evaluator.batches, chosen, precision))


def test_one_sequence_per_batch():
    # few rows take other kernels than many
    model, chosen = supernet(), candidates(10)
    evaluator = SharedEvaluator(model, dataset(5, longest=24), batch_size=1)
    assert np.array_equal(evaluator.logits(chosen), one_by_one(model, evaluator.batches, chosen))


@pytest.mark.parametrize("budget", [0, 1 << 12, 1 << 15, 1 << 18], ids=lambda b: f"{b} bytes")
def test_any_budget_gives_the_same_bits_and_is_kept(budget):
    model, chosen = supernet(), candidates(30)
    expected = SharedEvaluator(model, dataset(), batch_size=32).logits(chosen)
    evaluator = SharedEvaluator(model, dataset(), batch_size=32, budget_bytes=budget)
    assert np.array_equal(evaluator.logits(chosen), expected)
    assert evaluator.store.peak_bytes <= budget


def test_candidates_given_one_at_a_time_share_work_with_earlier_ones():
    model, chosen = supernet(), candidates(30, texts=TRUNCATE[:1])
    together = SharedEvaluator(model, dataset(), batch_size=32)
    single = SharedEvaluator(model, dataset(), batch_size=32)
    logits = together.logits(chosen)
    assert np.array_equal(logits, np.concatenate([single.logits([a]) for a in chosen]))
    assert single.work["attention"] == together.work["attention"]


def test_work_is_what_the_trie_says_and_far_less_than_one_by_one():
    model, chosen = supernet(), candidates(60, texts=TRUNCATE[:1])
    evaluator = SharedEvaluator(model, dataset(30), batch_size=30)
    evaluator.logits(chosen)
    plans = [model.base_model.planner(a) for a in chosen]
    shared, apart = work_shared(build_trie(plans)), work_apart(plans)
    assert evaluator.work == {"attention": shared.attentions, "ffn": shared.ffns}
    assert apart == Work(180, sum(layer.stack for a in chosen for layer in a.layers))
    assert shared.attentions < apart.attentions / 2


def test_changed_weights_are_noticed():
    model, chosen = supernet(), candidates(4)
    evaluator = SharedEvaluator(model, dataset(20), batch_size=20)
    before = evaluator.logits(chosen)
    with torch.no_grad():
        model.ffnas.encoder[0].attention.query.weight.add_(0.1)
    after = evaluator.logits(chosen)
    assert not np.array_equal(before, after)
    assert np.array_equal(after, one_by_one(model, evaluator.batches, chosen))


def test_slices_cover_the_data_once_and_scores_do_not_depend_on_who_is_along():
    model, data, chosen = supernet(), dataset(), candidates(9)
    evaluator = SharedEvaluator(model, data, batch_size=8, slices=4, seed=3)
    assert [sum(len(evaluator.batches[i]) for i in part) for part in evaluator.slices] == [18, 18, 17, 17]
    assert sorted(evaluator.labels()) == sorted(data.labels)
    assert evaluator.evaluate(chosen, TASK)[4] == evaluator.evaluate(chosen[4:5], TASK)[0]
    part = evaluator.logits(chosen[:2], evaluator.slices[1])
    assert np.array_equal(part, one_by_one(model, [evaluator.batches[i] for i in evaluator.slices[1]], chosen[:2]))


def test_metrics_equal_those_of_evaluate():
    model, chosen = supernet(), candidates(5)
    found = SharedEvaluator(model, dataset(), batch_size=32).evaluate(chosen, TASK)
    assert found == [evaluate(model, dataset(), TASK, batch_size=32, architecture=a) for a in chosen]


def test_equal_candidates_are_computed_once():
    model, chosen = supernet(), candidates(1)
    evaluator = SharedEvaluator(model, dataset(20), batch_size=20)
    logits = evaluator.logits(chosen * 5)
    assert np.array_equal(logits[0], logits[4])
    assert evaluator.work["attention"] == 3


def test_expressions_with_one_canonical_form_share_a_branch():
    model = supernet()
    texts = ("linear(max(linear(x,wb1),x),wb2)", "linear(max(x,linear(x,wb1)),wb2)")
    plans = [model.base_model.planner(architecture([(t, 2, 2)] * 3)) for t in texts]
    assert work_shared(build_trie(plans)).attentions == 3


def test_a_continuation_that_changes_bits_is_not_taken(monkeypatch):
    real, plans = FFNStack.part, []

    def other_bits(stack, x, plan, begin, end):  # of every FFN but the first of a call
        plans.append((begin, end))
        return real(stack, x, plan, begin, end) * (1 + (end - begin - 1) * 1e-6)

    monkeypatch.setattr(FFNStack, "part", other_bits)
    model, chosen = supernet(), candidates(8, texts=TRUNCATE[:1])
    evaluator = SharedEvaluator(model, dataset(20), batch_size=20)
    plan = model.base_model.planner(chosen[0])[2]._replace(stack=2)
    assert not evaluator._continuation.is_exact(model.ffnas.encoder[2].all_ffn, plan, torch.zeros(20, 5, 15))
    plans.clear()
    evaluator.logits(chosen)
    walked = [p for p in plans if p not in ((0, 2), (0, 1), (1, 2))]
    assert walked, "no stack of three was run"
    assert all(begin == 0 for begin, _ in walked)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda m: SharedEvaluator(m, dataset(5), slices=6), ValueError, "slices=6"),
        (lambda m: SharedEvaluator(m, dataset(5), budget_bytes=-1), ValueError, "budget_bytes"),
        (lambda m: SharedEvaluator(m, dataset(5)).logits([]), ValueError, "at least one"),
        (
            lambda m: SharedEvaluator(m, dataset(5)).logits([architecture([(TRUNCATE[0], 5, 1)] * 3)]),
            UserError,
            "stack 5",
        ),
    ],
)
def test_bad_input_is_refused(make, error, words):
    with pytest.raises(error, match=words):
        make(supernet())


def test_the_store_gives_up_idle_entries_first_and_pinned_ones_from_the_top():
    store = ActivationStore(10 * 4)
    for depth, name in enumerate("abc"):
        store.put(name, torch.zeros(3), depth)
    store.release("c")
    store.put("d", torch.zeros(3), 3)  # c is idle
    assert [store.get(n) is not None for n in "abcd"] == [True, True, False, True]
    store.put("e", torch.zeros(4), 4)  # only pinned ones are left: a is the shallowest
    assert [store.get(n) is not None for n in "abde"] == [False, True, True, True]
    assert store.misses == 1
    store.put("f", torch.zeros(11), 5)  # larger than everything
    assert store.get("f") is None
    assert len(store) == 3
    store.clear()
    assert (store.used_bytes, len(store)) == (0, 0)
