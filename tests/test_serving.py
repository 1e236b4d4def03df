"""Exported models: the model's outputs without PyTorch, or a refusal that says why."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from torch import nn
from torch.nn import functional as F

import vqvit
from vqvit import cli, layouts, native
from vqvit import numerics as nm
from vqvit.backends import cpu, operands
from vqvit.nn import QuantLinear
from vqvit.plan import PlanError
from vqvit.serving import ProgramError, Session, float_ops, int8_ops
from vqvit.serving.program import PROGRAM, WEIGHTS, read

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"cpu backend: {cpu.unavailable()}")

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 136,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 5,
}

MODELS = {
    "vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL)),
    "vit_pooled": lambda: transformers.ViTModel(transformers.ViTConfig(**SMALL)),
    "deit": lambda: transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**SMALL)),
    "dinov2": lambda: transformers.Dinov2ForImageClassification(
        transformers.Dinov2Config(**{**SMALL, "mlp_ratio": 2}, layerscale_value=0.3)
    ),
}

CONFIGURATIONS = {
    "default": {},
    "grouped": {"activations": {"attn_out": "per_token_group", "fc2": "per_token_group"}},
    "every_token": {"cls_only": "off"},
    "static": {"activation": "static"},
    "float_attention": {"attention": "float"},
    "asymmetric_weights": {"tiers": {"fc1": "int8_asym"}},
    "float_head": {"tiers": {"head": "skip"}},
    "four_bits": {"bits": 4},
    "asymmetric_activations": {"activation": "per_token_asym"},
    "groups_behind_layer_norms": {"activation": "per_token_group"},
    "compensated": {"compensations": {"*": "paper", "*.fc2": "full", "head": "activation", "*.attn_out": "weight"}},
}

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
"""Kernels give the same bits; NumPy's sums between them are in another order."""


def quantized(name: str, **config) -> nn.Module:
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    calibration = images(8) if config.get("activation") == "static" else None
    vqvit.quantize_(model, vqvit.QuantConfig(**config), calibration=None if calibration is None else [calibration])
    return model


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32)


def assert_same(session: Session, model: nn.Module, pixels: torch.Tensor) -> None:
    with torch.inference_mode():
        wanted = {name: value for name, value in model(pixels).items() if isinstance(value, torch.Tensor)}
    received = session(pixels.numpy())
    assert received.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(received[name], value.numpy(), **TOLERANCE)


@pytest.mark.parametrize("name", MODELS)
def test_a_session_gives_the_outputs_of_the_model(name, tmp_path):
    model = quantized(name)
    session = Session(vqvit.export(model, tmp_path / "out"))
    for count in (1, 2, 5):
        assert_same(session, model, images(count))


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_every_configuration_that_serving_knows(configuration, tmp_path):
    model = quantized("vit", **CONFIGURATIONS[configuration])
    session = Session(vqvit.export(model, tmp_path / "out"), threads=1)
    assert_same(session, model, images(3))


def test_files_hold_one_layout_and_sessions_the_fastest(tmp_path):
    """Every instruction set gives the same bits from the same file, and from weights that another one laid out."""
    pixels, outputs = images(3).numpy(), []
    try:
        for isa in cpu.available_isas():
            cpu.set_isa(isa)
            model, fastest = quantized("vit"), native.cpu_weight_layout()
            layer = next(m for m in model.modules() if isinstance(m, QuantLinear))
            assert layouts.of(layer.codes) == fastest
            folder = vqvit.export(model, tmp_path / isa)
            assert layouts.of(layer.codes) == fastest
            weights = load_file(folder / WEIGHTS)
            assert {layouts.of(array) for array in weights.values() if array.dtype == np.int8} == {"panels"}
            torch.manual_seed(0)
            session = Session(vqvit.export(quantized("vit"), tmp_path / f"{isa}_same"), threads=2)
            held = {layouts.of(array) for array in session._weights.values() if array.dtype == np.int8}
            assert held == {fastest}
            for other in cpu.available_isas():
                cpu.set_isa(other)
                outputs.append(session(pixels)["logits"])
    finally:
        cpu.set_isa(None)
    assert all(np.array_equal(output, outputs[0]) for output in outputs)


