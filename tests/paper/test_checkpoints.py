"""Published files: read safely, converted for the task they were trained on, and written back as they were."""

from __future__ import annotations

import copyreg
import pickle

import numpy as np
import pytest
import torch
from paper_student import PaperStudent, Sizes, initialise, released, texts
from test_conversion import SMALL, TASKS, assert_same, published

from engine.architecture.architecture import Architecture
from engine.errors import UserError
from engine.export.saved import load_saved
from engine.published.back import to_published
from engine.published.convert import from_published
from engine.published.files import read_published
from engine.published.presets import PRESETS
from search.cli import main

ARCHITECTURE = PRESETS["efficientbert"].architecture
SIZES = SMALL["efficientbert"][0]


def student(kind="classification", classes=3, wide=True, seed=0):
    return initialise(PaperStudent(SIZES, released(), kind, classes), seed, wide)


def saved(path, model, **more):
    torch.save({"state_dict": model.state_dict(), **more}, path)
    return path


def convert(arguments, capsys):
    """Exit code, and what was printed."""
    code = main(["convert", *map(str, arguments)])
    out = capsys.readouterr()
    return code, out.out + out.err


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_metrics_of_a_fine_tuned_checkpoint_do_not_hinder(legacy, tmp_path):
    """{"acc": numpy.float64} beside the weights, as saved after every evaluation."""
    model = student()
    content = {"state_dict": model.state_dict(), "metrics": {"acc": np.float64(0.8125), "f1": np.float64(0.5)}}
    content |= {"epoch": 3, "step": 150}
    torch.save(content, tmp_path / "best.bin", _use_new_zipfile_serialization=not legacy)
    tensors = read_published(tmp_path / "best.bin")
    assert all(torch.equal(tensors[name], value) for name, value in model.state_dict().items())


def test_metrics_of_an_old_numpy_are_read(tmp_path):
    """NumPy 1 calls the function that makes a scalar by another module's name."""
    path = saved(tmp_path / "best.bin", student(), metrics={"acc": np.float64(0.5)})
    torch.save({"state_dict": {}}, tmp_path / "other.bin")
    import zipfile

    old, new = zipfile.ZipFile(path), tmp_path / "old.bin"
    with zipfile.ZipFile(new, "w") as target:
        for item in old.infolist():
            data = old.read(item)
            if item.filename.endswith("data.pkl"):
                assert b"numpy._core.multiarray" in data
                data = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            target.writestr(item, data)
    assert set(read_published(new)) == set(read_published(path))


