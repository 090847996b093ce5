"""First weights from a teacher: the best low-rank approximation, the same every time, closer than a random start."""

from __future__ import annotations

import time

import pytest
import torch
from encoder_reference import TRUNCATE, architecture, small_config
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    ElectraConfig,
    ElectraModel,
    RobertaConfig,
    RobertaModel,
)

from engine.errors import UserError
from engine.student import FFNASModel
from engine.student.from_encoder import standard_model
from engine.student.init import init_from_teacher, principal_directions

V, HT = 300, 20


def bert_config(**changes):
    sizes = {"vocab_size": V, "hidden_size": HT, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertConfig(**sizes | {"intermediate_size": 16, "max_position_embeddings": 40} | changes)


def make_teacher(cls=BertModel, config=None):
    torch.manual_seed(0)
    teacher = cls(config or bert_config()).eval()
    with torch.no_grad():  # a decaying spectrum, as real word tables have, and a mean
        table = teacher.get_input_embeddings().weight
        table.copy_(torch.randn(table.shape) * torch.logspace(0, -1.5, table.shape[1]) + 0.3)
        for parameter in teacher.base_model.embeddings.parameters():
            if parameter is not table and parameter.dim() == 2:
                parameter.copy_(0.3 * torch.randn(parameter.shape))
    return teacher


def make_student(seed=0, hidden=15, width=7, **changes):
    torch.manual_seed(seed)
    sizes = {"vocab_size": V, "hidden_size": hidden, "intermediate_size": hidden, "embedding_size": width}
    layers = architecture([(TRUNCATE[0], 1, 1)] * 3)
    extra = {"max_position_embeddings": 32, "teacher_hidden_size": HT, "layers": layers, "num_attention_heads": 1}
    return FFNASModel(small_config(**sizes | extra | changes)).eval()


def before_layernorm(student, ids):
    """Sum of the current token's, position and segment embeddings; neighbours left out."""
    block = student.embeddings
    tokens = block.token_embeddings.weight[ids]
    if block.dense is not None:
        width = tokens.shape[-1]
        tokens = tokens @ block.dense.weight[:, width : 2 * width].T + block.dense.bias
    return tokens + block.position_embeddings.weight[: ids.shape[1]] + block.segment_embeddings.weight[0]


def svd_error(table, rank):
    """Smallest possible mean squared error of a rank-`rank` approximation of the centred table."""
    values = torch.linalg.svdvals((table - table.mean(0)).double())
    return (values[rank:] ** 2).sum().item() / table.shape[0]


@pytest.mark.parametrize(("hidden", "width"), [(15, 7), (20, 20), (33, 9), (9, 15)])
def test_token_embeddings_are_the_best_approximation_of_their_rank(hidden, width):
    teacher, student = make_teacher(), make_student(hidden=hidden, width=width, pad_token_id=None)
    init_from_teacher(student, teacher)
    table = teacher.embeddings.word_embeddings.weight.detach().double()
    directions = principal_directions(table - table.mean(0))[:, :hidden]
    ids = torch.arange(V)[:, None]
    with torch.no_grad():
        student.embeddings.position_embeddings.weight.zero_()
        student.embeddings.segment_embeddings.weight.zero_()
        ours = before_layernorm(student, ids)[:, 0].double()[:, : directions.shape[1]]
        back = ours @ directions.T  # from the student's coordinates to the teacher's
    # the mean's part outside the student's coordinates cannot be represented; it is the same for every token
    missing = table.mean(0) - table.mean(0) @ directions @ directions.T
    error = (back + missing - table).square().sum(1).mean().item()
    best = svd_error(table, min(hidden, width))
    # tables are stored in float32: squared error of 1e-7 relative per entry of order 1
    assert error == pytest.approx(best, rel=1e-4, abs=1e-10)


def test_the_padding_tokens_embedding_stays_zero_for_a_trigram():
    student = make_student()
    init_from_teacher(student, make_teacher())
    assert (student.get_input_embeddings().weight[0] == 0).all()
    assert (student.get_input_embeddings().weight[1:] != 0).any(dim=1).all()


def test_full_embedding_of_the_teachers_width_keeps_every_distance():
    teacher, student = make_teacher(), make_student(hidden=HT, embedding_type="full")
    init_from_teacher(student, teacher)
    ids = torch.arange(24).reshape(2, 12)
    block = teacher.embeddings
    theirs = block.word_embeddings.weight[ids] + block.position_embeddings.weight[:12]
    theirs = (theirs + block.token_type_embeddings.weight[0]).flatten(0, 1)
    ours = before_layernorm(student, ids).flatten(0, 1)
    # a rotation: distances between any two tokens at any two positions agree to float32 rounding of sums of 20 squares
    torch.testing.assert_close(torch.cdist(ours, ours), torch.cdist(theirs, theirs), rtol=1e-4, atol=2e-3)


def test_initialisation_is_deterministic_and_touches_nothing_else():
    teacher = make_teacher()
    students = [make_student(seed=1) for _ in range(2)]
    before = {n: p.clone() for n, p in students[0].named_parameters()}
    states = []
    for student in students:
        torch.randn(3)  # the global generator's position must not matter
        state = torch.get_rng_state()
        init_from_teacher(student, teacher)
        assert torch.equal(torch.get_rng_state(), state)
        states.append(student.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    for name, value in states[0].items():
        touched = name.startswith(("embeddings", "fit_dense")) and "layernorm" not in name
        assert torch.equal(value, before[name]) != touched, name


def test_signs_and_order_of_the_directions_are_fixed():
    table = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)).double() * torch.tensor([1, 9, 3, 2, 5, 7])
    directions = principal_directions(table)
    variances = (table @ directions).square().sum(0)
    assert (variances.diff() <= 0).all()
    assert (directions.gather(0, directions.abs().argmax(0, keepdim=True)) > 0).all()
    flipped = principal_directions(-table)
    torch.testing.assert_close(flipped, directions)


