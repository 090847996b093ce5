"""The part of a model card that says how to load the model: with ffnas and without, as code to copy."""

from __future__ import annotations

import json
from collections.abc import Sequence

from engine.handover import AUTO_CLASSES

TASKS = {
    "FFNASForSequenceClassification": "text-classification",
    "FFNASForQuestionAnswering": "question-answering",
    "FFNASForMultipleChoice": "multiple-choice",
    "FFNASForMaskedLM": "fill-mask",
    "FFNASModel": "feature-extraction",
}
"""Per class the hub's task tag."""

_PIPELINES = {"text-classification", "fill-mask", "feature-extraction", "question-answering"}
"""Tasks with a pipeline: transformers' own, or for question answering, which 5.x no longer has, the directory's."""

FOLDER = "path/to/this/folder"


def usage_section(name: str, examples: Sequence[str]) -> str:
    """Markdown with two snippets.

    Args:
        name: of the model's class.
        examples: the texts of one input; none: the snippets do not call the model.
    """
    return "\n".join(
        [
            "## How to load it",
            "",
            "With torch and transformers alone; `trust_remote_code` runs the Python files of this folder, which are"
            " short and plain PyTorch:",
            "",
            "```python",
            *_code(name, examples, plain=True),
            "```",
            "",
            "With ffnas installed, on its fused kernels, and with no code from this folder:",
            "",
            "```python",
            "import engine  # a package of ffnas; registers the model type",
            *_code(name, examples, plain=False),
            "```",
        ]
    )


def _code(name: str, examples: Sequence[str], *, plain: bool) -> list[str]:
    task, auto_class = TASKS[name], AUTO_CLASSES[name]
    trust = ", trust_remote_code=True" if plain else ""
    if task not in _PIPELINES or (task == "question-answering" and not plain):
        return [
            f"from transformers import {auto_class}, AutoTokenizer",
            "",
            f'model = {auto_class}.from_pretrained("{FOLDER}"{trust})',
            f'tokenizer = AutoTokenizer.from_pretrained("{FOLDER}"{trust})',
        ]
    made = ["from transformers import pipeline", "", f'run = pipeline("{task}", model="{FOLDER}"{trust})']
    if not examples:
        return made
    texts = [json.dumps(text) for text in examples]
    if task == "question-answering":
        return [*made, f"print(run(question={texts[0]}, context={texts[-1]}))"]
    given = texts[0] if len(texts) == 1 else f'{{"text": {texts[0]}, "text_pair": {texts[1]}}}'
    return [*made, f"print(run({given}))"]
