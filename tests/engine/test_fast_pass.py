"""The runtime inside a model: equal answers, only where nothing else was asked for, and never an old weight."""

from __future__ import annotations

import copy
import pickle
import tempfile

import numpy as np
import pytest
import torch
from native_models import KINDS, build, inputs
from torch import nn
from torch.nn.utils import parametrizations, prune

from engine.student import FFNASForSequenceClassification, fast_pass
from engine.student.heads import FFNASForMultipleChoice

CLASSIFIERS = [
    name for name, (kind, _) in KINDS.items() if kind in (FFNASForSequenceClassification, FFNASForMultipleChoice)
]


@pytest.fixture
def calls(monkeypatch):
    """One entry per pass of the runtime."""
    made = []
    run = fast_pass.Encoder.run

    def counted(self, *args):
        made.append(self)
        return run(self, *args)

    monkeypatch.setattr(fast_pass.Encoder, "run", counted)
    return made


def given(batch=3, length=9):
    return dict(
        zip(
            ("input_ids", "attention_mask", "token_type_ids"), map(torch.from_numpy, inputs(batch, length)), strict=True
        )
    )


def slowly(model, monkeypatch, **more):
    """The layers' own answer."""
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setenv("FFNAS_RUNTIME", "0")
        return model(**{**given(), **more})


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_scores_are_those_of_the_layers(kind, calls, monkeypatch):
    model = build(kind)
    wanted = slowly(model, monkeypatch)
    assert not calls
    with torch.no_grad():
        found = model(**given())
    assert len(calls) == 1
    torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-5, atol=1e-5)
    assert type(found) is type(wanted)


def test_a_loss_is_that_of_the_same_scores(calls, monkeypatch):
    model, labels = build("mean"), torch.tensor([0, 2, 1])
    wanted = slowly(model, monkeypatch, labels=labels)
    with torch.inference_mode():
        found = model(**given(), labels=labels)
        pair = model(**given(), labels=labels, return_dict=False)
    assert len(calls) == 2
    torch.testing.assert_close(found.loss, wanted.loss)
    torch.testing.assert_close(pair[1], wanted.logits, rtol=1e-5, atol=1e-5)


