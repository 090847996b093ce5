"""`kernels.runtime` beside PyTorch in float64: models of all kinds, odd sizes, padding, precisions, threads; files."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from native_models import KINDS, answers, build, inputs
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertTokenizerFast, pipeline

from engine.errors import UserError
from engine.export.native import write_native
from engine.student import FFNASForMaskedLM
from engine.student.configuration import FFNASConfig
from engine.student.native import describe
from kernels.build import library_path
from kernels.runtime import NativeError, Session
from kernels.runtime import session as session_module
from kernels.runtime.library import Encoder

pytestmark = pytest.mark.filterwarnings("ignore::kernels.BackendFallbackWarning")  # float64 is for the reference

SHAPES = ((1, 1), (1, 7), (3, 16), (5, 33), (2, 40))
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]


def wanted_of(kind):
    return {"encoder": ("hidden", "pooled"), "spans": ("head",)}.get(kind, ("head",))


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


def test_threads_change_no_bit():
    model = build("mean")
    given = inputs(7, 37)
    one = Session(describe(model), threads=1).run(*given)
    for threads in (2, 3, 8):
        session = Session(describe(model), threads=threads)
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
        ({"precision": "int3"}, "precision: must be fp32, bf16 or auto"),
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
    with pytest.raises(UserError, match="FFNASForMaskedLM is not supported"):
        describe(
            FFNASForMaskedLM(FFNASConfig(hidden_size=8, num_attention_heads=2, vocab_size=20, num_hidden_layers=1))
        )


# --- folders -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A classifier's folders, Hugging Face's and native."""
    root = tmp_path_factory.mktemp("native")
    (root / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = BertTokenizerFast(str(root / "vocab.txt"), model_max_length=40)
    model = build("mean", id2label={0: "bad", 1: "so so", 2: "good"}, label2id={"bad": 0, "so so": 1, "good": 2})
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    write_native(model, tokenizer, root / "native")
    return root


TEXTS = ["a b c", "z", "q w e r t y u i o p " * 8, "", "a b"]


def test_texts_get_the_answers_of_a_pipeline(exported):
    classify = pipeline("text-classification", model=str(exported / "model"), truncation=True, max_length=40)
    session = Session(exported / "native", threads=1)
    for found, wanted in zip(session(TEXTS, batch_size=2), classify(TEXTS), strict=True):
        assert found["label"] == wanted["label"]
        assert found["score"] == pytest.approx(wanted["score"], abs=1e-5)
    assert session("a b c") == session(["a b c"])


def test_pairs(exported):
    tokenizer = AutoTokenizer.from_pretrained(exported / "model")
    model = AutoModelForSequenceClassification.from_pretrained(exported / "model").eval()
    session = Session(exported / "native", threads=1)
    given = tokenizer([("a b", "c"), ("x", "y z w")], padding=True, return_tensors="pt")
    with torch.no_grad():
        wanted = model(**given).logits.numpy()
    np.testing.assert_allclose(session.scores([("a b", "c"), ("x", "y z w")]), wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(NativeError, match="must be strings or pairs"):
        session.scores([3])


def test_it_needs_no_pytorch(exported):
    """A process that cannot import torch, transformers or safetensors."""
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'safetensors', 'triton'): sys.modules[name] = None\n"
        "from kernels.runtime import Session\n"
        f"print(Session({str(exported / 'native')!r}, threads=1)('a b c')[0]['label'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("bad", "so so", "good")


def test_damaged_folders_are_refused_in_one_line(exported, tmp_path):
    """Every field taken away, and bytes changed or cut: never a crash, never an answer from a damaged file."""
    source = exported / "native"
    good = json.loads((source / "ffnas.json").read_text())
    folder = tmp_path / "model"
    folder.mkdir()

    def refused(message, text=None, **changes):
        (folder / "ffnas.json").write_text(json.dumps({**good, **changes}) if text is None else text)
        with pytest.raises(NativeError, match=message) as error:
            Session(folder, threads=1)
        assert "\n" not in str(error.value)

    with pytest.raises(NativeError, match=r"no ffnas\.json"):
        Session(folder)
    refused(r"no encoder\.bin")
    for name in ("weights.safetensors", "tokenizer.json", "encoder.bin"):
        (folder / name).write_bytes((source / name).read_bytes())
    refused("no JSON", "{")
    refused("no JSON", "[" * 100_000)
    refused("format", "[]")
    refused("version 2", version=2)
    refused("hidden_size", hidden_size=2**40)
    refused("hidden_size", hidden_size=True)
    refused("surprise", surprise=1)
    refused("head must be", head="x")
    refused("labels", labels=[1])
    refused("regression", regression="no")
    refused("different models", hidden_size=35)
    refused("different models", labels=["a"])
    refused("different models", pools=False)
    refused("different models", head="tokens")
    refused("with 3 labels", head="none")
    for name in ("hidden_size", "labels", "positions", "max_length"):
        refused(name, json.dumps({k: v for k, v in good.items() if k != name}))
    weights = (folder / "weights.safetensors").read_bytes()
    for changed in (weights[:-4], weights[:50] + bytes([weights[50] ^ 1]) + weights[51:], b"", weights + b"\0"):
        (folder / "weights.safetensors").write_bytes(changed)
        refused("cut, or was changed")
    (folder / "weights.safetensors").write_bytes(weights)
    encoder = (folder / "encoder.bin").read_bytes()
    (folder / "encoder.bin").write_bytes(encoder[:-4])
    refused("is not the one")
    (folder / "encoder.bin").write_bytes(encoder)
    (folder / "ffnas.json").write_text(json.dumps(good))
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(NativeError, match="not a tokenizer"):
        Session(folder, threads=1)("a")


def test_arrays_that_do_not_fit_are_refused():
    description, arrays = describe(build("stacks"))
    for name in arrays:
        for wrong in (None, arrays[name][:-1], arrays[name].astype(np.float64)):
            given = {k: v for k, v in {**arrays, name: wrong}.items() if v is not None}
            with pytest.raises(NativeError, match=f"{name} is"):
                Session((description, given), threads=1)
    for change in ({"program": (1, 2, 3)}, {"program": ()}, {"heads": -1}, {"stack": 65}):
        broken = replace(description, layers=(replace(description.layers[0], **change), *description.layers[1:]))
        with pytest.raises(NativeError):
            Session((broken, arrays), threads=1)


def test_hostile_folders_do_not_crash(exported, tmp_path):
    """Words of encoder.bin and of its programs, changed at random, with hashes that fit.

    In a process of its own, so that a crash is seen as one.
    """
    code = f"""
import hashlib, json, random, shutil
from pathlib import Path
import numpy as np
from kernels.runtime import NativeError, Session
from kernels.runtime import session as session_module
from kernels.runtime.library import Encoder
from kernels.runtime.folder import fnv
source, folder = Path({str(exported / "native")!r}), Path({str(tmp_path / "hostile")!r})
shutil.copytree(source, folder)
good, answers = (source / "encoder.bin").read_bytes(), json.loads((source / "ffnas.json").read_text())
words, programs = (int.from_bytes(good[k : k + 8], "little") for k in (16, 24))
rng, refused, answered = random.Random(0), 0, 0
for turn in range(2000):
    data = bytearray(good)
    for _ in range(rng.randint(1, 3)):
        if turn % 2:
            at, size = 64 + 8 * rng.randrange(words), 8
            value = rng.choice([-1, 0, 1, 8, 2**31, 2**62, rng.randrange(2**20)])
        else:
            at, size = 64 + 8 * words + 4 * rng.randrange(programs), 4
            value = rng.choice([rng.randint(-(2**31), 2**31 - 1), rng.randint(-3, 300)])
        data[at : at + size] = value.to_bytes(size, "little", signed=True)
    data[48:56] = fnv(bytes(data[56:])).to_bytes(8, "little")
    (folder / "encoder.bin").write_bytes(data)
    (folder / "ffnas.json").write_text(json.dumps({{**answers, "sha256": hashlib.sha256(data).hexdigest()}}))
    try:
        Session(folder, threads=1).run(np.array([[2, 5, 6, 3]]))
        answered += 1
    except NativeError:
        refused += 1
print(refused, answered)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    refused, answered = map(int, done.stdout.split())
    assert refused + answered == 2000
    assert refused > 800  # a changed constant, or a word that nobody reads, answers something else, harmlessly


# --- C -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """csrc/examples/classify.c, compiled."""
    made = tmp_path_factory.mktemp("c") / "classify"
    csrc = Path(__file__).resolve().parents[2] / "csrc"
    library = library_path()
    command = ["cc", "-std=c11", "-Wall", "-Wextra", "-Werror", str(csrc / "examples" / "classify.c"), f"-I{csrc}"]
    done = subprocess.run(
        [*command, str(library), f"-Wl,-rpath,{library.parent}", "-o", str(made)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return made


def run_c(program, folder, *ids):
    return subprocess.run([program, folder, *map(str, ids)], capture_output=True, text=True, check=False, timeout=60)


def test_c_gives_the_same_scores(exported, program):
    ids = [2, 5, 9, 30, 3]
    done = run_c(program, exported / "native", *ids)
    assert done.returncode == 0, done.stderr
    wanted = Session(exported / "native", threads=1).run(np.array([ids]))[0]
    np.testing.assert_allclose([float(line) for line in done.stdout.split()], wanted, atol=1e-6)


@pytest.mark.parametrize("kind", ["trigram", "stacks", "spans", "fewer heads"])
def test_c_reads_every_kind(kind, program, tmp_path):
    write_native(build(kind), None, tmp_path / "native")
    ids = [4, 8, 15, 16, 23]
    done = run_c(program, tmp_path / "native", *ids)
    wanted = Session(tmp_path / "native", threads=1).run(np.array([ids]))[0].ravel()
    np.testing.assert_allclose([float(line) for line in done.stdout.split()], wanted, atol=2e-6)


def test_c_refuses(exported, program, tmp_path):
    assert run_c(program, tmp_path, 1).returncode == 1
    assert "status 5" in run_c(program, tmp_path, 1).stderr
    assert "status 3" in run_c(program, exported / "native", 97).stderr
    assert run_c(program, exported / "native").returncode == 2
