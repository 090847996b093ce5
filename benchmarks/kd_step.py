"""A distillation step of the paper's setting: the published arithmetic in eager PyTorch against ours, for K candidates.

    python -m benchmarks.kd_step                      S = 128, K = 1, 4, 8
    python -m benchmarks.kd_step --lengths 128 384 512 --population 1 8
    python -m benchmarks.kd_step --memory              attention and losses alone (`benchmarks.kd_memory`)

Teacher: BERT-base-shaped, random weights. Students: EfficientBERT's shape (H = 540, six layers, twelve heads), its
released architecture and random ones in 15-16 M parameters. Batch 16, all tokens real, dropout 0.

    published   the teacher's and student's S x S scores of all mapped layers kept, the published losses, plain PyTorch
                everywhere, one candidate; fp32, and under bf16 autocast
    ours K      `PopulationStep` with K candidates; fp32, and bf16 (autocast, the teacher's weights rounded once)

Times are per candidate, medians of rounds in which all sides take turns. Shares of our K = 1 step are measured apart;
the score loss is part of the student's forward pass where its attention computes it.
Peak memory is the process's highest resident size above the models, each side in a process of its own (`--one`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import kd_memory
from benchmarks.environment import describe
from benchmarks.memory import peak_bytes
from benchmarks.random_teacher import RandomTeacher
from engine.architecture.architecture import Architecture
from engine.architecture.shape import ModelShape
from engine.autocast import autocast
from engine.data import Batch, TaskSpec
from engine.distill import Distiller, Member, PopulationStep
from engine.distill.population import side_by_side
from engine.objective import KDWeights, layer_map
from engine.student import FFNASModel, attention
from engine.student.supernet import build_student
from engine.teacher.capture import recording
from engine.training.settings import PhaseSettings
from kernels import use_backend
from kernels.losses.paper import attention_score_mse_paper, hidden_mse_paper
from search.space import SearchSpace

RELEASED = (
    "tanh(linear4_2(gelu(linear4_2(x,wb1)),wb2)), elu(linear2_1(gelu(linear2_1(x,wb1)),wb2)), "
    "sigmoid(linear1_2(relu(linear1_2(x,wb1)),wb2)), linear2_2(gelu(linear2_2(max(x,tanh(x)),wb1)),wb2), "
    "linear1_2(relu(mul(linear1_2(x,wb1),x)),wb2), leaky_relu(linear2_3(gelu(linear2_3(x,wb1)),wb2))"
)
SHAPE = ModelShape(540, 6, 540, teacher_hidden_size=768)
BATCH = 16
SETTINGS = PhaseSettings(steps=1000, batch_size=BATCH, lr=1e-4)
SPEC = TaskSpec("text", "classification", ("text",), "label", ("a", "b"))


def batch(length: int) -> Batch:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 30000, (BATCH, length), generator=g)
    return Batch(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids))


def architectures(count: int) -> list[Architecture]:
    """The released architecture, then random ones of its size."""
    space, rng = SearchSpace(SHAPE, (15_000_000, 16_000_000)), np.random.default_rng(0)
    return [Architecture.parse(RELEASED), *(space.sample(rng) for _ in range(count - 1))]


def students(count: int, attention: str = "sdpa") -> list[FFNASModel]:
    made = []
    for architecture in architectures(count):
        torch.manual_seed(1)
        made.append(
            build_student(
                SHAPE, architecture, 12, model_class=FFNASModel, hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0, attn_implementation=attention,
            )
        )  # fmt: skip
    return [m.train() for m in made]


def published(teacher: RandomTeacher, length: int, precision: str) -> Callable[[], None]:
    """One step of one candidate by the published arithmetic, in eager PyTorch."""
    (student,) = students(1, "eager")
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, weight_decay=0.01, foreach=True)
    data, layers = batch(length), layer_map(6, 12)
    device = torch.device("cpu")

    def step() -> None:
        with use_backend("reference"), autocast(device, precision):
            with torch.no_grad(), recording(range(12)) as seen:  # every layer is kept, as there
                hidden = teacher.model(**teacher.inputs(data), output_hidden_states=True).hidden_states
            states = student.states(data.input_ids, data.attention_mask, data.token_type_ids)
        weight, bias = student.fit_dense.weight, student.fit_dense.bias
        with autocast(device, precision):
            loss: Tensor = hidden_mse_paper(states.embeddings, weight, bias, hidden[0])
            for k, layer in enumerate(layers):
                loss = loss + hidden_mse_paper(states.hidden[k], weight, bias, hidden[layer + 1])
                loss = loss + attention_score_mse_paper(
                    states.queries[k], states.keys[k], seen.queries[layer], seen.keys[layer], data.attention_mask,
                    scale_s=1.0, scale_t=1.0,
                )  # fmt: skip
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def ours(teacher: RandomTeacher, length: int, precision: str, count: int, apart: bool = False) -> Callable[[], None]:
    """One step of `count` candidates; `apart`: attention, then the score loss, as before they were one pass."""
    distiller = Distiller(teacher, 6, KDWeights(), SPEC, torch.device("cpu"), precision, precision)  # type: ignore[arg-type]
    workers, threads = side_by_side(count, distiller.device)
    population = PopulationStep(
        distiller, [Member(m) for m in students(count)], SETTINGS, 10**6, "text", workers=workers, threads=threads
    )
    population.__enter__()
    data = batch(length)

    def step() -> None:
        with mock.patch.object(attention, "one_pass_pays", (lambda *_: False) if apart else attention.one_pass_pays):
            population(data, 0)

    return step


SIDES: dict[str, tuple[str, str, int]] = {
    "published fp32": ("published", "fp32", 1),
    "published bf16": ("published", "bf16", 1),
    **{f"ours {p} K={k}": ("ours", p, k) for p in ("fp32", "bf16") for k in (1, 2, 4, 8)},
    **{f"ours apart {p} K={k}": ("apart", p, k) for p in ("fp32", "bf16") for k in (1, 2, 4, 8)},
}


def make(side: str, teacher: RandomTeacher, length: int) -> tuple[Callable[[], None], int]:
    """(step, candidates it trains)."""
    kind, precision, count = SIDES[side]
    if kind == "published":
        return published(teacher, length, precision), count
    return ours(teacher, length, precision, count, apart=kind == "apart"), count


def times(sides: list[str], length: int, rounds: int) -> dict[str, float]:
    """Seconds per step and candidate."""
    teacher = RandomTeacher()
    steps = {side: make(side, teacher, length) for side in sides}
    for step, _ in steps.values():
        step()
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    order = list(sides)
    for _ in range(rounds):
        for side in order:
            step, count = steps[side]
            start = time.perf_counter()
            step()
            seconds[side].append((time.perf_counter() - start) / count)
        order.reverse()
    return {side: statistics.median(values) for side, values in seconds.items()}


def shares(length: int, precision: str, rounds: int) -> dict[str, float]:
    """Seconds of the parts of our K = 1 step."""
    teacher, (student,) = RandomTeacher(), students(1)
    distiller = Distiller(teacher, 6, KDWeights(), SPEC, torch.device("cpu"), precision, precision)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, fused=True)
    data = batch(length)
    marks: dict[str, list[float]] = {k: [] for k in ("teacher", "student forward", "losses", "backward", "optimizer")}
    for _ in range(rounds + 1):
        stamps = [time.perf_counter()]
        targets = distiller.targets(data, need_logits=False)
        stamps.append(time.perf_counter())
        with autocast(distiller.device, precision):
            states = student.states(
                data.input_ids,
                data.attention_mask,
                data.token_type_ids,
                score_targets=distiller.score_targets(targets, ("hidden", "attention")),
            )
        stamps.append(time.perf_counter())
        loss = distiller._objective(student, states, data, targets, ("hidden", "attention"))
        stamps.append(time.perf_counter())
        loss.total.backward()
        stamps.append(time.perf_counter())
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        stamps.append(time.perf_counter())
        for name, begin, end in zip(marks, stamps, stamps[1:], strict=False):
            marks[name].append(end - begin)
    return {name: statistics.median(values[1:]) for name, values in marks.items()}


def peak(side: str, length: int) -> int:
    """Bytes above the models that a warm step needs; measured in this process."""
    step, _ = make(side, RandomTeacher(), length)
    step()
    return peak_bytes(step)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kd_step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", help="default: 128; with --memory 384 512 2048")
    parser.add_argument("--memory", action="store_true", help="peak memory of attention and losses, and nothing else")
    parser.add_argument("--population", type=int, nargs="+", default=[1, 4, 8], choices=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--apart", action="store_true", help="also ours with the score loss apart from attention")
    parser.add_argument("--only", nargs="+", choices=list(SIDES), help="these sides, and no shares")
    parser.add_argument("--no-memory", action="store_true", help="times only")
    parser.add_argument("--out", type=Path, help="also write JSON here")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.lengths = args.lengths or ([384, 512, 2048] if args.memory else [128])
    return args


def main() -> None:
    args = parse()
    if args.one:
        print(peak(args.one[0], int(args.one[1])))
        return
    if args.memory:
        made = kd_memory.table(args.lengths)
        print(kd_memory.report(made))
        _save(args.out, {"environment": describe(), "memory": made})
        return
    kinds = ("published", "ours", *(["apart"] if args.apart else []))
    sides = [s for s, (kind, _, k) in SIDES.items() if kind == "published" or (kind in kinds and k in args.population)]
    sides = args.only or sides
    result: dict[str, object] = {"environment": describe(), "lengths": {}}
    for length in args.lengths:
        seconds = times(sides, length, args.rounds)
        memory = {}
        if not args.no_memory and Path("/proc/self/clear_refs").exists():
            for side in sides:
                command = [sys.executable, "-m", "benchmarks.kd_step", "--one", side, str(length)]
                memory[side] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        columns = f"{'ms/candidate':>24} {'tokens/s':>10} {'of fp32':>8} {'of bf16':>8} {'peak MiB':>9}"
        print(f"S={length}, batch {BATCH}: {columns}")
        for side in sides:
            own = seconds[side]
            bases = [seconds.get(f"published {p}") for p in ("fp32", "bf16")]
            ratios = ["       -" if base is None else f"{base / own:8.2f}" for base in bases]
            room = f"{memory[side] / 2**20:9.0f}" if side in memory else ""
            print(f"  {side:<34} {own * 1e3:12.0f} {BATCH * length / own:10.0f} {' '.join(ratios)} {room}")
        parts = {} if args.only else {p: shares(length, p, args.rounds) for p in ("fp32", "bf16")}
        for precision, share in parts.items():
            whole = sum(share.values())
            print(f"  shares of ours {precision} K=1: " + ", ".join(f"{n} {v / whole:.0%}" for n, v in share.items()))
        result["lengths"][str(length)] = {"seconds": seconds, "memory": memory, "shares": parts}  # type: ignore[index]
    _save(args.out, result)


def _save(path: Path | None, result: dict[str, object]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
