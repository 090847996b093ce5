"""The CPU backend: csrc/cpu, loaded through ctypes.

Serves float32 and bfloat16 tensors with float32 or bfloat16 products on any CPU. At the first call the compiled library
is found or built (`kernels.build`), and the best instruction set of this machine chosen:

    generic -> avx2 -> avx512 -> amx_fp32 (float32 products);   avx512bf16 or amx for bfloat16 products

`amx_fp32` multiplies float32 operands on bfloat16 tiles, cut into three planes without loss (csrc/cpu/gemm_bf16.h): as
exact as multiply-adds, and about twice as fast; calls of fewer than 48 tokens stay on `avx512`.
`FFNAS_CPU_ISA` names the highest one that may be used. Where bfloat16 products were asked for on a machine without
them, float32 products are used: more exact, only slower. float64 and float16 go to the next backend.

Saved for backward, per layer: the layer's input (but not x itself), h, and y where its gradient reads it (compute
dtype); otherwise LayerNorm's input in its place (x's dtype); mean and deviation of its rows. All
else is computed again. They lie in tiles (csrc/cpu/tile.h), so their rows are not the matrices' rows; but each block of
rows has the memory of its rows, so the gradient of x can be written where y, or LayerNorm's input, has been read.

Chosen: a plain C interface with pointers in one int64 array, about 3 us a call. Rejected: a torch.library operator in
C++; its boxed call with six tensor lists costs more and ties the library to one PyTorch version.
"""

from __future__ import annotations

import ctypes
import warnings
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.backends.cpu_tensor_ops import CpuTensorOps
from kernels.backends.packed_weights import DTYPE_CODES, PackedWeights, limit_bytes
from kernels.build import BuildError, library_path
from kernels.call import Backend, BackendUnavailable, FFNCall
from kernels.language.program import Flag
from kernels.reference.philox import drop_threshold
from kernels.runtime.instruction_sets import ABI_VERSION, ISAS, UnknownInstructionSet, best_isas

_ERRORS = {1: "out of memory", 2: "the program is not valid", 3: "the call does not fit this build of the library"}
_CROWDED = 4
_NO_VIEW = (0, 0, 0)


def load() -> CpuBackend:
    """Finds or builds the library. Raises `BackendUnavailable` where it cannot be had."""
    try:
        return CpuBackend(library_path())
    except (BuildError, UnknownInstructionSet) as error:
        raise BackendUnavailable(str(error)) from error


