"""`vqvit.data`: folders, parquet files and the digits become batches; what is wrong with them is said."""

import contextlib
import json
import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from vqvit.data import DataError, Resize, digits, open_images, transform_for

SIZE = 16


def write_image(path, value, shape=(20, 24)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*shape, 3), value, np.uint8)).save(path)


def encoded(path, value):
    write_image(path, value)
    return path.read_bytes()


def write_parquet(path, columns):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.table(columns), path)


def plain(images):
    """A transform whose result shows which image it came from."""
    return torch.stack([torch.full((3, 2, 2), float(np.asarray(image)[0, 0, 0])) for image in images])


def values(batches):
    return [int(v) for batch in batches for v in (batch[0] if isinstance(batch, tuple) else batch)[:, 0, 0, 0]]


def test_folder_with_classes(tmp_path):
    for index, name in enumerate(["cat/b.png", "cat/deep/c.png", "ape/a.png"]):
        write_image(tmp_path / name, index)
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    batches = open_images(tmp_path, plain, batch_size=2)
    assert (len(batches), batches.images, batches.labelled) == (2, 3, True)
    seen = [(x.shape[0], y.tolist()) for x, y in batches]
    assert seen == [(2, [0, 1]), (1, [1])]
    assert values(batches) == values(batches) == [2, 0, 1]


def test_flat_folder_has_no_labels(tmp_path):
    write_image(tmp_path / "a.png", 5)
    write_image(tmp_path / "sub" / "b.png", 6)
    batches = open_images(tmp_path, plain)
    assert not batches.labelled
    assert [type(b) for b in batches] == [torch.Tensor]


CLASSES = {
    "sorted names": (["ape", "cat"], None, [0, 1]),
    "numbers": (["10", "2"], None, [10, 2]),
    "the model's": (["ape", "cat"], {"cat": 3, "ape": 7, "dog": 1}, [7, 3]),
    "not all the model's": (["ape", "cat"], {"cat": 3}, [0, 1]),
}


@pytest.mark.parametrize("kind", CLASSES)
def test_class_numbers(tmp_path, kind):
    folders, label2id, expected = CLASSES[kind]
    for name in folders:
        write_image(tmp_path / name / "x.png", 0)
    ((_, labels),) = open_images(tmp_path, plain, label2id=label2id)
    assert labels.tolist() == expected


@pytest.mark.parametrize("image_column, wrap", [("img", True), ("image", True), ("image", False)])
def test_parquet(tmp_path, image_column, wrap):
    raw = [encoded(tmp_path / "x.png", value) for value in range(5)]
    (tmp_path / "x.png").unlink()
    column = [{"bytes": r, "path": ""} for r in raw] if wrap else raw
    write_parquet(tmp_path / "part-0.parquet", {image_column: column[:3], "label": [4, 3, 2]})
    write_parquet(tmp_path / "part-1.parquet", {image_column: column[3:], "label": [1, 0]})
    batches = open_images(tmp_path, plain, batch_size=4)
    assert values(batches) == [0, 1, 2, 3, 4]
    assert [y.tolist() for _, y in batches] == [[4, 3, 2, 1], [0]]
    single = open_images(tmp_path / "part-1.parquet", plain)
    assert values(single) == [3, 4]


def test_parquet_without_labels(tmp_path):
    write_parquet(tmp_path / "a.parquet", {"img": [encoded(tmp_path / "x.jpg", 9)]})
    assert [type(b) for b in open_images(tmp_path / "a.parquet", plain)] == [torch.Tensor]


@pytest.mark.parametrize("limit, expected", [(1, [0]), (4, [0, 2, 5, 7]), (10, list(range(10))), (99, list(range(10)))])
def test_limit_takes_even_steps(tmp_path, limit, expected):
    for value in range(10):
        write_image(tmp_path / f"{value}.png", value)
    batches = open_images(tmp_path, plain, batch_size=3, limit=limit)
    assert values(batches) == expected
    assert len(batches) == len(list(batches))


