"""Distillation steps as the engine runs them: populations of 1 and 8 candidates, captured, and the mixed step.

The paper's shapes: a BERT-base teacher with random weights, students of H = 540, six layers, twelve heads, 16 sentences
of 128 tokens, products in bfloat16. Seconds are per step and candidate; the teacher's pass is part of every step.

    eager          one candidate, plain PyTorch, no graph
    ungraphed      our kernels, FFNAS_CUDA_GRAPHS=0
    captured K=k   k candidates that differ in their expressions, each step replayed as a CUDA graph
    mixed          eight subnets of one supernet in one pass, and eight passes by plain PyTorch
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig

from benchmarks.gpu.records import Line, Records
from benchmarks.gpu.scale import Scale
from benchmarks.gpu.sides import seconds
from benchmarks.random_teacher import RandomTeacher
from engine.architecture.architecture import Architecture
from engine.architecture.shape import ModelShape
from engine.data import Batch, TaskSpec
from engine.distill import Distiller, Member, PopulationStep
from engine.distill.graphs import ENVIRONMENT
from engine.objective import KDWeights
from engine.student import FFNASModel
from engine.student.supernet import build_student
from engine.training.settings import PhaseSettings
from kernels import use_backend

SPEC = TaskSpec("text", "classification", ("text",), "label", ("a", "b"))
_ACTIVATIONS = ("gelu", "tanh", "swish", "relu", "elu", "sigmoid", "leaky_relu")


def run(records: Records, scale: Scale, out: Path) -> None:
    del out
    records.case("captured K=1", lambda: population(1, scale))
    records.case("captured K=8", lambda: population(2 if scale.rehearses else 8, scale))
    records.case("ungraphed K=1", lambda: population(1, scale, graphs="0"))
    records.case("eager K=1", lambda: population(1, scale, graphs="0", backend="reference"))
    records.case("mixed K=8", lambda: mixed(scale, ""))
    records.case("mixed K=8, eager", lambda: mixed(scale, "reference"))


@cache
def teacher(scale: Scale) -> RandomTeacher:
    config = BertConfig()
    if scale.rehearses:
        config = BertConfig(
            vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
        )
    return RandomTeacher(config, scale.device)


def distiller(scale: Scale) -> Distiller:
    precision = "fp32" if scale.rehearses else "bf16"
    layers, device = 2 if scale.rehearses else 6, torch.device(scale.device)
    return Distiller(teacher(scale), layers, KDWeights(), SPEC, device, precision, precision)  # type: ignore[arg-type]


def architectures(count: int, scale: Scale) -> list[Architecture]:
    """`count` candidates of one shape family: the same widths and stacks, other activations."""
    layers = 2 if scale.rehearses else 6
    texts = [
        [f"linear2_2({_ACTIVATIONS[(k + layer) % 7]}(linear2_2(x,wb1)),wb2)" for layer in range(layers)]
        for k in range(count)
    ]
    return [Architecture.parse(", ".join(t)) for t in texts]


def student(architecture: Architecture, scale: Scale) -> FFNASModel:
    shape = ModelShape(540, 6, 540, teacher_hidden_size=768)
    if scale.rehearses:
        shape = ModelShape(8, 2, 8, vocab_size=60, embedding_size=4, max_positions=16, teacher_hidden_size=16)
    torch.manual_seed(1)
    made = build_student(
        shape, architecture, 2 if scale.rehearses else 12, model_class=FFNASModel, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return made.train().to(scale.device)


def batch(scale: Scale) -> Batch:
    samples, length, words = (2, 5, 60) if scale.rehearses else (16, 128, 30000)
    ids = torch.randint(1, words, (samples, length), generator=torch.Generator().manual_seed(0)).to(scale.device)
    return Batch(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids))


@contextmanager
def running(graphs: str, backend: str) -> Iterator[None]:
    """FFNAS_CUDA_GRAPHS and the backend in the block; "" leaves either as it is."""
    before = os.environ.get(ENVIRONMENT)
    if graphs:
        os.environ[ENVIRONMENT] = graphs
    try:
        with use_backend(backend) if backend else nullcontext():
            yield
    finally:
        os.environ.pop(ENVIRONMENT, None) if before is None else os.environ.__setitem__(ENVIRONMENT, before)


def population(count: int, scale: Scale, *, graphs: str = "", backend: str = "") -> Line:
    """Seconds per step and candidate of `count` candidates, and the number of replays."""
    kd = distiller(scale)
    members = [Member(student(a, scale)) for a in architectures(count, scale)]
    settings = PhaseSettings(steps=1000, batch_size=16, lr=1e-4)
    data = batch(scale)
    with running(graphs, backend), PopulationStep(kd, members, settings, 10**6, "text") as step:
        took = per_call(lambda: step(data, 0), scale)
        step.retire_diverged("benchmark", 1)
    captured: dict[str, Any] = {}
    if kd.graphs is not None:
        captured = {"captures": kd.graphs.captures, "replays": kd.graphs.replays}
    reasons = [m.reason for m in members if m.reason]
    return {"candidates": count, "seconds": took / count, **captured, "failed": reasons}


def mixed(scale: Scale, backend: str) -> Line:
    """Seconds per step and subnet: forward, losses and backward of eight subnets; one after the other in eager."""
    count = 2 if scale.rehearses else 8
    kd, plans, data = distiller(scale), architectures(count, scale), batch(scale)
    supernet = student(plans[0], scale)
    targets = kd.targets(data, need_logits=False)

    def step() -> None:
        groups = [[a] for a in plans] if backend else [plans]
        for group in groups:
            kd.mixed_loss(supernet, data, group, task=False, targets=targets).total.backward()
        supernet.zero_grad(set_to_none=True)

    with running("", backend):
        return {"candidates": count, "seconds": per_call(step, scale) / count}


def per_call(run: Callable[[], object], scale: Scale) -> float:
    """Seconds of one call, after calls that compile, capture and load."""
    if scale.rehearses:
        run()
        return seconds(run, 1, scale.device)
    for _ in range(4):
        run()
    torch.cuda.synchronize()
    return min(seconds(run, 10, scale.device) / 10 for _ in range(3))
