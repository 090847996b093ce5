"""An exported directory as `torch.export` program, as ONNX file, and as ONNX file with int8 weights.

    model.pt2                 torch.export.load(...).module()
    onnx/model.onnx           onnxruntime, float32; batch and sequence length are free
    onnx/model_int8.onnx      the same with dynamic int8 quantization (onnxruntime.quantization)

Inputs are input_ids, attention_mask and token_type_ids, [B, S] int64 (multiple choice: [B, choices, S]); outputs what
the model's head gives. Export goes through the directory's own plain modeling file: ffnas' fused operators have no
translation to ONNX. Needs the extra `ffnas[onnx]`.

Rejected: torchao for int8 on the CPU; its dynamic quantization is faster only with `torch.compile`, and the result is
no file that runs without Python.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.errors import UserError
from engine.files import write_atomic
from engine.handover import hand_over, load_plain
from engine.handover.known import HandOver
from engine.student.heads import FFNASForSequenceClassification

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
OPSET = 20
"""The first with Gelu in the tanh form as one operator."""

PROGRAM, ONNX, INT8 = "model.pt2", "onnx/model.onnx", "onnx/model_int8.onnx"


class _Tensors(nn.Module):
    """The plain model with tensors in and a tuple of tensors out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.names = known(model).outputs

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> tuple[Tensor, ...]:
        out = self.model(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        return tuple(out[name] for name in self.names if out[name] is not None)


def known(model: nn.Module) -> HandOver:
    """Of a plain model, whose class is called as ours; others are sequence classifiers of transformers."""
    name = type(model).__name__
    return hand_over(name if name.startswith("FFNAS") else FFNASForSequenceClassification.__name__)


def missing_onnx() -> list[str]:
    """Those of onnx, onnxscript and onnxruntime that are not installed."""
    return [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]


def require_onnx() -> None:
    """Raises `UserError` unless onnx, onnxscript and onnxruntime are installed."""
    missing = missing_onnx()
    if missing:
        raise UserError(f"ONNX export needs {', '.join(missing)}: pip install 'ffnas[onnx]'")


def example_inputs(config: Any, rows: int = 2, length: int = 16, *, choices: int | None = None) -> dict[str, Tensor]:
    """Random ids with padding behind the last row's first half; [rows, length] or [rows, choices, length]."""
    shape = (rows, length) if choices is None else (rows, choices, length)
    ids = torch.randint(1, config.vocab_size, shape, generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    mask[-1, ..., length // 2 + 1 :] = 0
    types = torch.zeros_like(ids)
    if getattr(config, "type_vocab_size", 2) > 1:  # RoBERTa knows one segment
        types[..., length // 3 :] = 1
    return dict(zip(INPUTS, (ids * mask, mask, types * mask), strict=True))


def program_of(model: nn.Module) -> torch.export.ExportedProgram:
    """`torch.export` of a plain model, batch and length (and number of choices) free."""
    choices = 3 if known(model).choices else None
    inputs = example_inputs(model.config, choices=choices)
    free = {name: dict.fromkeys(range(t.dim()), torch.export.Dim.DYNAMIC) for name, t in inputs.items()}
    with torch.no_grad(), _quiet():
        return torch.export.export(_Tensors(model), (), kwargs=inputs, dynamic_shapes=free, strict=False)


def export_program(folder: str | os.PathLike[str]) -> Path:
    """Writes model.pt2 into a model directory; returns its path."""
    path = Path(folder) / PROGRAM
    with write_atomic(path) as temporary:
        torch.export.save(program_of(load_plain(folder)), temporary)
    return path


def export_onnx(folder: str | os.PathLike[str]) -> Path:
    """Writes onnx/model.onnx into a model directory; returns its path.

    Raises:
        UserError: a library is missing.
    """
    path = Path(folder) / ONNX
    write_onnx(load_plain(folder), path)
    return path


def write_onnx(model: nn.Module, path: Path) -> None:
    """Writes a plain model, or a sequence classifier of transformers, as ONNX file.

    Raises:
        UserError: a library is missing.
    """
    require_onnx()
    program = program_of(model)
    count = len(program.graph_signature.user_outputs)
    with write_atomic(path) as temporary, _quiet():
        torch.onnx.export(
            program,
            (),
            str(temporary),
            kwargs=program.example_inputs[1],
            input_names=list(INPUTS),
            output_names=list(known(model).outputs[:count]),
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )


def quantize_onnx(folder: str | os.PathLike[str]) -> Path:
    """Writes onnx/model_int8.onnx beside onnx/model.onnx; returns its path.

    Weights of matrix products are int8 per output channel, tables int8 per table, activations are quantized as they
    come; everything between stays float32.

    Raises:
        UserError: a library or onnx/model.onnx is missing.
    """
    require_onnx()
    from onnxruntime.quantization import QuantType, quantize_dynamic

    source, path = Path(folder) / ONNX, Path(folder) / INT8
    if not source.is_file():
        raise UserError(f"{source}: is missing: export to ONNX first")
    with write_atomic(path) as temporary, _quiet():
        quantize_dynamic(source, temporary, per_channel=True, reduce_range=False, weight_type=QuantType.QInt8)
    return path


class OnnxModel:
    """An ONNX file in onnxruntime on the CPU.

    Args:
        path: the file.
        threads: threads inside an operator; None for onnxruntime's choice.

    Raises:
        UserError: onnxruntime is missing or cannot read the file.
    """

    def __init__(self, path: str | os.PathLike[str], threads: int | None = None) -> None:
        require_onnx()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
            options.inter_op_num_threads = 1
        try:
            self.session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors share no base class
            raise UserError(f"{path}: onnxruntime cannot read it ({' '.join(str(error).split())[:160]})") from error
        self.outputs = [output.name for output in self.session.get_outputs()]

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Outputs by name; `inputs` as `INPUTS`, arrays or tensors, `token_type_ids` 0 where left out."""
        arrays = {name: np.asarray(value, dtype=np.int64) for name, value in inputs.items()}
        arrays.setdefault("token_type_ids", np.zeros_like(arrays["input_ids"]))
        return dict(zip(self.outputs, self.session.run(None, arrays), strict=True))


def largest_difference(model: nn.Module, other: Any, inputs: Sequence[Mapping[str, Tensor]]) -> float:
    """Largest absolute difference of the outputs of a plain model and an `OnnxModel` or exported program."""
    reference = _Tensors(model)
    worst = 0.0
    for example in inputs:
        with torch.no_grad():
            expected = reference(**example)
            got = other(example).values() if isinstance(other, OnnxModel) else other(**example)
        for a, b in zip(expected, got, strict=True):
            worst = max(worst, (a - torch.as_tensor(b)).abs().max().item())
    return worst


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' progress and advice."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "root")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