@pytest.mark.parametrize("limit, expected", [(None, [1, 4, 5, 9]), (2, [1, 5])])
def test_chosen_images(tmp_path, limit, expected):
    for index in range(10):
        write_image(tmp_path / f"{index}.png", index)
    batches = open_images(tmp_path, plain, batch_size=3, limit=limit, indices=[1, 4, 5, 9])
    assert values(batches) == batches.indices == expected and batches.images == len(expected)


@pytest.mark.parametrize("indices", [[], [3, 3], [2, 1], [-1, 2], [1, 10], range(11)])
def test_indices_are_checked(tmp_path, indices):
    for index in range(10):
        write_image(tmp_path / f"{index}.png", index)
    with pytest.raises(DataError, match="expected ascending numbers from 0 to 9; got"):
        open_images(tmp_path, plain, indices=indices)


def test_resize_normalises(tmp_path):
    image = Image.new("RGB", (40, 20), (255, 0, 51))
    (pixels,) = Resize(SIZE, mean=(0.5, 0.5, 0.0), std=(0.5, 0.5, 1.0))([image])
    assert pixels.shape == (3, SIZE, SIZE) and pixels.dtype == torch.float32
    assert torch.equal(pixels[:, 0, 0], torch.tensor([1.0, -1.0, 0.2]))


def test_resize_keeps_proportions():
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, 10:30] = 255
    (cut,) = Resize(20, mean=(0.0,) * 3, std=(1.0,) * 3)([Image.fromarray(pixels)])
    assert torch.equal(cut, torch.ones(3, 20, 20))


def processor_folder(tmp_path, **fields):
    pytest.importorskip("transformers")
    content = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 12, "width": 12},
        "image_mean": [0.25] * 3,
        "image_std": [0.5] * 3,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**content, **fields}))
    return tmp_path


def test_processor_of_the_model(tmp_path):
    folder = processor_folder(tmp_path)
    image = Image.new("RGB", (30, 30), (255, 255, 255))
    (pixels,) = transform_for(folder)([image])
    assert torch.allclose(pixels, torch.full((3, 12, 12), 1.5))
    (larger,) = transform_for(folder, size=SIZE)([image])
    assert str(transform_for(folder, size=SIZE)) == "16 x 16, mean (0.25, 0.25, 0.25), std (0.5, 0.5, 0.5)"
    assert torch.allclose(larger, torch.full((3, SIZE, SIZE), 1.5))


def test_digits():
    pytest.importorskip("sklearn")
    first, second = digits(), digits()
    assert first.test_images.shape == (360, 3, 32, 32) and first.train_images.shape == (1437, 3, 32, 32)
    assert torch.equal(first.test_images, second.test_images) and torch.equal(first.test_labels, second.test_labels)
    assert first.test_images.min() == -1 and first.test_images.max() == 1
    assert first.test_labels.bincount().min() >= 35
    train = {image.numpy().tobytes() for image in first.train_images}
    shared = sum(image.numpy().tobytes() in train for image in first.test_images)
    assert shared == 0, "a test image is also a training image"


def test_path_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no .*absent"):
        open_images(tmp_path / "absent", plain)
    with pytest.raises(DataError, match=r"expected a folder with \.jpg.* has none"):
        open_images(tmp_path, plain)
    (tmp_path / "text.parquet").write_text("not parquet")
    with pytest.raises(DataError, match=r"cannot read .*text\.parquet"):
        open_images(tmp_path, plain)


def png(mode, array, **options):
    buffer = BytesIO()
    Image.fromarray(array).convert(mode).save(buffer, "PNG", **options)
    return buffer.getvalue()


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def animation(suffix):
    buffer = BytesIO()
    frames = [Image.fromarray(noise(8, 8, 3)), Image.fromarray(255 - noise(8, 8, 3))]
    frames[0].save(buffer, suffix, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def bomb():
    """A PNG of 30,000 x 30,000 pixels in a few bytes."""
    chunk = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    packed = b"IHDR" + chunk
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(chunk)) + packed + struct.pack(">I", zlib.crc32(packed))
    return start + png("RGB", noise(4, 4, 3))[33:]


