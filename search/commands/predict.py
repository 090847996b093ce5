"""`ffnas predict`: what a model answers to the rows of a file or of a published split, GLUE submissions included.

Works with any model directory transformers can load with a task head: found models, teachers, others.

Gold labels are never read for a test split; where a split has them, its metrics are printed beside the predictions.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from engine.data import EncodedDataset, Rows, TaskSpec
    from engine.data.catalog import PublishedTask
    from engine.model_sources import TeacherSource

EXAMPLES = """
examples:
  ffnas predict runs/NAME/best/model --data reviews.csv --out answers.tsv
  ffnas predict MODEL --task glue/mnli --data glue_data --split dev
  ffnas predict MODEL --task glue/mnli --data glue_data --glue-submission submission
  ffnas predict MODEL --task squad_v2 --data SQuAD --split dev --out predictions.json
"""


@dataclass
class Split:
    """Rows to answer, tokenized.

    Attributes:
        name: of the split.
        rows: texts, names and, where they are known, labels.
        data: the same, encoded.
    """

    name: str
    rows: Rows
    data: EncodedDataset


def command(argv: list[str]) -> None:
    """Writes predictions; raises `UserError` when the input is wrong."""
    from engine.errors import UserError

    options = _parse(argv)
    if options.glue_submission is not None and not (options.task or "").startswith("glue/"):
        raise UserError("--glue-submission goes with a GLUE task: give --task glue/NAME")
    if options.split is not None and options.task is None:
        raise UserError("--split goes with a published task: give --task")
    if options.batch_size < 1:
        raise UserError(f"--batch-size: {options.batch_size}: choose at least 1")

    from search.console.libraries import quiet
    from search.console.progress import Reporter

    quiet()
    Prediction(options, Reporter()).run()


class Prediction:
    """One call of the command.

    Args:
        options: of the command line.
        reporter: told what was written.
    """

    def __init__(self, options: argparse.Namespace, reporter: Any) -> None:
        from engine.data.catalog import published
        from engine.training.precision import choose_device

        self.options, self.reporter = options, reporter
        self.task: PublishedTask | None = published(options.task) if options.task else None
        self.device = choose_device(options.device)
        self.spec, self.model, self.tokenizer = self._load()

    def run(self) -> None:
        """Answers and writes."""
        if self.options.glue_submission is not None:
            self._submit(Path(self.options.glue_submission))
            return
        split = self._published_split() if self.task is not None else self._own_rows()
        out = Path(self.options.out or ("predictions.json" if self.spec.is_span else "predictions.tsv"))
        if self.spec.is_span:
            self._write_answers(split, out)
        else:
            logits = self._logits(split)
            self._write_rows(split, logits, out)
            if split.rows.labels is not None:
                from engine.evaluation.metrics import compute_metrics

                self._tell(compute_metrics(self.spec, logits, split.rows.labels), split.name)
        self.reporter.info(f"{len(split.rows):,} predictions: {out}")

    def _load(self) -> tuple[TaskSpec, Any, Any]:
        """The task as the model answers it, the model and its tokenizer.

        Raises:
            UserError: not loadable, or the model's head is not for the task.
        """
        import engine.student
        from engine.errors import UserError
        from engine.model_sources import load_tokenizer, require_rows, resolve
        from engine.teacher.loading import load_model

        assert engine.student  # registers our model type
        found = resolve(self.options.model)
        spec = self.task.spec if self.task is not None else _spec_of(found.folder)
        if self.task is not None and self.task.name == "glue/ax":
            raise UserError("--task glue/ax: predict glue/mnli with --glue-submission, which writes AX.tsv too")
        model, has_head = load_model(found, spec)
        if not has_head:
            raise UserError(
                f"{self.options.model}: has no head for {spec.name} ({spec.num_labels} outputs): fine-tune it"
            )
        if self.task is not None and spec.kind == "classification":
            self._require_names(found)
        tokenizer = load_tokenizer(found)
        require_rows(tokenizer, model.config.vocab_size, self.options.model)
        return spec, model.to(self.device).eval(), tokenizer

    def _require_names(self, found: TeacherSource) -> None:
        """Raises `UserError` unless the model names the task's classes, so that it is known which output is which.

        In any order (the outputs are put into the task's), or as the task's files number them, in theirs.
        """
        import json

        from engine.errors import UserError
        from engine.teacher.loading import names_labels

        assert self.task is not None
        names = json.loads((found.folder / "config.json").read_text(encoding="utf-8")).get("id2label") or {}
        own = tuple(str(names[key]) for key in sorted(names, key=int))
        if names_labels(found, self.task.spec) or (own and own == self.task.values):
            return
        given = ", ".join(own) if own else "LABEL_0, LABEL_1, ..."
        raise UserError(
            f"{self.options.model}: its classes are called {given}, those of {self.task.name}"
            f" {', '.join(self.task.classes)}: which output is which cannot be told: write the names into id2label of"
            " its config.json (ffnas convert --task or --labels does)"
        )

    def _encode(self, name: str, rows: Rows) -> Split:
        from engine.data import encode_task, model_positions

        limit = model_positions(self.model.config)
        length = self.options.max_length or min(384 if self.spec.is_span else 128, limit or 128)
        data = encode_task(rows, self.spec, self.tokenizer, length, max_positions=limit, stride=self.options.stride)
        return Split(name, rows, data)

    def _published_split(self, name: str | None = None) -> Split:
        from engine.data.published_files import find_split, read_split
        from engine.errors import UserError

        assert self.task is not None
        name = name or self.options.split or "test"
        if name not in self.task.files:
            raise UserError(f"--split {name!r}: {self.task.name} has {', '.join(self.task.files)}")
        data = self.options.data
        given = data if data is not None and Path(data).is_file() else None
        source = find_split(self.task, data, name, given)
        if source is None:
            raise UserError(f"--data {data}: no {self.task.files[name]} of {self.task.name} in it")
        labelled = name not in self.task.tests
        return self._encode(name, read_split(self.task, source, labelled=labelled, encoding=self.options.encoding))

    def _own_rows(self) -> Split:
        """Rows of a table; a label column, if there is one, is left alone."""
        from engine.data import Rows
        from engine.data.columns import find_text_columns
        from engine.data.config import words
        from engine.data.sources import read_table
        from engine.errors import UserError
        from search.console.arguments import reading

        if self.options.data is None:
            raise UserError("--data: no file given: use --data FILE, or --task NAME for a published one")
        table = read_table(self.options.data, **reading(self.options))
        wanted = words(self.options.text_columns) if self.options.text_columns else None
        columns = find_text_columns(table.columns, wanted, self.options.data)
        from dataclasses import replace

        self.spec = replace(self.spec, text_columns=columns)
        return self._encode("rows", Rows(tuple(table.texts(column) for column in columns)))

    def _logits(self, split: Split) -> np.ndarray:
        from engine.evaluation.evaluation import predict_rows

        size = max(1, self.options.batch_size // split.data.choices)
        return predict_rows(self.model, split.data, batch_size=size)

    def _write_rows(self, split: Split, logits: np.ndarray, out: Path) -> None:
        names = split.rows.ids or [str(i) for i in range(len(split.rows))]
        answers = [f"{v:.6f}" for v in logits[:, 0].tolist()]
        if not self.spec.is_regression:
            answers = [self.spec.label_names[i] for i in logits.argmax(axis=1).tolist()]
        _write_tsv(out, names, answers)

    def _write_answers(self, split: Split, out: Path) -> None:
        """SQuAD's prediction file, {id: text}, and beside it the scores of "no answer" where that is possible."""
        from engine.evaluation.answers import answer_metrics
        from engine.evaluation.evaluation import predict_answers
        from engine.files import write_json_atomic

        threshold = self.options.null_threshold
        answers = predict_answers(self.model, split.data, batch_size=self.options.batch_size)
        names = split.rows.ids or [str(i) for i in range(len(split.rows))]
        texts = [a.at(threshold) if self.spec.no_answer else a.text for a in answers]
        write_json_atomic(out, dict(zip(names, texts, strict=True)))
        best = {
            name: [{"text": text, "score": score} for text, score in answer.best]
            for name, answer in zip(names, answers, strict=True)
        }
        write_json_atomic(out.with_name(f"{out.stem}_nbest.json"), best)
        if self.spec.no_answer:
            odds = {name: a.no_answer - a.score for name, a in zip(names, answers, strict=True)}
            write_json_atomic(out.with_name(f"{out.stem}_null_odds.json"), odds)
        if split.rows.golds is not None:
            metrics = answer_metrics(answers, split.rows.golds, no_answer=self.spec.no_answer, threshold=threshold)
            self._tell(metrics, split.name)

    def _submit(self, folder: Path) -> None:
        """One file per test split in GLUE's submission format; MNLI's model also answers the diagnostics."""
        from engine.data.catalog import TASKS
        from engine.data.published_files import find_split, read_split

        assert self.task is not None
        for name in self.task.tests:
            split = self._published_split(name)
            path = folder / self.task.submission[name]
            write_submission(path, self.task, split.rows, self._logits(split))
            self.reporter.info(f"{len(split.rows):,} predictions: {path}")
        diagnostics = TASKS["glue/ax"]
        source = find_split(diagnostics, self.options.data, "test") if self.task.name == "glue/mnli" else None
        if source is not None and (self.options.data is None or Path(source).exists()):
            split = self._encode("test", read_split(diagnostics, source, labelled=False))
            path = folder / diagnostics.submission["test"]
            write_submission(path, diagnostics, split.rows, self._logits(split))
            self.reporter.info(f"{len(split.rows):,} predictions: {path}")
        missing = [name for name in submission_files() if not (folder / name).exists()]
        if missing:
            self.reporter.info(f"still missing for a whole submission: {', '.join(missing)}")

    def _tell(self, metrics: dict[str, float], split: str) -> None:
        self.reporter.info(f"{split}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))


def write_submission(path: Path, task: PublishedTask, rows: Rows, logits: np.ndarray) -> None:
    """A file of a GLUE submission: `index` and `prediction`, classes as GLUE's own files write them.

    Args:
        path: the file.
        task: of GLUE.
        rows: with the names of the test file's first column.
        logits: [N, classes], or [N, 1] of STS-B, whose scores are cut to 0..5 and written with three decimals.
    """
    if task.kind == "regression":
        answers = [f"{min(max(value, 0.0), 5.0):.3f}" for value in logits[:, 0].tolist()]
    else:
        names = task.values or task.classes
        answers = [names[i] for i in logits.argmax(axis=1).tolist()]
    _write_tsv(path, rows.ids or [str(i) for i in range(len(rows))], answers)


def submission_files() -> list[str]:
    """Names of all files of a GLUE submission."""
    from engine.data.catalog import TASKS

    return [name for task in TASKS.values() for name in task.submission.values()]


def _write_tsv(path: Path, names: list[str], answers: list[str]) -> None:
    from engine.files import write_text_atomic

    lines = ["index\tprediction", *(f"{name}\t{answer}" for name, answer in zip(names, answers, strict=True))]
    write_text_atomic(path, "\n".join(lines) + "\n")


def _spec_of(folder: Path) -> TaskSpec:
    """The task of a sequence classifier, as its configuration tells it.

    Raises:
        UserError: the model has another head, or does not name its classes.
    """
    import json

    from engine.data import TaskSpec
    from engine.errors import UserError

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    made = (config.get("architectures") or [""])[0]
    if not made.endswith("ForSequenceClassification"):
        raise UserError(f"{folder}: holds a {made or 'model without a head'}: say what it answers with --task")
    names = config.get("id2label") or {}
    if config.get("problem_type") == "regression" or config.get("num_labels") == 1 or len(names) == 1:
        return TaskSpec("rows", "regression", ("text",), "label", metric="pearson")
    labels = tuple(str(names[key]) for key in sorted(names, key=int)) or ("LABEL_0", "LABEL_1")
    return TaskSpec("rows", "classification", ("text",), "label", labels)


def _parse(argv: list[str]) -> argparse.Namespace:
    from search.console.arguments import QuietParser, add_reading_options

    parser = QuietParser(
        prog="ffnas predict",
        description="Answer rows with a model.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="model directory, hub name or package:NAME, with a head for the task")
    parser.add_argument("--data", help="a table with text columns, or with --task the published file or folder")
    parser.add_argument("--task", help="published task: glue/sst2, squad_v2, race, ... (see ffnas search --data.task)")
    parser.add_argument("--split", help="of the published task: train, dev, test, ... (default: test)")
    parser.add_argument("--out", help="file to write (default: predictions.tsv, or predictions.json for SQuAD)")
    parser.add_argument("--glue-submission", metavar="DIR", help="write the task's test files of a GLUE submission")
    parser.add_argument("--max-length", type=int, help="longest sequence in tokens (default: 128; SQuAD 384)")
    parser.add_argument("--stride", type=int, help="SQuAD: tokens by which windows overlap")
    parser.add_argument("--null-threshold", type=float, default=0.0, help="SQuAD v2.0: lead at which 'no answer' wins")
    parser.add_argument("--batch-size", type=int, default=64, help="sequences per pass")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda[:N]")
    add_reading_options(parser)
    return parser.parse_args(argv)
