"""Stage 0: the teacher is fine-tuned on the task once, and found in the cache ever after.

Cross-entropy to the labels (regression: MSE), the phase loop of every other training, evaluation on `select` after
each epoch and at the end, best weights kept. Long runs leave a checkpoint beside the cache entry and continue from it.

Rejected: `transformers.Trainer`; it cannot be made to give the same weights after a kill without owning the data order.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine.autocast import autocast
from engine.data import Batch, EncodedTask
from engine.errors import UserError
from engine.evaluation.evaluation import evaluate
from engine.evaluation.metrics import primary
from engine.model_sources import TeacherSource, resolve
from engine.objective import KDLoss
from engine.states import answers
from engine.teacher.adapter import Teacher
from engine.teacher.cache import Damaged, check, content_key, prepare_cache, store
from engine.teacher.settings import FinetuneSettings
from engine.training.checkpoint import remove_training_state
from engine.training.loop import Diverged, PhaseLog, cycle, run_phase
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

    Returns:
        The teacher in eval mode, with `metrics` (of `select`) and `folder` (the cache entry) set.

    Raises:
        UserError: the teacher or the cache cannot be used, training diverged, or `max_steps=0` without a head.
    """
    device = torch.device(device)
    cache_dir = Path(cache_dir)
    prepare_cache(cache_dir)
    found = resolve(str(source))
    details = {
        "source": found.name,
        "source_fingerprint": found.fingerprint(),
        "task": data.spec.to_dict(),
        "data": {"train": data.train.fingerprint(), "select": data.select.fingerprint()},
        "settings": asdict(settings),
        "precision": precision,
    }
    key = content_key({name: value for name, value in details.items() if name != "source"})
    folder = cache_dir / key
    teacher = _from_cache(folder, key, found, data, device)
    if teacher is not None:
        if progress is not None:
            progress(1, 1, **teacher.metrics)
        return teacher
    teacher = Teacher.load(found, data.spec, device=device, seed=settings.seed)
    checkpoint = cache_dir / f"{key}.checkpoint"
    _train(teacher, data, settings, precision, progress or _silent, checkpoint, checkpoint_every)
    store(folder, key, teacher, details)
    remove_training_state(checkpoint)
    teacher.folder = folder
    return teacher


def _from_cache(
    folder: Path, key: str, source: TeacherSource, data: EncodedTask, device: torch.device
) -> Teacher | None:
    try:
        record = check(folder, key)
    except Damaged as problem:
        _log.warning("cached teacher %s is damaged (%s): fine-tuning again", folder, problem)
        return None
    if record is None:
        return None
    teacher = Teacher.load(TeacherSource(source.name, folder), data.spec, device=device)
    teacher.metrics = record["metrics"]
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
    per_epoch = data.train.num_batches(settings.batch_size)
    total = max(1, round(settings.epochs * per_epoch))
    total = total if settings.max_steps is None else min(total, settings.max_steps)
    if total == 0 and not teacher.has_head:
        raise UserError(
            f"finetune.max_steps is 0, but teacher {teacher.name!r} has no head for task {data.spec.name!r}: "
            "let it train, or give a fine-tuned teacher"
        )
    best = _Best(teacher, data, precision)

    def loss(batch: Batch, _step: int) -> KDLoss:
        with autocast(teacher.device, precision), _attention(batch, precision):
            logits = answers(teacher.model(**teacher.inputs(batch), return_dict=True))
        value = task_loss(logits, batch.labels, regression=data.spec.is_regression)
        nothing = torch.zeros_like(value)
        return KDLoss(value, nothing, nothing, value)

    def after_step(done: int) -> None:
        if done % per_epoch == 0 or done == total:
            progress(done, total, **best.update(last=done == total))

    def log(entry: PhaseLog) -> None:
        progress(entry.step, total, loss=entry.losses["total"])

    phase = PhaseSettings(
        steps=total,
        batch_size=settings.batch_size,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        warmup_ratio=settings.warmup_ratio,
    )
    devices = [teacher.device] if teacher.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), _dropout(teacher.model, settings.dropout):
        torch.manual_seed(settings.seed)
        try:
            run_phase(
                "teacher",
                teacher.model,
                lambda step: cycle(data.train, settings.batch_size, seed=settings.seed, start_step=step),
                loss,
                phase,
                total,
                log=log,
                checkpoint=checkpoint,
                checkpoint_every=checkpoint_every,
                after_step=after_step,
                extra_state=best.state,
                restore_extra=best.restore,
            )
        except Diverged as error:
            raise UserError(f"{error}: choose a smaller finetune.lr") from error
    if total == 0:
        progress(1, 1, **best.update(last=True))
    best.install()