class Hostile:
    """Unpickles to a call."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


HOSTILE = {
    "print": Hostile(print, "ran"),
    "eval": Hostile(eval, "print('ran')"),
    "reconstructor": Hostile(copyreg._reconstructor, list, object, None),
    "numpy load": Hostile(np.load, "/nonexistent"),
    "object array": np.array([{"a": 1}], dtype=object),
    "object scalar": Hostile(np.float64(0).__reduce__()[0], np.dtype("O"), b"cos\nsystem\n."),
    "integer scalar": np.int64(3),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_nothing_else_is_unpickled(case, tmp_path, capsys):
    path = saved(tmp_path / "hostile.bin", student(), metrics={"acc": np.float64(0.5), "other": HOSTILE[case]})
    with pytest.raises(UserError, match=r"hostile\.bin: not a file of tensors"):
        read_published(path)
    (tmp_path / "plain.bin").write_bytes(pickle.dumps({"state_dict": HOSTILE[case]}, protocol=2))
    with pytest.raises(UserError, match=r"plain\.bin"):
        read_published(tmp_path / "plain.bin")
    assert "ran" not in capsys.readouterr().out
    # the allowance ends with the reading
    torch.save({"acc": np.float64(0.5)}, tmp_path / "after.bin")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "after.bin", weights_only=True)


NAMES = {
    "mnli": ("contradiction", "entailment", "neutral"),
    "mnli-mm": ("contradiction", "entailment", "neutral"),
    "qqp": ("not_duplicate", "duplicate"),
    "qnli": ("entailment", "not_entailment"),
    "sst-2": ("negative", "positive"),
    "cola": ("unacceptable", "acceptable"),
    "mrpc": ("not_equivalent", "equivalent"),
    "rte": ("entailment", "not_entailment"),
    "wnli": ("not_entailment", "entailment"),
}
"""Published order of the classes; those of files that number them, by what the numbers mean."""


@pytest.mark.parametrize("task", NAMES)
def test_a_task_names_the_classes_in_the_published_order(task):
    state = student(classes=len(NAMES[task])).state_dict()
    assert tuple(from_published(state, ARCHITECTURE, task=task).model.config.id2label.values()) == NAMES[task]


def test_without_a_task_classes_have_numbers(tmp_path, capsys):
    path = saved(tmp_path / "best.bin", student())
    assert convert([path, tmp_path / "m", "--architecture", ARCHITECTURE], capsys)[0] == 0
    assert load_saved(tmp_path / "m").config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    code, said = convert([path, tmp_path / "n", "--architecture", ARCHITECTURE, "--task", "sst-2"], capsys)
    assert code == 2
    assert "2 names for a classifier of 3 outputs" in said


@pytest.mark.parametrize(
    ("task", "head"), [("mnli", 0), ("glue/qnli", 2), ("sst-2", 3), ("cola", 4), ("sts-b", 5), ("rte", 7), ("wnli", 2)]
)
def test_a_task_takes_its_numbered_head(task, head, tmp_path):
    oracle = student("several", TASKS)
    made = from_published(oracle.state_dict(), ARCHITECTURE, task=task)
    ids, segments, padding = texts(SIZES.vocab, 9)
    with torch.no_grad():
        got = made.model(input_ids=ids, token_type_ids=segments, attention_mask=padding == 0).logits
        assert_same(got, oracle(ids, segments, padding, task=head).logits)
    assert any("head of glue/qnli" in note or "that of glue/qnli" in note for note in made.notes) == (task == "wnli")


def test_a_single_output_needs_its_kind(tmp_path, capsys):
    path = saved(tmp_path / "best.bin", student("choices"))
    code, said = convert([path, tmp_path / "m", "--architecture", ARCHITECTURE], capsys)
    assert code == 2
    assert "--kind multiple-choice or --regression" in said
    assert not (tmp_path / "m").exists()
    state = read_published(path)
    for options, made in (
        ({"task": "swag"}, "FFNASForMultipleChoice"),
        ({"task": "race"}, "FFNASForMultipleChoice"),
        ({"kind": "multiple-choice"}, "FFNASForMultipleChoice"),
        ({"task": "sts-b"}, "FFNASForSequenceClassification"),
        ({"problem_type": "regression"}, "FFNASForSequenceClassification"),
    ):
        model = from_published(state, ARCHITECTURE, **options).model
        assert type(model).__name__ == made
        assert (model.config.problem_type == "regression") == made.endswith("Classification")
    assert convert([path, tmp_path / "m", "--architecture", ARCHITECTURE, "--task", "swag"], capsys)[0] == 0
    assert type(load_saved(tmp_path / "m")).__name__ == "FFNASForMultipleChoice"
    spans = from_published(student("spans").state_dict(), ARCHITECTURE, task="squad2.0").model
    assert type(spans).__name__ == "FFNASForQuestionAnswering"


@pytest.mark.parametrize(
    ("preset", "sizes", "said"),
    [
        ("efficientbert-tiny", Sizes(540, 540, 50, 128), "hidden size 360, the checkpoint's 540"),
        ("efficientbert", Sizes(360, 360, 50, 128), "hidden size 540, the checkpoint's 360"),
        ("efficientbert", Sizes(540, 540, 50, 64), "token embedding 128, the checkpoint's 64"),
        ("efficientbert", Sizes(540, 1080, 50, 128), "FFN width 540, the checkpoint's 1080"),
        ("tinybert6-transfer", Sizes(768, 768, 50, 768), "FFN width 3072, the checkpoint's 768"),
    ],
)
def test_a_preset_of_other_sizes_is_refused(preset, sizes, said, tmp_path, capsys):
    layers = [(body, 1, 1) for body, _, _ in released()]
    path = saved(tmp_path / "best.bin", PaperStudent(sizes, layers))
    code, out = convert([path, tmp_path / "m", "--preset", preset], capsys)
    assert code == 2
    assert said in out
    assert len(out.strip().splitlines()) == 1
    assert not (tmp_path / "m").exists()


def test_the_preset_of_its_sizes_is_taken(tmp_path, capsys):
    path = saved(tmp_path / "best.bin", PaperStudent(Sizes(360, 360, 50, 128), released()))
    assert convert([path, tmp_path / "m", "--preset", "efficientbert-tiny", "--task", "mnli"], capsys)[0] == 0
    assert load_saved(tmp_path / "m").config.layer_norm_eps == 1e-5


def used(name):
    """Whether a tensor of the stored ones is used by the released architecture, and at which inner width."""
    parts = name.split(".")
    if "all_ffn" not in parts:
        return True, None
    _, stack, inverse = released()[int(parts[1])]
    return int(parts[3]) < stack, SIZES.ffn // inverse


@pytest.mark.parametrize("kind", ["classification", "spans", "encoder", "choices"])
def test_back_at_full_size_loads_in_the_published_model(kind, tmp_path, capsys):
    """Strictly, with the same outputs, and the slices bit for bit the source's."""
    source = student(kind)
    path = saved(tmp_path / "best.bin", source, metrics={"acc": np.float64(0.5)})
    options = ["--kind", "multiple-choice"] if kind == "choices" else []
    assert convert([path, tmp_path / "m", "--architecture", ARCHITECTURE, *options], capsys)[0] == 0
    code, said = convert([tmp_path / "m", tmp_path / "back.bin", "--back"], capsys)
    assert code == 0
    assert "full size" in said
    back = torch.load(tmp_path / "back.bin", weights_only=True)["state_dict"]
    assert set(back) == set(source.state_dict())
    for name, wanted in source.state_dict().items():
        taken, width = used(name)
        if width is None:
            assert torch.equal(back[name], wanted)
            continue
        inner = {"dense1.weight": 0, "dense1.bias": 0, "dense2.weight": 1}.get(name.split(".", 4)[4])
        if taken and inner is None:
            assert torch.equal(back[name], wanted)
        elif taken:
            own = back[name].transpose(0, inner) if back[name].dim() == 2 else back[name]
            source_part = wanted.transpose(0, inner) if wanted.dim() == 2 else wanted
            assert torch.equal(own[:width], source_part[:width])
            assert not own[width:].any()
    again = PaperStudent(SIZES, released(), kind).eval()
    again.load_state_dict(back)
    batch = texts(SIZES.vocab, 9, choices=2 if kind == "choices" else None)
    with torch.no_grad():
        first, second = source(*batch), again(*batch)
    assert torch.equal(first.last, second.last)
    if kind != "encoder":
        assert torch.equal(first.logits, second.logits)


