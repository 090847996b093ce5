"""`ffnas export`: a model directory also as `torch.export` program, ONNX and int8 ONNX, compared with PyTorch.

ffnas export runs/NAME                              all formats of best/model, scored on the run's dev split
ffnas export DIR --onnx --eval dev.csv              one format, scored on a labelled file
ffnas export runs/NAME --native FOLDER              answers texts without PyTorch, from Python or C (kernels.runtime)
ffnas export runs/NAME --push-to-hub USER/NAME      best/model as it is, model card included, to the hub

Where libraries for ONNX are missing, everything else is written and the command ends with one line that names them and
exit code 2.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.errors import UserError
from engine.files import write_json_atomic
from search.console.arguments import QuietParser, add_reading_options, reading

if TYPE_CHECKING:
    from engine.data import EncodedDataset, TaskSpec
    from engine.student.modeling import FFNASPreTrainedModel
    from kernels.runtime import Session

FORMATS = ("program", "onnx", "int8")
PRECISIONS = ("fp32", "bf16", "int8")
RESULT = "exports.json"
_BATCH = 32
_MUCH = 0.3
"""Points of a metric."""


def command(argv: list[str]) -> None:
    """Exports, compares, scores; writes exports.json into the model directory and prints it as a table.

    Raises:
        UserError: wrong options, no model there, the hub refuses, or a library is missing (after everything that does
            without it is written).
    """
    parser = QuietParser(prog="ffnas export", description="A model directory in further formats, or on the hub.")
    parser.add_argument("source", metavar="RUN_OR_MODEL", help="run directory, or model directory")
    for name, what in zip(FORMATS, ("torch.export program", "ONNX", "ONNX with int8 weights"), strict=True):
        parser.add_argument(f"--{name}", action="store_true", help=f"{what} (default: all three)")
    parser.add_argument(
        "--native", metavar="FOLDER", help="write FOLDER for kernels.runtime, which answers texts without PyTorch"
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="with --native: of matrix products, unless a session asks for another (default: fp32); what it costs is"
        " measured on --eval or a run's dev split",
    )
    parser.add_argument("--eval", metavar="FILE", help="labelled CSV, TSV, JSONL or Parquet to score on")
    add_reading_options(parser)
    parser.add_argument("--label-column", "--data.label_column", dest="label_column", help="label column of --eval")
    parser.add_argument(
        "--push-to-hub",
        metavar="USER/NAME",
        help="upload the model directory, card included; further formats only where they are asked for",
    )
    parser.add_argument("--private", action="store_true", help="with --push-to-hub: for its owner alone")
    options = parser.parse_args(argv)
    if options.private and options.push_to_hub is None:
        raise UserError("--private goes with --push-to-hub USER/NAME")
    if options.precision is not None and options.native is None:
        raise UserError("--precision goes with --native FOLDER")
    asked = [name for name in FORMATS if getattr(options, name)]
    wanted = asked or ([] if options.push_to_hub or options.native else list(FORMATS))
    source = Path(options.source)
    is_run = (source / "config.yaml").is_file()
    folder = source / "best" / "model" if is_run else source
    if not (folder / "config.json").is_file():
        raise UserError(f"{source}: neither a run directory with best/model nor a model directory: check the path")
    if options.push_to_hub is not None:
        from engine.export.hub import push_to_hub, require_hub

        require_hub(options.push_to_hub)  # before minutes of work
    if options.native is not None:
        print(_native(folder, options, source if is_run else None))
    if wanted:
        _formats(wanted, options, folder, source if is_run else None)
    if options.push_to_hub is not None:
        address = push_to_hub(folder, options.push_to_hub, private=options.private)
        print(f"on the hub: {address}")


def _native(folder: Path, options: argparse.Namespace, run: Path | None) -> str:
    """Writes the native folder; says how far its answers are from PyTorch's, and what its precision costs."""
    from search.console.libraries import quiet

    quiet()
    from transformers import AutoTokenizer

    from engine.export import onnx as formats
    from engine.export.native import write_native
    from engine.export.saved import load_saved
    from engine.handover import load_plain
    from kernels.runtime import NativeError, Session

    target, precision = options.native, options.precision or PRECISIONS[0]
    model = load_saved(folder).eval()
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(folder) if has_tokenizer else None
    measured = None if precision == PRECISIONS[0] else _cost(model, precision, folder, options, run)
    write_native(model, tokenizer, target, precision=precision, measured=measured)
    try:
        session = Session(target, precision=PRECISIONS[0])
    except NativeError as error:
        raise UserError(f"--native: {error}") from error
    inputs = [formats.example_inputs(model.config, 1, min(n, model.config.max_position_embeddings)) for n in (5, 16)]
    for given in inputs:
        given["attention_mask"].fill_(1)  # PyTorch also answers for padding
        if session.answers.head == "choice":
            given.update({name: value[:, None] for name, value in given.items()})  # of one choice each
    worst = formats.largest_difference(load_plain(folder), _answers_of(session), inputs)
    told = f"native folder: {target}, its answers differ from PyTorch's by at most {worst:.1g}"
    return told if precision == PRECISIONS[0] else f"{told} in fp32\n{_told(precision, measured)}"