def _attention(batch: Batch, precision: str) -> contextlib.AbstractContextManager[object]:
    """bf16 on the CPU without torch's fused attention: its backward there costs more than the S×S it saves.

    MiniLM, 32 x 34 and 8 x 128 tokens, one AVX-512/AMX core, torch 2.13: backward of the whole model 304 and 311 ms
    fused, 150 and 168 ms not; in fp32 no difference.
    """
    on_cpu = batch.input_ids.device.type == "cpu"
    if on_cpu and precision == "bf16" and batch.input_ids.shape[1] <= MATH_MAX_LENGTH:
        return sdpa_kernel(SDPBackend.MATH)
    return contextlib.nullcontext()


@contextlib.contextmanager
def _dropout(model: nn.Module, p: float | None) -> Iterator[None]:
    """Set every dropout of `model` to `p` for a while; None leaves them as they are."""
    before = {module: module.p for module in model.modules() if isinstance(module, nn.Dropout)}
    for module in before if p is not None else ():
        module.p = p
    try:
        yield
    finally:
        for module, value in before.items():
            module.p = value


def task_loss(logits: Tensor, labels: Tensor, *, regression: bool) -> Tensor:
    """Cross-entropy of [B, C] logits, or MSE of [B, 1] predictions, to gold labels; fp32 scalar.

    Start and end scores [B, S, 2] have labels [B, 2]; theirs is the mean of both cross-entropies.
    """
    if regression:
        return F.mse_loss(logits.float().squeeze(-1), labels.float())
    if logits.dim() == 3:
        return F.cross_entropy(logits.float().transpose(1, 2).flatten(0, 1), labels.flatten())
    return F.cross_entropy(logits.float(), labels)


class _Best:
    """The best weights so far by the task's primary metric on `select`."""

    def __init__(self, teacher: Teacher, data: EncodedTask, precision: str) -> None:
        self.teacher, self.data, self.precision = teacher, data, precision
        self.metrics: dict[str, float] | None = None
        self.weights: dict[str, Tensor] | None = None  # None: those in the model

    def update(self, *, last: bool) -> dict[str, float]:
        """Evaluate the model; remember its weights if they are the best."""
        metrics = evaluate(self.teacher.model, self.data.select, self.data.spec, precision=self.precision)
        if self.metrics is None or primary(self.data.spec, metrics)[1] > primary(self.data.spec, self.metrics)[1]:
            self.metrics = metrics
            state = self.teacher.model.state_dict()
            self.weights = None if last else {name: t.detach().cpu().clone() for name, t in state.items()}
        return metrics

    def install(self) -> None:
        """Put the best weights into the model."""
        if self.weights is not None:
            self.teacher.model.load_state_dict(self.weights)
        self.teacher.metrics = dict(self.metrics or {})
        self.teacher.model.eval()

    def state(self) -> dict[str, Tensor]:
        """Tensors for a checkpoint."""
        if self.metrics is None or self.weights is None:
            return {}
        values = {f"metric/{name}": torch.tensor(value, dtype=torch.float64) for name, value in self.metrics.items()}
        return {**values, **{f"weight/{name}": tensor for name, tensor in self.weights.items()}}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state`."""
        if state:
            pick = {kind: {k.split("/", 1)[1]: v for k, v in state.items() if k.startswith(kind)} for kind in _KINDS}
            self.metrics = {name: float(value) for name, value in pick["metric"].items()}
            self.weights = pick["weight"]


_KINDS = ("metric", "weight")


def _silent(*_args: object, **_metrics: object) -> None:
    """Reports nothing."""
