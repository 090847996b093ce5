"""Published checkpoints convert to models with the published arithmetic, and back without a change."""

from __future__ import annotations

import pickle

import pytest
import torch
from published_model import hidden_states, logits, random_state, released

from engine.architecture.architecture import Architecture
from engine.errors import UserError
from engine.export.saved import load_saved
from engine.published.back import to_published
from engine.published.convert import from_published
from engine.published.files import read_published, write_published
from engine.published.presets import PRESETS
from search.cli import main

TINY = {"hidden": 24, "ffn": 24, "vocab": 61, "factor": 7, "teacher": 11}
ARCHITECTURE = PRESETS["efficientbert"].architecture


def batch(vocab, rows=3, length=9):
    """ids, segments, padding (1 at padding); rows padded to different lengths with token 0."""
    g = torch.Generator().manual_seed(3)
    lengths = torch.tensor([length, 4, 7][:rows])
    padding = (torch.arange(length)[None] >= lengths[:, None]).float()
    ids = torch.randint(1, vocab, (rows, length), generator=g) * (1 - padding).long()
    return ids, (torch.arange(length)[None] > 3).long().expand(rows, -1) * (1 - padding).long(), padding


def tiny_state(**changes):
    return random_state(TINY["hidden"], released("truncate"), TINY["ffn"], vocab=TINY["vocab"], factor=TINY["factor"],
                        teacher=TINY["teacher"], **changes)  # fmt: skip


def saved(tmp_path, state, prefix=""):
    path = tmp_path / "best.bin"
    torch.save({"state_dict": {f"{prefix}{k}": v for k, v in state.items()}, "epoch": 3}, path)
    return path


def converted(path, **options):
    return from_published(read_published(path), options.pop("architecture", ARCHITECTURE), **options)