def test_back_sliced_says_so_and_has_the_slices(tmp_path, capsys):
    path = saved(tmp_path / "best.bin", student())
    assert convert([path, tmp_path / "m", "--architecture", ARCHITECTURE], capsys)[0] == 0
    code, said = convert([tmp_path / "m", tmp_path / "back.bin", "--back", "--sliced"], capsys)
    assert code == 0
    assert "cannot load it" in said
    assert read_published(tmp_path / "back.bin")["encoder.0.all_ffn.0.dense1.weight"].shape == (12, 24)


def test_back_of_another_epsilon_and_of_another_space(tmp_path, capsys):
    path = saved(tmp_path / "best.bin", student())
    options = ["--architecture", ARCHITECTURE, "--layer-norm-eps", "1e-12"]
    assert convert([path, tmp_path / "m", *options], capsys)[0] == 0
    assert (
        "LayerNorm epsilon is 1e-12, the published code's 1e-05"
        in convert([tmp_path / "m", tmp_path / "back.bin", "--back"], capsys)[1]
    )
    from engine.student.configuration import FFNASConfig
    from engine.student.heads import FFNASForSequenceClassification

    layers = Architecture.parse("none@2, linear1_1(gelu(linear1_1(x,wb1)),wb2)")
    config = FFNASConfig(hidden_size=24, num_hidden_layers=2, intermediate_size=24, vocab_size=61, layers=layers)
    with pytest.raises(UserError, match=r"layer 0 .* none of the published space"):
        to_published(FFNASForSequenceClassification(config))


def test_an_encoder_s_round_trip_adds_nothing(tmp_path, capsys):
    path = saved(tmp_path / "best.bin", student("encoder"))
    assert convert([path, tmp_path / "m", "--architecture", ARCHITECTURE], capsys)[0] == 0
    assert load_saved(tmp_path / "m").cls_pooler is None
    assert convert([tmp_path / "m", tmp_path / "back.bin", "--back", "--module"], capsys)[0] == 0
    names = {name.removeprefix("module.") for name in torch.load(tmp_path / "back.bin")["state_dict"]}
    assert names == set(student("encoder").state_dict())
    with_pooler = {**student("encoder").state_dict(), **{
        name: value for name, value in student().state_dict().items() if name.startswith("cls_pooler")
    }}  # fmt: skip
    torch.save({"state_dict": with_pooler}, tmp_path / "pooled.bin")
    assert convert([tmp_path / "pooled.bin", tmp_path / "p", "--architecture", ARCHITECTURE], capsys)[0] == 0
    assert torch.equal(load_saved(tmp_path / "p").cls_pooler.dense.weight, with_pooler["cls_pooler.dense.weight"])


def test_all_released_shapes_go_back_to_what_they_were():
    """Small, with the tensors the published model wants, for every configuration."""
    for name in SMALL:
        oracle, sizes = published(name, "classification", table=SMALL, wide=True)
        preset = PRESETS[name]
        model = from_published(oracle.state_dict(), preset.architecture, ffn_size=sizes.ffn, policy=preset.policy).model
        oracle_again = PaperStudent(sizes, released(*SMALL[name][1:]))
        oracle_again.load_state_dict(to_published(model, full=True))
        batch = texts(sizes.vocab, 6)
        with torch.no_grad():
            assert torch.equal(oracle_again.eval()(*batch).logits, oracle(*batch).logits)
