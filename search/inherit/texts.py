"""Further texts of the user's own, without labels: students learn the teacher's answers to them too.

`data.text` of the other strategy is general text for the warm-up; here it is what the task's texts are like and nobody
has labelled: reviews without stars, questions without a topic. The teacher is trained before, on labelled rows alone.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from engine.data import EncodedDataset, EncodedTask
from engine.data.task import TaskHead
from search.context import Prepared


def with_text(prepared: Prepared) -> EncodedTask:
    """The run's data, the rows of `data.text` added to its training rows; as it is where none are given."""
    data, given = prepared.data, prepared.config.data.text
    if not given or data.spec.is_pair or not isinstance(data.text, EncodedDataset):
        return data
    return replace(data, train=joined(data.train, data.text, data.spec.head))


def unused(prepared: Prepared) -> str | None:
    """Why `data.text` is given and not used, in one line; None where it is used or not given."""
    if not prepared.config.data.text:
        return None
    if prepared.spec.is_pair:
        return "data.text is not used: strategy inherit takes texts without labels for tasks of single texts only"
    if not isinstance(prepared.data.text, EncodedDataset):
        return "data.text is not used: strategy inherit takes files of texts, no prepared folders"
    return None


def joined(train: EncodedDataset, text: EncodedDataset, head: TaskHead) -> EncodedDataset:
    """The rows of both, those of `text` without labels (`TaskHead.no_labels`)."""
    labels = train.labels
    if labels is not None:
        labels = np.concatenate([labels, head.no_labels(len(text), labels)])
    return replace(
        train,
        tokens=np.concatenate([train.tokens, text.tokens]),
        offsets=np.concatenate([train.offsets, train.offsets[-1] + text.offsets[1:]]),
        second=np.concatenate([train.second, text.second]),
        labels=labels,
        truncated=train.truncated + text.truncated,
        _hash=[],
    )
