"""Functions that can be read in one sitting: at most 60 lines and 8 parameters, files under 400 lines.

Counted are the lines of a function with its signature, without its docstring, and its parameters without `self` and
`cls`. Those that are larger are named below with their size: a number may fall, and a name may go, none may rise or be
added. ABI-bound signatures (`kernels/triton`, `torch.library` schemas) are what they are.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("search", "engine", "kernels")
LINES, PARAMETERS, FILE_LINES = 60, 8, 400
LONG = {
    "kernels/triton/attention_kernels.py:attention_bwd_kv_kernel": 62,
    "kernels/triton/evaluate.py:interpret": 104,
    "kernels/triton/row_kernels.py:ffn_rows_bwd_kernel": 74,
}
"""Longer functions, with their lines."""

WIDE = {
    "search/phases.py:train_phase": 12,
    "search/scoring/trials.py:run_trials": 13,
    "search/space/space.py:SearchSpace.__init__": 15,
    "search/stages.py:_search": 10,
    "engine/data/batching.py:plan_batches": 9,
    "engine/data/dataset.py:EncodedDataset.batches": 9,
    "engine/data/tokenizing.py:pack": 9,
    "engine/distill/population.py:train_population": 11,
    "engine/handover/configuration_ffnas.py:FFNASConfig.__init__": 25,
    "engine/handover/modeling_ffnas.py:FFNASModel.forward": 9,
    "engine/published/convert.py:from_published": 10,
    "engine/student/modeling.py:FFNASModel.forward": 12,
    "engine/teacher/finetune.py:finetune": 10,
    "engine/training/loop.py:run_phase": 15,
    "kernels/attention/ops.py:fused_attention": 9,
    "kernels/backends/cpu_tensor_ops.py:CpuTensorOps.score_mse": 10,
    "kernels/backends/cpu_tensor_ops.py:CpuTensorOps.attention_forward": 10,
    "kernels/backends/cpu_tensor_ops.py:CpuTensorOps.attention_backward": 14,
    "kernels/backends/cuda.py:_Rows.backward": 9,
    "kernels/call.py:TensorOps.score_mse": 10,
    "kernels/call.py:TensorOps.attention_forward": 10,
    "kernels/call.py:TensorOps.attention_backward": 14,
    "kernels/cuda/rows.py:backward": 9,
    "kernels/ffn/grouped.py:_calls": 9,
    "kernels/ffn/modules.py:FusedFFN.__init__": 10,
    "kernels/ffn/modules.py:FusedFFNStack.__init__": 10,
    "kernels/ffn/ops.py:fused_ffn": 13,
    "kernels/ffn/ops.py:fused_ffn_stack": 12,
    "kernels/ffn/schemas.py:make_call": 13,
    "kernels/losses/ops.py:attention_score_mse": 9,
    "kernels/losses/ops.py:attention_score_mse_layers": 9,
    "kernels/reference/attention.py:forward": 10,
    "kernels/reference/attention.py:backward": 14,
    "kernels/reference/attention.py:_Blocks.__init__": 10,
    "kernels/reference/ffn.py:ffn": 13,
    "kernels/reference/losses.py:score_mse": 10,
}
"""Functions with more parameters, with their number; those of `kernels/triton` are Triton's, which has no records."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(tree: ast.Module) -> Iterator[tuple[str, Function]]:
    """All functions of a file with their dotted names inside it; nested ones count as part of the outer."""

    def walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, Function]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{prefix}{child.name}", child
            elif isinstance(child, ast.ClassDef):
                yield from walk(child, f"{prefix}{child.name}.")
            else:
                yield from walk(child, prefix)

    return walk(tree, "")


def lines_of(function: Function) -> int:
    """Lines from `def` to the end, the docstring left out."""
    first = function.body[0]
    documented = (
        isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    )
    docstring = first.end_lineno - first.lineno + 1 if documented else 0
    return function.end_lineno - function.lineno + 1 - docstring


def parameters_of(function: Function) -> int:
    """Parameters a caller may give; `*args` and `**kwargs` count as one each."""
    given = function.args
    names = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
    return sum(name.arg not in ("self", "cls") for name in names)


def measured(package: str) -> dict[str, tuple[int, int]]:
    """`path:name` -> (lines, parameters) of every function of a package."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        place = path.relative_to(ROOT).as_posix()
        for name, function in functions(ast.parse(path.read_text(encoding="utf-8"))):
            found[f"{place}:{name}"] = lines_of(function), parameters_of(function)
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_functions_are_short_and_take_few_parameters(package):
    found = measured(package)
    longer = {name: lines for name, (lines, _) in found.items() if lines > LONG.get(name, LINES)}
    wider = {
        name: count
        for name, (_, count) in found.items()
        if count > WIDE.get(name, PARAMETERS) and not name.startswith("kernels/triton/")
    }
    assert not longer, f"split them: {longer}"
    assert not wider, f"group parameters that belong together: {wider}"


def test_what_has_become_small_is_no_longer_excused():
    found = {name: sizes for package in PACKAGES for name, sizes in measured(package).items()}
    over = {name: (lines > LINES, count > PARAMETERS) for name, (lines, count) in found.items()}
    named = [*LONG, *WIDE]
    assert not [name for name in named if not any(over.get(name, (False, False)))]


@pytest.mark.parametrize("package", PACKAGES)
def test_files_are_short(package):
    lines = {
        p.relative_to(ROOT).as_posix(): len(p.read_text("utf-8").splitlines()) for p in (ROOT / package).rglob("*.py")
    }
    assert not {name: count for name, count in lines.items() if count >= FILE_LINES}


def test_the_measure_counts_what_it_says():
    """Guards the guard."""
    tree = ast.parse(
        'class A:\n    def f(self, a, /, b, *c, d=1, **e):\n        """Two\n        lines."""\n        return a\n'
    )
    ((name, function),) = functions(tree)
    assert (name, lines_of(function), parameters_of(function)) == ("A.f", 2, 5)
