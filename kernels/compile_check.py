"""Compiles every GPU kernel for sm_80 and sm_90 on a machine without a GPU, and reads what the machine code needs.

    python -m kernels.compile_check [--arch 80 90] [--quick] [--jobs 2]

Triton kernels are those that the driver really launches: recipes (`kernels.triton.recipe`) of forward and backward
calls are run over meta tensors, for every dtype, for interpreting kernels with every number of slots, and for code
generated from sampled programs. CUDA C++ files (csrc/cuda/*.cu) are compiled with nvcc where there is one.

One line per kernel and architecture: registers, bytes spilled, shared memory, the tensor-core instruction found. Exit
code 1 on a failed compilation, on spills in a hot kernel, and on a product of 16-bit operands without tensor-core
instruction; 0 else. Results are kept by hash of the sources and versions, so that a second run only prints them.

Rejected: reading register counts from PTX. They are decided by ptxas, after it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from kernels.cache import cache_dir

ARCHITECTURES = (80, 90)
HIDDEN, TOKENS = 540, 8192
SAMPLED = 20
"""Programs compiled in the specialized tier."""

_ROOT = Path(__file__).resolve().parent
_DTYPES = ("torch.bfloat16", "torch.float16", "torch.float32")
_INTERPRETED = (
    "linear(gelu(mul(linear(x,wb1),x)),wb2)",
    "linear(gelu(linear(max(x,tanh(x)),wb1)),wb2)",
    "tanh(add(x,linear(gelu(linear(x,wb1)),wb2)))",
    "mul(gelu(linear(x,wb1)),linear(tanh(x),wb2))",
)
"""Between them every kernel in every form: mid with and without x, pre, post with x, the parallel form."""
_TENSOR_CORE = re.compile(r"\b(HGMMA|HMMA|IMMA|QGMMA)\b")
_PRODUCTS = ("ffn_linear_kernel", "ffn_linear_bwd_kernel", "ffn_weight_grad_kernel")


@dataclass(frozen=True)
class Row:
    """What one kernel needs on one architecture; `problem` is empty when all is well."""

    kernel: str
    variant: str
    arch: int
    registers: int = 0
    spills: int = 0
    shared: int = 0
    tensor_core: str = "-"
    problem: str = ""


@dataclass(frozen=True)
class Job:
    """A call whose kernels are compiled (Triton), or a source file (CUDA C++)."""

    name: str
    arch: int
    words: tuple[int, ...] = ()
    recipe: str = ""
    slots: int = 0
    generated: bool = False
    source: str = ""


def triton_jobs(architectures: Sequence[int], quick: bool) -> list[Job]:
    """Calls that between them launch every Triton kernel in both tiers."""
    from kernels.lowering import lower
    from kernels.triton.microcode import SLOT_VARIANTS

    jobs = []
    for arch in architectures:
        for dtype in _DTYPES[:1] if quick else _DTYPES:
            name = f"interpreted {dtype[6:]}"
            # other dtypes differ from bfloat16 in products and conversions only: fewer programs stand for their kernels
            texts = {"torch.bfloat16": _INTERPRETED, "torch.float32": _INTERPRETED[::3]}.get(dtype, _INTERPRETED[:1])
            for text in _INTERPRETED[:1] if quick else texts:
                inner = HIDDEN if text is _INTERPRETED[-1] else 180
                jobs.append(Job(name, arch, lower(text).words, _recipe(dtype, inner), SLOT_VARIANTS[0]))
            for slots in () if quick or dtype == "torch.float16" else SLOT_VARIANTS[1:]:
                jobs.append(Job(name, arch, lower(_INTERPRETED[0]).words, _recipe(dtype, HIDDEN), slots))
        for k, (text, policy) in enumerate(sampled_programs(2 if quick else SAMPLED)):
            words, dtype = lower(text, policy).words, _DTYPES[k % 3]
            inner = {0: 270, 1: 270, 2: 720, 3: HIDDEN}[words[5]]
            jobs.append(Job(f"generated {dtype[6:]}", arch, words, _recipe(dtype, inner), generated=True))
        if not quick:
            words = lower(_INTERPRETED[0]).words
            others = {
                "tf32": _recipe("torch.float32", HIDDEN, tf32=True),
                "odd widths": _recipe("torch.bfloat16", 135),
                "odd supernet view": _recipe("torch.bfloat16", 135, stride=HIDDEN),
                "wide": _recipe("torch.bfloat16", HIDDEN),
                "autocast": _recipe("torch.float32", HIDDEN, compute="torch.bfloat16"),
                "bare": _recipe("torch.bfloat16", HIDDEN, norm=False),
            }
            jobs += [Job(f"interpreted {k}", arch, words, recipe, SLOT_VARIANTS[0]) for k, recipe in others.items()]
    return jobs


def sampled_programs(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """(expression, policy) of random valid FFN bodies; the released ones' kinds among them."""
    from kernels.expression import ExpressionError
    from kernels.lowering import lower
    from kernels.operators import BINARY, UNARY

    rng = Random(seed)

    def over(core: str, times: int) -> str:
        for _ in range(times):
            if rng.random() < 0.4:
                other = rng.choice(("x", f"{rng.choice(UNARY)}(x)"))
                core = f"{rng.choice(BINARY)}({core},{other})"
            else:
                core = f"{rng.choice(UNARY)}({core})"
        return core

    found: list[tuple[str, str]] = []
    while len(found) < count:
        policy = rng.choice(("truncate", "pad"))
        mid = over(f"linear({over('x', rng.randint(0, 1))},wb1)", rng.randint(0, 3))
        text = over(f"linear({mid},wb2)", rng.randint(0, 2))
        if rng.random() < 0.2:
            text = f"{rng.choice(BINARY)}({over('linear(x,wb1)', 1)},{over('linear(tanh(x),wb2)', 1)})"
        try:
            lower(text, policy)
        except ExpressionError:
            continue
        found.append((text, policy))
    return found


