"""The part of a model card that says how to load the model: with ffnas and without, as code to copy."""

from __future__ import annotations

import json
from collections.abc import Sequence

from engine.handover.known import HandOver

FOLDER = "path/to/this/folder"


def usage_section(known: HandOver, examples: Sequence[str]) -> str:
    """Markdown with two snippets.

    Args:
        known: of the model's class.
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
            *_code(known, examples, plain=True),
            "```",
            "",
            "With ffnas installed, on its fused kernels, and with no code from this folder:",
            "",
            "```python",
            "import engine  # a package of ffnas; registers the model type",
            *_code(known, examples, plain=False),
            "```",
        ]
    )


def _code(known: HandOver, examples: Sequence[str], *, plain: bool) -> list[str]:
    task, auto_class = known.tag, known.auto
    trust = ", trust_remote_code=True" if plain else ""
    if not known.pipeline or (known.own_pipeline is not None and not plain):
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
    if known.call:
        given = ", ".join(f"{name}={text}" for name, text in zip(known.call, texts, strict=False))
        return [*made, f"print(run({given}))"]
    given = texts[0] if len(texts) == 1 else f'{{"text": {texts[0]}, "text_pair": {texts[1]}}}'
    return [*made, f"print(run({given}))"]