def test_names_and_sizes_are_those_of_the_arithmetic():
    assert (int8_ops.ACTIVATIONS, int8_ops.GROUP, int8_ops.LOG2_E) == (nm.ACTIVATIONS, nm.GROUP, nm.LOG2_E)
    assert (int8_ops.TERM_BITS, int8_ops.RESIDUAL_STEPS) == (operands.TERM_BITS, nm.RESIDUAL_STEPS)


def test_a_head_normalises_the_token_that_it_reads(tmp_path):
    steps = [step.op for step in read(vqvit.export(quantized("vit"), tmp_path / "out")).steps]
    assert "aten.pad.default" not in steps
    assert steps.index("aten.select.int") < steps.index("aten.layer_norm.default")


def test_what_the_model_computes_of_its_weights_alone_is_stored(tmp_path):
    """Position embeddings of DINOv2 at another size than it was trained for: interpolated once, when it is exported."""
    model, pixels = quantized("dinov2"), torch.randn(2, 3, 48, 40)
    folder = vqvit.export(model, tmp_path / "out", pixels)
    assert "upsample" not in " ".join(step.op for step in read(folder).steps)
    assert_same(Session(folder), model, pixels)


def test_blocks_write_over_their_input_only_where_nobody_else_reads_it(tmp_path, monkeypatch):
    over, original = [], int8_ops.run_encoder_block

    def watched(threads, block, leading_tokens, over_input, x):
        out = original(threads, block, leading_tokens, over_input, x)
        over.append(out is x)
        return out

    monkeypatch.setattr(int8_ops, "run_encoder_block", watched)
    deep = transformers.ViTConfig(**{**SMALL, "num_hidden_layers": 4})
    monkeypatch.setitem(MODELS, "deep", lambda: transformers.ViTModel(deep))

    class FirstAndLast(nn.Module):
        """Reads a block's result a second time, after the next block has run."""

        def __init__(self, vit):
            super().__init__()
            self.config, self.main_input_name, self.vit = vit.config, "pixel_values", vit

        def forward(self, pixel_values):
            hidden = self.vit(pixel_values, output_hidden_states=True).hidden_states
            return {"logits": hidden[1][:, 0] + hidden[-1][:, 0]}

    model = quantized("deep", cls_only="off")
    pixels = images(2)
    for exported, wanted in ((model, [False, True, True, True]), (FirstAndLast(model), [False, False, True, True])):
        with torch.inference_mode():
            expected = exported(pixels)
        session = Session(vqvit.export(exported.eval(), tmp_path / type(exported).__name__))
        over.clear()
        received, before = session(pixels.numpy()), pixels.clone()
        assert over == wanted and torch.equal(pixels, before)
        for name, value in received.items():
            np.testing.assert_allclose(value, expected[name].numpy(), **TOLERANCE)


def test_a_process_that_serves_does_not_import_torch(tmp_path):
    model, pixels = quantized("vit"), images(2)
    vqvit.export(model, tmp_path / "out")
    np.save(tmp_path / "images.npy", pixels.numpy())
    code = (
        "import sys, numpy as np\n"
        "from vqvit.serving import Session\n"
        "np.save(sys.argv[3], Session(sys.argv[1], 1)(np.load(sys.argv[2]))['logits'])\n"
        "print(sorted({'torch', 'transformers'} & sys.modules.keys()))\n"
    )
    root = str(Path(vqvit.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "out", tmp_path / "images.npy", tmp_path / "logits.npy"],
        env={**os.environ, "VQVIT_TORCH": "0", "PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "[]", done.stderr
    with torch.inference_mode():
        np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), model(pixels).logits.numpy(), **TOLERANCE)


