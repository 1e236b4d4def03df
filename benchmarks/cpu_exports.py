"""Files that the engines of `cpu.py` serve from; each is made by a process of its own, `python cpu_exports.py`.

It reads a JSON request: `artifact`, a name in `ARTIFACTS`; `folder`, where the float model and earlier artifacts lie;
`target`, the name of the new one there; `images`, an .npy file (N, 3, S, S) fp32 to calibrate on; `options`, the
engine's.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

FLOAT = "float"
"""Folder of the Hugging Face model: every other artifact comes from it."""

INPUT = "pixel_values"


class ExportError(RuntimeError):
    """An artifact was made but is not what its engine promises."""


@dataclass(frozen=True)
class Artifact:
    """A file or folder that an engine loads: how it is made and which other artifact has to be there first."""

    file: str
    make: Callable[[Path, Path, np.ndarray, dict], None]
    after: str | None = None


def make_onnx(folder: Path, target: Path, images: np.ndarray, options: dict) -> None:
    """ONNX in fp32 with a free batch size, by torch.onnx's default exporter.

    Attention is written out before the export: the exporter's form of the fused one tests every probability for NaN.
    """
    import torch

    model = one_output(folder)
    model.model.set_attn_implementation("eager")
    batch = torch.export.Dim("batch", min=1, max=1024)
    example = torch.from_numpy(images[:2])
    torch.onnx.export(
        model, (example,), str(target), input_names=[INPUT], output_names=["output"], dynamo=True,
        dynamic_shapes=({0: batch},), external_data=False, verbose=False,
    )  # fmt: skip


def make_onnx_dynamic(folder: Path, target: Path, images: np.ndarray, options: dict) -> None:
    """int8 weights for each channel, activations quantized at run time, as ONNX Runtime's documentation does it."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        _prepared_onnx(folder, target), target, weight_type=QuantType.QInt8, per_channel=True,
        reduce_range=products_saturate(),
    )  # fmt: skip
    _require_quantized(target, "MatMulInteger", "DynamicQuantizeMatMul")


def make_onnx_static(folder: Path, target: Path, images: np.ndarray, options: dict) -> None:
    """QDQ around every product: int8 weights for each channel, u8 activations, ranges from the calibration images."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.batches = iter(images[i : i + 1] for i in range(len(images)))

        def get_next(self):
            batch = next(self.batches, None)
            return None if batch is None else {INPUT: batch}

    quantize_static(
        _prepared_onnx(folder, target), target, Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, op_types_to_quantize=["Conv", "Gemm", "MatMul"],
        reduce_range=products_saturate(),
    )  # fmt: skip
    _require_quantized(target, "DequantizeLinear")


def make_openvino(folder: Path, target: Path, images: np.ndarray, options: dict) -> None:
    """OpenVINO IR in fp32, with a free batch size."""
    import openvino

    openvino.save_model(_openvino_model(folder, images), target, compress_to_fp16=False)


def make_nncf(folder: Path, target: Path, images: np.ndarray, options: dict) -> None:
    """OpenVINO IR quantized by NNCF for transformers with its default settings."""
    import nncf
    import openvino

    calibration = nncf.Dataset([images[i : i + 1] for i in range(len(images))])
    quantized = nncf.quantize(
        _openvino_model(folder, images), calibration, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(images)
    )
    openvino.save_model(quantized, target, compress_to_fp16=False)
    if "FakeQuantize" not in {op.get_type_name() for op in quantized.get_ops()}:
        raise ExportError("NNCF quantized no layer")


def make_vqvit(folder: Path, target: Path, images: np.ndarray, options: dict) -> None:
    """A vqvit checkpoint for the engine's `config`."""
    import vqvit

    vqvit.save(_quantized(folder, options), target)


def make_program(folder: Path, target: Path, images: np.ndarray, options: dict) -> None:
    """What `vqvit.serving` runs, for the engine's `config`."""
    import torch

    import vqvit

    vqvit.export(_quantized(folder, options), target, torch.from_numpy(images[:2]))


ARTIFACTS = {
    "onnx": Artifact("model.onnx", make_onnx),
    "onnx_dynamic": Artifact("dynamic.onnx", make_onnx_dynamic, "onnx"),
    "onnx_static": Artifact("static.onnx", make_onnx_static, "onnx"),
    "openvino": Artifact("openvino.xml", make_openvino),
    "nncf": Artifact("nncf.xml", make_nncf),
    "vqvit": Artifact("vqvit", make_vqvit),
    "program": Artifact("program", make_program),
}


def products_saturate() -> bool:
    """Whether this CPU's int8 products of 8-bit weights saturate in ONNX Runtime: x86 without VNNI.

    Its documentation has weights of 7 bits there (`reduce_range`), as NNCF does by itself.
    """
    from vqvit.provenance import cpu_flags

    flags = cpu_flags()
    return "avx2" in flags and "avx_vnni" not in flags and "avx512_vnni" not in flags


def _quantized(folder: Path, options: dict):
    import vqvit
    from vqvit.hf import load_float

    model = load_float(folder / FLOAT).float().eval()
    vqvit.quantize_(model, vqvit.QuantConfig(**options.get("config", {})))
    return model


def one_output(folder: Path):
    """The float model of `folder` as a module from pixels (B, 3, S, S) to the one output (B, D) that is compared."""
    import torch

    from vqvit.evaluate import pick_output
    from vqvit.hf import load_float

    class OneOutput(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, pixel_values):
            return pick_output(self.model(pixel_values))[0]

    return OneOutput(load_float(folder / FLOAT).float()).eval()


def _openvino_model(folder: Path, images: np.ndarray):
    import openvino
    import torch

    with torch.no_grad():
        converted = openvino.convert_model(
            one_output(folder), example_input=torch.from_numpy(images[:2]), input=[-1, *images.shape[1:]]
        )
    return converted


def _prepared_onnx(folder: Path, target: Path) -> Path:
    """The fp32 model after the shape inference and folding that ONNX Runtime asks for before quantization."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = target.with_suffix(".prepared.onnx")
    quant_pre_process(str(folder / ARTIFACTS["onnx"].file), str(prepared), skip_symbolic_shape=True)
    return prepared


def _require_quantized(path: Path, *operators: str) -> None:
    """A toolchain that finds nothing to quantize says nothing: look for its operators. Raises `ExportError`."""
    import onnx

    kinds = [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]
    if not any(kind in operators for kind in kinds):
        raise ExportError(f"ONNX Runtime quantized no layer: none of {', '.join(operators)} in {path.name}")
    float_products = sum(kind == "Gemm" for kind in kinds)
    if float_products and "MatMulInteger" in operators:
        raise ExportError(f"ONNX Runtime left {float_products} linear layers in fp32")


def main() -> None:
    request = json.load(sys.stdin)
    folder = Path(request["folder"])
    made = ARTIFACTS[request["artifact"]]
    made.make(folder, folder / request["target"], np.load(request["images"]), request["options"])


if __name__ == "__main__":
    main()