def hidden_loss(student, teacher, ids):
    with torch.no_grad():
        states = student.states(ids)
        out = teacher(ids, output_hidden_states=True).hidden_states
        pairs = zip((states.embeddings, *states.hidden), (out[0], out[1], out[1], out[2]), strict=True)
        return sum((student.fit_dense(a) - b).square().mean().item() for a, b in pairs)


@pytest.mark.parametrize(("hidden", "width"), [(15, 7), (33, 9)])
def test_the_first_hidden_loss_is_much_lower_than_from_a_random_start(hidden, width):
    teacher, student = make_teacher(), make_student(hidden=hidden, width=width)
    ids = torch.randint(0, V, (4, 30), generator=torch.Generator().manual_seed(3))
    usual = hidden_loss(student, teacher, ids)
    init_from_teacher(student, teacher)
    assert hidden_loss(student, teacher, ids) < 0.6 * usual


def test_another_vocabulary_is_refused():
    with pytest.raises(UserError, match=r"299 tokens, the teacher 300"):
        init_from_teacher(make_student(vocab_size=299), make_teacher())


def test_a_student_without_projection_and_with_other_positions():
    student = make_student(teacher_hidden_size=None, max_position_embeddings=60)
    further = student.embeddings.position_embeddings.weight[40:].detach().clone()
    init_from_teacher(student, make_teacher(BertForSequenceClassification))
    assert torch.equal(student.embeddings.position_embeddings.weight[40:], further)


FAMILIES = {
    "roberta": (RobertaModel, RobertaConfig),
    "electra-narrow": (ElectraModel, ElectraConfig),
    "distilbert": (DistilBertModel, DistilBertConfig),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families(family):
    cls, config_class = FAMILIES[family]
    sizes = {"vocab_size": V, "hidden_size": HT, "num_hidden_layers": 2, "num_attention_heads": 2}
    if family == "distilbert":
        sizes = {"vocab_size": V, "dim": HT, "n_layers": 2, "n_heads": 2, "hidden_dim": 16}
    if family == "electra-narrow":
        sizes["embedding_size"] = 12
    teacher = make_teacher(cls, config_class(**sizes | {"max_position_embeddings": 42}))
    student = make_student()
    init_from_teacher(student, teacher)
    assert all(torch.isfinite(p).all() for p in student.parameters())
    table = teacher.base_model.embeddings.position_embeddings.weight.detach()
    words = teacher.get_input_embeddings().weight.detach().double()
    directions = principal_directions(words - words.mean(0))
    first = 2 if family == "roberta" else 0  # RoBERTa's first position is padding_idx + 1
    expected = (table[first : first + 32].double() @ directions)[:, :15]
    ours = student.embeddings.position_embeddings.weight.detach().double()
    torch.testing.assert_close(ours[:, : expected.shape[1]], expected, rtol=1e-5, atol=1e-6)


def test_a_table_of_real_size_takes_less_than_two_seconds():
    table = torch.randn(30522, 384)
    began = time.perf_counter()
    principal_directions(table)
    assert time.perf_counter() - began < 2


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_teacher_that_is_a_model_of_ours_gives_the_same_first_weights(family):
    roberta = {"vocab_size": V, "hidden_size": HT, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = RobertaConfig(**roberta, intermediate_size=16, max_position_embeddings=40, pad_token_id=1)
    teacher = make_teacher() if family == "bert" else make_teacher(RobertaModel, config)
    first, second = make_student(), make_student()
    init_from_teacher(first, teacher)
    init_from_teacher(second, standard_model(teacher))
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        if family == "bert" or "fit_dense" not in name:  # random texts: RoBERTa counts no position at a padding token
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
