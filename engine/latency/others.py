"""One forward pass outside PyTorch: ffnas' runtime and onnxruntime in float32 and int8, and OpenVINO."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from engine.errors import UserError
from engine.export.onnx import INT8, OnnxModel, missing_onnx, quantize_onnx
from engine.student.modeling import FFNASPreTrainedModel
from engine.student.native import describe
from kernels.runtime import Session

RUNTIME = ("runtime", "runtime_int8")
"""Sides of ffnas' runtime, products in the case's precision and in int8."""

OTHERS = ("onnx", "int8", "openvino")
"""Sides that read an ONNX file. int8 is onnxruntime's dynamic quantization."""


def missing(side: str) -> list[str]:
    """Libraries that a side needs and that are not installed."""
    if side not in OTHERS:
        return []
    lacks = missing_onnx()
    if side == "openvino" and importlib.util.find_spec("openvino") is None:
        lacks.append("openvino")
    return lacks


def runtime_pass(
    side: str, model: FFNASPreTrainedModel, dtype: str, threads: int, ids: Tensor
) -> Callable[[], object] | None:
    """A pass of `kernels.runtime` over ids [B, S], its threads its own; int8 counts as fp32, whose place it takes."""
    if side == "runtime_int8" and dtype != "fp32":
        return None
    description, arrays = describe(model)
    session = Session((description, arrays), threads=threads, precision=dtype if side == "runtime" else "int8")
    given, wanted = ids.numpy(), "hidden" if description.answers.head == "none" else "head"
    return lambda: session.run(given, wanted=wanted)


def other_pass(
    side: str, file: Callable[[], Path], dtype: str, threads: int, ids: Tensor
) -> Callable[[], object] | None:
    """A pass of onnxruntime or OpenVINO over ids [B, S]; None where the side does not have the precision.

    Args:
        side: of `OTHERS`.
        file: writes the ONNX file, or finds it; asked for where it is needed only.
        dtype: `fp32` or `bf16`; int8 counts as fp32, which it takes the place of.
        threads: of the library's own.
        ids: int64 [B, S].

    Raises:
        UserError: a library is missing or cannot read the file.
    """
    arrays = {"input_ids": ids.numpy(), "attention_mask": np.ones(ids.shape, np.int64)}
    if side == "openvino":
        return _openvino_pass(file(), dtype, threads, arrays)
    if dtype != "fp32":
        return None
    path = file()
    if side == "int8":
        folder = path.parents[len(Path(INT8).parents) - 1]
        path = folder / INT8 if (folder / INT8).exists() else quantize_onnx(folder)
    session = OnnxModel(path, threads=threads)
    return lambda: session(arrays)


def _openvino_pass(path: Path, dtype: str, threads: int, arrays: dict[str, Any]) -> Callable[[], object]:
    try:
        import openvino
    except ImportError as error:
        raise UserError("openvino: not installed: pip install openvino") from error
    core = openvino.Core()
    options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
    options["INFERENCE_PRECISION_HINT"] = {"fp32": "f32", "bf16": "bf16"}[dtype]
    request = core.compile_model(core.read_model(str(path)), "CPU", options).create_infer_request()
    given = {**arrays, "token_type_ids": np.zeros_like(arrays["input_ids"])}
    names = {name for port in request.model_inputs for name in port.get_names()}
    given = {name: value for name, value in given.items() if name in names}
    return lambda: request.infer(given)
