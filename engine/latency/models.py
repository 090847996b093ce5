"""Time of whole models, in turns: PyTorch eager, torch.compile, ffnas' kernels and runtime, onnxruntime and OpenVINO.

A case is a dtype, a number of threads, a batch size and a sequence length. All sides of all models run a case in turns,
in an order that alternates, and medians are reported, so that drift and other processes hit all alike. Sequences are
full, without a mask: padding would be timed by its share, which is the data's affair.

The eager side of our models is the plain PyTorch file they are exported with; baselines run transformers' own code.
Rejected: timing one model after the other, which measures the machine's mood.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from engine.errors import UserError
from engine.export.export import export_model
from engine.export.onnx import ONNX, write_onnx
from engine.export.saved import load_saved
from engine.handover import FILES, load_plain
from engine.latency.others import OTHERS, RUNTIME, other_pass, runtime_pass
from engine.published.build import build_preset
from engine.published.presets import PRESETS
from engine.student.from_encoder import reason_against, standard_model
from engine.student.modeling import FFNASPreTrainedModel
from engine.student.native import is_described

SIDES = ("eager", "compile", "ffnas", "runtime", "runtime_int8", "onnx", "int8", "openvino")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SLICE = 0.02
"""Shortest timed stretch, in seconds."""


@dataclass(frozen=True)
class Case:
    """What all sides run alike."""

    dtype: str
    threads: int
    batch: int
    length: int


@dataclass(frozen=True)
class Timing:
    """Seconds of one forward pass.

    Attributes:
        model, side: what ran.
        case: how.
        median, fastest, slowest: over the rounds; None where the case was left out.
        note: why it was left out.
    """

    model: str
    side: str
    case: Case
    median: float | None
    fastest: float | None = None
    slowest: float | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Flat, as JSON."""
        values = asdict(self)
        return {**values.pop("case"), **values}


class Subject:
    """A model by preset name, or a directory of ours or one transformers loads as a sequence classifier.

    Its sides are made when asked for.

    Args:
        name: of the preset, or the directory's path.
        folder: where files may be written.
        device: where PyTorch's sides run.

    Raises:
        UserError: it is neither.
    """

    def __init__(self, name: str, folder: Path, device: torch.device) -> None:
        self.name, self.device = name, device
        self.folder = folder / f"{len(list(folder.iterdir()))}"
        self.folder.mkdir()
        self.student: FFNASPreTrainedModel | None = None
        if name in PRESETS:
            model = build_preset(PRESETS[name])
            self.student = model if isinstance(model, FFNASPreTrainedModel) else None
        elif (Path(name) / "config.json").is_file():
            model = self._read(Path(name))
        else:
            raise UserError(f"model {name!r}: neither a preset nor a model directory; presets: {', '.join(PRESETS)}")
        if self.student is not None:
            if not (self.folder / FILES[0]).exists():
                export_model(self.student, None, self.folder, None, {})
            model = load_plain(self.folder)
        self.plain: Any = model.to(device).eval()  # of any family
        self.params = sum(p.numel() for p in model.parameters())

    def _read(self, path: Path) -> nn.Module:
        if json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type") == "ffnas":
            self.student = load_saved(path)
            return self.student
        return AutoModelForSequenceClassification.from_pretrained(path, local_files_only=True, use_safetensors=True)

    @property
    def sides(self) -> tuple[str, ...]:
        """The sides this model has: `ffnas` for ours only, `RUNTIME` for those it takes, on a GPU those of PyTorch."""
        has = {
            "ffnas": self.student is not None,
            **dict.fromkeys(RUNTIME, self.device.type == "cpu" and self._as_ours() is not None),
            **dict.fromkeys(OTHERS, self.device.type == "cpu"),
        }
        return tuple(side for side in SIDES if has.get(side, True))

    def runner(self, side: str, case: Case) -> Callable[[], object] | None:
        """A function that runs one forward pass; None where the side does not have the case."""
        ids = torch.randint(1, 1000, (case.batch, case.length), generator=torch.Generator().manual_seed(0))
        limit = getattr(self.plain.config, "max_position_embeddings", case.length)
        if case.length > limit:
            return None
        if side in RUNTIME:
            model = self._as_ours()
            assert model is not None
            return runtime_pass(side, model, case.dtype, case.threads, ids)
        if side in OTHERS:
            return other_pass(side, self._onnx_file, case.dtype, case.threads, ids)
        return self._torch_pass(side, case, ids.to(self.device))

    def _torch_pass(self, side: str, case: Case, ids: torch.Tensor) -> Callable[[], object]:
        model: Any = self.student if side == "ffnas" else self.plain
        assert model is not None
        model = model.to(self.device, DTYPES[case.dtype]).eval()
        if side == "compile":
            torch._dynamo.reset()
            call: Callable[..., object] = torch.compile(model, dynamic=False)
        else:
            call = model

        def run() -> object:
            with torch.inference_mode():
                out = call(input_ids=ids)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            return out

        return run

    def _as_ours(self) -> FFNASPreTrainedModel | None:
        """The model as one the runtime takes, if it is one."""
        if self.student is not None:
            return self.student if is_described(self.student) else None
        if reason_against(self.plain) is not None:
            return None
        made = standard_model(self.plain)
        return made if is_described(made) else None

    def _onnx_file(self) -> Path:
        path = self.folder / ONNX
        if not path.exists():
            write_onnx(self.plain.float(), path)
        return path