def test_bfloat16_autocast_gives_bfloat16(calls, monkeypatch):
    model = build("cls")
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = model(**given()).logits
    assert len(calls) == 1
    assert found.dtype == torch.bfloat16
    exact = slowly(model, monkeypatch).logits
    assert (found - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize(
    "asked",
    [
        {"output_hidden_states": True},
        {"states_layers": (0,)},
        {"position_ids": torch.arange(9)[None]},
        {"architecture": "own"},
    ],
    ids=lambda asked: next(iter(asked)),
)
@pytest.mark.parametrize("kind", ["cls", "spans", "encoder", "choices"])
def test_whoever_asks_for_more_gets_the_layers(kind, asked, calls, monkeypatch):
    model = build(kind)
    asked = {**asked, "attention_mask": None}
    if "architecture" in asked:
        asked["architecture"] = model.config.full_architecture
    wanted = slowly(model, monkeypatch, **asked)
    with torch.no_grad():
        found = model(**{**given(), **asked})
    assert not calls
    assert torch.equal(found[0], wanted[0])


def test_gradients_training_and_the_switch(calls, monkeypatch):
    model = build("cls")
    assert model(**given()).logits.requires_grad
    model.train()
    with torch.no_grad():
        model(**given())
        model.eval()
        model.ffnas.encoder[0].attention.dropout.train()  # Monte Carlo dropout of one layer
        model(**given())
        model.eval()
        monkeypatch.setenv("FFNAS_RUNTIME", "0")
        model(**given())
        monkeypatch.setenv("FFNAS_RUNTIME", "1")
        assert not calls
        model(**given())
    assert len(calls) == 1


class Louder(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def hook(model):
    model.ffnas.encoder[0].attention.register_forward_hook(lambda *_: None)


def another_class(model):
    old = model.classifier
    model.classifier = Louder(old.in_features, old.out_features)


def own_forward(model):
    layer = model.ffnas.encoder[1].all_ffn
    layer.forward = lambda x, plan: x


def weight_norm(model):
    parametrizations.weight_norm(model.ffnas.encoder[0].all_ffn[0].dense1)


def pruned(model):
    prune.l1_unstructured(model.ffnas.encoder[0].attention.query, "weight", 0.5)


def float64(model):
    model.double()


def eager(model):
    model.set_attn_implementation("eager")


@pytest.mark.parametrize("change", [hook, another_class, own_forward, weight_norm, pruned, float64, eager])
@pytest.mark.filterwarnings("ignore::kernels.readable.CalledLayersWarning", "ignore::kernels.BackendFallbackWarning")
def test_a_model_with_more_than_its_layers_runs_them(change, calls, monkeypatch):
    model = build("cls")
    with torch.no_grad():
        model(**given())
        assert len(calls) == 1
        change(model)
        found = model(**given()).logits
    assert len(calls) == 1
    assert torch.equal(found, slowly(model, monkeypatch).logits)


def one_element(model):
    model.ffnas.encoder[1].all_ffn[0].dense2.weight.data[3, 5] += 1.0


def by_numpy(model):
    model.ffnas.encoder[0].attention.value.weight.detach().numpy()[0] *= 3.0


def bias(model):
    model.ffnas.encoder[0].all_ffn[0].dense1.bias.data.add_(1.0)


def norm(model):
    model.ffnas.encoder[0].all_ffn[0].layernorm.weight.data.mul_(1.5)


def table(model):
    model.ffnas.embeddings.token_embeddings.weight.data.mul_(0.5)


def new_data(model):
    dense = model.ffnas.encoder[0].attention.dense
    dense.weight.data = dense.weight.data * 2.0


def new_parameter(model):
    model.classifier.weight = nn.Parameter(model.classifier.weight.detach() * 2.0)


def load_state(model):
    model.load_state_dict({k: v * 1.1 for k, v in model.state_dict().items()})


def optimizer_step(model):
    with torch.enable_grad():
        model(**given(), labels=torch.tensor([0, 1, 2])).loss.backward()
    torch.optim.SGD(model.parameters(), 0.1).step()


def norm_epsilon(model):
    model.ffnas.encoder[0].attention.layernorm.eps = 0.5


def stack_epsilon(model):
    model.ffnas.encoder[1].all_ffn.eps = 0.5


def scaling(model):
    model.ffnas.encoder[0].attention.scaling *= 3.0


def another_pooler(model):
    model.ffnas.cls_pooler.activation = "relu"


def more_classes(model):
    model.classifier = nn.Linear(36, 7).eval()


def fewer_classes(model):
    model.classifier = nn.Linear(36, 2).eval()


def no_bias(model):
    model.ffnas.encoder[0].attention.value.bias = None


@pytest.mark.parametrize(
    "change", [norm_epsilon, stack_epsilon, scaling, another_pooler, more_classes, fewer_classes, no_bias]
)
def test_whatever_else_is_changed_acts(change, monkeypatch):
    """Settings and shapes that the configuration does not have: the layers know them."""
    model = build("cls")
    with torch.no_grad():
        before = model(**given()).logits
        change(model)
        after = model(**given()).logits
    wanted = slowly(model, monkeypatch).logits
    assert after.shape == wanted.shape
    torch.testing.assert_close(after, wanted, rtol=1e-5, atol=1e-5)
    assert before.shape != after.shape or not torch.allclose(before, after, rtol=1e-3, atol=1e-3)


def test_padding_before_a_text_is_read_where_the_first_token_is(calls, monkeypatch):
    model, padded = build("cls"), given()
    padded["attention_mask"][2] = 1
    padded["attention_mask"][2, :2] = 0
    with torch.no_grad():
        found = model(**padded).logits
    assert torch.equal(found, slowly(model, monkeypatch, **padded).logits)


def swapped_layers(model):
    layers = model.ffnas.encoder
    layers[0].all_ffn[0].dense1, layers[1].all_ffn[0].dense1 = layers[1].all_ffn[0].dense1, layers[0].all_ffn[0].dense1


def from_a_file(model):
    """The system writes, not this process."""
    rows = model.ffnas.encoder[0].all_ffn[0].dense1.weight.detach().numpy()
    with tempfile.TemporaryFile() as file:
        file.write(np.full(rows[5:9].shape, 0.5, rows.dtype).tobytes())
        file.seek(0)
        assert file.readinto(rows[5:9].data.cast("B")) == rows[5:9].nbytes


def shared(model):
    model.share_memory()
    model.ffnas.encoder[0].all_ffn[0].dense1.weight.data[3] += 1.0


@pytest.mark.parametrize("passes", [1, 4])  # before: the system watches from the second that finds nothing
@pytest.mark.parametrize(
    "write",
    [
        one_element, by_numpy, bias, norm, table, new_data, new_parameter, load_state, optimizer_step, swapped_layers,
        from_a_file, shared,
    ],
)  # fmt: skip
def test_every_write_is_seen(write, passes, calls, monkeypatch):
    model = build("cls", hidden_size=64, intermediate_size=160)  # matrices of several pages
    with torch.no_grad():
        before = [model(**given()).logits for _ in range(passes)][-1]
        write(model)
        after = model(**given()).logits
    assert len(calls) == passes + 1
    assert not torch.allclose(after, before, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(after, slowly(model, monkeypatch).logits, rtol=1e-5, atol=1e-5)


def test_copies_and_pickles_answer_for_themselves(calls):
    model = build("cls")
    with torch.no_grad():
        before = model(**given()).logits
        twin, again = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        model.classifier.weight.zero_()
        for other in (twin, again):
            assert torch.equal(other(**given()).logits, before)
    assert len(set(map(id, calls))) == 3


def test_threads_of_torch_are_the_runtimes(calls):
    model, before = build("mean"), torch.get_num_threads()
    try:
        answers = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with torch.no_grad():
                answers.append(model(**given(8, 40)).logits)
    finally:
        torch.set_num_threads(before)
    assert calls[0] is not calls[1]
    assert torch.equal(*answers)


def test_inside_vmap_and_away_from_the_cpu_the_layers_run():
    model, ids = build("cls"), given()["input_ids"]
    with torch.no_grad():
        inside = []
        torch.vmap(lambda row: inside.append(fast_pass._precision(model, row[None], None, None)) or row)(ids)
        assert inside == [None]
        assert fast_pass._precision(model, ids, None, None) == "fp32"
        assert fast_pass._key(model, "fp32") is not None
        assert fast_pass._key(model.to("meta"), "fp32") is None


def test_bad_ids_raise_as_the_layers_do():
    model = build("cls")
    bad = given()
    bad["input_ids"][1, 0] = 97
    with torch.no_grad(), pytest.raises(IndexError):
        model(**bad)


def test_a_text_of_padding_alone_is_left_to_the_layers(calls, monkeypatch):
    model, nothing = build("mean"), given()
    nothing["attention_mask"][1] = 0
    with torch.no_grad():
        found = model(**nothing).logits
    assert torch.equal(found, slowly(model, monkeypatch, **nothing).logits)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ["spans", "encoder", "masks", "labels"])
def test_answers_per_token_without_padding(kind, autocast, calls, monkeypatch):
    """bfloat16 products: off by 2^-9 of their terms' size, layer upon layer."""
    model, whole = build(kind), given()
    whole["attention_mask"][:] = 1
    tolerance = 0.05 if autocast else 1e-5
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        wanted = slowly(model, monkeypatch, **whole)
        with torch.no_grad():
            found = [model(**whole), model(**{**whole, "attention_mask": None})]
    assert len(calls) == 2
    assert list(found[0]) == list(wanted)
    for name, value in wanted.items():
        assert found[0][name].dtype == value.dtype
        assert torch.equal(found[0][name], found[1][name])
        assert (found[0][name] - value).abs().max() <= tolerance * value.abs().max()


@pytest.mark.parametrize("kind", ["spans", "encoder", "masks", "labels"])
def test_rows_of_padding_come_from_the_layers(kind, calls, monkeypatch):
    model = build(kind)
    with torch.no_grad():
        found = model(**given())
    assert not calls
    for name, value in slowly(model, monkeypatch).items():
        assert torch.equal(found[name], value)


def test_a_loss_of_spans(calls, monkeypatch):
    model, whole = build("spans"), given()
    whole |= {
        "attention_mask": None,
        "start_positions": torch.tensor([0, 3, 8]),
        "end_positions": torch.tensor([1, 5, 9]),
    }
    wanted = slowly(model, monkeypatch, **whole)
    with torch.no_grad():
        torch.testing.assert_close(model(**whole).loss, wanted.loss)
    assert len(calls) == 1


def test_choices_side_by_side(calls, monkeypatch):
    model, several = build("choices"), {name: value[None] for name, value in given().items()}
    wanted = slowly(model, monkeypatch, **several).logits
    with torch.no_grad():
        found = model(**several).logits
    assert len(calls) == 1
    assert found.shape == (1, 3)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_no_compiler_no_runtime(monkeypatch, calls):
    def refuse(*_, **__):
        raise fast_pass.NativeError("no compiler")

    model = build("cls")
    wanted = slowly(model, monkeypatch).logits
    monkeypatch.setattr(fast_pass.Encoder, "from_arrays", refuse)
    with torch.no_grad():
        for _ in range(2):
            np.testing.assert_array_equal(model(**given()).logits, wanted)
    assert not calls


def test_weights_above_the_limit_are_not_kept(monkeypatch, calls):
    monkeypatch.setenv("FFNAS_PACKED_MIB", "0")
    with torch.no_grad():
        build("cls")(**given())
    assert not calls
