"""`ffnas latency MODEL...`: how fast models are on this machine, beside BERT-base.

    ffnas latency efficientbert
    ffnas latency runs/NAME/best/model --batches 1 32 --lengths 128 --threads 1 all --sides eager ffnas runtime

Writes latency.json, latency.md and latency.png into --out, and prints the table.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import UserError
from search.console.arguments import QuietParser
from search.console.environment import processor

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from engine.latency.models import Case, Timing
    from search.console.progress import Reporter

SIDE_NAMES = {
    "eager": "PyTorch eager",
    "compile": "torch.compile",
    "ffnas": "ffnas kernels",
    "runtime": "ffnas runtime",
    "runtime_int8": "ffnas runtime int8",
    "onnx": "onnxruntime",
    "int8": "onnxruntime int8",
    "openvino": "OpenVINO",
}

_LINES = {
    "eager": ":",
    "compile": "-.",
    "ffnas": "-",
    "runtime": "-",
    "runtime_int8": "-",
    "onnx": "--",
    "int8": "--",
    "openvino": "--",
}


def command(argv: list[str]) -> None:
    """Measures, writes and prints.

    Raises:
        UserError: wrong options, an unknown model, or a library is missing.
    """
    options = _parser().parse_args(argv)
    from search.console.progress import Reporter

    with Reporter() as reporter:
        reporter.doing("loading PyTorch")
        _compare(options, reporter)


def _compare(options: argparse.Namespace, reporter: Reporter) -> None:
    from search.console.libraries import quiet

    quiet()
    import torch

    from engine.latency.models import Case, measure, subjects_of
    from engine.latency.others import missing
    from engine.training.precision import choose_device

    sides = list(SIDE_NAMES) if options.sides is None else options.sides
    if "int8" in sides and "runtime_int8" not in sides:
        sides.insert(sides.index("int8"), "runtime_int8")
    for side in [s for s in sides if missing(s)]:
        lacks = f"{SIDE_NAMES[side]}: {', '.join(missing(side))} not installed (pip install 'ffnas[onnx]' openvino)"
        if options.sides is not None:
            raise UserError(f"--sides: {lacks}")
        sides.remove(side)
        reporter.info(f"without {lacks}")
    device = choose_device(options.device)
    threads = _threads(options.threads) if device.type == "cpu" else [torch.get_num_threads()]
    cases = [
        Case(dtype, count, batch, length)
        for dtype in options.dtypes
        for count in threads
        for length in options.lengths
        for batch in options.batches
    ]
    names = list(dict.fromkeys([*options.models, *([] if options.baseline == "none" else [options.baseline])]))
    with subjects_of(names, device) as subjects:
        total = sum(side in s.sides for s in subjects for side in sides) * len(cases)
        with reporter.phase("latency", total, costs=_costs(cases, total)) as bar:
            timings = measure(
                subjects,
                cases,
                sides,
                rounds=options.rounds,
                limit=options.limit,
                progress=lambda done, _, timing: bar.update(done, f"{timing.model} {timing.side}"),
            )
        params = {subject.name: subject.params for subject in subjects}
    result = {
        "conditions": _conditions(device, options.rounds),
        "baseline": options.baseline,
        "params": params,
        "timings": [timing.to_dict() for timing in timings],
    }
    folder = Path(options.out)
    text = table(timings, options.baseline)
    _write(folder, result, text, timings)
    reporter.info(text)
    reporter.info(f"files: {folder / 'latency.json'}, {folder / 'latency.md'}, {folder / 'latency.png'}")


def _costs(cases: Sequence[Case], total: int) -> list[float]:
    """What the timings of every case cost beside those of the others: by the tokens of a pass, and the threads for it.

    All timings of a case are reported when the last of them is done, so which costs how much within it is the same.
    """
    sides = total // max(1, len(cases))
    return [case.batch * case.length / case.threads for case in cases for _ in range(sides)]


def _parser() -> argparse.ArgumentParser:
    parser = QuietParser(prog="ffnas latency", description="Time of whole models on this machine.")
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="preset (`ffnas presets`) or model directory")
    add("--baseline", default="bert-base", help="preset or directory beside them, or none (bert-base)")
    add("--batches", type=_positive, nargs="+", default=[1, 8, 32, 128], help="batch sizes (1 8 32 128)")
    add("--lengths", type=_positive, nargs="+", default=[128, 384], help="sequence lengths (128 384)")
    add("--threads", nargs="+", default=["1", "all"], help="CPU threads: numbers or all (1 all)")
    add("--dtypes", nargs="+", choices=("fp32", "bf16"), default=["fp32"], help="precisions (fp32)")
    add(
        "--sides", nargs="+", choices=tuple(SIDE_NAMES), metavar="SIDE",
        help=f"what to time, of {' '.join(SIDE_NAMES)} (all that are installed)",
    )  # fmt: skip
    add("--device", default="auto", help="auto, cpu or cuda[:N]")
    add("--rounds", type=_positive, default=7, help="timed runs of each, in turns (7)")
    add("--limit", type=float, default=30.0, help="leave out what takes more seconds a pass (30)")
    add("--out", default="latency", help="folder for the results (latency)")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def _threads(given: list[str]) -> list[int]:
    import torch

    counts = []
    for text in given:
        if text != "all" and not (text.isdigit() and int(text) >= 1):
            raise UserError(f"--threads: {text!r} is neither a number nor all")
        counts.append(torch.get_num_threads() if text == "all" else int(text))
    return list(dict.fromkeys(counts))


def table(timings: list[Timing], baseline: str) -> str:
    """Markdown: one line per case, model and side; milliseconds, and how many times faster than the eager baseline."""
    reference = {t.case: t.median for t in timings if t.model == baseline and t.side == "eager"}
    own = {(t.case, t.model): t.median for t in timings if t.side == "eager"}
    head = "| precision | threads | batch | length | model | on | ms | sequences/s | vs baseline eager | vs own eager |"
    lines = [head, "|" + "---|" * 10]
    for t in timings:
        case = t.case
        start = f"| {case.dtype} | {case.threads} | {case.batch} | {case.length} | {t.model} | {SIDE_NAMES[t.side]} |"
        if t.median is None:
            lines.append(f"{start} – | – | {t.note} | |")
            continue
        ratios = (_ratio(reference.get(case), t.median), _ratio(own.get((case, t.model)), t.median))
        lines.append(f"{start} {1e3 * t.median:.1f} | {case.batch / t.median:.1f} | {ratios[0]} | {ratios[1]} |")
    return "\n".join(lines)


def _ratio(reference: float | None, seconds: float) -> str:
    return "–" if reference is None else f"{reference / seconds:.2f}"


def _conditions(device: Any, rounds: int) -> dict[str, Any]:
    import importlib.metadata
    from datetime import datetime, timezone

    import torch

    from kernels.dispatch import preferred_backend

    versions = {}
    for name in ("ffnas", "torch", "transformers", "onnxruntime", "openvino"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads_available": torch.get_num_threads(),
        "backend": preferred_backend(device.type),
        "rounds": rounds,
        "input": "full sequences without a mask, inference mode; medians of interleaved runs",
        "versions": versions,
    }


def _write(folder: Path, result: dict[str, Any], text: str, timings: list[Timing]) -> None:
    from engine.files import write_json_atomic, write_text_atomic
    from search.report.theme import save

    write_json_atomic(folder / "latency.json", result)
    conditions = result["conditions"]
    versions = ", ".join(f"{k} {v}" for k, v in conditions["versions"].items())
    heading = f"{conditions['device']}, {conditions['date']}, {versions}; {conditions['input']}."
    write_text_atomic(folder / "latency.md", f"{heading}\n\n{text}\n")
    save(plot(timings, heading), folder / "latency.png")


def plot(timings: list[Timing], heading: str) -> Any:
    """Sequences per second over the batch size, one panel per precision, number of threads and length."""
    from search.report.theme import WIDTH, figure, style

    panels = list(dict.fromkeys((t.case.dtype, t.case.threads, t.case.length) for t in timings))
    with style():
        made = figure(WIDTH, 3.1 * ((len(panels) + 1) // 2))
        axes = made.subplots((len(panels) + 1) // 2, min(2, len(panels)), squeeze=False).flatten()
        for panel, (dtype, threads, length) in zip(axes, panels, strict=False):
            here = [t for t in timings if (t.case.dtype, t.case.threads, t.case.length) == (dtype, threads, length)]
            for model, side in dict.fromkeys((t.model, t.side) for t in here):
                mine = [t for t in here if (t.model, t.side) == (model, side) and t.median]
                rates = [t.case.batch / t.median for t in mine if t.median]
                label = f"{model}, {SIDE_NAMES[side]}"
                panel.plot([t.case.batch for t in mine], rates, _LINES[side], marker="o", ms=3, label=label)
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_xlabel("batch size")
            panel.set_ylabel("sequences per second")
            panel.set_title(f"{dtype}, {threads} threads, {length} tokens", fontsize=9)
        for panel in axes[len(panels) :]:
            panel.set_axis_off()
        axes[0].legend(fontsize=6.5)
        made.suptitle(heading, fontsize=6)
    return made