def assert_equal_logits(model, expected, ids, types, padding):
    """1e-5 of the logits' scale: float32 rounding of another order of summation through all layers."""
    with torch.no_grad():
        got = model(input_ids=ids, token_type_ids=types, attention_mask=padding == 0).logits
    assert (got - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("supernet", [None, 4])
def test_a_converted_model_has_the_published_arithmetic(prefix, supernet, tmp_path):
    state = tiny_state(supernet=supernet)
    made = converted(saved(tmp_path, state, prefix))
    ids, types, padding = batch(TINY["vocab"])
    assert_equal_logits(
        made.model, logits(state, released("truncate"), 24, 12, ids, types, padding), ids, types, padding
    )
    assert bool(made.notes) == bool(supernet)


@pytest.mark.parametrize("name", [n for n, p in PRESETS.items() if p.family == "ffnas"])
@pytest.mark.parametrize("size", ["tiny", pytest.param("full", marks=pytest.mark.slow)])
def test_every_preset_converts(name, size, tmp_path):
    preset = PRESETS[name]
    twice = 2 if preset.shape.num_layers == 12 else 1
    layers = [layer for layer in released(preset.policy) for _ in range(twice)]
    full = size == "full"
    hidden = preset.shape.hidden_size if full else 24
    ffn = preset.shape.ffn_size if full else 24 * preset.shape.ffn_size // preset.shape.hidden_size
    factor = preset.shape.embedding_size and (preset.shape.embedding_size if full else 7)
    vocab = preset.shape.vocab_size if full else 61
    state = random_state(hidden, layers, ffn, vocab=vocab, factor=factor, teacher=768 if full else 11, classes=3)
    path = saved(tmp_path, state)
    made = converted(path, architecture=preset.architecture, heads=preset.heads, ffn_size=ffn, policy=preset.policy)
    if full:
        assert made.model.base_model.num_parameters() == preset.counts().paper + preset.counts().pooler
    ids, types, padding = batch(vocab, length=61 if full else 9)
    assert_equal_logits(made.model, logits(state, layers, ffn, 12, ids, types, padding), ids, types, padding)


def test_a_head_of_several_tasks_is_chosen(tmp_path):
    state = tiny_state(heads=("classifiers.first", "classifiers.second"), classes=3)
    path = saved(tmp_path, state)
    with pytest.raises(UserError, match="heads for first, second"):
        converted(path)
    with pytest.raises(UserError, match="no head 'rte'"):
        converted(path, task="rte")
    made = converted(path, task="second")
    assert made.notes == ("heads of other tasks left out: first",)
    ids, types, padding = batch(TINY["vocab"])
    expected = logits(state, released("truncate"), 24, 12, ids, types, padding, "classifiers.second")
    assert_equal_logits(made.model, expected, ids, types, padding)


def test_an_encoder_and_question_answering_have_the_published_hidden_states(tmp_path):
    state = tiny_state(heads=())
    ids, types, padding = batch(TINY["vocab"])
    expected = hidden_states(state, released("truncate"), 24, 12, ids, types, padding)
    options = {"input_ids": ids, "token_type_ids": types, "attention_mask": padding == 0}
    with torch.no_grad():
        encoder = converted(saved(tmp_path, state)).model(**options).last_hidden_state
        torch.testing.assert_close(encoder, expected, rtol=1e-5, atol=1e-5)
        state |= {"classifier.weight": torch.randn(2, 24), "classifier.bias": torch.randn(2)}
        out = converted(saved(tmp_path, state)).model(**options)
    both = expected @ state["classifier.weight"].T + state["classifier.bias"]
    torch.testing.assert_close(torch.stack([out.start_logits, out.end_logits], -1), both, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("module", [False, True])
def test_there_and_back_changes_nothing(module, tmp_path):
    state = tiny_state()
    model = converted(saved(tmp_path, state)).model
    write_published(to_published(model, module=module), tmp_path / "back.bin")
    back = torch.load(tmp_path / "back.bin", weights_only=True)["state_dict"]
    assert {name.removeprefix("module.") for name in back} == set(state)
    assert all(name.startswith("module.") == module for name in back)
    assert all(torch.equal(back[("module." if module else "") + name], value) for name, value in state.items())
    named = to_published(model, task="mnli")
    assert torch.equal(named["classifiers.mnli.weight"], state["classifier.weight"])


def test_a_supernet_can_be_kept_whole(tmp_path):
    model = converted(saved(tmp_path, tiny_state(supernet=4)), stored=True).model
    assert [(s.stack, s.ratio) for s in model.config.full_architecture.layers] == [(4, 1)] * 6
    assert [s.expression for s in model.config.full_architecture.layers] == [s.expression for s in ARCHITECTURE.layers]


def test_missing_and_unknown_names_are_all_listed(tmp_path):
    state = tiny_state()
    del state["encoder.2.attention.key.bias"], state["cls_pooler.dense.bias"]
    state |= {"encoder.1.bottleneck.weight": torch.ones(2), "embeddings.extra": torch.ones(1)}
    with pytest.raises(UserError) as error:
        converted(saved(tmp_path, state))
    text = str(error.value)
    assert "2 missing: cls_pooler.dense.bias, encoder.2.attention.key.bias" in text
    assert "2 not understood: embeddings.extra, encoder.1.bottleneck.weight" in text


def test_names_can_be_dropped_when_asked(tmp_path):
    path = saved(tmp_path, tiny_state() | {"optimizer.step": torch.ones(1)})
    made = converted(path, drop=["optimizer."])
    assert made.notes == ("dropped as asked: optimizer.step",)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("architecture", "12 layers, the checkpoint 6"),
        ("smaller", "no supernet"),
        ("larger", "dense1.weight: .* in the checkpoint, .* in the model"),
        ("heads", "num_attention_heads"),
        ("labels", "3 names for a classifier of 2"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(wrong, message, tmp_path):
    texts = ARCHITECTURE.texts()
    smaller = Architecture.parse(", ".join([texts[0].replace("4_2", "3_2"), *texts[1:]]))
    larger = Architecture.parse(", ".join([texts[0].replace("4_2", "4_1"), *texts[1:]]))
    options = {
        "architecture": {"architecture": PRESETS["efficientbert-plusplus"].architecture},
        "smaller": {"architecture": smaller},
        "larger": {"architecture": larger},
        "heads": {"heads": 7},
        "labels": {"id2label": {0: "a", 1: "b", 2: "c"}},
    }[wrong]
    with pytest.raises(UserError, match=message):
        converted(saved(tmp_path, tiny_state()), **options)


class Hostile:
    def __reduce__(self):
        return (print, ("ran",))


def test_files_are_not_trusted(tmp_path, capsys):
    path = tmp_path / "hostile.bin"
    path.write_bytes(pickle.dumps({"state_dict": Hostile()}, protocol=2))
    torch.save({"state_dict": {"a": Hostile()}}, tmp_path / "zipped.bin")
    (tmp_path / "text.bin").write_text("weights")
    torch.save({"state_dict": {"a": torch.ones(1, dtype=torch.long)}}, tmp_path / "integers.bin")
    for name in ("hostile", "zipped", "text", "integers", "absent"):
        with pytest.raises(UserError, match=f"{name}.bin"):
            read_published(tmp_path / f"{name}.bin")
    assert "ran" not in capsys.readouterr().out


def test_the_command_converts_both_ways(tmp_path, capsys):
    state = tiny_state()
    path = saved(tmp_path, state, "module.")
    out = tmp_path / "model"
    arguments = [str(path), str(out), "--architecture", str(ARCHITECTURE), "--labels", "bad,good"]
    assert main(["convert", *arguments]) == 0
    assert "FFNASForSequenceClassification" in capsys.readouterr().out
    model = load_saved(out)
    assert model.config.id2label == {0: "bad", 1: "good"}
    assert (out / "architecture.png").read_bytes().startswith(b"\x89PNG")
    ids, types, padding = batch(TINY["vocab"])
    assert_equal_logits(model, logits(state, released("truncate"), 24, 12, ids, types, padding), ids, types, padding)
    assert main(["convert", str(out), str(tmp_path / "back.bin"), "--back", "--sliced"]) == 0
    assert "sliced to the architecture" in capsys.readouterr().out
    back = read_published(tmp_path / "back.bin")
    assert set(back) == set(state)
    assert all(torch.equal(back[name], value) for name, value in state.items())
    assert main(["convert", *arguments]) == 2
    assert "--overwrite" in capsys.readouterr().err
    other = [str(path), str(tmp_path / "b"), "--labels", "a,b"]
    assert main(["convert", *other]) == 2
    assert main(["convert", *other, "--preset", "bert-base"]) == 2
    assert main(["convert", *other, "--preset", "efficientbert-plusplus"]) == 2
    assert not (tmp_path / "b").exists()
