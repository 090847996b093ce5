"""`kernels.runtime` beside PyTorch in float64: models of all kinds, odd sizes, padding, precisions, threads; files."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from native_models import KINDS, answers, build, inputs

from engine.errors import UserError
from engine.student.native import describe
from kernels.runtime import NativeError, Session
from kernels.runtime import session as session_module
from kernels.runtime.instruction_sets import INT8
from kernels.runtime.library import Encoder, runs_int8

pytestmark = pytest.mark.filterwarnings("ignore::kernels.BackendFallbackWarning")  # float64 is for the reference

SHAPES = ((1, 1), (1, 7), (3, 16), (5, 33), (2, 40))


def wanted_of(kind):
    return {"encoder": ("hidden", "pooled", "mean", "cls", "max")}.get(kind, ("head",))


def agree(found, exact, mask, tolerance):
    if found.ndim == 3:
        found, exact = found[mask == 1], exact[mask == 1]
    assert np.isfinite(found).all()
    assert np.abs(found - exact).max() <= tolerance * max(1.0, np.abs(exact).max())


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_pytorch(kind):
    """fp32 sums of at most 50 terms a product, some ten products deep: 1e-5 of the largest answer."""
    model = build(kind)
    session = Session(describe(model), threads=1)
    for batch, length in SHAPES:
        given = inputs(batch, length, types=model.config.type_vocab_size)
        for wanted in wanted_of(kind):
            agree(session.run(*given, wanted=wanted), answers(model, *given, wanted), given[1], 1e-5)


@pytest.mark.parametrize("kind", ["mean", "cls", "trigram", "spans"])
def test_padding_inside_a_text_and_before_it(kind):
    model = build(kind)
    session = Session(describe(model), threads=1)
    ids, mask, types = inputs(3, 12, holes=True)
    if kind == "mean":  # first tokens are read by the others
        mask[1] = 0
        mask[1, 5:9] = 1
    agree(session.run(ids, mask, types), answers(model, ids, mask, types), mask, 1e-5)


@pytest.mark.parametrize("kind", ["labels", "masks", "spans"])
def test_some_tokens_alone_get_the_scores_they_get_among_all(kind):
    """Among other rows a product may round otherwise: 1e-6 of the largest score."""
    session = Session(describe(build(kind)), threads=1)
    ids, mask, types = inputs(3, 12, holes=True)
    real = np.flatnonzero(mask)
    places = np.random.default_rng(0).choice(real, 7)
    among = session.run(ids, mask, types).reshape(ids.size, -1)
    few = session._encoder.run_at(ids, mask.astype(np.uint8), types, places)
    np.testing.assert_allclose(few, among[places], rtol=1e-6, atol=1e-6 * np.abs(among[real]).max())
    for wrong in (np.flatnonzero(mask == 0)[:1], np.array([-1]), np.array([ids.size])):
        with pytest.raises(NativeError, match="input"):
            session._encoder.run_at(ids, mask.astype(np.uint8), types, wrong)


def test_places_are_for_scores_per_token():
    session = Session(describe(build("cls")), threads=1)
    with pytest.raises(NativeError, match="input"):
        session._encoder.run_at(*inputs(1, 4)[:1], None, None, np.array([0]))


def test_scores_of_words_come_in_pieces(monkeypatch):
    """More rows than are computed at a time, of padding between."""
    model = build("labels", num_labels=3, max_position_embeddings=700)
    session = Session(describe(model), threads=1)
    given = inputs(3, 700, holes=True)
    agree(session.run(*given), answers(model, *given), given[1], 1e-5)


def test_choices_of_one_question_stand_side_by_side():
    model = build("choices")
    session = Session(describe(model), threads=1)
    ids, mask, types = inputs(6, 9)
    found = session.run(ids.reshape(2, 3, 9), mask.reshape(2, 3, 9), types.reshape(2, 3, 9))
    given = (torch.from_numpy(v.reshape(2, 3, 9)) for v in (ids, mask, types))
    with torch.no_grad():
        exact = model.double()(*given).logits.numpy()
    assert found.shape == (2, 3)
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)


def test_models_without_layers_give_each_sequence_its_own_vector():
    """The last layer that reads the first token alone does not exist."""
    description, arrays = describe(build("encoder"))
    none = description._replace(layers=(description.layers[0]._replace(heads=0, stack=0),))
    session = Session((none, arrays), threads=1)
    given = inputs(3, 5)
    hidden = session.run(*given, wanted="hidden")
    np.testing.assert_array_equal(session.run(*given, wanted="cls"), hidden[:, 0])


def test_without_mask_and_types_all_tokens_are_real_and_of_type_0():
    model = build("cls")
    ids, mask, types = inputs(1, 9)
    session = Session(describe(model), threads=1)
    np.testing.assert_array_equal(session.run(ids), session.run(ids, np.ones_like(mask), np.zeros_like(types)))


@pytest.mark.parametrize("kind", ["mean", "cls", "stacks"])
def test_bf16_products_stay_near(kind):
    """Operands have 8 bits: each product is off by 2^-9 of its terms' size at most, and errors of layers add up."""
    model = build(kind)
    session = Session(describe(model), threads=1, precision="bf16")
    given = inputs(3, 33)
    agree(session.run(*given), answers(model, *given), given[1], 0.05)


