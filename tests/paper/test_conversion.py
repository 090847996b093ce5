"""Published checkpoints, converted, beside the published arithmetic: the same answers in every kind and length."""

from __future__ import annotations

import pytest
import torch
from paper_student import PaperStudent, Sizes, initialise, released, texts

from engine.published.convert import from_published
from engine.published.files import read_published
from engine.published.presets import PRESETS

CONFIGURATIONS = {
    "efficientbert": (Sizes(540, 540, 1000, 128, teacher=768), "truncate", 1),
    "efficientbert-tiny": (Sizes(360, 360, 1000, 128, teacher=768), "truncate", 1),
    "efficientbert-plusplus": (Sizes(360, 360, 1000, 128, teacher=768), "truncate", 2),
    "tinybert6-transfer": (Sizes(768, 3072, 1000, None, teacher=768), "pad", 1),
}
"""Widths, layers and heads as released, the vocabulary cut."""

SMALL = {
    "efficientbert": (Sizes(24, 24), "truncate", 1),
    "efficientbert-tiny": (Sizes(12, 12), "truncate", 1),
    "efficientbert-plusplus": (Sizes(12, 12), "truncate", 2),
    "tinybert6-transfer": (Sizes(24, 96, factor=None), "pad", 1),
}
KINDS = ["classification", "pair", "regression", "spans", "choices", "several", "encoder"]
LENGTHS = [1, 2, 7, 128]
TASKS = (3, 2, 2, 2, 2, 1, 2, 2)
"""Outputs of the published multi-task head: mnli, qqp, qnli, sst-2, cola, sts-b, mrpc, rte."""


@pytest.fixture(autouse=True)
def _layers(monkeypatch):
    """What is compared are the layers; the runtime sums in another order, which has tests of its own."""
    monkeypatch.setenv("FFNAS_RUNTIME", "0")


def published(name, kind, *, table, wide, seed=0):
    sizes, policy, times = table[name]
    kind = "classification" if kind == "pair" else kind
    model = PaperStudent(sizes, released(policy, times), kind, TASKS if kind == "several" else 3)
    return initialise(model, seed, wide), sizes


def convert(name, state, sizes, **options):
    preset = PRESETS[name]
    made = from_published(
        state, preset.architecture, heads=preset.heads, ffn_size=sizes.ffn, policy=preset.policy, **options
    )
    return made.model


OPTIONS = {
    "regression": {"kind": "classification", "problem_type": "regression"},
    "choices": {"kind": "multiple-choice"},
    "several": {"task": "mnli"},
}


def assert_same(got, expected):
    """1e-5, of the values' scale where that is above 1: float32 sums in another order, layer after layer."""
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item())


@torch.no_grad()
def assert_agree(oracle, model, kind, vocab, lengths):
    for length in lengths:
        ids, segments, padding = texts(vocab, length, choices=2 if kind == "choices" else None)
        if kind == "classification":
            segments = torch.zeros_like(segments)
        expected = oracle(ids, segments, padding)
        inputs = {"input_ids": ids, "token_type_ids": segments, "attention_mask": padding == 0}
        if kind == "encoder":
            real = padding == 0
            got = model(**inputs, output_hidden_states=True)
            for own, wanted in zip(got.hidden_states, expected.hidden, strict=True):
                own = own if model.fit_dense is None else model.fit_dense(own)
                assert_same(own[real], wanted[real])
            assert_same(got.last_hidden_state[real], expected.last[real])
            continue
        got = model(**inputs)
        if kind == "spans":
            real = padding == 0
            assert_same(torch.stack([got.start_logits, got.end_logits], -1)[real], expected.logits[real])
        else:
            assert_same(got.logits, expected.logits)


@pytest.mark.parametrize("wide", [False, True], ids=["published-init", "wide"])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_released_sizes_answer_as_published(name, wide):
    """Classification through all layers, with every layer's states, at the released widths."""
    oracle, sizes = published(name, "classification", table=CONFIGURATIONS, wide=wide)
    model = convert(name, oracle.state_dict(), sizes)
    assert model.config.layer_norm_eps == 1e-5
    assert_agree(oracle, model, "pair", sizes.vocab, LENGTHS)


@pytest.mark.parametrize(("wide", "prefix"), [(False, ""), (True, "module.")], ids=["published-init", "wide-module"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SMALL)
def test_every_kind_answers_as_published(name, kind, wide, prefix, tmp_path):
    oracle, sizes = published(name, kind, table=SMALL, wide=wide)
    torch.save({"state_dict": {f"{prefix}{k}": v for k, v in oracle.state_dict().items()}}, tmp_path / "best.bin")
    model = convert(name, read_published(tmp_path / "best.bin"), sizes, **OPTIONS.get(kind, {}))
    assert_agree(oracle, model, kind, sizes.vocab, LENGTHS)


def test_epsilon_of_bert_would_show():
    """The suite can tell 1e-12 from 1e-5: at the published initialisation answers differ by more than it allows."""
    oracle, sizes = published("efficientbert", "encoder", table=SMALL, wide=False)
    model = convert("efficientbert", oracle.state_dict(), sizes, layer_norm_eps=1e-12)
    with pytest.raises(AssertionError):
        assert_agree(oracle, model, "encoder", sizes.vocab, [7])