def _recipe(
    dtype: str, inner: int, *, compute: str | None = None, norm: bool = True, tf32: bool = False, stride: int = 0
) -> str:
    """A backward call's recipe, as JSON; the forward call's is the same without `needs`. `stride`: of w2's rows."""
    shapes = [
        (TOKENS, HIDDEN),
        (inner, HIDDEN),
        (inner,),
        (HIDDEN, inner),
        (HIDDEN,),
        *([(HIDDEN,)] * 2 if norm else []),
    ]
    tensors = [[list(s), [s[1], 1] if len(s) == 2 else [1], dtype] for s in shapes]
    if stride:
        tensors[3][1] = [stride, 1]
    made = {
        "tensors": tensors, "layers": 1, "p_drop": 0.1 if norm else 0.0, "eps": 1e-12, "compute": compute or dtype,
        "tf32": tf32, "save": True, "needs": [True] * len(tensors),
    }  # fmt: skip
    return json.dumps(made)


def cuda_jobs(architectures: Sequence[int], quick: bool) -> list[Job]:
    """Every csrc/cuda/*.cu, for every architecture; nothing in an installation without sources."""
    files = sorted((_ROOT.parent / "csrc" / "cuda").glob("*.cu"))
    return [Job(f.name, arch, source=str(f)) for f in (files[:1] if quick else files) for arch in architectures]


def run_job(job: Job) -> list[Row]:
    """Compiles a job, or looks its rows up. Failures come back as rows with a problem."""
    file = cache_dir() / "compile-check" / f"{_key(job)}.json"
    if file.is_file():
        return [Row(**row) for row in json.loads(file.read_text(encoding="utf-8"))]
    try:
        rows = _compile_cuda(job) if job.source else _compile_triton(job)
    except Exception as error:  # a compiler may fail in any way; the table says how
        text = str(error).strip() or repr(error)
        return [Row(job.name, "", job.arch, problem=f"{type(error).__name__}: {text.splitlines()[0][:200]}")]
    if not any(row.problem for row in rows):
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps([asdict(row) for row in rows]), encoding="utf-8")
        os.replace(temporary, file)
    return rows


def _key(job: Job) -> str:
    """Hash of a job and of everything its result depends on."""
    import torch
    import triton

    digest = hashlib.sha256(repr((asdict(job), torch.__version__, triton.__version__, sys.version)).encode())
    if job.source:
        files: Iterator[Path] = iter(sorted(Path(job.source).parent.glob("*.*")))
        digest.update(_nvcc_version().encode())
    else:
        files = iter([*sorted((_ROOT / "triton").glob("*.py")), _ROOT / "program.py", _ROOT / "operators.py"])
    for file in (*files, Path(__file__)):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:32]


def _compile_triton(job: Job) -> list[Row]:
    from kernels.triton.recipe import compile_recipe

    rows: list[Row] = []
    seen: set[str] = set()

    def note(kernel: Any, built: Any, constants: dict[str, Any]) -> None:
        if built.hash in seen:
            return
        seen.add(built.hash)
        rows.append(_row(job, kernel.__name__, built, constants))

    backward = json.loads(job.recipe)
    for made in ({**backward, "needs": None, "save": False}, {**backward, "needs": None}, backward):
        compile_recipe(job.words, made, job.arch, note, generated=job.generated, slots=job.slots)
    return rows


