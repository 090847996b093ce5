"""Phases by names that say what happens, for terminal and report.

Files and TensorBoard keep the short ones (log.jsonl, phases.json, checkpoints, seeds): a run begun by an older version
goes on, and its report has the same names as any other. Rejected: renaming them there too; a name would then be a
promise, and no sentence could ever be made clearer.
"""

from __future__ import annotations

_WHOLE = {
    "teacher": "prepare the teacher on your task",
    "teacher evaluation": "score the teacher",
    "library": "measure every block alone",
    "block library": "measure every block alone",
    "latency": "time every block",
    "latency table": "time every operation",
    "last round": "try whole students for a few steps",
    "full distillation": "train the best students in full",
    "evidence": "compare with baselines, measure speed",
    "warm-up": "warm up the first supernet on text",
    "stage1 candidates": "stage 1: try FFN formulas and sizes",
    "stage2 candidates": "stage 2: try more formulas",
    "stage3 text": "stage 3: train the supernet on text",
    "stage3 task": "stage 3: train the supernet on your task",
    "stage3 candidates": "stage 3: try sizes",
    "random candidates": "baseline: try random candidates",
    "resolve candidates": "look for candidates under the new budget",
}
_MODELS = {
    "derive": "train the found model",
    "gelu": "baseline: train the hand-designed student",
    "random": "baseline: train the random student",
    "uniform": "baseline: train the uniform student",
    "search": "train the solved student",
}
"""What is trained, by the first word of phases that end in `text` or `task`."""
_ON = {"text": "on text", "task": "on your task"}


def phase_name(name: str) -> str:
    """What to call the phase `name` in front of people; a name nobody has given another as it is."""
    key = name.replace(": candidates", " candidates")
    if key in _WHOLE:
        return _WHOLE[key]
    what, _, on = name.rpartition(" ")
    if on not in _ON:
        return name
    if what.startswith("encoder-"):
        return f"train the student of {what.removeprefix('encoder-')} of the encoder"
    return f"{_MODELS[what]} {_ON[on]}" if what in _MODELS else name
