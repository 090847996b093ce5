"""Exported directories on machines without ffnas: plain PyTorch gives our numbers, for every head and operator."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from encoder_reference import architecture, batch, randomize, small_config
from plain_subprocess import run_plain
from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification, BertTokenizer

from engine.errors import UserError
from engine.export.export import export_model
from engine.handover import FILES, auto_map, load_plain
from engine.handover.generate import expressions_source
from engine.student import (
    FFNASForMaskedLM,
    FFNASForMultipleChoice,
    FFNASForQuestionAnswering,
    FFNASForSequenceClassification,
    FFNASModel,
)
from kernels.language.expression import parse_expression
from kernels.language.operators import BINARY, OPERATORS, UNARY
from kernels.reference.ffn import evaluate

HEADS = (
    FFNASModel,
    FFNASForSequenceClassification,
    FFNASForQuestionAnswering,
    FFNASForMultipleChoice,
    FFNASForMaskedLM,
)
LAYERS = [
    ("tanh(linear(gelu(linear(x,wb1)),wb2))", 2, 2),
    ("linear(relu(mul(linear(x,wb1),x)),wb2)", 1, 3),
    ("linear(gelu(linear(max(x,tanh(x)),wb1)),wb2)", 1, 1),
]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(48))]


def tensors(output):
    return [value for value in output.to_tuple() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("head", HEADS, ids=lambda h: h.__name__)
@pytest.mark.parametrize("embedding", ["trigram", "factorized", "full"])
def test_plain_models_compute_what_ours_do(head, embedding, tmp_path):
    model = randomize(head(small_config(layers=architecture(LAYERS), embedding_type=embedding))).eval()
    export_model(model, None, tmp_path / "model", None, {})
    plain = load_plain(tmp_path / "model")
    ids, mask, types = batch()
    if head is FFNASForMultipleChoice:
        ids, mask, types = (t[:, None].expand(-1, 2, -1).contiguous() for t in (ids, mask, types))
        ids[:, 1] = ids[:, 1].flip(0)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, token_type_ids=types)
        got = plain(ids, attention_mask=mask, token_type_ids=types)
    assert type(got).__module__.startswith("transformers.")
    for a, b in zip(tensors(got), tensors(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # float32, another order of summation


def test_plain_models_give_attentions_hidden_states_and_losses(tmp_path):
    model = randomize(FFNASForSequenceClassification(small_config(layers=architecture(LAYERS)))).eval()
    export_model(model, None, tmp_path / "model", None, {})
    plain = load_plain(tmp_path / "model")
    ids, mask, types = batch()
    options = {"attention_mask": mask, "token_type_ids": types, "labels": torch.tensor([0, 1, 1])}
    expected = model(ids, **options, output_hidden_states=True)
    got = plain(ids, **options, output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-5, atol=1e-6)
    for a, b in zip(got.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert all((p * ~mask[:, None, None, :]).sum() == 0 for p in got.attentions)
    assert plain(ids, return_dict=False, **options)[0].requires_grad


@pytest.mark.parametrize("policy", ["truncate", "pad"])
@pytest.mark.parametrize("name", [*UNARY, *BINARY])
def test_every_operator_of_the_table_is_written_out(name, policy):
    """Each on the plain linear pair; binary ones also at unequal widths, the inner one narrower (pad: wider)."""
    inner = 5 if policy == "truncate" else 16
    operand = "linear(x,wb1)" if name in UNARY else "linear(x,wb1),x"
    text = f"linear({name}({operand}),wb2)"
    expression = parse_expression(text)
    hidden, ffn = (11, 5) if policy == "truncate" else (11, 16)
    source = expressions_source(architecture([(text, 1, 1)]), hidden, ffn, policy)
    scope: dict = {}
    exec(compile(source, "expressions", "exec"), scope)  # our own generated text
    dense1, dense2 = torch.nn.Linear(hidden, inner).double(), torch.nn.Linear(inner, hidden).double()
    x = 3 * torch.randn(7, hidden, dtype=torch.float64)
    weights = (dense1.weight, dense1.bias, dense2.weight, dense2.bias)
    torch.testing.assert_close(scope["BODIES"][0](x, dense1, dense2), evaluate(expression, x, *weights, policy=policy))


def test_an_operator_that_is_no_plain_pytorch_is_refused(monkeypatch):
    from types import MappingProxyType

    from engine.handover import generate

    row = OPERATORS["relu"]
    odd = type(row)(row.name, 1, row.opcode, lambda a: torch._C._nn.gelu_(a), row.gradient)
    monkeypatch.setattr(generate, "OPERATORS", MappingProxyType({**OPERATORS, "relu": odd}))
    with pytest.raises(UserError, match="'relu' uses"):
        expressions_source(architecture([("linear(relu(linear(x,wb1)),wb2)", 1, 1)]), 4, 4, "truncate")


def test_the_directory_tells_transformers_where_its_code_is(tmp_path):
    export_model(FFNASForQuestionAnswering(small_config()), None, tmp_path / "m", None, {}, drawing=b"\x89PNG")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["auto_map"] == auto_map("FFNASForQuestionAnswering")
    named = {place.partition(".")[0] for place in config["auto_map"].values()}
    assert all((tmp_path / "m" / f"{module}.py").is_file() for module in named)
    assert config["custom_pipelines"]["question-answering"]["pt"] == ["AutoModelForQuestionAnswering"]
    assert all((tmp_path / "m" / name).is_file() for name in FILES)
    card = (tmp_path / "m" / "README.md").read_text()
    assert "![The layers, input at the bottom](architecture.png)" in card
    assert "trust_remote_code=True" in card


SCRIPT = """
import json, sys, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
folder, texts = sys.argv[1], json.loads(sys.argv[2])
result = {}
model = AutoModelForSequenceClassification.from_pretrained(folder + "/class", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder + "/class", trust_remote_code=True)
with torch.no_grad():
    result["logits"] = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.tolist()