@pytest.mark.parametrize("name", INT8)
@pytest.mark.parametrize("kind", KINDS)
def test_int8_products_stay_near(kind, name, monkeypatch):
    """A code is off by 1/510 of its row's range, a weight by 1/254 of its output's largest: twice bfloat16's 2^-9."""
    number = INT8[name][1]
    if not runs_int8(number):
        pytest.skip(f"this processor or compiler has no {name}")
    model = build(kind)
    session = Session(describe(model), threads=1, precision="int8")
    monkeypatch.setattr(session._encoder, "_isa", number)
    for shape in ((1, 5), (3, 33), (9, 16)):
        given = inputs(*shape, types=model.config.type_vocab_size)
        for wanted in wanted_of(kind):
            found = session.run(*given, wanted=wanted)
            agree(found, answers(model, *given, wanted), given[1], 0.06)
            assert np.abs(found - Session(describe(model), threads=1).run(*given, wanted=wanted)).max() > 1e-5


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512", "avx512bf16", "amx", "amx_fp32"])
def test_every_instruction_set(isa, monkeypatch):
    """One that this machine lacks gives the next lower one."""
    monkeypatch.setenv("FFNAS_CPU_ISA", isa)
    model = build("cls")
    for given in (inputs(1, 5), inputs(4, 30)):
        for precision, tolerance in (("fp32", 1e-5), ("bf16", 0.05)):
            found = Session(describe(model), threads=1, precision=precision).run(*given)
            agree(found, answers(model, *given), given[1], tolerance)