class CpuBackend(Backend):
    """See the module."""

    name = "cpu"
    saved_layout = 3

    def __init__(self, path: Path) -> None:
        self._library = _open(path)
        self._isa = dict(zip((torch.float32, torch.bfloat16), best_isas(self._library), strict=True))
        self.packed = PackedWeights(self._library, limit_bytes())
        self.tensor_ops = CpuTensorOps(self._library, ABI_VERSION, self._isa, self.packed)

    def isa(self, dtype: torch.dtype) -> str:
        """The instruction set that serves products in `dtype`."""
        return ISAS[self._isa[dtype]]

    def supports(self, call: FFNCall) -> str | None:
        if call.x.device.type != "cpu":
            return f"it serves CPU tensors, x is on {call.x.device}"
        if call.compute_dtype not in self._isa:
            return f"it has float32 and bfloat16 products, not {call.compute_dtype}"
        if call.x.dtype not in DTYPE_CODES:
            return f"it serves float32 and bfloat16, x is {call.x.dtype}"
        return None

    def forward(self, call: FFNCall, save: bool) -> tuple[Tensor, list[Tensor]]:
        out = torch.empty((call.tokens, call.hidden), dtype=call.x.dtype)
        saved = self.saved_like(call) if save else []
        if call.tokens:
            words = self._words(call, call.x, out)
            packed = [(None, None)] * call.layers if save else self._packed(call)  # held until the call is done
            for own, kept, weights in zip(_parameter_views(call), _saved_views(call, saved), packed, strict=True):
                words.extend(own)
                words.extend(kept)
                words.extend(0 if w is None else w.data_ptr() for w in weights)
            self._run(self._library.ffnas_forward, call, words)
        return out, saved

    def _packed(self, call: FFNCall) -> list[tuple[Tensor | None, Tensor | None]]:
        """Per layer w1 and w2 as they were kept, None where they were not."""
        isa = self.packed.isa_for(self._isa[call.compute_dtype], call.tokens)
        found = self.packed.find([*call.w1, *call.w2], isa, call.tokens)
        return list(zip(found[: call.layers], found[call.layers :], strict=True))

    def saved_like(self, call: FFNCall) -> list[Tensor]:
        x, tokens, dtype = call.x, call.tokens, call.compute_dtype
        kept = _saves(call)
        like = []
        for layer in range(call.layers):
            if layer > 0:
                like.append(x.new_empty((tokens, call.hidden)))
            if kept.h:
                like.append(x.new_empty((tokens, call.inner), dtype=dtype))
            if kept.y:
                like.append(x.new_empty((tokens, call.hidden), dtype=dtype))
            if kept.sum:
                like.append(x.new_empty((tokens, call.hidden)))
            if kept.stats:
                like.append(x.new_empty((tokens, 2), dtype=torch.float32))
        return like

    def backward(
        self,
        call: FFNCall,
        grad_out: Tensor,
        saved: Sequence[Tensor],
        needs: Sequence[bool],
        overwrite: bool = False,
    ) -> list[Tensor]:
        inputs = [call.x, *call.parameters]
        make = torch.empty if call.tokens else torch.zeros
        gradients: list[Tensor | None] = [None] * len(inputs)
        if overwrite and needs[0]:
            gradients[0] = _room_for_dx(call, saved)
        for i, (tensor, need) in enumerate(zip(inputs, needs, strict=True)):
            if need and gradients[i] is None:
                gradients[i] = make(tensor.shape, dtype=tensor.dtype)
        if call.tokens and any(needs):
            dx, *rest = gradients
            words = self._words(call, grad_out, call.x)
            words += array("q", _NO_VIEW if dx is None else _view(dx))
            groups = [rest[k : k + call.layers] for k in range(0, len(rest), call.layers)]
            groups += [[None] * call.layers] * (6 - len(groups))
            parameters = _parameter_views(call)
            for layer, (own, kept) in enumerate(zip(parameters, _saved_views(call, saved), strict=True)):
                wanted = [v for group in groups for v in _optional_view(group[layer])]
                words += array("q", (*own, *kept, *wanted))
            self._run(self._library.ffnas_backward, call, words)
        return [g for g in gradients if g is not None]

    def _words(self, call: FFNCall, first: Tensor, second: Tensor) -> array[int]:
        """The call's scalars and two leading matrices."""
        seed = 0 if call.seed is None else int(call.seed)
        threshold = drop_threshold(call.p_drop)
        program = call.program
        return array(
            "q",
            (
                ABI_VERSION, self._isa[call.compute_dtype], call.tokens, call.hidden, call.inner, call.layers,
                call.has_ln, seed, threshold, program.data_ptr(), program.numel(), *_view(first), *_view(second),
            ),
        )  # fmt: skip

    def _run(self, function: ctypes._NamedFuncPointer, call: FFNCall, words: array[int]) -> None:
        address, count = words.buffer_info()
        scale = 0.0 if call.p_drop >= 1.0 else 1.0 / (1.0 - call.p_drop)
        status = function(address, count, call.eps, scale)
        if status == _CROWDED:
            warnings.warn(_CROWDED_TEXT, CrowdedWarning, stacklevel=2)
        elif status:
            raise RuntimeError(f"ffnas cpu backend: {_ERRORS.get(status, f'status {status}')}")


