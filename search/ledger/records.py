"""What a trial is, and the Optuna entry that keeps it.

Parameters of an entry are the stack and the ratio of every layer, as categories; everything else are user attributes.

A search remembers thousands of trials and looks into few of them again, so a record holds its architecture as text,
half a kilobyte at six layers, and its tree, twenty times as large, is made when somebody asks. Rejected: sharing equal
subtrees among all trees; random expressions share little beyond their lowest nodes.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from dataclasses import dataclass, field, fields
from datetime import datetime, timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from engine.architecture.architecture import Architecture

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial, TrialState

STATES = ("complete", "failed", "pruned")

RUN, FAILED = "run", "failed"
"""User attributes of a shared ledger: what the entry's run depends on, and whether its trial failed."""


class PackedArchitecture:
    """A dataclass's field of type `Architecture` that is kept as text; records of one architecture share the text."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.slot = f"_{name}"

    def __get__(self, record: object, owner: type) -> Architecture:
        if record is None:
            raise AttributeError("no default")  # a dataclass asks the class for one
        return _unpacked(getattr(record, self.slot))

    def __set__(self, record: object, architecture: Architecture) -> None:
        object.__setattr__(record, self.slot, sys.intern(str(architecture)))


@lru_cache(maxsize=512)
def _unpacked(text: str) -> Architecture:
    return Architecture.parse(text)


def digest(key: str) -> bytes:
    """16 bytes in the place of a key, for sets of all that was seen."""
    return hashlib.blake2b(key.encode(), digest_size=16).digest()


@dataclass(frozen=True)
class Candidate:
    """A proposed architecture under its number.

    Attributes: as of `Trial`.
    """

    number: int
    architecture: Architecture
    key: str
    params: int


@dataclass(frozen=True)
class Trial:
    """The record of one evaluated candidate.

    A complete trial has a finite score; one whose score is NaN or infinite becomes a failed one with that reason.

    Attributes:
        stage: name of the stage, such as "stage1".
        number: position in the stage, from 0; unique in it.
        architecture: the candidate.
        key: its canonical key.
        score: higher is better; None unless complete (a pruned trial may have one).
        params: parameter count.
        seconds: wall time of training and scoring.
        state: "complete", "failed" or "pruned".
        reason: why it failed or was pruned, one line.
        attrs: further JSON values.
    """

    stage: str
    number: int
    if TYPE_CHECKING:
        architecture: Architecture
    else:
        architecture: PackedArchitecture = PackedArchitecture()  # a descriptor
    key: str
    score: float | None
    params: int
    seconds: float
    state: str = "complete"
    reason: str | None = None
    attrs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.state not in STATES:
            raise ValueError(f"state {self.state!r}: a trial is one of {', '.join(STATES)}")
        if self.number < 0:
            raise ValueError(f"number {self.number}: trials are numbered from 0")
        if self.score is not None:
            object.__setattr__(self, "score", float(self.score))
            if not math.isfinite(self.score):
                object.__setattr__(self, "reason", self.reason or f"the score is {self.score}")
                object.__setattr__(self, "score", None)
                object.__setattr__(self, "state", "failed" if self.state == "complete" else self.state)
        if self.state == "complete" and self.score is None:
            raise ValueError("a complete trial has a score")
        if self.state == "failed" and self.score is not None:
            raise ValueError("a failed trial has no score")

    def to_dict(self) -> dict[str, Any]:
        """JSON values that `from_dict` makes an equal trial of."""
        return {**{f.name: getattr(self, f.name) for f in fields(self)}, "architecture": str(self.architecture)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Trial:
        """Inverse of `to_dict`."""
        return cls(**{**values, "architecture": Architecture.parse(values["architecture"])})


def is_finished(frozen: FrozenTrial) -> bool:
    """Whether an entry is a finished trial; one of a shared ledger that is failed may have been abandoned instead."""
    attrs = frozen.user_attrs
    return frozen.state.is_finished() and (frozen.state.name != "FAIL" or RUN not in attrs or FAILED in attrs)


def to_optuna(trial: Trial | Candidate, choices: dict[str, list[Any]], **attrs: Any) -> FrozenTrial:
    """A finished entry for a trial, a waiting one for a candidate; `attrs` are further user attributes."""
    from optuna.distributions import BaseDistribution, CategoricalDistribution
    from optuna.trial import FrozenTrial, TrialState

    values: dict[str, Any] = {}
    distributions: dict[str, BaseDistribution] = {}
    for index, layer in enumerate(trial.architecture.layers):
        for name, value, allowed in (
            (f"layer{index}.stack", layer.stack, choices["stacks"]),
            (f"layer{index}.ratio", str(layer.ratio), choices["ratios"]),
        ):
            if value in allowed:
                values[name] = value
                distributions[name] = CategoricalDistribution(allowed)
    about: dict[str, Any] = {
        "number": trial.number,
        "architecture": str(trial.architecture),
        "key": trial.key,
        "params": trial.params,
    }
    now = datetime.now()
    state, score = TrialState.WAITING, None
    began: datetime | None = None
    ended: datetime | None = None
    if isinstance(trial, Trial):
        state, score = optuna_state(trial), trial.score
        began, ended = now - timedelta(seconds=trial.seconds), now
        about |= outcome(trial)
    return FrozenTrial(
        number=-1,  # the storage numbers entries by itself; ours is an attribute
        trial_id=-1,
        state=state,
        value=score,
        datetime_start=began,
        datetime_complete=ended,
        params=values,
        distributions=distributions,
        user_attrs={**about, **attrs},
        system_attrs={},
        intermediate_values={},
    )


def optuna_state(trial: Trial) -> TrialState:
    """Optuna's name for the state of a trial."""
    from optuna.trial import TrialState

    return {"complete": TrialState.COMPLETE, "failed": TrialState.FAIL, "pruned": TrialState.PRUNED}[trial.state]