def test_auto_takes_the_faster_precision_for_each_size(monkeypatch):
    """With a clock by which one precision takes no time."""
    model, given = build("cls"), inputs(3, 33)
    for fast in ("fp32", "bf16"):
        now, run = [0.0], Encoder.run
        monkeypatch.setattr(session_module.time, "perf_counter", lambda now=now: now[0])

        def timed(self, *args, now=now, fast=fast, run=run):
            now[0] += args[-1] != fast
            return run(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(Encoder, "run", timed)
            session = Session(describe(model), threads=1, precision="auto")
            found = session.run(*given)
        np.testing.assert_array_equal(found, Session(describe(model), threads=1, precision=fast).run(*given))
        assert list(session._chosen.values()) == [fast]


def test_eight_bits_are_taken_only_by_who_asks(monkeypatch):
    """`auto` leaves them out even where they take no time; `fastest` does not."""
    model, given = build("cls"), inputs(3, 33)
    now, run = [0.0], Encoder.run

    def timed(self, *args):
        now[0] += args[-1] != "int8"
        return run(self, *args)

    monkeypatch.setattr(session_module.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(Encoder, "run", timed)
    for precision, wanted in (("auto", {"fp32", "bf16"}), ("fastest", {"int8"})):
        session = Session(describe(model), threads=1, precision=precision)
        session.run(*given)
        assert set(session._chosen.values()) <= wanted


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("shape", [(7, 37), (1, 9)])
def test_threads_change_no_bit(precision, shape):
    model = build("mean")
    given = inputs(*shape)
    one = Session(describe(model), threads=1, precision=precision).run(*given)
    for threads in (2, 3, 8):
        session = Session(describe(model), threads=threads, precision=precision)
        for _ in range(5):
            np.testing.assert_array_equal(session.run(*given), one)


def test_sessions_side_by_side_and_one_from_several_threads():
    model = build("cls")
    shared = Session(describe(model), threads=2)
    cases = [inputs(b, s) for b, s in ((1, 4), (3, 21), (2, 40))]
    wanted = [Session(describe(model), threads=1).run(*c) for c in cases]
    wrong = []

    def work(own):
        for turn in range(40):
            at = turn % len(cases)
            for session in (shared, own):
                if not np.array_equal(session.run(*cases[at]), wanted[at]):
                    wrong.append(turn)

    workers = [threading.Thread(target=work, args=(Session(describe(model), threads=2),)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_a_closed_session_says_so():
    session = Session(describe(build("cls")), threads=2)
    session.run(*inputs(1, 4))
    session.close()
    session.close()
    with pytest.raises(NativeError, match="closed"):
        session.run(*inputs(1, 4))


def test_a_model_says_the_same_after_the_original_changed():
    model = build("cls")
    given = inputs(2, 8)
    session = Session(describe(model), threads=1)
    before = session.run(*given)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    np.testing.assert_array_equal(session.run(*given), before)


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i, m, t: (i + 97, m, t), "outside the vocabulary"),
        (lambda i, m, t: (-i - 1, m, t), "outside the vocabulary"),
        (lambda i, m, t: (i, m, t + 2), "token types"),
        (lambda i, m, t: (i, m * 0, t), "without tokens"),
        (lambda i, m, t: (i, np.roll(np.tri(*m.shape, dtype=int), 1, 1), t), "reads the first token"),
        (lambda i, m, t: (np.zeros((1, 41), int), None, None), "positions the model does not have"),
        (lambda i, m, t: (i[0], m, t), r"input_ids: must be \[sequences, tokens\]"),
        (lambda i, m, t: (i, m[:, :2], t), "attention_mask: has shape"),
        (lambda i, m, t: (i[:0], m[:0], t[:0]), "input_ids"),
    ],
)
def test_bad_ids_get_one_line(change, message):
    session = Session(describe(build("cls")), threads=1)
    good = inputs(2, 5)
    before = session.run(*good)
    with pytest.raises(NativeError, match=message) as error:
        session.run(*change(*good))
    assert "\n" not in str(error.value)
    np.testing.assert_array_equal(session.run(*good), before)


def test_ids_of_padding_may_be_anything():
    session = Session(describe(build("trigram")), threads=1)
    ids, mask, types = inputs(2, 6)
    mask[1, 3:] = 0
    ids[1, 4:] = 10**12
    assert np.isfinite(session.run(ids, mask, types)).all()


def test_bad_options_get_one_line():
    parts = describe(build("encoder"))
    for options, message in (
        ({"threads": 0}, "threads"),
        ({"precision": "int3"}, "precision: must be one of fp32, bf16, int8"),
    ):
        with pytest.raises(NativeError, match=message):
            Session(parts, **options)
    session = Session(parts, threads=1)
    with pytest.raises(NativeError, match="no head"):
        session.run(np.ones((1, 2), int))
    with pytest.raises(NativeError, match="no head for whole texts"):
        session("a")


def test_models_that_are_more_than_their_parameters_are_refused():
    model = build("cls")
    handle = model.ffnas.encoder[0].all_ffn[0].dense1.register_forward_hook(lambda *_: None)
    with pytest.raises(UserError, match="hooks"):
        describe(model)
    handle.remove()
    handle = model.ffnas.encoder[1].attention.value.register_forward_hook(lambda *_: None)
    with pytest.raises(UserError, match="hooks"):
        describe(model)
    handle.remove()
    describe(model)
    with pytest.raises(UserError, match="Linear is not supported"):
        describe(torch.nn.Linear(2, 2))
    masks = build("masks")
    masks.lm_head.register_forward_hook(lambda *_: None)
    with pytest.raises(UserError, match="lm_head has hooks"):
        describe(masks)


def test_arrays_that_do_not_fit_are_refused():
    description, arrays = describe(build("stacks"))
    for name in arrays:
        for wrong in (None, arrays[name][:-1], arrays[name].astype(np.float64)):
            given = {k: v for k, v in {**arrays, name: wrong}.items() if v is not None}
            with pytest.raises(NativeError, match=f"{name} is"):
                Session((description, given), threads=1)
    for change in ({"program": (1, 2, 3)}, {"program": ()}, {"heads": -1}, {"stack": 65}):
        broken = description._replace(layers=(description.layers[0]._replace(**change), *description.layers[1:]))
        with pytest.raises(NativeError):
            Session((broken, arrays), threads=1)


def test_a_chain_of_tags_is_refused():
    model = build("labels", token_head="crf")
    with pytest.raises(UserError, match="transitions of a CRF are not in the runtime"):
        describe(model)