class CrowdedWarning(UserWarning):
    """Other processes keep the threads of a call waiting for one another; it runs on one while they do.

    Forward and backward of an FFN (H = d = 540, 1024 tokens, float32) with two threads on the two cores of an EPYC with
    AVX2 that six other processes used: 515 ms before, 240 to 350 ms since (processor time 130 and 85 ms); 235 ms with
    one thread; eager PyTorch with two 585 to 740 ms. csrc/cpu/runtime.cpp decides.
    """


_CROWDED_TEXT = (
    "ffnas: the threads of a call get less done than one would, since other processes use the same cores; CPU kernels"
    " run on one thread while that lasts. `--threads 1` (torch.set_num_threads(1)) helps the rest of this process too"
    " (said once)"
)


def _open(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.ffnas_abi_version.restype = ctypes.c_int64
    found = library.ffnas_abi_version()
    if found != ABI_VERSION:
        raise BackendUnavailable(f"{path} has interface {found}, expected {ABI_VERSION}: reinstall ffnas")
    for function in (library.ffnas_forward, library.ffnas_backward):
        function.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_double]
        function.restype = ctypes.c_int
    library.ffnas_set_threads.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    library.ffnas_set_threads.restype = None
    library.ffnas_set_threads(*_torch_threads())
    return library


def _torch_threads() -> tuple[int | None, int | None]:
    """Addresses of PyTorch's `torch_parallel_for` and `torch_get_num_threads`, so that its thread pool is used."""
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    torch_cpu = ctypes.CDLL(str(path))
    functions = (torch_cpu.torch_parallel_for, torch_cpu.torch_get_num_threads)
    return tuple(ctypes.cast(f, ctypes.c_void_p).value for f in functions)  # type: ignore[return-value]


class _Saves(NamedTuple):
    """Which tensors forward saves in every layer (h and y are y1 and y2 in the parallel form)."""

    h: bool
    y: bool
    sum: bool
    stats: bool


def _saves(call: FFNCall) -> _Saves:
    y = bool(call.flags & Flag.POST_BWD_USES_Y)
    return _Saves(y or not call.flags & Flag.PARALLEL, y, call.has_ln and not y, call.has_ln)


def _view(t: Tensor) -> tuple[int, int, int]:
    return t.data_ptr(), t.stride(0), DTYPE_CODES[t.dtype]


def _tiles(t: Tensor) -> tuple[int, int, int]:
    """View of a tensor kept in tiles: its width, where others have the distance of rows (any, of a single row)."""
    return t.data_ptr(), t.shape[1], DTYPE_CODES[t.dtype]


def _optional_view(t: Tensor | None) -> tuple[int, int, int]:
    return _NO_VIEW if t is None else _view(t)


def _parameter_views(call: FFNCall) -> list[list[int]]:
    """Per layer the views of w1, b1, w2, b2, ln_weight, ln_bias."""
    norm = (call.ln_weight, call.ln_bias) if call.has_ln else ()
    absent = (2 - len(norm)) * _NO_VIEW
    layers = zip(call.w1, call.b1, call.w2, call.b2, *norm, strict=True)
    return [[v for t in layer for v in _view(t)] + [*absent] for layer in layers]


def _room_for_dx(call: FFNCall, saved: Sequence[Tensor]) -> Tensor | None:
    """The first layer's saved LayerNorm's input, or y, if x's gradient can take its memory."""
    kept = _saves(call)
    if not (kept.sum or kept.y) or not call.tokens:
        return None
    room = saved[kept.h + kept.y + kept.sum - 1]
    return room if room.dtype == call.x.dtype else None


def _saved_views(call: FFNCall, saved: Sequence[Tensor]) -> list[list[int]]:
    """Per layer the views of the saved layer input, h, y, sum and stats; nothing where they are not saved."""
    if not saved:
        return [[0] * (5 * len(_NO_VIEW))] * call.layers
    rest = iter(saved)
    kept = _saves(call)
    views = []
    for layer in range(call.layers):
        row = [*(_view(next(rest)) if layer > 0 else _NO_VIEW)]
        for is_kept in kept:
            row += _tiles(next(rest)) if is_kept else _NO_VIEW
        views.append(row)
    return views
