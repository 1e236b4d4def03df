"""Blocks whose result depends on more than hidden states: never replaced, and an int8 block refuses what it ignores."""

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

import vqvit
from vqvit.nn import EncoderBlock

WIDTH, HEADS = 48, 3

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": 32,
    "patch_size": 8,
}


class Block(nn.Module):
    """A pre-LayerNorm block with timm's names; subclasses take another argument."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.qkv, self.attn.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.attn.num_heads = HEADS
        self.mlp.fc1, self.mlp.act, self.mlp.fc2 = nn.Linear(WIDTH, 96), nn.GELU(), nn.Linear(96, WIDTH)

    def block(self, x, turn=None, mask=None):
        q, k, v = self.attn.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        if turn is not None:
            q, k = q * turn, k * turn
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.attn.proj(attended.transpose(1, 2).flatten(2))
        return x + self.mlp.fc2(self.mlp.act(self.mlp.fc1(self.norm2(x))))

    def forward(self, x):
        return self.block(x)


class WithRope(Block):
    def forward(self, x, rope=None):
        return self.block(x, turn=rope)


class WithMask(Block):
    def forward(self, x, attn_mask=None):
        return self.block(x, mask=attn_mask)


class WithPositions(Block):
    def forward(self, x, position_embeddings=None):
        return self.block(x, turn=position_embeddings)


class WithWindow(Block):
    def forward(self, x, window=0):
        return self.block(x, mask=local(x.shape[1], window) if window else None)


class LocalAboveEight(Block):
    """Attends to its neighbours alone where there are more than eight tokens."""

    def forward(self, x):
        return self.block(x, mask=local(x.shape[1], 2) if x.shape[1] > 8 else None)


class WithWeights(Block):
    """Returns a second result."""

    def forward(self, x):
        y = self.block(x)
        return y, y.mean(-1)


def local(tokens: int, reach: int) -> torch.Tensor:
    places = torch.arange(tokens)
    return (places[:, None] - places).abs() <= reach


class Tower(nn.Module):
    """Patches, three blocks that are called as `call` says, and a mean."""

    def __init__(self, kind: type[Block], call):
        super().__init__()
        self.embed = nn.Conv2d(3, WIDTH, 8, 8)
        self.blocks = nn.ModuleList(kind() for _ in range(3))
        self.call, self.image_size = call, 32

    def forward(self, pixels):
        x = self.embed(pixels).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = self.call(block, x)
        return x


def angles(x: torch.Tensor) -> torch.Tensor:
    return 2 * torch.cos(torch.arange(x.shape[1])[:, None] * torch.arange(1.0, WIDTH // HEADS + 1))


TOWERS = {
    "rope": (WithRope, lambda block, x: block(x, rope=angles(x))),
    "rope_by_position": (WithRope, lambda block, x: block(x, angles(x))),
    "attn_mask": (WithMask, lambda block, x: block(x, attn_mask=local(x.shape[1], 1))),
    "position_embeddings": (WithPositions, lambda block, x: block(x, position_embeddings=angles(x))),
    "window": (WithWindow, lambda block, x: block(x, window=1)),
    "local_above_eight_tokens": (LocalAboveEight, lambda block, x: block(x)),
    "second_result": (WithWeights, lambda block, x: torch.add(*[y.view(*x.shape[:2], -1) for y in block(x)])),
}


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def sharpen(model: nn.Module) -> nn.Module:
    """Larger weights, so that attention depends on where it looks."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2)
    return model.eval()


@pytest.mark.parametrize("name", TOWERS)
def test_a_block_that_takes_more_than_hidden_states_keeps_its_structure(name):
    model, pixels = sharpen(Tower(*TOWERS[name])), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        want = model(pixels)
        report = vqvit.quantize_(model)
        got = model(pixels)
    reasons = [r.reason for r in report.layers if r.role == "block"]
    assert len(reasons) == 3 and all(reason.startswith("kept its structure: ") for reason in reasons)
    assert not any(isinstance(module, EncoderBlock) for module in model.modules())
    assert relative_error(got, want) < 0.1
    assert sum(r.status == "int8" for r in report.layers) == 13  # the layers themselves are replaced


def test_a_block_that_could_take_more_and_is_not_given_it_is_replaced():
    model, pixels = sharpen(Tower(WithRope, lambda block, x: block(x, rope=None))), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        want = model(pixels)
        report = vqvit.quantize_(model)
        assert len(report.plan.blocks) == 3 and relative_error(model(pixels), want) < 0.1


def data2vec() -> nn.Module:
    config = transformers.Data2VecVisionConfig(**SMALL, use_shared_relative_position_bias=True)
    return transformers.Data2VecVisionForImageClassification(config)


def beit() -> nn.Module:
    return transformers.BeitModel(transformers.BeitConfig(**SMALL, use_shared_relative_position_bias=True))


@pytest.mark.parametrize("build", [data2vec, beit])
def test_a_shared_relative_position_bias_reaches_every_block(build):
    model, pixels = sharpen(build()), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "relative_position_bias_table" in name:
                parameter.normal_(std=3)
        want = model(pixels)[0]
        report = vqvit.quantize_(model)
        got = model(pixels)[0]
    assert relative_error(got, want) < 0.1
    reasons = [r.reason for r in report.layers if r.role == "block"]
    assert len(reasons) == 2 and all("its model passes" in reason for reason in reasons)


@pytest.fixture
def block() -> EncoderBlock:
    model = nn.Sequential(Block()).eval()
    vqvit.quantize_(model)
    return model[0]


@pytest.mark.parametrize(
    "name", ["rope", "relative_position_bias", "attn_mask", "position_embeddings", "window_size", "is_causal"]
)
def test_an_int8_block_refuses_what_it_does_not_compute_with(block, name):
    value = True if name == "is_causal" else torch.ones(1)
    with pytest.raises(TypeError, match=rf"^0: expected hidden states alone; got {name}= \(\w+\)"):
        block(torch.randn(1, 5, WIDTH), **{name: value})


def test_an_int8_block_refuses_what_it_is_given_by_position(block):
    with pytest.raises(TypeError, match=r"^0: expected hidden states alone; got argument 4 \(Tensor\)"):
        block(torch.randn(1, 5, WIDTH), None, False, torch.ones(1))


def test_an_int8_block_takes_what_asks_for_nothing(block):
    x = torch.randn(1, 5, WIDTH)
    want = block(x)
    nothing = {"output_attentions": False, "rope": None, "return_dict": True, "output_hidden_states": True}
    assert torch.equal(block(x, None, None, False, **nothing), want)