def _row(job: Job, kernel: str, built: Any, constants: dict[str, Any]) -> Row:
    """Registers, spills and instructions of a compiled Triton kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("nvdisasm", file.name) if kernel in _PRODUCTS else ""
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of {kernel}'s registers")
    registers, stack = int(found[1]), int(found[2])
    core = _TENSOR_CORE.search(code)
    sizes = [
        constants.get(name, constants.get(other)) for name, other in (("BM", "ROWS"), ("BN", "FIRST"), ("BK", "SECOND"))
    ]
    blocks = "x".join(str(v) for v in sizes if v is not None)
    variant = f"{job.name} {constants.get('SLOTS', 0)} slots {blocks} {constants['warps']} warps"
    problem = f"spills {stack} bytes" if stack else ""
    if (
        kernel in _PRODUCTS
        and core is None
        and not (job.name.endswith("float32") or constants.get("PRECISION") == "ieee")
    ):
        problem = "no tensor-core instruction"
    return Row(kernel, variant, job.arch, registers, stack, built.metadata.shared, core[1] if core else "-", problem)


def _tool(name: str, *arguments: str) -> str:
    """Runs a tool of the CUDA toolkit, or of Triton's package."""
    import triton

    own = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    command = str(own) if own.is_file() else shutil.which(name)
    if command is None:
        raise RuntimeError(f"{name} is neither in Triton's package nor on the path")
    result = subprocess.run([command, *arguments], capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{name}: {result.stderr.strip() or result.stdout.strip()}")
    return result.stdout


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, of the path, or of the usual place."""
    home = os.environ.get("CUDA_HOME")
    for place in (f"{home}/bin/nvcc" if home else None, shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"):
        if place and Path(place).is_file():
            return place
    return None


def _nvcc_version() -> str:
    nvcc = find_nvcc()
    return subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout if nvcc else ""


def _compile_cuda(job: Job) -> list[Row]:
    nvcc = find_nvcc()
    assert nvcc is not None
    suffix = "a" if job.arch >= 90 else ""
    with tempfile.TemporaryDirectory() as folder:
        cubin = str(Path(folder) / "kernel.cubin")
        command = [
            nvcc, "-std=c++17", "-O3", "-cubin", f"-arch=sm_{job.arch}{suffix}", "-Xptxas", "-v",
            *cuda_flags(), job.source, "-o", cubin,
        ]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            errors = [line for line in result.stderr.splitlines() if "error" in line] or result.stderr.splitlines()
            raise RuntimeError(errors[0] if errors else f"nvcc ended with {result.returncode}")
        code = _tool("nvdisasm", cubin) if Path(cubin).stat().st_size else ""
    return list(_ptxas_rows(job, result.stderr, code))


def cuda_flags() -> list[str]:
    """The flags csrc/cuda is built with, without those for architectures and linking."""
    from kernels.cuda import build

    return [*(f for f in build.FLAGS if "ptxas" not in f), '-DFFNAS_CUDA_BUILD_KEY="compile-check"']


def _ptxas_rows(job: Job, log: str, code: str) -> Iterator[Row]:
    """One row per kernel from the messages of ptxas -v."""
    bodies = dict(re.findall(r"\.text\.(\S+):(.*?)(?=\.text\.\S+:|\Z)", code, re.S))
    blocks = re.split(r"Compiling entry function '(\S+)' for", log)[1:]
    for name, text in zip(blocks[::2], blocks[1::2], strict=True):
        used = re.search(r"Used (\d+) registers", text)
        spill = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
        shared = re.search(r"(\d+) bytes smem", text)
        spills = int(spill[1]) + int(spill[2]) if spill else 0
        core = _TENSOR_CORE.search(bodies.get(name, ""))
        yield Row(
            _demangled(name), job.name, job.arch, int(used[1]) if used else 0, spills, int(shared[1]) if shared else 0,
            core[1] if core else "-", f"spills {spills} bytes" if spills else "",
        )  # fmt: skip


def _demangled(name: str) -> str:
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if tool is None:
        return name
    text = subprocess.run([tool, name], capture_output=True, text=True, check=False).stdout.strip()
    return text.split("(")[0].removeprefix("void ")


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text."""
    cells = [["kernel", "variant", "arch", "regs", "spills", "smem", "tensor core", ""]]
    for r in sorted(rows, key=lambda r: (r.kernel, r.variant, r.arch)):
        numbers = [f"sm_{r.arch}", r.registers, r.spills, r.shared, r.tensor_core]
        cells.append([r.kernel, r.variant, *map(str, numbers), r.problem and f"FAILED: {r.problem}"])
    widths = [max(len(row[k]) for row in cells) for k in range(7)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, [*widths, 0], strict=True)).rstrip() for row in cells)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.compile_check", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--arch", type=int, nargs="+", default=list(ARCHITECTURES), help="compute capabilities times 10"
    )
    parser.add_argument("--quick", action="store_true", help="one program, one dtype, two generated programs, one .cu")
    parser.add_argument("--jobs", type=int, default=2, help="compilations at once")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    jobs = triton_jobs(options.arch, options.quick)
    if find_nvcc() is None:
        print("nvcc not found: csrc/cuda is not compiled")
    else:
        jobs += cuda_jobs(options.arch, options.quick)
    with ProcessPoolExecutor(options.jobs) as workers:
        found: dict[Row, None] = {}
        for done, result in enumerate(workers.map(run_job, jobs), 1):
            found.update(dict.fromkeys(result))
            for row in result:
                if row.problem:
                    print(f"[{done}/{len(jobs)}] {row.kernel} {row.variant} sm_{row.arch}: {row.problem}", flush=True)
    rows = list(found)
    print(table(rows))
    failed = [r for r in rows if r.problem]
    print(f"{len(rows)} kernels, {len(failed)} failed, {time.monotonic() - start:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
