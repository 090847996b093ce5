"""A background process that compiles kernels into Triton's cache on disk: `python -m kernels.triton.compile_worker`.

It reads one job a line (JSON) from its input, and writes one line when it is done: {"kernels": n} or
{"error": "..."}. It needs no GPU and never touches one; it ends with its input.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from typing import Any

from kernels.triton.recipe import compile_recipe


def _note(kernels: list[Any], kernel: Any, *_: object) -> None:
    kernels.append(kernel)


def main() -> None:
    """Serves jobs from standard input until it ends. What kernels print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        job = json.loads(line)
        kernels: list[Any] = []
        try:
            compile_recipe(job["words"], job["recipe"], job["arch"], partial(_note, kernels), generated=True)
        except Exception as error:  # whatever it is, the caller reports it and goes on without
            text = str(error).strip() or repr(error)
            answer: dict[str, Any] = {
                "error": f"compiling a program failed: {type(error).__name__}: {text.splitlines()[0]}"
            }
        else:
            answer = {"kernels": len(kernels)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