classify = pipeline("text-classification", model=folder + "/class", trust_remote_code=True)
result["labels"] = [a["label"] for a in classify(texts)]
fill = pipeline("fill-mask", model=folder + "/mlm", trust_remote_code=True)
result["filled"] = fill("w1 w2 [MASK] w3", top_k=1)[0]["token_str"]
tied = fill.model
result["tied"] = tied.lm_head.decoder.weight.data_ptr() == tied.get_input_embeddings().weight.data_ptr()
answer = pipeline("question-answering", model=folder + "/qa", trust_remote_code=True)
result["answer"] = answer(question=texts[0], context=" ".join(f"w{i}" for i in range(40)), max_answer_len=5)
result["answers"] = answer([{"question": t, "context": "w7 w8 w9"} for t in texts])
result["modules"] = sorted(m for m in sys.modules if m.split(".")[0] in ("engine", "kernels", "search", "triton"))
print(json.dumps(result))
"""


def test_directories_load_and_predict_without_ffnas(tmp_path):
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(WORDS))
    tokenizer = BertTokenizer(vocab=str(vocabulary))
    config = {"layers": architecture(LAYERS), "vocab_size": len(WORDS)}
    classes = {"id2label": {0: "neg", 1: "pos"}, "label2id": {"neg": 0, "pos": 1}}
    models = {
        "class": FFNASForSequenceClassification(small_config(**config, **classes)),
        "mlm": FFNASForMaskedLM(small_config(**config)),
        "qa": FFNASForQuestionAnswering(small_config(**config)),
    }
    for name, model in models.items():
        randomize(model).eval().get_input_embeddings().weight.data[0] = 0
        export_model(model, tokenizer, tmp_path / name, None, {})
    texts = ["w1 w2 w3", "w9 w8 w7 w6 w5 w4", "w30"]
    got = run_plain(SCRIPT, tmp_path, tmp_path, json.dumps(texts))
    with torch.no_grad():
        expected = models["class"](**tokenizer(texts, padding=True, return_tensors="pt")).logits
        filled = models["mlm"](**tokenizer("w1 w2 [MASK] w3", return_tensors="pt")).logits[0, 3].argmax()
    np.testing.assert_allclose(got["logits"], expected.numpy(), rtol=1e-5, atol=1e-5)
    assert got["labels"] == [("neg", "pos")[i] for i in expected.argmax(-1)]
    assert got["filled"] == WORDS[filled]
    assert got["tied"]
    assert got["modules"] == []
    context = " ".join(f"w{i}" for i in range(40))
    assert got["answer"]["answer"] == context[got["answer"]["start"] : got["answer"]["end"]]
    assert 1 <= len(got["answer"]["answer"].split()) <= 5
    for text, answer in zip(texts, got["answers"], strict=True):
        assert answer["answer"] == best_span(models["qa"], tokenizer, text, "w7 w8 w9")


def best_span(model, tokenizer, question, context):
    """By brute force over all spans of a context that fits one window."""
    encoded = tokenizer(question, context, return_tensors="pt")
    with torch.no_grad():
        out = model(**encoded)
    first = (encoded["token_type_ids"][0] == 1).nonzero()[0].item()
    words = context.split()
    spans = [(i, j) for i in range(len(words)) for j in range(i, len(words))]
    i, j = max(spans, key=lambda s: (out.start_logits[0, first + s[0]] + out.end_logits[0, first + s[1]]).item())
    return " ".join(words[i : j + 1])


AGAIN = """
import json, sys, torch
from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification
folder, ids = sys.argv[1], torch.tensor(json.loads(sys.argv[2]))
result = {}
for name in ("found", "tuned", "again"):
    model = AutoModelForSequenceClassification.from_pretrained(f"{folder}/{name}", trust_remote_code=True)
    with torch.no_grad():
        result[name] = model(ids).logits.tolist()
    if name == "tuned":
        model.save_pretrained(f"{folder}/again")
