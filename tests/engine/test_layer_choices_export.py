"""Layers with fewer heads, without FFN or left out, outside the model: exported directories, ONNX, latency tables, the
teacher's first weights, and work that is shared between subnets, which takes whole layers alone."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from encoder_reference import batch
from layer_choices import CHOICES, HEADS, THREE_OF_FIVE, config, each_choice, spec, supernet
from plain_subprocess import run_plain
from transformers import BertConfig, BertModel

from engine.architecture.architecture import SKIP, Architecture
from engine.architecture.file import load_architecture
from engine.data import Batch, EncodedDataset
from engine.distill.mixed import mixed_states
from engine.distill.room import step_bytes
from engine.errors import UserError
from engine.evaluation.evaluation import predict_batches
from engine.evaluation.shared import SharedEvaluator
from engine.export.export import export_model
from engine.handover import load_plain
from engine.latency.build import Clock
from engine.latency.table import Conditions, LatencyTable, identity
from engine.student import FFNASForMaskedLM, FFNASForSequenceClassification
from engine.student.init import init_from_teacher

SCRIPT = """
import json, sys, torch
from transformers import AutoModelForSequenceClassification
inputs = torch.load(sys.argv[2])
found = []
for folder in json.loads(sys.argv[1]):
    model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        found.append(model(**inputs).logits.tolist())