def test_the_command_exports_a_checkpoint(tmp_path, capsys):
    model = quantized("vit")
    vqvit.save(model, tmp_path / "model")
    assert cli.main(["export", str(tmp_path / "model"), str(tmp_path / "out"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["inputs"] == {"pixel_values": ["batch", 3, 32, 32]}
    assert result["outputs"] == ["logits"]
    assert_same(Session(tmp_path / "out"), model, images(2))


def test_an_export_replaces_an_earlier_one_and_nothing_else(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="other content"):
        vqvit.export(quantized("vit"), tmp_path)
    vqvit.export(quantized("vit"), tmp_path / "out")
    second = quantized("vit")
    vqvit.export(second, tmp_path / "out")
    assert_same(Session(tmp_path / "out"), second, images(1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "out"]


class Unknown(nn.Module):
    """Around a model, an operation that serving has not."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        return torch.special.bessel_j0(self.model(pixel_values).logits)


def test_models_that_no_program_can_express_are_refused_by_name(tmp_path):
    with pytest.raises(PlanError):
        vqvit.export(MODELS["vit"](), tmp_path / "out")
    model = Unknown(MODELS["vit"]().eval())
    vqvit.quantize_(model, vqvit.QuantConfig())
    with pytest.raises(ValueError, match="sample: expected images"):
        vqvit.export(model, tmp_path / "out")
    with pytest.raises(ProgramError, match=r"aten\.special_bessel_j0"):
        vqvit.export(model, tmp_path / "out", images(2))
    with pytest.raises(ProgramError, match="bfloat16"):
        vqvit.export(quantized("vit", tiers={"fc1": "fp16"}), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_inputs_that_the_model_was_not_exported_for_are_refused(tmp_path):
    session = Session(vqvit.export(quantized("vit"), tmp_path / "out"))
    pixels = images(2).numpy()
    with pytest.raises(ValueError, match=r"expected shape \(batch, 3, 32, 32\); got \(2, 3, 16, 32\)"):
        session(pixels[:, :, :16])
    with pytest.raises(ValueError, match=r"got \(0, 3, 32, 32\)"):
        session(pixels[:0])
    with pytest.raises(ValueError, match=r"got \(3, 32, 32\)"):
        session(pixels[0])
    with pytest.raises(TypeError, match="expected float32; got float64"):
        session(pixels.astype(np.float64))
    with pytest.raises(TypeError, match="expected pixel_values; got 2 arrays"):
        session(pixels, pixels)


def test_folders_that_are_not_whole_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a model from vqvit\.export"):
        Session(tmp_path)
    folder = vqvit.export(quantized("vit"), tmp_path / "out")
    with pytest.raises(ValueError, match="threads: expected at least 1; got 0"):
        Session(folder, threads=0)
    weights, program = (folder / WEIGHTS).read_bytes(), json.loads((folder / PROGRAM).read_text())
    (folder / WEIGHTS).write_bytes(weights[:-4])
    with pytest.raises(ProgramError, match="truncated or corrupted"):
        Session(folder)
    (folder / WEIGHTS).write_bytes(weights)
    for change, message in (
        ({"format": 99}, "expected format 1; got 99"),
        ({"steps": [{"op": "aten.nothing", "arguments": [], "results": "x"}]}, "expected operations .* aten.nothing"),
        ({"steps": 3}, "expected a program"),
    ):
        (folder / PROGRAM).write_text(json.dumps({**program, **change}))
        with pytest.raises(ProgramError, match=message):
            Session(folder)


X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
WEIGHT = torch.randn(8, 8, generator=torch.Generator().manual_seed(2))
HEADS = torch.randn(3, 2, 4, 5, 8, generator=torch.Generator().manual_seed(3))
ROW = torch.arange(8.0)

FLOAT_CALLS = {
    "aten.add.Tensor": (lambda: X + ROW, (X, ROW, 1)),
    "aten.sub.Tensor": (lambda: torch.sub(X, ROW, alpha=2), (X, ROW, 2)),
    "aten.mul.Tensor": (lambda: X * ROW, (X, ROW)),
    "aten.div.Tensor": (lambda: X / 3.0, (X, 3.0)),
    "aten.cat.default": (lambda: torch.cat([X, X], 1), ([X, X], 1)),
    "aten.expand.default": (lambda: X[:1].expand(4, -1, 8), (X[:1], [4, -1, 8], False)),
    "aten.flatten.using_ints": (lambda: X.flatten(1, -1), (X, 1, -1)),
    "aten.layer_norm.default": (
        lambda: F.layer_norm(X, (8,), ROW, ROW, 1e-6),
        (X, [8], ROW, ROW, 1e-6, True),
    ),
    "aten.linear.default": (lambda: F.linear(X, WEIGHT, ROW), (X, WEIGHT, ROW)),
    "aten.matmul.default": (lambda: X @ WEIGHT, (X, WEIGHT)),
    "aten.mean.dim": (lambda: X.mean((1, 2), keepdim=True), (X, [1, 2], True, None)),
    "aten.pad.default": (lambda: F.pad(X, (1, 2, 0, 3), value=7.0), (X, [1, 2, 0, 3], "constant", 7.0)),
    "aten.permute.default": (lambda: X.permute(2, 0, 1), (X, [2, 0, 1])),
    "aten.relu.default": (lambda: X.relu(), (X,)),
    "aten.reshape.default": (lambda: X.reshape(6, -1), (X, [6, -1])),
    "aten.scaled_dot_product_attention.default": (
        lambda: F.scaled_dot_product_attention(*HEADS),
        (*HEADS, None, 0.0, False, None, False),
    ),
    "aten.select.int": (lambda: X.select(-1, 2), (X, -1, 2)),
    "aten.slice.Tensor": (lambda: X[:, :, 1:7:2], (X, 2, 1, 7, 2)),
    "aten.softmax.int": (lambda: X.softmax(-1), (X, -1, None)),
    "aten.sum.dim_IntList": (lambda: X.sum((0, 2)), (X, [0, 2], False, None)),
    "aten.tanh.default": (lambda: X.tanh(), (X,)),
    "aten.transpose.int": (lambda: X.transpose(1, 2), (X, 1, 2)),
    "aten.unflatten.int": (lambda: X.unflatten(-1, (2, 4)), (X, -1, [2, 4])),
    "aten.unsqueeze.default": (lambda: X.unsqueeze(1), (X, 1)),
    "aten.view.default": (lambda: X.view(3, -1), (X, [3, -1])),
}
UNTESTED_ALONE = {
    "aten.clone.default", "aten.contiguous.default", "aten.dropout.default", "aten.to.dtype", "aten.sym_size.int",
    "aten.unbind.int", "add", "floordiv", "mul", "sub",
}  # fmt: skip
"""Operations that do nothing here, or that are Python's; `unbind` has a test of its own."""


def to_numpy(value: object) -> object:
    return (
        [to_numpy(v) for v in value] if isinstance(value, list) else value.numpy() if torch.is_tensor(value) else value
    )


@pytest.mark.parametrize("op", FLOAT_CALLS)
def test_float_operations_agree_with_pytorch(op):
    wanted, arguments = FLOAT_CALLS[op]
    received = float_ops.OPS[op](*map(to_numpy, arguments))
    assert received.dtype == np.float32
    np.testing.assert_allclose(received, wanted().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [[8], [3, 8]], ids=["one_axis", "two_axes"])
def test_layer_norms_without_weights_or_of_more_axes(shape):
    weight = torch.rand(shape) if len(shape) == 2 else None
    received = float_ops.OPS["aten.layer_norm.default"](X.numpy(), shape, to_numpy(weight), None, 1e-6, True)
    wanted = F.layer_norm(X, shape, weight, None, 1e-6)
    np.testing.assert_allclose(received, wanted.numpy(), rtol=1e-5, atol=1e-6)


def test_unbind_and_the_list_of_tested_operations():
    for received, wanted in zip(float_ops.OPS["aten.unbind.int"](HEADS.numpy(), 2), HEADS.unbind(2), strict=True):
        np.testing.assert_array_equal(received, wanted.numpy())
    assert float_ops.OPS.keys() == FLOAT_CALLS.keys() | UNTESTED_ALONE
