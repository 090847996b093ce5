"""Stage 0: the teacher is fine-tuned on the task once, and found in the cache ever after.

The loss against the labels (`TaskHead.gold_loss`), the phase loop of every other training, evaluation on `select` eight
times, best weights kept, an early end where nothing gets better. How long and at which rate follows from the sizes of
data and model unless settings say otherwise (`engine.teacher.settings`). Long runs leave a checkpoint beside the cache
entry and continue from it.

A source that was fine-tuned on the task's classes already is not trained again if its head is clearly better than
always answering the most frequent class.

Rejected: `transformers.Trainer`; it cannot be made to give the same weights after a kill without owning the data order.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from engine.autocast import autocast
from engine.data import Batch, EncodedTask
from engine.errors import UserError
from engine.model_sources import TeacherSource, resolve
from engine.objective import KDLoss
from engine.states import answers
from engine.teacher.adapter import Teacher
from engine.teacher.best import Best
from engine.teacher.cache import Damaged, check, content_key, prepare_cache, store
from engine.teacher.sentence import sentence_pooling
from engine.teacher.settings import FinetuneSettings, evaluation_interval, learning_rate, total_steps
from engine.training.checkpoint import remove_training_state
from engine.training.loop import Diverged, cycle, run_phase
from engine.training.settings import PhaseSettings

Progress = Callable[..., None]
"""Called as `progress(done_steps, total_steps, **metrics)`; metrics are `loss`, or those of an evaluation."""

CHECKPOINT_EVERY = 500

MATH_MAX_LENGTH = 256
"""Longest sequence for which bf16 training on the CPU keeps S×S: see `_attention`."""

_log = logging.getLogger("ffnas.teacher")


def finetune(
    source: str | Path,
    data: EncodedTask,
    settings: FinetuneSettings,
    cache_dir: str | Path,
    device: torch.device | str = "cpu",
    *,
    precision: str = "fp32",
    progress: Progress | None = None,
    checkpoint_every: int = CHECKPOINT_EVERY,
    standard: bool = False,
    published: bool = False,
) -> Teacher:
    """The teacher fine-tuned on `data.train`, from the cache if it was made before.

    Args:
        source: as `Teacher.load` takes it.
        data: encoded with this teacher's tokenizer; `train` trains, `select` chooses among evaluations.
        settings: see `FinetuneSettings`; with `max_steps=0` the teacher is loaded, evaluated and cached as it is.
        cache_dir: one folder per content hash is kept there.
        device: where to train, and where the returned teacher is.
        precision: "fp32", or "bf16" for autocast.
        progress: called every few steps and after evaluations.
        checkpoint_every: steps between checkpoints of an unfinished run.
        standard: fine-tune the teacher as a model of ours where its family is known (`Teacher.load`).
        published: fine-tune a BERT with the published code's arithmetic, which it keeps.

    Returns:
        The teacher in eval mode, with `metrics` (of `select`), `notes` and `folder` (the cache entry) set.

    Raises:
        UserError: the teacher or the cache cannot be used, training diverged, or `max_steps=0` without a head.
    """
    device = torch.device(device)
    cache_dir = Path(cache_dir)
    prepare_cache(cache_dir)
    found = resolve(str(source))
    key, details = _identity(found, data, settings, precision, standard, published)
    folder = cache_dir / key
    teacher = _from_cache(folder, key, found, data, device)
    if teacher is not None:
        if progress is not None:
            progress(1, 1, **teacher.metrics)
        return teacher
    teacher = Teacher.load(found, data.spec, device=device, seed=settings.seed, standard=standard, published=published)
    checkpoint = cache_dir / f"{key}.checkpoint"
    _train(teacher, data, settings, precision, progress or _silent, checkpoint, checkpoint_every)
    store(folder, key, teacher, {**details, "notes": teacher.notes})
    remove_training_state(checkpoint)
    teacher.folder = folder
    return teacher


def _steps(settings: FinetuneSettings, data: EncodedTask) -> int:
    """Optimizer steps of a fine-tuning on these data."""
    train = data.train
    row_tokens = len(train.tokens) / max(1, len(train))
    return total_steps(settings, len(train), train.num_batches(settings.batch_size), row_tokens)


def _decided(settings: FinetuneSettings, data: EncodedTask) -> dict[str, Any]:
    """The settings as plain values, with the number of steps in place of what it was decided by."""
    given = {k: v for k, v in asdict(settings).items() if k not in ("epochs", "max_steps", "max_tokens")}
    return {**given, "steps": _steps(settings, data)}


def finetuned(
    source: str | Path,
    data: EncodedTask,
    settings: FinetuneSettings,
    cache_dir: str | Path,
    device: torch.device | str = "cpu",
    *,
    precision: str = "fp32",
    standard: bool = False,
) -> Teacher | None:
    """What `finetune` would return without training: the teacher from the cache, None where it is not there.

    Args: as of `finetune`.
    """
    found = resolve(str(source))
    key, _ = _identity(found, data, settings, precision, standard)
    return _from_cache(Path(cache_dir) / key, key, found, data, torch.device(device))


def _identity(
    source: TeacherSource,
    data: EncodedTask,
    settings: FinetuneSettings,
    precision: str,
    standard: bool,
    published: bool = False,
) -> tuple[str, dict[str, Any]]:
    """Name of the cache entry, and what decides it."""
    details: dict[str, Any] = {
        "source": source.name,
        "source_fingerprint": source.fingerprint(),
        "task": data.spec.to_dict(),
        "data": {"train": data.train.fingerprint(), "select": data.select.fingerprint()},
        "settings": _decided(settings, data),
        "precision": precision,
    }
    if standard:
        details["standard"] = {"pooling": sentence_pooling(source.folder)}
    if published:
        details["published"] = True
    return content_key({name: value for name, value in details.items() if name != "source"}), details


def _from_cache(
    folder: Path, key: str, source: TeacherSource, data: EncodedTask, device: torch.device
) -> Teacher | None:
    try:
        record = check(folder, key)
    except Damaged as problem:
        _log.warning("cached teacher %s is damaged (%s): it has to be fine-tuned again", folder, problem)
        return None
    if record is None:
        return None
    teacher = Teacher.load(TeacherSource(source.name, folder), data.spec, device=device)
    teacher.metrics = record["metrics"]
    teacher.notes = list(record.get("notes", ()))
    teacher.folder = folder
    return teacher


def _train(
    teacher: Teacher,
    data: EncodedTask,
    settings: FinetuneSettings,
    precision: str,
    progress: Progress,
    checkpoint: Path,
    checkpoint_every: int,
) -> None:
    """Train in place; leaves the best evaluated weights in the model and their metrics in `teacher.metrics`."""
    total = _steps(settings, data)
    if total == 0 and not teacher.has_head:
        raise UserError(
            f"finetune.max_steps is 0, but teacher {teacher.name!r} has no head for task {data.spec.name!r}: "
            "let it train, or give a fine-tuned teacher"
        )
    best = Best(teacher, data, precision)
    if total and settings.reuse_head and teacher.knows_labels and best.knows_the_task():
        progress(1, 1, **teacher.metrics)
        return
    phase = PhaseSettings(
        steps=total,
        batch_size=settings.batch_size,
        lr=learning_rate(settings, teacher.hidden_size),
        weight_decay=settings.weight_decay,
        warmup_ratio=settings.warmup_ratio,
    )
    devices = [teacher.device] if teacher.device.type == "cuda" else []
    held = _frozen_tables(teacher.model) if settings.freeze_embeddings else contextlib.nullcontext()
    dropout = settings.dropout
    if dropout is None and total * settings.batch_size < len(data.train):
        dropout = 0.0
    with torch.random.fork_rng(devices=devices), _dropout(teacher.model, dropout), held:
        torch.manual_seed(settings.seed)
        try:
            run_phase(
                "teacher",
                teacher.model,
                lambda step: cycle(data.train, settings.batch_size, seed=settings.seed, start_step=step),
                _loss_of(teacher, data, precision),
                phase,
                total,
                log=lambda entry: progress(entry.step, total, loss=entry.losses["total"]),
                checkpoint=checkpoint,
                checkpoint_every=checkpoint_every,
                after_step=_evaluating(best, total, settings.patience, progress),
                extra_state=best.state,
                restore_extra=best.restore,
            )
        except _NoGain:
            pass
        except Diverged as error:
            raise UserError(f"{error}: choose a smaller finetune.lr") from error
    if total == 0:
        progress(1, 1, **best.update(last=True))
    best.install()


def _loss_of(teacher: Teacher, data: EncodedTask, precision: str) -> Callable[[Batch, int], KDLoss]:
    """The task's loss as the training loop takes it."""

    def loss(batch: Batch, _step: int) -> KDLoss:
        with autocast(teacher.device, precision), _attention(batch, precision):
            logits = answers(teacher.model(**teacher.inputs(batch), return_dict=True))
        assert batch.labels is not None  # of train
        value = data.spec.head.gold_loss(logits, batch.labels)
        return KDLoss.of(value, prediction=value)

    return loss