print(json.dumps([found, [m for m in sys.modules if m.split(".")[0] in ("engine", "kernels", "search")]]))
"""


def inputs(**sizes):
    return dict(zip(("input_ids", "attention_mask", "token_type_ids"), batch(**sizes), strict=True))


@each_choice
@pytest.mark.parametrize("embedding", ["full", "factorized"])
def test_plain_models_compute_what_the_subnet_does(choice, embedding, tmp_path):
    model, given = supernet(embedding_type=embedding, embedding_size=6), inputs()
    export_model(model, None, tmp_path / "m", choice, {"name": "m"}, architecture_file=True)
    plain = load_plain(tmp_path / "m")
    with torch.no_grad():
        expected = model(**given, architecture=choice, output_hidden_states=True)
        got = plain(**given, output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-5, atol=1e-5)  # float32, another order of summation
    torch.testing.assert_close(got.hidden_states[-1], expected.hidden_states[-1], rtol=1e-5, atol=1e-5)
    left = Architecture(tuple(layer for layer in choice.layers if not layer.skipped))
    heads = [HEADS if layer.heads is None else layer.heads for layer in left.layers]
    assert [0 if p is None else p.shape[1] for p in got.attentions] == heads
    assert load_architecture(tmp_path / "m" / "architecture.json", shape=model_shape(model, left)) == left
    assert str(left) in (tmp_path / "m" / "README.md").read_text()
    again = FFNASForSequenceClassification.from_pretrained(tmp_path / "m").eval()
    torch.testing.assert_close(again(**given).logits, expected.logits, rtol=1e-5, atol=1e-5)


def model_shape(model, architecture):
    return replace(model.config.shape, num_layers=len(architecture))


def test_exported_models_load_where_ffnas_is_not_installed(tmp_path):
    model, given = supernet(embedding_type="factorized", embedding_size=6), inputs()
    names = ["three of five heads", "only the middle", "one block of each", "no attention"]
    for name in names:
        export_model(model, None, tmp_path / name.replace(" ", "_"), CHOICES[name], {})
    torch.save(given, tmp_path / "inputs.pt")
    folders = [str(tmp_path / name.replace(" ", "_")) for name in names]
    found, modules = run_plain(SCRIPT, tmp_path, json.dumps(folders), tmp_path / "inputs.pt")
    assert modules == []
    for name, logits in zip(names, found, strict=True):
        with torch.no_grad():
            expected = model(**given, architecture=CHOICES[name]).logits
        torch.testing.assert_close(torch.tensor(logits), expected, rtol=1e-5, atol=1e-5)


def test_the_card_names_heads_and_source_layers(tmp_path):
    model = supernet()
    export_model(model, None, tmp_path / "m", CHOICES["last layer left out"], {})
    export_model(model, None, tmp_path / "n", CHOICES["no FFN"], {})
    export_model(model, None, tmp_path / "o", None, {})
    first, second, plain = ((tmp_path / name / "README.md").read_text() for name in "mno")
    assert "Its layers are layers 0, 1 of the model they were taken from." in first
    assert "| 1 | 4 | `linear(gelu(linear(x,wb1)),wb2)` | 1 | 5/8 | 25 |" in first
    assert "| layer | heads | expression |" in second
    assert "| 2 | 3 | none | 0 | | | 0 |" in " ".join(second.split())
    assert "heads |" not in plain


def test_onnx_computes_the_same(tmp_path):
    choice = Architecture((spec(1, "3/8", 3), SKIP, spec(1, heads=0)))
    pytest.importorskip("onnxruntime", reason="needs the extra ffnas[onnx]")
    pytest.importorskip("onnxscript", reason="needs the extra ffnas[onnx]")
    from engine.export.onnx import OnnxModel, export_onnx

    model = supernet(embedding_type="factorized", embedding_size=6)
    export_model(model, None, tmp_path / "m", choice, {})
    run = OnnxModel(export_onnx(tmp_path / "m"))
    for sizes in ({}, {"rows": 5, "length": 11}):
        given = inputs(**sizes)
        with torch.no_grad():
            expected = model(**given, architecture=choice).logits
        torch.testing.assert_close(torch.as_tensor(run(given)["logits"]), expected, rtol=1e-4, atol=1e-4)


def test_a_factorized_embedding_is_trained_on_masked_tokens_and_saved(tmp_path):
    model = supernet(FFNASForMaskedLM, embedding_type="factorized", embedding_size=6)
    given = inputs()
    model(**given, labels=given["input_ids"]).loss.backward()
    assert model.ffnas.embeddings.dense.weight.shape == (35, 6)
    assert model.ffnas.embeddings.dense.weight.grad.abs().min() > 0
    model.save_pretrained(tmp_path)
    again = FFNASForMaskedLM.from_pretrained(tmp_path).eval()
    assert again.config.embedding_type == "factorized"
    assert torch.equal(again(**given).logits, model(**given).logits)


def test_a_factorized_embedding_starts_as_the_teachers():
    teacher = BertModel(
        BertConfig(vocab_size=53, hidden_size=20, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    )
    student = supernet(embedding_type="factorized", embedding_size=6)
    init_from_teacher(student, teacher)
    block = student.base_model.embeddings
    words = teacher.embeddings.word_embeddings.weight.detach()
    ours = block.dense(block.token_embeddings.weight)[1:] - block.dense.bias
    table = (words - words.mean(0)).double()
    _, values, directions = torch.linalg.svd(table, full_matrices=False)
    wanted = (table @ directions[:6].T).float()[1:]
    torch.testing.assert_close(ours[:, :6].abs(), wanted.abs(), rtol=1e-3, atol=1e-4)  # signs of directions are free
    assert ours[:, 6:].abs().max() == 0
    assert values[5] > values[6]


@each_choice
def test_shared_work_takes_whole_layers_alone(choice):
    model = supernet()
    ids, mask, types = batch(rows=6)
    step = Batch(ids, mask, types, torch.zeros(6, dtype=torch.long))
    whole = Architecture((spec(1, "3/8"), spec(2), spec(1, "5/8")))
    with pytest.raises(UserError, match=r"layers\[\d\]: a step with several subnets takes layers with all their heads"):
        mixed_states(model, step, [whole, choice])
    found = mixed_states(model, step, [whole, whole])[1]  # ratios p/q are no matter
    expected = model.states(ids, mask, types, architecture=whole)
    torch.testing.assert_close(found.hidden[-1][mask], expected.hidden[-1][mask], rtol=1e-4, atol=1e-4)


def test_room_for_training_counts_what_is_left():
    shape = config().shape
    layer = 8 * 35 + 3 * 35 + 2 * 40
    assert step_bytes(Architecture((spec(1), spec(1), spec(1))), shape, 1) == 4 * (3 * 35 + 3 * layer)
    assert step_bytes(Architecture((SKIP, spec(1), SKIP)), shape, 1) == 4 * (3 * 35 + layer)
    pruned = Architecture((spec(0, heads=3), SKIP, SKIP))
    assert step_bytes(pruned, shape, 1) == 4 * (3 * 35 + 4 * 35 + 4 * 21)


def table(shape) -> LatencyTable:
    zero = dict.fromkeys(("pre", "mid", "post"), 0.0)
    return LatencyTable(
        shape, HEADS, "truncate", Conditions(), 10.0, {(1, Fraction(1)): 3.0}, 0.0, zero, {"gelu": 0.0}
    )  # fmt: skip


def test_latency_tables_know_layers_without_ffn_and_refuse_those_with_fewer_heads(tmp_path):
    made = table(config().shape)
    assert made.predict(Architecture((spec(1), spec(0), spec(1, heads=HEADS)))) == 16.0
    with pytest.raises(UserError, match="latency table: is of layers with all 5 heads, a layer has 3"):
        made.predict(THREE_OF_FIVE)
    made.save(tmp_path / "t.json")
    raw = json.loads((tmp_path / "t.json").read_text())["shape"]
    assert "num_heads" not in raw
    assert "trigram" not in raw
    assert LatencyTable.load(tmp_path / "t.json").shape == replace(config().shape, num_heads=None)
    factorized = replace(config().shape, embedding_size=6, trigram=False)
    table(factorized).save(tmp_path / "t.json")
    assert LatencyTable.load(tmp_path / "t.json").shape == replace(factorized, num_heads=None)


def test_names_of_latency_tables_are_those_of_before():
    shape, rest = config().shape, (HEADS, "truncate", (1,), (Fraction(1),), Conditions())
    assert identity(shape, *rest) == identity(replace(shape, num_heads=None), *rest)
    smaller = replace(shape, embedding_size=6)
    assert identity(smaller, *rest) != identity(replace(smaller, trigram=False), *rest)


def test_a_latency_table_is_not_measured_on_such_layers():
    clock = Clock(config().shape, HEADS, "truncate", Conditions(sequence_length=8), (1, 2), (Fraction(1),))
    for layer in (SKIP, spec(0), spec(1, heads=2)):
        with pytest.raises(UserError, match="latency table: is measured on layers with all heads and an FFN"):
            clock.use(Architecture((spec(1), layer, spec(1))))
    clock.use(Architecture((spec(1),) * 3))


@each_choice
def test_shared_evaluation_takes_whole_layers_alone(choice):
    model, rng, count = supernet(), np.random.default_rng(0), 9
    lengths = np.full(count, 6, dtype=np.int32)
    tokens, offsets = rng.integers(1, 53, 6 * count).astype(np.int32), np.arange(0, 6 * count + 1, 6)
    evaluator = SharedEvaluator(model, EncodedDataset(tokens, offsets, lengths, rng.integers(0, 2, count)))
    whole = Architecture((spec(1, "3/8"), spec(2), spec(1, "5/8")))
    with pytest.raises(UserError, match=r"layers\[\d\]: shared evaluation takes layers with all their heads"):
        evaluator.logits([whole, choice])
    (found,) = evaluator.logits([whole])
    assert np.array_equal(found, predict_batches(model, evaluator.batches, architecture=whole)[0])
