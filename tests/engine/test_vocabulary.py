"""A smaller vocabulary: the same batches, the same answers, and the same training as with the whole table."""

from itertools import islice

import numpy as np
import pytest
import torch

from engine.architecture.architecture import Architecture, LayerSpec
from engine.architecture.shape import ModelShape
from engine.data import EncodedDataset, TaskSpec
from engine.student.heads import FFNASForMaskedLM
from engine.student.supernet import build_student
from engine.student.vocabulary import Vocabulary, of_first_batches
from engine.training.loop import cycle
from engine.training.optim import build_optimizer, clipped_step
from kernels.language.expression import GELU_FFN

PAD = 3
SHAPE = ModelShape(24, 2, 24, vocab_size=90, embedding_size=8, teacher_hidden_size=16)


@pytest.fixture
def data() -> EncodedDataset:
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 12, size=40)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = rng.integers(5, 90, size=offsets[-1]).astype(np.int32)
    labels = rng.integers(0, 2, size=40)
    return EncodedDataset(tokens, offsets, second=lengths.astype(np.int32), labels=labels, pad_id=PAD)


def student(**options):
    architecture = Architecture(tuple(LayerSpec(GELU_FFN, 2, 1) for _ in range(2)))
    task = TaskSpec("toy", "classification", ("text",), "label", ("no", "yes"), "accuracy")
    options = {"task": task, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **options}
    return build_student(SHAPE, architecture, 2, pad_token_id=PAD, seed=0, **options)


def logits(model, batch):
    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits


def trained(model, batches):
    """AdamW on gold labels, with decay, clipping and a falling rate; in float64, so that rounding is out of the way."""
    model = model.double().train()
    optimizer = build_optimizer(model, lr=0.02, weight_decay=0.1)
    for batch in batches:
        torch.nn.functional.cross_entropy(logits(model, batch), batch.labels).backward()
        clipped_step(optimizer, list(model.parameters()), 0.5)
        optimizer.zero_grad()
    return model.eval()


def test_batches_are_the_same_under_other_numbers(data):
    vocabulary = Vocabulary.of([data.tokens[:200]], PAD)
    assert vocabulary.ids.tolist() == sorted({PAD, *data.tokens[:200].tolist()})
    few = data.select(np.arange(10))
    vocabulary = Vocabulary.of([few.tokens], PAD)
    for own, renumbered in zip(few.batches(4, seed=1), vocabulary.renumber(few).batches(4, seed=1), strict=True):
        assert renumbered.input_ids.max() < len(vocabulary)
        assert torch.equal(vocabulary.original(renumbered).input_ids, own.input_ids)
        assert torch.equal(renumbered.attention_mask, own.attention_mask)
        assert torch.equal(renumbered.labels, own.labels)


def test_a_token_outside_is_no_row_of_any_table(data):
    few = data.select(np.arange(3))
    vocabulary = Vocabulary.of([few.tokens], PAD)
    rest = vocabulary.renumber(data)
    assert set(np.unique(rest.tokens)) == {-1, *range(len(vocabulary))} - {vocabulary.pad_id}
    with pytest.raises(IndexError):
        logits(vocabulary.student(student()), next(rest.batches(40)))


def test_only_the_tokens_of_the_first_batches_count(data):
    for steps in (0, 1, 3, 10, 25):
        found = of_first_batches(data, 4, 7, steps)
        wanted = [b.input_ids[b.attention_mask] for b in islice(cycle(data, 4, seed=7), steps)]
        kept = {int(t) for array in found for t in np.unique(array)} - {PAD}
        assert kept == {int(t) for ids in wanted for t in ids}


def test_the_student_answers_bit_for_bit_the_same_and_shares_every_other_tensor(data):
    few = data.select(np.arange(10))
    vocabulary, model = Vocabulary.of([few.tokens], PAD), student().eval()
    smaller = vocabulary.student(model)
    own, other = next(few.batches(10)), next(vocabulary.renumber(few).batches(10))
    with torch.no_grad():
        assert torch.equal(logits(smaller, other), logits(model, own))
    whole = model.state_dict()
    for name, tensor in smaller.state_dict().items():
        if "token_embeddings" in name:
            assert torch.equal(tensor, whole[name][vocabulary.ids])
        else:
            assert tensor.data_ptr() == whole[name].data_ptr(), name
    assert model.config.vocab_size == 90
    assert model.config.pad_token_id == PAD


def test_training_ends_with_the_same_weights(data):
    """Rows of tokens that occur end as in the whole table; the others, had they been kept, would only have decayed."""
    few = data.select(np.arange(20))
    vocabulary = Vocabulary.of([few.tokens], PAD)
    renumbered = vocabulary.renumber(few)
    smaller = trained(vocabulary.student(student()), islice(cycle(renumbered, 4, seed=2), 8))
    whole = trained(student(), islice(cycle(few, 4, seed=2), 8))
    ids = vocabulary.ids
    for (name, own), other in zip(whole.named_parameters(), smaller.parameters(), strict=True):
        kept = own[ids] if "token_embeddings" in name else own
        # the norm of all gradients is summed in another order: 1e-16 relative, and AdamW's first steps divide by it
        torch.testing.assert_close(other, kept, rtol=1e-9, atol=1e-11, msg=name)
    assert not torch.allclose(whole.base_model.embeddings.token_embeddings.weight[ids], student().base_model.embeddings
                              .token_embeddings.weight[ids].double(), atol=1e-3)  # fmt: skip


def test_models_that_answer_with_tokens_are_refused(data):
    with pytest.raises(ValueError, match="whole vocabulary"):
        Vocabulary.of([data.tokens], PAD).student(student(task=None, model_class=FFNASForMaskedLM))
    with pytest.raises(ValueError, match="padding token is 3"):
        Vocabulary.of([data.tokens], 0).student(student())
