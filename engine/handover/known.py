"""How a model of ours is known to others: transformers' Auto class, the hub's tag, the files a hand-over needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.data.task import heads


@dataclass(frozen=True)
class HandOver:
    """Of one model class.

    Attributes:
        auto: name of transformers' Auto class that loads it.
        tag: the hub's name of what it does.
        outputs: tensors of its output record that an exported program gives.
        choices: whether inputs are [B, choices, S].
        pipeline: whether transformers, or the directory itself, has a pipeline for it.
        call: names of the texts a pipeline is called with; () for one text, or a pair.
        own_pipeline: class of a pipeline that the directory brings along, and the file it is in: some versions of
            transformers lack it.
        plain: file with the plain class of the same name, where it is not `engine/handover/modeling_ffnas.py`.
    """

    auto: str
    tag: str
    outputs: tuple[str, ...] = ("logits",)
    choices: bool = False
    pipeline: bool = True
    call: tuple[str, ...] = ()
    own_pipeline: tuple[str, Path] | None = None
    plain: Path | None = None


ENCODER = HandOver("AutoModel", "feature-extraction", ("last_hidden_state", "pooler_output"))
MASKED_LM = HandOver("AutoModelForMaskedLM", "fill-mask")


def hand_overs() -> dict[str, HandOver]:
    """By name of the class: the encoder, the model of each kind of task, and masked language modeling."""
    of_tasks = {model.__name__: model.hand_over for model in (head.student_class() for head in heads())}
    return {"FFNASModel": ENCODER, **of_tasks, "FFNASForMaskedLM": MASKED_LM}


def hand_over(name: str) -> HandOver:
    """That of the class of this name; raises `KeyError` where there is none."""
    return hand_overs()[name]