def jpeg():
    buffer = BytesIO()
    Image.fromarray(noise(64, 64, 3)).save(buffer, "JPEG")
    return buffer.getvalue()


def tiff(mode, array):
    buffer = BytesIO()
    Image.fromarray(array).save(buffer, "TIFF")
    assert Image.open(BytesIO(buffer.getvalue())).mode == mode
    return buffer.getvalue()


UNREADABLE = {
    "text": lambda: b"not an image",
    "empty": lambda: b"",
    "truncated png": lambda: png("RGB", noise(64, 64, 3))[:2000],
    "truncated jpeg": lambda: jpeg()[:1000],
    "damaged png": lambda: png("RGB", noise(64, 64, 3))[:40] + b"\0" * 200,
    "animated gif": lambda: animation("GIF"),
    "animated png": lambda: animation("PNG"),
    "animated webp": lambda: animation("WEBP"),
    "pages": lambda: animation("TIFF"),
    "bomb": bomb,
    "float tiff": lambda: tiff("F", noise(8, 8).astype(np.float32)),
    "int32 tiff": lambda: tiff("I", noise(8, 8).astype(np.int32)),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_unreadable_images_are_named_and_skipped_or_refused(tmp_path, caplog, kind):
    for index, name in enumerate("ace"):
        write_image(tmp_path / f"{name}.png", index)
    (tmp_path / "b.png").write_bytes(UNREADABLE[kind]())
    batches = open_images(tmp_path, plain, batch_size=2)
    for _ in range(2):
        assert values(batches) == [0, 1, 2] and [len(batch) for batch in batches] == [2, 1]
    (name,) = batches.skipped
    assert name == str(tmp_path / "b.png") and "b.png: expected a readable image" in batches.skipped[name]
    messages = [record.message for record in caplog.records]
    assert len(messages) == 1 and messages[0].startswith("1 of 4 images skipped: image ")
    with pytest.raises(DataError, match=r"image .*b\.png: expected a readable image; .+"):
        list(open_images(tmp_path, plain, strict=True))
    with pytest.raises(DataError, match=r"expected at least one that can be read; got 1 of 1 images skipped"):
        list(open_images(tmp_path / "b.png", plain))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_mutated_pictures_raise_nothing_else(tmp_path):
    """Whatever strangers put into a file: an image, or `DataError`."""
    rng = np.random.default_rng(0)
    sources = [png("RGB", noise(16, 16, 3)), jpeg(), animation("GIF"), animation("WEBP"), animation("TIFF")]
    for _ in range(400):
        content = bytearray(sources[rng.integers(len(sources))])
        for _ in range(rng.integers(1, 8)):
            content[rng.integers(len(content))] = rng.integers(256)
        (tmp_path / "x.png").write_bytes(content[: rng.integers(1, len(content) + 1)])
        with contextlib.suppress(DataError):
            list(open_images(tmp_path, plain, strict=True))


def test_16_bits_become_8(tmp_path):
    """0, 1/4, 1/2, 3/4 and 1 of the range; Pillow's own conversion clips to 255."""
    wide = np.array([[0, 0x4040, 0x8080, 0xBFBF, 0xFFFF]], np.uint16)
    Image.fromarray(wide).save(tmp_path / "a.png")
    Image.fromarray(wide).save(tmp_path / "b.tif")
    assert Image.open(tmp_path / "a.png").mode.startswith("I")
    for name in ("a.png", "b.tif"):
        seen = []
        list(open_images(tmp_path / name, lambda images, seen=seen: seen.extend(images) or torch.zeros(1)))
        assert np.asarray(seen[0]).tolist() == [[[v] * 3 for v in (0, 0x40, 0x80, 0xBF, 0xFF)]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_honoured(tmp_path, orientation):
    """A camera stores the pixels of a turned picture and how to turn them back."""
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :8] = 255
    turns = {
        1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    stored = Image.fromarray(upright)
    stored = stored if turns[orientation] is None else stored.transpose(turns[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    seen = []
    list(open_images(tmp_path, lambda images: seen.extend(images) or torch.zeros(1)))
    assert np.array_equal(np.asarray(seen[0]), upright)


def test_a_single_picture(tmp_path):
    write_image(tmp_path / "cat.jpg", 7)
    write_image(tmp_path / "dog.png", 8)
    (tmp_path / "no_suffix").write_bytes((tmp_path / "dog.png").read_bytes())
    for name in ("dog.png", "no_suffix"):
        batches = open_images(tmp_path / name, plain)
        assert values(batches) == [8] and (batches.images, batches.labelled) == (1, False)
    raw = (tmp_path / "dog.png").read_bytes()
    write_parquet(tmp_path / "data.parquet", {"img": [raw]})
    (tmp_path / "data.parquet").rename(tmp_path / "parquet_by_content")
    assert values(open_images(tmp_path / "parquet_by_content", plain)) == [8]


@pytest.mark.parametrize("column", ["strings", "paths"])
def test_paths_in_parquet_files_are_never_opened(tmp_path, monkeypatch, column):
    write_image(tmp_path / "secret.png", 9)
    path = str(tmp_path / "secret.png")
    monkeypatch.chdir(tmp_path)
    columns = {"strings": [path, "secret.png"], "paths": [{"bytes": None, "path": path}] * 2}
    if column == "strings":
        write_parquet(tmp_path / "x.parquet", {"image": columns[column]})
        with pytest.raises(DataError, match=r"expected encoded images .* in column image of .*; got string"):
            open_images(tmp_path / "x.parquet", plain)
        return
    pa = pytest.importorskip("pyarrow")
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    write_parquet(tmp_path / "x.parquet", {"image": pa.array(columns[column], kind)})
    with pytest.raises(DataError, match="expected an encoded image; got NoneType"):
        list(open_images(tmp_path / "x.parquet", plain, strict=True))


def test_parquet_errors(tmp_path):
    write_parquet(tmp_path / "other.parquet", {"text": ["a"], "label": [0]})
    with pytest.raises(DataError, match=r"expected a column img or image in .*; got text, label"):
        open_images(tmp_path / "other.parquet", plain)
    write_parquet(tmp_path / "words.parquet", {"img": [b""], "label": ["cat"]})
    with pytest.raises(DataError, match="expected integers in column label"):
        open_images(tmp_path / "words.parquet", plain)
    write_parquet(tmp_path / "bad.parquet", {"img": [b"junk"]})
    with pytest.raises(DataError, match=r"bad\.parquet, row 0"):
        list(open_images(tmp_path / "bad.parquet", plain, strict=True))
    write_parquet(tmp_path / "null.parquet", {"img": [None, b"x"]})
    with pytest.raises(DataError, match=r"null\.parquet, row 0"):
        list(open_images(tmp_path / "null.parquet", plain, strict=True))


@pytest.mark.parametrize("option", [dict(batch_size=0), dict(limit=0), dict(limit=-3)])
def test_option_errors(tmp_path, option):
    write_image(tmp_path / "a.png", 0)
    with pytest.raises(DataError, match="expected at least 1"):
        open_images(tmp_path, plain, **option)


def test_transform_errors(tmp_path):
    with pytest.raises(
        DataError, match=r"expected a size, or a model folder with preprocessor_config\.json; got neither"
    ):
        transform_for(tmp_path)
    with pytest.raises(DataError, match="at least 1; got 0"):
        transform_for(tmp_path, 0)
    folder = processor_folder(tmp_path)
    (folder / "preprocessor_config.json").write_text("{")
    with pytest.raises(DataError, match="expected an image processor's configuration"):
        transform_for(folder)


def test_cifar10_of_the_hub(test_data):
    files = sorted(test_data.glob("cifar10/plain_text/test-*.parquet"))
    if not files:
        pytest.skip("the data folder has no cifar10/plain_text/test-*.parquet")
    batches = open_images(files[0], Resize(SIZE), batch_size=32, limit=64)
    seen = list(batches)
    assert [x.shape for x, _ in seen] == [(32, 3, SIZE, SIZE)] * 2
    assert torch.cat([y for _, y in seen]).unique().numel() == 10