def _cost(
    model: FFNASPreTrainedModel, precision: str, folder: Path, options: argparse.Namespace, run: Path | None
) -> dict[str, Any] | None:
    """The metric of the model in fp32 and in `precision`; None where there is no labelled data at hand."""
    import torch

    from engine.evaluation.metrics import primary
    from engine.student.native import describe
    from kernels.runtime import Session

    data: tuple[TaskSpec, EncodedDataset] | None = None
    if options.eval is not None:
        data = _labelled_file(folder, options)
    elif run is not None:
        data = _dev_split(run, folder)
    if data is None:
        return None
    found: dict[str, Any] = {"rows": len(data[1])}
    for name in (PRECISIONS[0], precision):
        session = Session(describe(model), precision=name)

        def answer(session: Session = session, **given: Any) -> tuple[torch.Tensor]:
            return (torch.from_numpy(session.run(**{k: v.numpy() for k, v in given.items()})),)

        found["metric"], found[name] = primary(data[0], _score(answer, *data))
        session.close()
    return found


def _told(precision: str, measured: dict[str, Any] | None) -> str:
    if measured is None:
        return f"{precision}: what it costs was not measured; --eval FILE with labels does"
    lost = 100 * (measured[PRECISIONS[0]] - measured[precision])
    line = (
        f"{precision}: {measured['metric']} {measured[precision]:.4f} of {measured['rows']} rows, fp32"
        f" {measured[PRECISIONS[0]]:.4f}"
    )
    return line if lost <= _MUCH else f"{line}: {lost:.1f} points are lost, consider --precision bf16"


def _answers_of(session: Session) -> Callable[..., tuple[np.ndarray, ...]]:
    """The outputs that the model has in PyTorch, in their order."""

    def answer(**given: Any) -> tuple[np.ndarray, ...]:
        arrays = {name: tensor.numpy() for name, tensor in given.items()}
        if session.answers.head == "none":
            wanted = ("hidden", "pooled") if session.answers.pools else ("hidden",)
            return tuple(session.run(**arrays, wanted=name) for name in wanted)
        scores = session.run(**arrays)
        spans = session.answers.labels == ("start", "end")
        return (scores[..., 0], scores[..., 1]) if spans else (scores,)

    return answer


def _formats(wanted: list[str], options: argparse.Namespace, folder: Path, run: Path | None) -> None:
    """Writes the formats that the installed libraries allow; raises `UserError` where they do not allow all."""
    from engine.export.onnx import missing_onnx
    from search.console.libraries import quiet
    from search.console.progress import Reporter

    missing = missing_onnx()
    written = [name for name in wanted if name == "program" or not missing]
    if written:
        with Reporter() as reporter:
            reporter.doing("exporting")
            quiet()
            data = None
            if options.eval is not None:
                data = _labelled_file(folder, options)
            elif run is not None:
                data = _dev_split(run, folder)
            result = export_formats(folder, written, data)
            write_json_atomic(folder / RESULT, result)
            reporter.info(_table(result))
    left = [f"--{name}" for name in wanted if name not in written]
    if left:
        raise UserError(
            f"{', '.join(left)}: not written, {', '.join(missing)} not installed: run pip install 'ffnas[onnx]' and the"
            " command again"
        )


