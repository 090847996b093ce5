"""Peak memory of attention with its score loss and of the hidden-state loss, forward and backward, at growing lengths.

    python -m benchmarks.kd_step --memory [--lengths 384 512 2048] [--out FILE]

One layer of EfficientBERT (12 heads of 45, H = 540) against one of BERT-base (12 heads of 64, H = 768), batch 2, on the
CPU. `eager` is plain PyTorch with the published loss, S x S scores of both sides kept; `ours` is `fused_attention` with
a teacher and `hidden_mse`. Each side and length runs in a process of its own: the highest resident size of a warm pass
above the size before it; inputs and weights do not count, gradients do.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.memory import peak_bytes

BATCH, HEADS, OWN, TEACHER = 2, 12, 540, 768
SIDES = ("eager", "ours")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def runner(side: str, precision: str, length: int) -> Callable[[], None]:
    """One forward and backward pass of a side."""
    from engine.student.attention import eager_attention
    from kernels.attention.ops import fused_attention
    from kernels.losses.ops import hidden_mse
    from kernels.losses.paper import attention_score_mse_paper, hidden_mse_paper

    generator, dtype = torch.Generator().manual_seed(0), PRECISIONS[precision]

    def rows(width: int, grad: bool) -> Tensor:
        return torch.randn(BATCH, length, width, generator=generator).to(dtype).requires_grad_(grad)

    def heads(x: Tensor) -> Tensor:
        return x.view(BATCH, length, HEADS, -1).transpose(1, 2)

    student = [rows(OWN, True) for _ in range(3)]
    taught = [heads(rows(TEACHER, False)) for _ in range(2)]
    state, target = rows(OWN, True), rows(TEACHER, False)
    weight = (torch.randn(TEACHER, OWN, generator=generator) / OWN**0.5).to(dtype).requires_grad_()
    bias, mask = torch.zeros(TEACHER, dtype=dtype, requires_grad=True), torch.ones(BATCH, length, dtype=torch.bool)
    scale, scale_t = (OWN // HEADS) ** -0.5, (TEACHER // HEADS) ** -0.5

    def run() -> None:
        q, k, v = (heads(x) for x in student)
        if side == "ours":
            context, loss = fused_attention(q, k, v, mask, scale=scale, teacher=(taught[0], taught[1]), scale_t=scale_t)
            assert loss is not None
            loss = loss + hidden_mse(state, weight, bias, target, mask)
        else:
            context, _ = eager_attention(torch.nn.Module(), q, k, v, None, scale)
            loss = attention_score_mse_paper(q, k, *taught, mask, scale_s=scale, scale_t=scale_t)
            loss = loss + hidden_mse_paper(state, weight, bias, target)
        (loss + context.float().mean()).backward()
        for leaf in (*student, state, weight, bias):
            leaf.grad = None

    return run


def measure(side: str, precision: str, length: int) -> int:
    """Bytes a warm pass needs above what is there before it; measured in this process."""
    run = runner(side, precision, length)
    run()
    return peak_bytes(run)


def table(lengths: list[int]) -> dict[str, dict[str, dict[str, int]]]:
    """Precision, side, length: bytes."""
    made: dict[str, dict[str, dict[str, int]]] = {}
    for precision in PRECISIONS:
        for side in SIDES:
            for length in lengths:
                command = [sys.executable, "-m", "benchmarks.kd_memory", side, precision, str(length)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                made.setdefault(precision, {}).setdefault(side, {})[str(length)] = int(done.stdout.split()[-1])
    return made


def report(made: dict[str, dict[str, dict[str, int]]]) -> str:
    """The table, with each side's growth from length to length and our share of eager's."""
    lines = ["peak memory of attention and losses, forward + backward, one layer, MiB"]
    for precision, sides in made.items():
        for side, by_length in sides.items():
            first = by_length.get("512") or next(iter(by_length.values()))
            cells = []
            for length, own in by_length.items():
                share = f", {own / sides['eager'][length]:.0%} of eager" if side != "eager" else ""
                cells.append(f"S={length}: {own / 2**20:7.1f} ({own / first:.2f}x{share})")
            lines.append(f"  {precision} {side:<6} " + "   ".join(cells))
    return "\n".join(lines)


if __name__ == "__main__":
    print(measure(sys.argv[1], sys.argv[2], int(sys.argv[3])))