model = AutoModelForQuestionAnswering.from_pretrained(f"{folder}/answers", trust_remote_code=True)
result["answers"] = list(model(ids).start_logits.shape)
print(json.dumps(result))
"""


def test_models_saved_again_load_without_ffnas_as_exports_do(tmp_path):
    """Loaded with ffnas, trained, saved; loaded and saved once more by the directory's own files; with another head."""
    export_model(
        randomize(FFNASForSequenceClassification(small_config(num_labels=3))), None, tmp_path / "found", None, {}
    )
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "found")
    assert isinstance(model, FFNASForSequenceClassification)
    ids = batch()[0]
    with torch.no_grad():
        expected = {"found": model(ids).logits}
        model.classifier.weight.add_(0.5 * torch.randn_like(model.classifier.weight))
        expected["tuned"] = expected["again"] = model(ids).logits
    model.save_pretrained(tmp_path / "tuned")
    AutoModelForQuestionAnswering.from_pretrained(tmp_path / "tuned").save_pretrained(tmp_path / "answers")
    assert (tmp_path / "answers" / "question_answering_ffnas.py").is_file()
    found = run_plain(AGAIN, tmp_path, tmp_path, json.dumps(ids.tolist()))
    assert found.pop("answers") == list(ids.shape)
    assert not np.allclose(found["found"], found["tuned"], atol=1e-2)
    for name, logits in found.items():
        np.testing.assert_allclose(logits, expected[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_code_is_written_only_where_the_configuration_names_it(tmp_path):
    model = FFNASForSequenceClassification(small_config())
    model.save_pretrained(tmp_path / "own")
    assert not list((tmp_path / "own").glob("*.py"))
    model.config.auto_map = {"AutoConfig": "configuration_other.OtherConfig"}
    model.save_pretrained(tmp_path / "other")
    assert not list((tmp_path / "other").glob("*.py"))
    # as transformers writes it for a model of a repository
    model.config.auto_map = {k: f"someone/model--{v}" for k, v in auto_map("FFNASForSequenceClassification").items()}
    model.save_pretrained(tmp_path / "hub")
    assert {f.name for f in (tmp_path / "hub").glob("*.py")} == set(FILES)
    assert json.loads((tmp_path / "hub" / "config.json").read_text())["auto_map"] == auto_map(
        "FFNASForSequenceClassification"
    )