def outcome(trial: Trial) -> dict[str, Any]:
    """User attributes that are known when a trial ends, in the order they are to be written.

    Each costs a millisecond: empty ones are left out. The last one of a failed trial tells it from an abandoned entry.
    """
    attrs: dict[str, Any] = {"seconds": trial.seconds, "check": _check_sum(trial)}
    if trial.reason is not None:
        attrs["reason"] = trial.reason
    if trial.attrs:
        attrs["attrs"] = json.loads(json.dumps(trial.attrs, allow_nan=False))
    if trial.state == "failed":
        attrs[FAILED] = True
    return attrs


def from_optuna(stage: str, frozen: FrozenTrial) -> Trial:
    """The trial a finished entry holds.

    Raises:
        KeyError, TypeError, ValueError: ffnas did not write the entry, or its checksum is wrong.
    """
    attrs = frozen.user_attrs
    trial = Trial(
        stage=stage,
        number=int(attrs["number"]),
        architecture=Architecture.parse(attrs["architecture"]),
        key=attrs["key"],
        score=frozen.value,
        params=int(attrs["params"]),
        seconds=float(attrs["seconds"]),
        state={"COMPLETE": "complete", "FAIL": "failed", "PRUNED": "pruned"}[frozen.state.name],
        reason=attrs.get("reason"),
        attrs=attrs.get("attrs", {}),
    )
    if attrs.get("check", _check_sum(trial)) != _check_sum(trial):
        raise ValueError("its checksum is wrong")
    return trial


def _check_sum(trial: Trial) -> str:
    """16 hexadecimal digits over the values of a trial."""
    score = None if trial.score is None else (trial.score + 0.0).hex()  # SQLite gives -0.0 back as 0.0
    values = [trial.number, str(trial.architecture), trial.key, score, trial.params, float(trial.seconds)]
    text = json.dumps([*values, trial.state, trial.reason, trial.attrs], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
