"""`ffnas predict`: what a model answers to texts, rows of a file, or a published split, GLUE submissions included.

Works with any model directory transformers can load with a task head: found models, teachers, others. Answers go to
standard output or where `--out` says; everything else that is told goes to standard error.

Gold labels are never read for a test split; where there are labels, the score is told beside the answers.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.data.catalog import TASKS, PublishedTask
from engine.data.catalog import published as published_task
from engine.data.published_files import find_split, read_split
from engine.data.task import TaskSpec, heads
from engine.errors import UserError
from engine.model_sources import TeacherSource, resolve
from search.commands.predict_files import check_out, submission_files, write_predictions, write_submission
from search.commands.predict_rows import (
    Asked,
    fitted,
    given_texts,
    gold,
    piped_texts,
    published,
    published_rows,
    table_rows,
)

if TYPE_CHECKING:
    import numpy as np

    from engine.data import EncodedDataset
    from search.console.progress import Reporter

HELP = """usage: ffnas predict MODEL [TEXT ...] [--data FILE] [options]

Answers texts, the rows of a table, or a published split. MODEL: a folder, hub name or package:NAME.

examples:
  ffnas predict runs/NAME/best/model "the battery lasts two days"
  ffnas predict MODEL --data reviews.csv --out answers.csv --probabilities
  cat reviews.txt | ffnas predict MODEL                         one text a line
  ffnas predict MODEL --task glue/mnli --data glue_data --glue-submission FOLDER

what to answer:
  TEXT ...               texts; without them and without --data: the lines of standard input
  --data FILE            CSV, TSV, JSON Lines, Parquet, hub name; with --task the published file
  --text-columns A[,B]   its text columns (default: found by name)
  --id-column NAME       what names a row (default: column id, idx or guid, else its number from 1)
  --label-column NAME    labels to score the answers by (default: found by name; none are needed)
  --task NAME            published task: glue/sst2, squad_v2, race, ...
  --split NAME           of the published task: train, dev, test, ... (test)
what to write:
  --out FILE             .csv, .tsv or .jsonl, of SQuAD .json (default: standard output)
  --probabilities        one for every label, not the answer's alone
  --glue-submission DIR  the task's test files of a GLUE submission
how:
  --max-length N         longest sequence in tokens (128; SQuAD 384); longer ones are cut
  --batch-size N         sequences per pass (64)
  --device NAME          auto, cpu or cuda[:N] (auto)
  --encoding, --quoting, --delimiter     how text files are written (utf-8, standard, auto)
  --stride N, --null-threshold X         SQuAD: overlap of windows; lead for "no answer" (0)