def measure(
    subjects: Sequence[Subject],
    cases: Sequence[Case],
    sides: Sequence[str],
    *,
    rounds: int = 7,
    limit: float = 30.0,
    progress: Callable[[int, int, Timing], None] = lambda done, total, timing: None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Timing]:
    """Times every side of every subject in every case.

    Args:
        subjects: models.
        cases: shapes, dtypes and threads; the number of threads is put back afterwards.
        sides: which of `SIDES`.
        rounds: timed runs per side and case.
        limit: a side whose first run takes longer than this many seconds is left out of the case.
        progress: called after each side of a case.
        clock: seconds. `time.process_time` tells sides of one thread apart beside busy neighbours, but it leaves
            waiting and sleeping out.
    """
    result: list[Timing] = []
    total = sum(side in s.sides for s in subjects for side in sides) * len(cases)
    for case in cases:
        with _threads(case.threads):
            timings = _measure_case(subjects, case, sides, rounds, limit, clock)
        for timing in timings:
            result.append(timing)
            progress(len(result), total, timing)
    return result


def _measure_case(
    subjects: Sequence[Subject],
    case: Case,
    sides: Sequence[str],
    rounds: int,
    limit: float,
    clock: Callable[[], float],
) -> list[Timing]:
    runs: dict[tuple[str, str], Callable[[], object]] = {}
    left_out: dict[tuple[str, str], str] = {}
    for subject in subjects:
        for side in (s for s in sides if s in subject.sides):
            run = subject.runner(side, case)
            if run is None:
                left_out[subject.name, side] = "not in this precision or length"
                continue
            run()  # compiles, packs weights
            began = time.perf_counter()
            run()
            took = time.perf_counter() - began
            if took > limit:
                left_out[subject.name, side] = f"one pass takes {took:.0f} s"
            else:
                runs[subject.name, side] = run
    times = interleaved(runs, rounds, clock)
    done = [
        Timing(model, side, case, statistics.median(values), min(values), max(values))
        for (model, side), values in times.items()
    ]
    return done + [Timing(model, side, case, None, note=note) for (model, side), note in left_out.items()]


def interleaved(
    runs: Mapping[Any, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[Any, list[float]]:
    """Seconds per call of every side, `rounds` values each, taken in turns, the order reversed each time."""
    repeats = {}
    for key, run in runs.items():
        began = clock()
        run()
        repeats[key] = max(1, round(SLICE / max(clock() - began, 1e-7)))
    times: dict[Any, list[float]] = {key: [] for key in runs}
    order = list(runs)
    for _ in range(rounds):
        for key in order:
            began = clock()
            for _ in range(repeats[key]):
                runs[key]()
            times[key].append((clock() - began) / repeats[key])
        order.reverse()
    return times


@contextmanager
def subjects_of(names: Sequence[str], device: torch.device) -> Iterator[list[Subject]]:
    """The models of these names, with a temporary folder for their files."""
    with tempfile.TemporaryDirectory(prefix="ffnas-latency-") as folder:
        yield [Subject(name, Path(folder), device) for name in names]


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
