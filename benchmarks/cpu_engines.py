"""The engines that `cpu.py` compares, and how a process opens one. What an engine needs is imported when it opens."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from cpu_exports import ARTIFACTS, FLOAT, INPUT

REFERENCE = "torch_fp32"
"""The engine that errors and speed-ups are measured against: the float model in eager mode."""


class EngineError(RuntimeError):
    """An engine opened but does not run what its name says."""


@dataclass(frozen=True)
class Session:
    """An open model in three steps, of which only `call` is timed.

    Attributes:
        place: images (B, 3, S, S) fp32 to what the engine reads.
        call: one inference.
        fetch: what it returned, as (B, D) fp32.
    """

    place: Callable[[np.ndarray], object]
    call: Callable[[object], object]
    fetch: Callable[[object], np.ndarray]


@dataclass(frozen=True)
class Engine:
    """One competitor.

    Attributes:
        title: for people.
        packages: what has to be installed, by import name.
        artifact: key of `ARTIFACTS`, or `FLOAT` for the Hugging Face folder.
        open: (file or folder, options, batch, threads) to a `Session`.
        options: passed to `open` and to the artifact's maker.
        own: ours, so not among the peers.
    """

    title: str
    packages: tuple[str, ...]
    artifact: str
    open: Callable[[Path, dict, int, int], Session]
    options: dict = field(default_factory=dict)
    own: bool = False

    def target(self, name: str) -> str:
        """File or folder of this engine's artifact: engines of their own options have one of their own."""
        if self.artifact == FLOAT:
            return FLOAT
        file = ARTIFACTS[self.artifact].file
        return f"{name}-{file}" if self.own else file


def open_torch(path: Path, options: dict, batch: int, threads: int) -> Session:
    """The Hugging Face model; `dtype`: float32 or bfloat16; `compiled`: by inductor, weights frozen into the graph."""
    import torch

    from vqvit.hf import load_float

    torch.set_num_threads(threads)
    dtype = getattr(torch, options["dtype"])
    model = load_float(path).to(dtype).eval()
    if options["compiled"]:
        import torch._inductor.config as inductor

        inductor.freezing = True
        model = torch.compile(model)
    return _torch_session(model, dtype)


def open_vqvit(path: Path, options: dict, batch: int, threads: int) -> Session:
    """A vqvit checkpoint, in eager mode."""
    import torch

    import vqvit

    torch.set_num_threads(threads)
    return _torch_session(vqvit.load(path), torch.float32)


def open_serving(path: Path, options: dict, batch: int, threads: int) -> Session:
    """An exported vqvit model, in a process without PyTorch."""
    os.environ["VQVIT_TORCH"] = "0"
    from vqvit import serving

    session = serving.Session(path, threads)
    return Session(lambda images: images, session, _served_output)


def _served_output(outputs: dict[str, np.ndarray]) -> np.ndarray:
    """The one that `vqvit.evaluate.pick_output` picks."""
    return next(outputs[name] for name in ("logits", "pooler_output") if name in outputs)


def _torch_session(model, dtype) -> Session:
    import torch

    from vqvit.evaluate import pick_output

    def call(pixels):
        with torch.inference_mode():
            return model(pixels)

    return Session(
        lambda images: torch.from_numpy(images).to(dtype), call, lambda output: pick_output(output)[0].float().numpy()
    )


def open_onnxruntime(path: Path, options: dict, batch: int, threads: int) -> Session:
    """ONNX Runtime's CPU provider with every graph optimisation and the batch size fixed."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.inter_op_num_threads = 1
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    settings.add_free_dimension_override_by_name("batch", batch)
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    return Session(lambda images: {INPUT: images}, lambda feed: session.run(None, feed), lambda outputs: outputs[0])


def open_openvino(path: Path, options: dict, batch: int, threads: int) -> Session:
    """OpenVINO for latency, the batch size fixed; `precision`: f32 or bf16, what float operations run in.

    Raises `EngineError` if this CPU does not get that precision.
    """
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    model.reshape([batch, *(dimension.get_length() for dimension in list(model.input(0).partial_shape)[1:])])
    settings = {
        "INFERENCE_PRECISION_HINT": options["precision"],
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = core.compile_model(model, "CPU", settings)
    received = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    if received != options["precision"]:
        raise EngineError(f"expected OpenVINO to run {options['precision']} here; it runs {received}")
    request = compiled.create_infer_request()

    def call(images):
        request.infer([images], share_inputs=True)
        return request.get_output_tensor(0)

    return Session(lambda images: images, call, lambda output: np.array(output.data))


_TORCH = ("torch", "transformers")
_ORT = ("onnx", "onnxscript", "onnxruntime")

ENGINES = {
    "torch_fp32": Engine("PyTorch fp32", _TORCH, FLOAT, open_torch, {"dtype": "float32", "compiled": False}),
    "torch_fp32_compiled": Engine(
        "PyTorch fp32, compiled", _TORCH, FLOAT, open_torch, {"dtype": "float32", "compiled": True}
    ),
    "torch_bf16": Engine("PyTorch bf16", _TORCH, FLOAT, open_torch, {"dtype": "bfloat16", "compiled": False}),
    "torch_bf16_compiled": Engine(
        "PyTorch bf16, compiled", _TORCH, FLOAT, open_torch, {"dtype": "bfloat16", "compiled": True}
    ),
    "ort_fp32": Engine("ONNX Runtime fp32", _ORT, "onnx", open_onnxruntime),
    "ort_int8_dynamic": Engine("ONNX Runtime INT8, dynamic", _ORT, "onnx_dynamic", open_onnxruntime),
    "ort_int8_static": Engine("ONNX Runtime INT8, static", _ORT, "onnx_static", open_onnxruntime),
    "openvino_fp32": Engine("OpenVINO fp32", ("openvino",), "openvino", open_openvino, {"precision": "f32"}),
    "openvino_bf16": Engine("OpenVINO bf16", ("openvino",), "openvino", open_openvino, {"precision": "bf16"}),
    "openvino_int8": Engine("OpenVINO INT8 (NNCF)", ("openvino", "nncf"), "nncf", open_openvino, {"precision": "f32"}),
    "openvino_int8_bf16": Engine(
        "OpenVINO INT8 (NNCF), bf16", ("openvino", "nncf"), "nncf", open_openvino, {"precision": "bf16"}
    ),
    "vqvit": Engine("vqvit W8A8", _TORCH, "vqvit", open_vqvit, {"config": {}}, own=True),
    "vqvit_float_attention": Engine(
        "vqvit W8A8, float attention", _TORCH, "vqvit", open_vqvit, {"config": {"attention": "float"}}, own=True
    ),
    "vqvit_exported": Engine("vqvit W8A8, exported", _TORCH, "program", open_serving, {"config": {}}, own=True),
    "vqvit_exported_all_tokens": Engine(
        "vqvit W8A8, exported, without the CLS shortcut",
        _TORCH,
        "program",
        open_serving,
        {"config": {"cls_only": "off"}},
        own=True,
    ),
}
"""In the order of the table; an option of vqvit is one more row, its `config` the fields of `vqvit.QuantConfig`."""


def environment(threads: int, scratch: Path) -> dict[str, str]:
    """Of a process that opens an engine: so many threads, this checkout on the path, compilers' caches in `scratch`."""
    here = Path(__file__).resolve().parent
    path = os.pathsep.join(p for p in (str(here.parent), str(here), os.environ.get("PYTHONPATH")) if p)
    return {
        **os.environ,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": str(threads),
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
    }