Rows carry the answer's label and probability, of a regression the number. Where labels are given,
the metric goes to standard error, with the 95 % interval that resampling the rows gives."""


def command(argv: list[str]) -> None:
    """Writes predictions; raises `UserError` when the input is wrong."""
    if not argv or {"-h", "--help"} & set(argv):
        print(HELP)
        return
    options = _parse(argv)
    _check(options)
    task = published_task(options.task) if options.task else None
    if task is not None and task.name == "glue/ax":
        raise UserError("--task glue/ax: predict glue/mnli with --glue-submission, which writes AX.tsv too")
    kinds = heads() if task is None else (task.spec.head,)
    check_out(options.out, [suffix for head in kinds for suffix in head.suffixes])
    asked = None if options.glue_submission is not None else _asked(options, task)  # mistakes in files are told first
    found = resolve(options.model)
    spec = task.spec if task is not None else _spec_of(found.folder)
    check_out(options.out, spec.head.suffixes)
    labels = None
    if asked is not None and task is None:
        spec = fitted(asked, spec)
        labels = _labels(asked, spec)

    from search.console.libraries import quiet
    from search.console.progress import Reporter

    with Reporter.on_error() as reporter:
        reporter.doing("loading the model")
        quiet()
        model = Predictor(options, found, spec, reporter)
        if task is not None and spec.head.named_outputs:
            _require_names(options.model, found, task)
        if asked is None:
            assert task is not None
            _submit(model, task, Path(options.glue_submission))
            return
        write = _answered(model, asked, labels)
    write()  # to the standard output of a terminal, on which nothing may move any more
    if options.out is not None:
        reporter.info(f"{len(asked.rows):,} predictions: {options.out}")


def _require_names(model: str, found: TeacherSource, task: PublishedTask) -> None:
    """Raises `UserError` unless the model names the task's classes, so that it is known which output is which.

    In any order (the outputs are put into the task's), or as the task's files number them, in theirs.
    """
    from engine.teacher.loading import names_labels

    names = json.loads((found.folder / "config.json").read_text(encoding="utf-8")).get("id2label") or {}
    own = tuple(str(names[key]) for key in sorted(names, key=int))
    if names_labels(found, task.spec) or (own and own == task.values):
        return
    given = ", ".join(own) if own else "LABEL_0, LABEL_1, ..."
    raise UserError(
        f"{model}: its classes are called {given}, those of {task.name} {', '.join(task.classes)}: which is which"
        " cannot be told: write the names into id2label of its config.json (ffnas convert --task or --labels does)"
    )


class Predictor:
    """A loaded model.

    Args:
        options: of the command line.
        found: the model's folder.
        spec: the task as the model answers it.
        reporter: told what was written.

    Raises:
        UserError: not loadable, or the model's head is not for the task.
    """

    def __init__(self, options: argparse.Namespace, found: TeacherSource, spec: TaskSpec, reporter: Reporter) -> None:
        import engine.student
        from engine.model_sources import load_tokenizer, require_rows
        from engine.teacher.loading import load_model, placed
        from engine.training.precision import choose_device

        assert engine.student  # registers our model type
        self.options, self.spec, self.reporter = options, spec, reporter
        device = choose_device(options.device)
        model, has_head = load_model(found, spec)
        if not has_head:
            raise UserError(f"{options.model}: has no head for {spec.name} ({spec.num_labels} outputs): fine-tune it")
        self.tokenizer = load_tokenizer(found)
        require_rows(self.tokenizer, model.config.vocab_size, options.model)
        self.model = placed(model, device).eval()

    def encoded(self, asked: Asked) -> EncodedDataset:
        """The rows as the model takes them."""
        from engine.data import encode_task, model_positions

        limit, options = model_positions(self.model.config), self.options
        length = options.max_length or min(self.spec.head.default_length, limit or 128)
        return encode_task(asked.rows, self.spec, self.tokenizer, length, max_positions=limit, stride=options.stride)

    def answers(self, asked: Asked) -> Any:
        """Answers to the rows (`TaskHead.answer`)."""
        from engine.evaluation.evaluation import answers_of

        data = self.encoded(asked)
        self.reporter.doing(f"answering {len(asked.rows):,} rows")
        return answers_of(self.model, data, self.spec, batch_size=self.options.batch_size)


def _asked(options: argparse.Namespace, task: PublishedTask | None) -> Asked:
    if task is not None:
        return published_rows(task, options.split or "test", options)
    if options.data is not None:
        return table_rows(options)
    return given_texts(options.texts) if options.texts else piped_texts(options.encoding)


def _labels(asked: Asked, spec: TaskSpec) -> tuple[np.ndarray, np.ndarray, str] | None:
    """`gold`; where the column was found by its name and does not fit, a line in place of an error."""
    try:
        found = gold(asked, spec)
    except UserError as error:
        if asked.insist:
            raise
        _say(f"not scored, column {asked.label_column!r} is no label of this model's: {error}")
        return None
    if found is not None and found[2]:
        _say(found[2])
    return found


def _say(line: str) -> None:
    print(f"ffnas: {line}", file=sys.stderr)


def _answered(model: Predictor, asked: Asked, labels: tuple[np.ndarray, np.ndarray, str] | None) -> Callable[[], None]:
    """Answers the rows; returns what writes the answers and, where there are labels, tells their score."""
    options, spec, head = model.options, model.spec, model.spec.head
    answers = model.answers(asked)
    threshold = options.null_threshold

    def write() -> None:
        names = [int(name) for name in asked.names] if asked.key == "row" else asked.names
        made = head.predictions(spec, asked.key, names, answers, every=options.probabilities, threshold=threshold)
        write_predictions(options.out, made)
        wanted, kept = (head.gold(asked.rows), None) if labels is None else labels[:2]
        if wanted is not None:
            measured = head.score(spec, answers, wanted, kept=kept, threshold=threshold)
            gold = None if head.label_dtype is None else wanted
            _tell(model, asked, measured.metrics, measured.rows(), gold)

    return write


def _tell(
    model: Predictor, asked: Asked, metrics: dict[str, float], rows: np.ndarray, labels: np.ndarray | None
) -> None:
    """The metrics, the task's own one first and with its interval."""
    from search.evidence.compare import CONFIDENCE, interval
    from search.evidence.resample import resampled

    name = model.spec.metric
    low, high = interval(resampled(model.spec, rows, labels))
    told = [f"{name} {metrics[name]:.4f} ({CONFIDENCE:.0%} interval {low:.4f} to {high:.4f})"]
    told += [f"{other} {value:.4f}" for other, value in metrics.items() if other != name]
    model.reporter.info(f"{asked.name}: {', '.join(told)}; {len(rows):,} rows with a label")


def _submit(model: Predictor, task: PublishedTask, folder: Path) -> None:
    """One file per test split in GLUE's submission format; MNLI's model also answers the diagnostics."""
    options = model.options
    wanted = [(task, name, published_rows(task, name, options)) for name in task.tests]
    diagnostics = TASKS["glue/ax"]
    source = find_split(diagnostics, options.data, "test") if task.name == "glue/mnli" else None
    if source is not None and (options.data is None or Path(source).exists()):
        wanted.append((diagnostics, "test", published("test", read_split(diagnostics, source, labelled=False))))
    for kind, name, asked in wanted:
        path = folder / kind.submission[name]
        write_submission(path, kind, asked.rows, model.answers(asked).rows)
        model.reporter.info(f"{len(asked.rows):,} predictions: {path}")
    missing = [name for name in submission_files() if not (folder / name).exists()]
    if missing:
        model.reporter.info(f"still missing for a whole submission: {', '.join(missing)}")


def _spec_of(folder: Path) -> TaskSpec:
    """The task of a model, as its configuration tells it.

    Raises:
        UserError: the model has another head, or does not name its classes.
    """
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        made = (config.get("architectures") or [""])[0]
        found = [spec for head in heads() if (spec := head.spec_of(config)) is not None]
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise UserError(
            f"{folder}/config.json cannot be read ({error}): give a folder `save_pretrained` wrote"
        ) from error
    if not found:
        raise UserError(f"{folder}: holds a {made or 'model without a head'}: say what it answers with --task")
    return found[0]


def _parse(argv: list[str]) -> argparse.Namespace:
    from search.console.arguments import QuietParser, add_reading_options

    parser = QuietParser(prog="ffnas predict", add_help=False, allow_abbrev=False)
    parser.add_argument("model")
    parser.add_argument("texts", nargs="*")
    for name in ("data", "task", "split", "out", "id-column", "glue-submission"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--label-column", "--data.label_column", "--data.label-column", dest="label_column")
    parser.add_argument("--probabilities", action="store_true")
    parser.add_argument("--max-length", "--data.max_length", "--data.max-length", dest="max_length", type=int)
    parser.add_argument("--stride", type=int)
    parser.add_argument("--null-threshold", type=float, default=0.0)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="auto")
    add_reading_options(parser)
    return parser.parse_intermixed_args(argv)


def _check(options: argparse.Namespace) -> None:
    """Refuses options that do not go together."""
    if options.glue_submission is not None and not (options.task or "").startswith("glue/"):
        raise UserError("--glue-submission goes with a GLUE task: give --task glue/NAME")
    if options.split is not None and options.task is None:
        raise UserError("--split goes with a published task: give --task")
    if options.texts and (options.data is not None or options.task is not None):
        raise UserError(f"text {options.texts[0]!r} beside --data or --task: give one of them")
    for name in ("id_column", "label_column"):
        if getattr(options, name) is not None and (options.data is None or options.task is not None):
            raise UserError(f"--{name.replace('_', '-')} goes with a table: give --data FILE and no --task")
    if options.batch_size < 1:
        raise UserError(f"--batch-size: {options.batch_size}: choose at least 1")