def _evaluating(best: Best, total: int, patience: int | None, progress: Progress) -> Callable[[int], None]:
    """What happens after every step: an evaluation where one is due, and the end where they get no better."""
    interval = evaluation_interval(total)

    def after_step(done: int) -> None:
        if done % interval and done < total:
            return
        progress(done, total, **best.update(last=done == total))
        if patience is not None and best.without_gain >= patience and done < total:
            best.teacher.notes.append(
                f"fine-tuning ended after {done} of {total} steps: {patience} evaluations without a gain"
            )
            raise _NoGain

    return after_step


def _attention(batch: Batch, precision: str) -> contextlib.AbstractContextManager[object]:
    """bf16 on the CPU without torch's fused attention: its backward there costs more than the S×S it saves.

    MiniLM, 32 x 34 and 8 x 128 tokens, one AVX-512/AMX core, torch 2.13: backward of the whole model 304 and 311 ms
    fused, 150 and 168 ms not; in fp32 no difference.
    """
    on_cpu = batch.input_ids.device.type == "cpu"
    if on_cpu and precision == "bf16" and batch.input_ids.shape[1] <= MATH_MAX_LENGTH:
        return sdpa_kernel(SDPBackend.MATH)
    return contextlib.nullcontext()


class _NoGain(Exception):
    """Ends the training: evaluations get no better."""


@contextlib.contextmanager
def _frozen_tables(model: PreTrainedModel) -> Iterator[None]:
    """Word and position tables without gradients for a while."""
    block = getattr(model.base_model, "embeddings", None)
    tables = [model.get_input_embeddings(), getattr(block, "position_embeddings", None)]
    held = [p for table in tables if table is not None for p in table.parameters() if p.requires_grad]
    for parameter in held:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in held:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def _dropout(model: nn.Module, p: float | None) -> Iterator[None]:
    """Set every dropout of `model` to `p` for a while; None leaves them as they are."""
    before = [(m, name, getattr(m, name)) for m in model.modules() if (name := _probability(m)) is not None]
    for module, name, _ in before if p is not None else ():
        setattr(module, name, p)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def _probability(module: nn.Module) -> str | None:
    """Name of a module's dropout probability; our attention blocks and FFNs have theirs as a number."""
    if isinstance(module, nn.Dropout):
        return "p"
    return "p_drop" if isinstance(getattr(module, "p_drop", None), float) else None


def _silent(*_args: object, **_metrics: object) -> None:
    """Reports nothing."""
