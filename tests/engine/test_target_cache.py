"""Teacher's answers on disk: equal to the teacher's own, found again, checked, refused where they do not fit or pay."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from engine.data import EncodedDataset, TaskSpec
from engine.data.parts import split
from engine.distill import TeacherTargets
from engine.distill.target_cache import BatchPlan, DiskTargets, PartTargets, teacher_hash
from engine.errors import UserError
from engine.states import EncoderStates
from engine.training.loop import cycle

LAYERS = [1, 2]


def toy_data(seed=0, rows=21) -> EncodedDataset:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 15, size=rows)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = rng.integers(1, 39, size=offsets[-1]).astype(np.int32)
    return EncodedDataset(tokens=tokens, offsets=offsets, second=lengths.astype(np.int32))


class Counting:
    """A distiller whose teacher passes are counted; a BERT with odd widths."""

    def __init__(self, dtype=torch.float32, seed=0) -> None:
        torch.manual_seed(seed)
        config = BertConfig(
            vocab_size=40, hidden_size=35, num_hidden_layers=3, num_attention_heads=5, intermediate_size=24
        )
        self.teacher = SimpleNamespace(model=BertModel(config).eval())
        self.spec = TaskSpec("toy", "classification", ("text",), "label", ("a", "b", "c"))
        self.layers, self.teacher_precision, self.device = LAYERS, "fp32", torch.device("cpu")
        self.dtype = dtype
        self.passes = 0

    @torch.no_grad()
    def targets(self, batch, *, need_logits):
        self.passes += 1
        hidden = self.teacher.model.embeddings(batch.input_ids) * batch.attention_mask[..., None]
        heads = hidden.unflatten(-1, (5, 7)).transpose(1, 2).to(self.dtype)
        return EncoderStates(
            embeddings=hidden,
            hidden=tuple(hidden * (layer + 2) for layer in LAYERS),
            queries=tuple(heads * (layer + 0.5) for layer in LAYERS),
            keys=tuple(heads - layer for layer in LAYERS),
            logits=hidden[:, 0, :3].clone(memory_format=torch.contiguous_format) if need_logits else None,
        )


@pytest.fixture
def plan() -> BatchPlan:
    return BatchPlan(toy_data(), batch_size=4, seed=3, steps=8)


def parts(plan: BatchPlan):
    """(step, batch) of everything the plan covers, made as training makes it."""
    stream = cycle(plan.data, plan.batch_size, seed=plan.seed)
    for step in range(plan.steps):
        for part in split(next(stream), rank=plan.rank, ranks=plan.ranks, micro_batches=plan.micro_batches):
            yield step, part.batch


def new(distiller, plan, folder, **options):
    options = {"need_logits": True, "cheaper": lambda read, compute: True, **options}
    return DiskTargets(distiller, plan=plan, folder=folder, **options)


def flat(states: EncoderStates):
    logits = () if states.logits is None else (states.logits,)
    return [states.embeddings, *states.hidden, *states.queries, *states.keys, *logits]


def assert_equal(found: EncoderStates, expected: EncoderStates) -> None:
    for a, b in zip(flat(found), flat(expected), strict=True):
        assert a.dtype == b.dtype
        assert a.stride() == b.stride()  # the same kernels run on the same memory layout
        assert torch.equal(a, b)


@pytest.mark.parametrize(("ranks", "micro"), [(1, 1), (2, 1), (1, 3), (3, 2)])
def test_the_plan_knows_every_part_training_makes(ranks, micro):
    for rank in range(ranks):
        plan = BatchPlan(toy_data(), 4, 3, 8, micro, rank, ranks)
        made = {(step, batch.part): tuple(batch.input_ids.shape) for step, batch in parts(plan)}
        assert plan.shapes() == made


@pytest.mark.parametrize("need_logits", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_exact_answers_are_the_teachers_bit_for_bit(plan, tmp_path, dtype, need_logits):
    distiller = Counting(dtype)
    for _ in range(2):  # written, then found again by a new process's object
        targets = new(distiller, plan, tmp_path, need_logits=need_logits)
        for _ in range(2):
            for step, batch in parts(plan):
                expected = distiller.targets(batch, need_logits=need_logits)
                assert_equal(targets.get(step, batch), expected)
        targets.close()
    assert distiller.passes == 4 * plan.steps + plan.steps + 1  # one more is timed


def test_micro_batches_have_records_of_their_own(tmp_path):
    plan = BatchPlan(toy_data(), 4, 3, 8, micro_batches=3)
    distiller = Counting()
    targets = new(distiller, plan, tmp_path)
    in_memory = PartTargets(lambda: TeacherTargets(distiller, need_logits=True))
    for _ in range(2):
        for step, batch in parts(plan):
            expected = distiller.targets(batch, need_logits=True)
            assert_equal(targets.get(step, batch), expected)
            assert_equal(in_memory.get(step, batch), expected)


def test_bf16_answers_are_the_teachers_rounded_once(plan, tmp_path):
    distiller = Counting()
    targets = new(distiller, plan, tmp_path, dtype="bf16")
    for _ in range(2):
        for step, batch in parts(plan):
            found = targets.get(step, batch)
    expected = distiller.targets(batch, need_logits=True)
    for a, b in zip(flat(found), flat(expected), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b.bfloat16().float())


def test_steps_beyond_the_plan_are_computed(plan, tmp_path):
    distiller = Counting()
    targets = new(distiller, plan, tmp_path)
    (_, batch), *_ = parts(plan)
    for step in (plan.steps, plan.steps + 5):
        assert_equal(targets.get(step, batch), distiller.targets(batch, need_logits=True))
    assert not list(tmp_path.iterdir())


def test_another_batch_for_a_step_is_an_error(plan, tmp_path):
    targets = new(Counting(), plan, tmp_path)
    (_, batch), *_ = parts(plan)
    with pytest.raises(ValueError, match="target cache: step 0"):
        targets.get(0, batch.map(lambda t: t[:2]))


def fill(plan, folder, distiller=None, **options):
    targets = new(distiller or Counting(), plan, folder, **options)
    for step, batch in parts(plan):
        targets.get(step, batch)
    targets.close()
    return targets


def test_a_damaged_record_is_computed_again_with_one_line(plan, tmp_path):
    targets = fill(plan, tmp_path)
    file = targets.folder / "states.bin"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    for damaged in (1, 0):
        notes, distiller = [], Counting()
        again = new(distiller, plan, tmp_path, note=notes.append)
        for step, batch in parts(plan):
            assert_equal(again.get(step, batch), Counting().targets(batch, need_logits=True))
        again.close()
        assert distiller.passes == len(notes) == damaged
        assert all("is damaged: computed again" in note and "\n" not in note for note in notes)


@pytest.mark.parametrize("name", ["states.bin", "sums.bin", "meta.json"])
@pytest.mark.parametrize("harm", ["truncated", "removed", "empty"])
def test_damaged_files_are_made_again_with_one_line(plan, tmp_path, name, harm):
    file = fill(plan, tmp_path).folder / name
    if harm == "removed":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: -3 if harm == "truncated" else 0])
    notes, distiller = [], Counting()
    targets = new(distiller, plan, tmp_path, note=notes.append)
    for step, batch in parts(plan):
        assert_equal(targets.get(step, batch), Counting().targets(batch, need_logits=True))
    targets.close()
    assert distiller.passes == plan.steps + 1
    assert len(notes) == 2  # what is wrong; the size of the new file
    assert notes[0].endswith("made again")


def test_a_killed_run_leaves_whole_records(plan, tmp_path):
    distiller = Counting()
    targets = new(distiller, plan, tmp_path)
    for step, batch in list(parts(plan))[:3]:
        targets.get(step, batch)
    targets.close()
    distiller.passes = 0
    fill(plan, tmp_path, distiller)
    assert distiller.passes == plan.steps - 3


def test_size_is_stated_before_and_lack_of_room_refused(plan, tmp_path, monkeypatch):
    notes = []
    targets = fill(plan, tmp_path, note=notes.append)
    size = (targets.folder / "states.bin").stat().st_size
    assert notes == [f"teacher targets: {size / 2**30:.2f} GiB (exact) in {targets.folder}"]
    values = sum(rows * width * 35 * 7 + rows * 3 for rows, width in plan.shapes().values())
    assert 4 * values <= size <= 4 * values + 8 * 8 * 64  # eight tensors a record, each aligned to 64 bytes
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=size - 1))
    with pytest.raises(UserError, match=r"need 0\.00 GiB, 0\.00 GiB are free: choose another place"):
        fill(plan, tmp_path / "full")
    assert not list((tmp_path / "full").iterdir())


def test_a_disk_that_fills_meanwhile_ends_in_one_line(plan, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(UserError, match="cannot be written \\(No space left on device\\)"):
        fill(plan, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_file_that_does_not_pay_is_not_kept(plan, tmp_path):
    notes, times = [], []
    distiller = Counting()
    targets = new(distiller, plan, tmp_path, note=notes.append, cheaper=lambda *seconds: bool(times.append(seconds)))
    for step, batch in parts(plan):
        assert_equal(targets.get(step, batch), Counting().targets(batch, need_logits=True))
    assert len(times) == 1
    assert min(times[0]) > 0
    assert "not kept, reading a batch took" in notes[-1]
    assert not list(tmp_path.iterdir())


def test_a_second_process_computes_while_the_first_has_the_file(plan, tmp_path):
    distiller, notes = Counting(), []
    first = new(distiller, plan, tmp_path)
    (step, batch), *_ = parts(plan)
    expected = first.get(step, batch)
    second = new(distiller, plan, tmp_path, note=notes.append)
    assert_equal(second.get(step, batch), expected)
    assert len(notes) == 1
    assert "in use by another process" in notes[0]
    assert (first.folder / "meta.json").exists()
    first.close()


def test_the_key_covers_what_decides_the_answers(plan, tmp_path):
    other = [
        new(Counting(seed=1), plan, tmp_path),
        new(Counting(), plan, tmp_path, need_logits=False),
        new(Counting(), plan, tmp_path, dtype="bf16"),
        *(
            new(Counting(), BatchPlan(**{**plan.__dict__, **change}), tmp_path)
            for change in (
                {"data": toy_data(1)},
                {"batch_size": 5},
                {"seed": 4},
                {"steps": 9},
                {"micro_batches": 2},
                {"ranks": 2},
                {"ranks": 2, "rank": 1},
            )
        ),
    ]
    for name, value in (("layers", [0, 2]), ("teacher_precision", "bf16")):
        distiller = Counting()
        setattr(distiller, name, value)
        other.append(new(distiller, plan, tmp_path))
    keys = {targets.key for targets in other}
    assert len(keys) == len(other)
    assert new(Counting(), plan, tmp_path).key not in keys
    assert teacher_hash(Counting().teacher) == teacher_hash(Counting().teacher)


def test_meta_names_key_size_and_measurement(plan, tmp_path):
    targets = fill(plan, tmp_path)
    meta = json.loads((targets.folder / "meta.json").read_text())
    assert meta["key"] == targets.key
    assert meta["bytes"] == (targets.folder / "states.bin").stat().st_size
    assert set(meta["seconds"]) == {"read", "compute"}
