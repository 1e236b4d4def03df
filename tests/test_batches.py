"""What users' loaders yield is understood, and loaders are read anew instead of being kept."""

import numpy as np
import pytest
import torch
from test_checkpoint import small_vit
from torch.utils.data import DataLoader, Dataset, TensorDataset

import vqvit
from vqvit.batches import IN_MEMORY, Batches, EveryOther, TensorFile, read_batch

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGES = torch.linspace(-1, 1, 12 * 3 * 32 * 32).reshape(12, 3, 32, 32)
LABELS = torch.arange(12) % 10


class Dicts(Dataset):
    """As datasets of transformers and of the Hub: a dict for each example."""

    def __init__(self, label):
        self.label = label

    def __len__(self):
        return len(IMAGES)

    def __getitem__(self, index):
        example = {"pixel_values": IMAGES[index]}
        return example if self.label is None else {**example, self.label: int(LABELS[index])}


def without_labels(examples):
    return torch.stack([image for image, _ in examples]), None


def with_python_labels(examples):
    return torch.stack([image for image, _ in examples]), [int(label) for _, label in examples]


LOADERS = {
    "TensorDataset(x)": (lambda: DataLoader(TensorDataset(IMAGES), 4), False),
    "TensorDataset(x, y)": (lambda: DataLoader(TensorDataset(IMAGES, LABELS), 4), True),
    "(x, None)": (lambda: DataLoader(TensorDataset(IMAGES, LABELS), 4, collate_fn=without_labels), False),
    "(x, list of ints)": (lambda: DataLoader(TensorDataset(IMAGES, LABELS), 4, collate_fn=with_python_labels), True),
    "dicts": (lambda: DataLoader(Dicts(None), 4), False),
    "dicts with labels": (lambda: DataLoader(Dicts("labels"), 4), True),
    "dicts with label": (lambda: DataLoader(Dicts("label"), 4), True),
    "(dict, y)": (
        lambda: [({"pixel_values": IMAGES[:6]}, LABELS[:6]), ({"pixel_values": IMAGES[6:]}, LABELS[6:])],
        True,
    ),
    "1-tuples": (lambda: [(x,) for x in IMAGES.split(4)], False),
    "lists": (lambda: [[x] for x in IMAGES.split(4)], False),
    "tensors": (lambda: IMAGES.split(4), False),
    "a generator": (lambda: (x for x in IMAGES.split(4)), False),
    "a generator of dicts": (lambda: ({"pixel_values": x, "labels": None} for x in IMAGES.split(4)), False),
    "a map of pairs": (lambda: zip(IMAGES.split(4), LABELS.split(4), strict=True), True),
}


@pytest.fixture(scope="module")
def quantized():
    model = small_vit(num_hidden_layers=1)
    vqvit.quantize_(model)
    return model


@pytest.mark.parametrize("kind", LOADERS)
def test_calibration_and_evaluation_take_what_loaders_yield(quantized, kind):
    make, labelled = LOADERS[kind]
    torch.manual_seed(1)
    model, reference = small_vit(num_hidden_layers=1), small_vit(num_hidden_layers=1)
    reference.load_state_dict(model.state_dict())
    vqvit.quantize_(model, vqvit.QuantConfig(activation="static", rounding="error_aware"), make())
    scores = vqvit.evaluate(model, make(), reference)
    assert scores.images == 12 and (scores.top1 is not None) == labelled and scores.cosine_mean > 0.98
    torch.manual_seed(1)
    plain = small_vit(num_hidden_layers=1)
    batches = [batch.images for batch in Batches(make())]
    vqvit.quantize_(plain, vqvit.QuantConfig(activation="static", rounding="error_aware"), batches)
    with torch.inference_mode():
        assert torch.equal(plain(IMAGES).logits, model(IMAGES).logits), "and computes the same from it"


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([], "got 0 elements"),
        ((IMAGES, LABELS, LABELS), "got 3 elements"),
        ((IMAGES, "cat"), "labels a tensor; got str"),
        ((IMAGES, ["cat"] * 12), "labels a tensor; got list"),
        ({"labels": LABELS}, "got dict"),
        (None, "got NoneType"),
        (np.ones(3), "got ndarray"),
        ((IMAGES * 255).to(torch.uint8), "floating-point images, scaled and normalised .* got uint8"),
        ({"pixel_values": (IMAGES * 255).to(torch.uint8)}, "got uint8"),
    ],
)
def test_other_batches_are_refused(quantized, batch, message):
    with pytest.raises(TypeError, match=message):
        read_batch(batch)
    with pytest.raises(TypeError, match=message):
        vqvit.evaluate(quantized, [batch], quantized)
    with pytest.raises(vqvit.CalibrationError, match=message):
        vqvit.quantize_(small_vit(num_hidden_layers=1), calibration=[batch])


def test_models_in_float64_are_refused_with_a_way_out():
    model = small_vit(num_hidden_layers=1).double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        vqvit.PlanError, match=r"expected a model in float32.* got float64 .*call model\.float\(\) first"
    ):
        vqvit.quantize_(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    vqvit.quantize_(model.float())


class Changing:
    """An iterator under another name: a second pass finds nothing."""

    def __init__(self):
        self.batches = iter(IMAGES.split(4))

    def __iter__(self):
        yield from self.batches


def test_a_loader_that_cannot_begin_anew_is_named():
    batches = Batches(Changing())
    assert (len(batches), batches.images) == (3, 12)
    with pytest.raises(ValueError, match="expected 3 in every pass, as in the first; got 0: pass a list, a DataLoader"):
        list(batches)
    model = small_vit(num_hidden_layers=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises((ValueError, StopIteration), match="in every pass"):
        vqvit.quantize_(model, vqvit.QuantConfig(activation="static"), Changing())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_no_batch_is_kept():
    import gc
    import weakref

    alive = []

    class Loader:
        def __iter__(self):
            for _ in range(5):
                batch = torch.randn(8, 3, 32, 32)
                alive.append(weakref.ref(batch))
                yield batch
                del batch
                gc.collect()
                assert sum(ref() is not None for ref in alive) <= 2, "the batch in work, and the one being made"

    model = small_vit(num_hidden_layers=2)
    config = vqvit.QuantConfig(activation="static", attention_scales="static", rounding="error_aware")
    vqvit.quantize_(model, config, Loader())
    assert len(alive) > 5 and not any(ref() is not None for ref in alive)


@pytest.mark.parametrize("size", [1, IN_MEMORY // 8])
def test_tensor_files_give_back_the_same_bits(size):
    special = torch.tensor([float("nan"), -0.0, float("inf"), 1e-45])
    rows = [
        (torch.randn(size, 3), torch.randn(3).bfloat16(), torch.arange(4)),
        (special, torch.tensor(3.5), torch.zeros(0, 4), torch.tensor([True, False])),
        (torch.randn(4, 6).t(),),
    ]
    stored = TensorFile(rows)
    for _ in range(2):
        for row, (*found,) in zip(rows, stored, strict=True):
            for a, b in zip(row, found, strict=True):
                assert a.shape == b.shape and a.dtype == b.dtype
                assert a.contiguous().view(-1).view(torch.uint8).equal(b.view(-1).view(torch.uint8))
    stored.append((special,))
    assert len(stored) == 4 and len(list(stored)) == 4


def test_every_other_batch():
    even, odd = (EveryOther(list(range(5)), first) for first in (0, 1))
    assert (list(even), list(odd), len(even), len(odd)) == ([0, 2, 4], [1, 3], 3, 2)
    assert list(even) == [0, 2, 4]
