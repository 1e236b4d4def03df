"""Graph capture: keys, bound, copies, order and errors with a stand-in for CUDA graphs; the real thing on a GPU."""

import contextlib

import pytest
import torch
import transformers

import vqvit
from vqvit import runtime

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 10,
}


class Recorded:
    """A graph that replays by calling again and writing into the tensors of the first result."""

    log: list[str]

    def __init__(self, call, warmup, pool):
        for _ in range(warmup):
            call()
        self.call, self.result = call, call()
        self.log.append("capture")

    def replay(self):
        self.log.append("replay")
        for old, new in zip(leaves(self.result), leaves(self.call()), strict=True):
            old.copy_(new)


def leaves(tree) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@pytest.fixture
def recorded() -> type[Recorded]:
    return type("Recorded", (Recorded,), {"log": []})


@pytest.fixture
def model() -> torch.nn.Module:
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL)).eval()
    vqvit.quantize_(model)
    return model


def on_cpu(model, capture, **options) -> runtime.Graphed:
    return runtime.Graphed(model, capture=capture, order=contextlib.nullcontext(), **options)


def test_same_results_and_one_graph_a_signature(model, recorded):
    fast = on_cpu(model, recorded)
    for batch in (1, 2, 1, 2, 2):
        x = torch.randn(batch, 3, 32, 32)
        with torch.inference_mode():
            assert torch.equal(fast(x).logits, model(x).logits)
    assert recorded.log.count("capture") == fast.graphs == 2
    assert recorded.log.count("replay") == 5


def test_keywords_and_flags_are_part_of_the_signature(model, recorded):
    fast, x = on_cpu(model, recorded), torch.randn(1, 3, 32, 32)
    assert fast(pixel_values=x).hidden_states is None
    assert len(fast(pixel_values=x, output_hidden_states=True).hidden_states) == 3
    assert torch.equal(fast(x).logits, fast(pixel_values=x).logits)
    assert fast.graphs == 3


def test_the_cls_shortcut_is_in_the_graph_where_no_hidden_states_are(model, recorded):
    assert vqvit.rewriter.plan_of(model).shortened.leading_tokens == 1
    fast, x = on_cpu(model, recorded), torch.randn(2, 3, 32, 32)
    for _ in range(2):
        hidden = fast(x, output_hidden_states=True).hidden_states[-1]
        assert hidden.isfinite().all() and torch.equal(fast(x).logits, model(x).logits)
    assert fast.graphs == 2


def test_results_survive_the_next_call_unless_told_otherwise(model, recorded):
    a, b = torch.randn(2, 1, 3, 32, 32)
    fast = on_cpu(model, recorded)
    first = fast(a).logits
    kept = first.clone()
    fast(b)
    assert torch.equal(first, kept)
    shared = on_cpu(model, recorded, copy_outputs=False)
    assert shared(a).logits.data_ptr() == shared(b).logits.data_ptr()


def test_inputs_are_read_at_each_call_not_at_capture(model, recorded):
    fast, x = on_cpu(model, recorded), torch.randn(1, 3, 32, 32)
    before = fast(x).logits
    x.mul_(-1)
    assert not torch.equal(fast(x).logits, before)


def test_the_least_recently_used_graph_goes(model, recorded):
    fast = on_cpu(model, recorded, max_graphs=2)
    for batch in (1, 2, 1, 3):  # 2 is the oldest when 3 comes
        fast(torch.randn(batch, 3, 32, 32))
    assert fast.graphs == 2 and recorded.log.count("capture") == 3
    fast(torch.randn(1, 3, 32, 32))
    assert recorded.log.count("capture") == 3
    fast(torch.randn(2, 3, 32, 32))
    assert recorded.log.count("capture") == 4


def test_moved_weights_are_captured_anew(model, recorded):
    fast, x = on_cpu(model, recorded), torch.randn(1, 3, 32, 32)
    fast(x)
    model.to(torch.bfloat16)
    assert fast(x.bfloat16()).logits.dtype == torch.bfloat16
    assert fast.graphs == 1
    fast.reset()
    assert fast.graphs == 0


def test_errors(model, recorded):
    fast, x = on_cpu(model, recorded), torch.randn(1, 3, 32, 32)
    with pytest.raises(runtime.CaptureError, match="expected a model on a CUDA device; got cpu"):
        runtime.graphed(model)
    with pytest.raises(runtime.CaptureError, match="expected at least one tensor argument"):
        fast()
    with pytest.raises(runtime.CaptureError, match="expected inputs on cpu; got meta"):
        fast(x.to("meta"))
    model.train()
    with pytest.raises(runtime.CaptureError, match="expected a model in eval mode"):
        fast(x)


def test_a_failed_capture_says_why_and_leaves_nothing(model):
    def refuse(call, warmup, pool):
        raise RuntimeError("operation not permitted when stream is capturing")

    fast = on_cpu(model, refuse)
    with pytest.raises(runtime.CaptureError, match=r"ViTForImageClassification: .* not permitted"):
        fast(torch.randn(1, 3, 32, 32))
    assert fast.graphs == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_on_a_gpu(model):
    model.cuda()
    fast = runtime.graphed(model)
    for batch in (1, 4, 1):
        x = torch.randn(batch, 3, 32, 32, device="cuda")
        with torch.inference_mode():
            want = model(x).logits
        assert torch.equal(fast(x).logits, want)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            got = fast(x).logits
        side.synchronize()
        assert torch.equal(got, want)
