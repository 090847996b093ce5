"""Smaller token tables: against numpy's singular values, the whole model's answers, and the parameter formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from encoder_reference import randomize, small_config

from engine.architecture.params import count_parameters
from engine.errors import UserError
from engine.export.export import export_model
from engine.handover import load_plain
from engine.student import FFNASForMaskedLM, FFNASForMultipleChoice, FFNASForSequenceClassification, FFNASModel
from engine.student.tables import cut_vocabulary, factorize_embeddings

VOCABULARY, HIDDEN = 53, 15


def make(cls=FFNASForSequenceClassification, **changes):
    torch.manual_seed(0)
    fields = {"embedding_type": "full", "num_labels": 3, "teacher_hidden_size": None, "pad_token_id": 2}
    return randomize(cls(small_config(**fields | changes))).eval()


def texts(ids=range(3, VOCABULARY), rows=4, length=7, seed=0):
    rng = np.random.default_rng(seed)
    found = torch.from_numpy(rng.choice(np.asarray(ids), (rows, length)))
    mask = torch.arange(length)[None] < torch.from_numpy(rng.integers(1, length + 1, rows))[:, None]
    return found, mask


@torch.no_grad()
def answers(model, ids, mask):
    return model(input_ids=ids.masked_fill(~mask, model.config.pad_token_id), attention_mask=mask)[0]


def table(model):
    return model.base_model.embeddings.token_embeddings.weight.detach()


def product(model):
    """The rows a factorized model computes."""
    dense = model.base_model.embeddings.dense
    return (table(model).double() @ dense.weight.double().T + dense.bias.double()).detach()


@pytest.mark.parametrize("cls", [FFNASForSequenceClassification, FFNASModel])
def test_full_rank_changes_nothing(cls):
    model = make(cls)
    counts = np.random.default_rng(1).integers(0, 100, VOCABULARY)
    for given in (None, counts, torch.from_numpy(counts)):
        made = factorize_embeddings(model, HIDDEN, given)
        assert made.config.embedding_type == "factorized"
        assert made.config.embedding_size == HIDDEN
        torch.testing.assert_close(answers(made, *texts()), answers(model, *texts()), rtol=1e-5, atol=1e-5)
    assert model.config.embedding_type == "full"
    assert made.base_model.embeddings.token_embeddings.padding_idx == 2


def test_models_without_a_pooler_keep_having_none():
    model = FFNASModel(small_config(embedding_type="full"), add_pooling_layer=False).eval()
    for made in (factorize_embeddings(model, 4), cut_vocabulary(model, [0, 9, 4])):
        assert made.cls_pooler is None


@pytest.mark.parametrize("rank", [1, 4, 14])
def test_the_error_is_what_singular_values_leave(rank):
    """Eckart and Young: the least weighted error is the sum of the squares of the left-out singular values."""
    model = make()
    counts = np.random.default_rng(2).integers(0, 1000, VOCABULARY) * (np.arange(VOCABULARY) % 3 == 0)
    weights = (counts + 1) / (counts + 1).sum()
    rows = table(model).double().numpy()
    mean = weights @ rows
    values = np.linalg.svd(np.sqrt(weights)[:, None] * (rows - mean), compute_uv=False)
    made = factorize_embeddings(model, rank, counts)
    assert table(made).shape == (VOCABULARY, rank)
    error = weights @ np.square(product(made).numpy() - rows).sum(axis=1)
    np.testing.assert_allclose(error, np.square(values[rank:]).sum(), rtol=1e-4)
    np.testing.assert_allclose(made.base_model.embeddings.dense.bias.detach().numpy(), mean, atol=1e-7)
    plain = factorize_embeddings(model, rank)
    assert weights @ np.square(product(plain).numpy() - rows).sum(axis=1) > error * 1.02


def test_the_copy_is_trainable_shares_nothing_and_is_counted_by_the_formula():
    model = make().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.base_model.embeddings.token_embeddings.weight.requires_grad_(False)
    for made in (factorize_embeddings(model, 6), cut_vocabulary(model, range(1, 30))):
        assert made.training
        assert all(p.requires_grad for p in made.parameters())
        layers = made.config.full_architecture
        parts = [p.numel() for name, p in made.base_model.named_parameters() if name.startswith(("emb", "enc"))]
        assert sum(parts) == count_parameters(layers, made.config.shape, fit_dense=False)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(1)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("kind", ["full", "trigram", "factorized"])
@pytest.mark.parametrize("cls", [FFNASForSequenceClassification, FFNASModel])
def test_a_cut_model_answers_bit_for_bit_the_same(cls, kind):
    model = make(cls, embedding_type=kind)
    kept = np.random.default_rng(3).permutation(VOCABULARY)[:20]
    kept = np.unique(np.append(kept, 2))[::-1].copy()
    made = cut_vocabulary(model, kept)
    number = np.full(VOCABULARY, -1)
    number[kept] = np.arange(len(kept))
    assert made.config.vocab_size == len(kept)
    assert made.config.pad_token_id == number[2]
    assert torch.equal(table(made), table(model)[torch.from_numpy(kept)])
    ids, mask = texts(kept[kept != 2])
    assert torch.equal(answers(made, torch.from_numpy(number)[ids], mask), answers(model, ids, mask))


def test_other_tokens_numbers_follow_or_go():
    model = make()
    model.config.bos_token_id, model.config.eos_token_id = 7, 8
    config = cut_vocabulary(model, torch.tensor([2, 5, 7])).config
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 2, None)
    model = make(pad_token_id=None)
    assert cut_vocabulary(model, [5]).config.pad_token_id is None


def test_both_together_are_exported_and_read_without_ffnas(tmp_path):
    model = factorize_embeddings(cut_vocabulary(make(), range(2, 40)), 5, np.arange(38))
    export_model(model, None, tmp_path / "m", None, {})
    ids, mask = texts(range(1, 38))
    other = load_plain(tmp_path / "m").eval()
    torch.testing.assert_close(answers(other, ids, mask), answers(model, ids, mask), rtol=1e-5, atol=1e-6)


def test_bad_input_is_named():
    model = make()
    for rank in (0, HIDDEN + 1, 3.0, True, "4"):
        with pytest.raises(UserError, match=r"rank: .* is out of range; use 1 to the hidden size 15"):
            factorize_embeddings(model, rank)
    with pytest.raises(UserError, match=r"counts: shape \[52\] for a vocabulary of 53"):
        factorize_embeddings(model, 4, np.zeros(52))
    for wrong in (-1.0, float("nan")):
        with pytest.raises(UserError, match=r"counts: .* is no count"):
            factorize_embeddings(model, 4, np.full(VOCABULARY, wrong))
    with pytest.raises(UserError, match="embedding_type: factorized cannot be factorized"):
        factorize_embeddings(factorize_embeddings(model, 4), 4)
    for wrong, message in (
        ([2, 53], "53 is not in the vocabulary of 53"),
        ([2, -1], "-1 is not"),
        ([2, 4, 4], "4 comes 2 times"),
        ([3, 4], "padding token 2 is left out"),
        ([], "flat list"),
        ([2.0], "flat list"),
    ):
        with pytest.raises(UserError, match=f"kept_ids: .*{message}"):
            cut_vocabulary(model, wrong)
    masked = make(FFNASForMaskedLM)
    for call in (lambda: cut_vocabulary(masked, [2]), lambda: factorize_embeddings(masked, 4)):
        with pytest.raises(UserError, match="answers with tokens"):
            call()


def test_choices_are_served_too():
    model = make(FFNASForMultipleChoice)
    ids, mask = texts(rows=6)
    made = factorize_embeddings(model, HIDDEN)
    shaped = ids.view(2, 3, -1), mask.view(2, 3, -1)
    torch.testing.assert_close(answers(made, *shaped), answers(model, *shaped), rtol=1e-5, atol=1e-5)
