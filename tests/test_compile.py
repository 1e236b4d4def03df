"""torch.compile and torch.export see the ops as opaque calls: one graph, the same bits."""

import pytest
import torch
import transformers

import vqvit

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}

MODELS = {
    "vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, intermediate_size=128)),
    "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SMALL, mlp_ratio=2)),
}

CONFIGS = {
    "per_token": vqvit.QuantConfig(),
    "per_token_group": vqvit.QuantConfig(activation="per_token_group"),
    "mixed": vqvit.QuantConfig(tiers={"fc2": "fp16", "*.0.qkv": "int8_asym"}),
}


@pytest.fixture(params=[(m, c) for m in MODELS for c in CONFIGS], ids="-".join)
def model(request) -> torch.nn.Module:
    name, config = request.param
    built = MODELS[name]().eval()
    vqvit.quantize_(built, CONFIGS[config])
    return built


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32)


def first(output) -> torch.Tensor:
    return output.to_tuple()[0]


def test_compile_without_graph_breaks(model, images):
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.inference_mode():
        assert torch.equal(first(compiled(images)), first(model(images)))


def test_export(model, images):
    with torch.no_grad():
        program = torch.export.export(model, (images,))
        assert torch.equal(first(program.module()(images)), first(model(images)))
    calls = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any(call.startswith("vqvit.int8_linear") for call in calls)


def test_an_exported_mask_is_checked_at_run_time(images):
    built = MODELS["vit"]().eval()
    vqvit.quantize_(built)
    mask = torch.ones(2, 17, dtype=torch.long)
    with torch.no_grad():
        module = torch.export.export(built, (images,), {"attention_mask": mask}).module()
        assert torch.equal(first(module(images, attention_mask=mask)), first(built(images)))
        mask[0, 3] = 0
        with pytest.raises(RuntimeError, match="expected no attention or head mask"):
            module(images, attention_mask=mask)
