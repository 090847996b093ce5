"""What is compiled: calls of the Triton drivers that between them launch every kernel in every form.

A family is a function `(quick) -> iterator of calls`, listed in `FAMILIES`. A call is run over meta tensors; what it
launches is compiled for every architecture. Calls may overlap as they like: a kernel that several launch is compiled
once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from random import Random

from kernels.compile_check.call import Call
from kernels.language.expression import ExpressionError
from kernels.language.lowering import lower
from kernels.language.operators import BINARY, UNARY

HIDDEN, TOKENS = 540, 8192
SAMPLED = 20
"""Programs compiled in the specialized tier."""

_DTYPES = ("torch.bfloat16", "torch.float16", "torch.float32")
_INTERPRETED = (
    "linear(gelu(mul(linear(x,wb1),x)),wb2)",
    "linear(gelu(linear(max(x,tanh(x)),wb1)),wb2)",
    "tanh(add(x,linear(gelu(linear(x,wb1)),wb2)))",
    "mul(gelu(linear(x,wb1)),linear(tanh(x),wb2))",
)
"""Between them every kernel in every form: mid with and without x, pre, post with x, the parallel form."""


def calls(quick: bool) -> list[Call]:
    """All calls, or a few that show that the toolchain works."""
    return [call for family in FAMILIES for call in family(quick)]


def ffn_interpreted(quick: bool) -> Iterator[Call]:
    """The FFN's interpreting kernels: every dtype, every number of slots, every form."""
    from kernels.triton.microcode import SLOT_VARIANTS

    for dtype in _DTYPES[:1] if quick else _DTYPES:
        name = f"interpreted {dtype[6:]}"
        # other dtypes differ from bfloat16 in products and conversions only: fewer programs stand for their kernels
        texts = {"torch.bfloat16": _INTERPRETED, "torch.float32": _INTERPRETED[::3]}.get(dtype, _INTERPRETED[:1])
        for text in _INTERPRETED[:1] if quick else texts:
            inner = HIDDEN if text is _INTERPRETED[-1] else 180
            yield ffn_call(name, lower(text).words, ffn_recipe(dtype, inner), slots=SLOT_VARIANTS[0])
        for slots in () if quick or dtype == "torch.float16" else SLOT_VARIANTS[1:]:
            yield ffn_call(name, lower(_INTERPRETED[0]).words, ffn_recipe(dtype, HIDDEN), slots=slots)


def ffn_generated(quick: bool) -> Iterator[Call]:
    """The FFN's specialized tier: sampled programs, dtypes in turn."""
    for k, (text, policy) in enumerate(sampled_programs(2 if quick else SAMPLED)):
        words, dtype = lower(text, policy).words, _DTYPES[k % 3]
        inner = {0: 270, 1: 270, 2: 720, 3: HIDDEN}[words[5]]
        # forward that saves nothing is forward without two stores: seen once per dtype
        yield ffn_call(f"generated {dtype[6:]} {k}", words, ffn_recipe(dtype, inner), saves_only=k >= len(_DTYPES))


def ffn_variants(quick: bool) -> Iterator[Call]:
    """The FFN with other settings and widths than the rest of the families has."""
    from kernels.triton.microcode import SLOT_VARIANTS

    words = lower(_INTERPRETED[0]).words
    others = {
        "tf32": ffn_recipe("torch.float32", HIDDEN, tf32=True),
        "odd widths": ffn_recipe("torch.bfloat16", 135),
        "odd supernet view": ffn_recipe("torch.bfloat16", 135, stride=HIDDEN),
        "wide": ffn_recipe("torch.bfloat16", HIDDEN),
        "autocast": ffn_recipe("torch.float32", HIDDEN, compute="torch.bfloat16"),
        "bare": ffn_recipe("torch.bfloat16", HIDDEN, norm=False),
    }
    for name, recipe in {} if quick else others.items():
        yield ffn_call(f"interpreted {name}", words, recipe, slots=SLOT_VARIANTS[0])


def losses(quick: bool) -> Iterator[Call]:
    """Attention and the KD losses (`kernels.compile_check.loss_calls`)."""
    from kernels.compile_check.loss_calls import loss_calls

    return loss_calls(quick)


FAMILIES: tuple[Callable[[bool], Iterator[Call]], ...] = (ffn_interpreted, ffn_generated, ffn_variants, losses)


def ffn_call(name: str, words: tuple[int, ...], recipe: str, *, slots: int = 0, saves_only: bool = False) -> Call:
    """Forward without and with saving, and backward, of a recipe; without `slots` by generated code."""
    return Call(name, _run_ffn, (words, recipe, slots, saves_only))


def _run_ffn(words: tuple[int, ...], recipe: str, slots: int, saves_only: bool) -> None:
    from kernels.triton.recipe import run_recipe

    backward = json.loads(recipe)
    made_of = [{**backward, "needs": None, "save": False}, {**backward, "needs": None}, backward]
    for made in made_of[saves_only:]:
        run_recipe(words, made, generated=not slots, slots=slots)


def ffn_recipe(
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


def sampled_programs(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """(expression, policy) of random valid FFN bodies; the released ones' kinds among them."""
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