def export_formats(
    folder: Path, wanted: list[str], data: tuple[TaskSpec, EncodedDataset] | None = None
) -> list[dict[str, Any]]:
    """Writes the formats and compares each with the model in PyTorch.

    Returns:
        One {"format", "file", "bytes", "largest_difference", "metrics"} per format, PyTorch's own first; differences
        are of outputs on random token sequences of several lengths.
    """
    import torch

    from engine.export import onnx as formats
    from engine.handover import load_plain

    model: Any = load_plain(folder)
    choices = {"choices": 3} if formats.known(model).choices else {}
    longest = min(128, int(model.config.max_position_embeddings))
    inputs = [
        formats.example_inputs(model.config, rows, length, **choices)
        for rows, length in ((2, 16), (1, 5), (3, longest))
    ]
    made: list[tuple[str, Path, Any]] = [("pytorch", folder / "model.safetensors", None)]
    if "program" in wanted:
        path = formats.export_program(folder)
        made.append(("program", path, torch.export.load(path).module()))
    if "onnx" in wanted or "int8" in wanted:
        path = formats.export_onnx(folder)
        made.append(("onnx", path, formats.OnnxModel(path)))
    if "int8" in wanted:
        path = formats.quantize_onnx(folder)
        made.append(("int8", path, formats.OnnxModel(path)))
    result = []
    for name, path, other in made:
        entry: dict[str, Any] = {"format": name, "file": str(path.relative_to(folder)), "bytes": path.stat().st_size}
        entry["largest_difference"] = 0.0 if other is None else formats.largest_difference(model, other, inputs)
        if data is not None:
            entry["metrics"] = _score(model if other is None else other, *data)
        result.append(entry)
    return result


def _score(model: Any, spec: TaskSpec, data: EncodedDataset) -> dict[str, float]:
    """Metrics of a classifier in any of the formats."""
    import torch

    from engine.evaluation.metrics import compute_metrics
    from engine.export.onnx import OnnxModel

    logits, labels = [], []
    for batch in data.batches(_BATCH, seed=0, epoch=0, shuffle=False, bucket=True):
        inputs = {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask.long(),
            "token_type_ids": batch.token_type_ids,
        }
        if isinstance(model, OnnxModel):
            values = model(inputs)["logits"]
        else:
            with torch.no_grad():
                out = model(**inputs)
            values = (out[0] if isinstance(out, tuple) else out.logits).numpy()
        logits.append(values)
        assert batch.labels is not None
        labels.append(batch.labels.numpy())
    return compute_metrics(spec, np.concatenate(logits), np.concatenate(labels))


def _dev_split(run: Path, folder: Path) -> tuple[TaskSpec, EncodedDataset] | None:
    from engine.data import load_task
    from engine.data.encode import encode_task
    from search.config.options import parse

    config, _ = parse(["--resume", str(run)])
    task = load_task(config.data, seed=config.seed)
    if not task.spec.head.pooled:
        return None
    return task.spec, encode_task(task.dev, task.spec, _tokenizer(folder), config.data.max_length)


def _labelled_file(folder: Path, options: argparse.Namespace) -> tuple[TaskSpec, EncodedDataset]:
    """The rows of a file whose labels are the model's."""
    import json
    from dataclasses import replace

    from engine.data.columns import find_label_column, find_text_columns
    from engine.data.config import words
    from engine.data.encode import encode_task
    from engine.data.labels import label_keys
    from engine.data.rows import Rows
    from engine.data.sources import read_table
    from engine.data.task import heads

    source = options.eval
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    known = next((spec for head in heads() if (spec := head.spec_of(config)) is not None), None)
    if known is None:
        raise UserError(f"--eval: {config['architectures'][0]} is scored in a run only: give a run directory")
    table = read_table(source, **reading(options))
    wanted = words(options.text_columns) if options.text_columns else None
    texts = find_text_columns(table.columns, wanted, source)
    label = find_label_column(table.columns, options.label_column, texts, source)
    metric, _ = known.head.choose_metric(len(known.label_names), len(texts) == 2, None)
    spec = replace(known, name=Path(source).stem, text_columns=texts, label_column=label, metric=metric)
    keys = label_keys(
        table.values(label), source, spec.label_names, label, remedy="remove the row or fill in its label"
    )
    rows = Rows(tuple(table.texts(column) for column in texts), spec.head.labels(keys, spec, source))
    tokenizer = _tokenizer(folder)
    return spec, encode_task(rows, spec, tokenizer, min(tokenizer.model_max_length, 512))


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        raise UserError(f"{folder}: has no tokenizer to score with: put its tokenizer files there")
    return AutoTokenizer.from_pretrained(folder)


def _table(result: list[dict[str, Any]]) -> str:
    names = list(result[0].get("metrics", {}))
    rows = [("format", "file", "MB", "difference", *names)]
    for entry in result:
        scores = (f"{entry['metrics'][name]:.4f}" for name in names)
        size, difference = f"{entry['bytes'] / 1e6:.1f}", f"{entry['largest_difference']:.1e}"
        rows.append((entry["format"], entry["file"], size, difference, *scores))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)
