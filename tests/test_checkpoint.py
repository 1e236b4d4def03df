"""Checkpoints: whole or absent, small, and refused with a reason when they are not what they should be."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import vqvit
from vqvit.checkpoint import CONFIG, MANIFEST, WEIGHTS, WEIGHTS_1, read_manifest, weights_of
from vqvit.files import sha256
from vqvit.hf import ArchitectureError, load_float


def small_vit(**changes) -> nn.Module:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    config = transformers.ViTConfig(**{**sizes, "image_size": 32, "patch_size": 8, "num_labels": 10, **changes})
    return transformers.ViTForImageClassification(config).eval()


@pytest.fixture
def checkpoint(tmp_path):
    model = small_vit()
    vqvit.quantize_(model)
    return vqvit.save(model, tmp_path / "ck")


def test_a_new_process_computes_the_same_logits(tmp_path):
    model, images = small_vit(), torch.randn(2, 3, 32, 32)
    vqvit.quantize_(model)
    vqvit.save(model, tmp_path / "ck")
    torch.save(images, tmp_path / "images.pt")
    script = (
        "import sys, torch, vqvit\n"
        "folder = sys.argv[1]\n"
        "with torch.inference_mode():\n"
        "    logits = vqvit.load(folder + '/ck')(torch.load(folder + '/images.pt')).logits\n"
        "torch.save(logits, folder + '/logits.pt')\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    with torch.inference_mode():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), model(images).logits)


def test_vit_b16_size_on_disk(tmp_path):
    """Scales, norms, biases and embeddings counted: at most 0.27 of fp32."""
    model = transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=1000)).eval()
    float_bytes = sum(p.numel() * 4 for p in model.parameters())
    vqvit.quantize_(model)
    folder = vqvit.save(model, tmp_path / "b16")
    assert sum(f.stat().st_size for f in folder.iterdir()) <= 0.27 * float_bytes


def test_float_weights_are_never_materialised(checkpoint, monkeypatch):
    """All tensors that loading creates on a real device come from the file: no random or zero initialisation."""
    allocated = []
    original = nn.Parameter.__new__

    def watch(cls, data=None, requires_grad=True):
        if data is not None and not data.is_meta:
            allocated.append(tuple(data.shape))
        return original(cls, data, requires_grad)

    monkeypatch.setattr(nn.Parameter, "__new__", watch)
    vqvit.load(checkpoint)
    assert not [shape for shape in allocated if len(shape) == 2]


def test_saving_replaces_a_checkpoint_and_nothing_else(checkpoint, tmp_path):
    model = small_vit(num_labels=3)
    vqvit.quantize_(model)
    vqvit.save(model, checkpoint)
    assert vqvit.load(checkpoint).config.num_labels == 3
    assert [p.name for p in tmp_path.iterdir()] == ["ck"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(FileExistsError, match="expected a new folder or a vqvit checkpoint"):
        vqvit.save(model, tmp_path / "mine")
    with pytest.raises(vqvit.PlanError, match="expected a quantized model"):
        vqvit.save(small_vit(), tmp_path / "float")


def test_a_failed_save_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("vqvit.checkpoint.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        vqvit.save(vqvit.load(checkpoint), tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["ck"]


def test_output_below_a_file(checkpoint, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError):
        vqvit.save(vqvit.load(checkpoint), tmp_path / "file" / "ck")


def weights(folder):
    return weights_of(folder, read_manifest(folder))


def as_format_1(folder):
    """The folder as earlier versions wrote it."""
    weights(folder).rename(folder / WEIGHTS_1)
    manifest = json.loads((folder / MANIFEST).read_text())
    kept = {name: value for name, value in manifest.items() if name not in ("weights", "config", "processor")}
    (folder / MANIFEST).write_text(json.dumps({**kept, "format": 1}))


@pytest.mark.parametrize("name", [WEIGHTS_1, MANIFEST, CONFIG])
def test_missing_file(checkpoint, name):
    as_format_1(checkpoint)
    (checkpoint / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        vqvit.load(checkpoint)


def test_missing_weights(checkpoint):
    weights(checkpoint).unlink()
    with pytest.raises(FileNotFoundError, match=WEIGHTS.pattern):
        vqvit.load(checkpoint)


def test_folders_of_format_1_load_and_are_replaced(checkpoint):
    logits = vqvit.load(checkpoint)(torch.ones(1, 3, 32, 32)).logits
    as_format_1(checkpoint)
    assert torch.equal(vqvit.load(checkpoint)(torch.ones(1, 3, 32, 32)).logits, logits)
    vqvit.save(vqvit.load(checkpoint), checkpoint)
    assert {p.name for p in checkpoint.iterdir()} == {weights(checkpoint).name, MANIFEST, CONFIG}
    assert torch.equal(vqvit.load(checkpoint)(torch.ones(1, 3, 32, 32)).logits, logits)


def test_weights_outside_the_folder_are_refused(checkpoint):
    for name in ("../ck/x", "/etc/passwd", None, 3):
        edit(checkpoint, weights=name)
        with pytest.raises(vqvit.CheckpointError, match="expected weights vqvit-<hash>"):
            vqvit.load(checkpoint)


def truncate(folder):
    data = weights(folder).read_bytes()
    weights(folder).write_bytes(data[: len(data) // 2])


def flip_a_bit(folder):
    data = bytearray(weights(folder).read_bytes())
    data[-100] ^= 4
    weights(folder).write_bytes(data)


def break_manifest(folder):
    (folder / MANIFEST).write_text("{")


def other_document(folder):
    (folder / MANIFEST).write_text('{"name": "package"}')


def future_format(folder):
    edit(folder, format=7)


def edit(folder, **changes):
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, **changes}))


def break_config(folder):
    (folder / CONFIG).write_text("[1, 2")


def wrong_tensors(folder):
    tensors = load_file(weights(folder))
    tensors["classifier.codes"] = tensors["classifier.codes"][:5].contiguous()
    del tensors["vit.layernorm.weight"]
    tensors["surplus"] = torch.ones(1)
    save_file(tensors, weights(folder))
    edit(folder, sha256=sha256(weights(folder)))


def not_safetensors(folder):
    weights(folder).write_bytes(b"\x80\x02pickle")
    edit(folder, sha256=sha256(weights(folder)))


DAMAGE = {
    truncate: r"expected SHA-256 .*truncated or corrupted",
    flip_a_bit: r"expected SHA-256 .*truncated or corrupted",
    break_manifest: "expected JSON; got text that fails to parse",
    other_document: "expected the fields .*; got another document",
    future_format: "expected format 1 or 2; got 7",
    break_config: "expected JSON; got text that fails to parse",
    wrong_tensors: r"classifier\.codes is \(5, 64\).*; surplus unknown; vit\.layernorm\.weight missing",
    not_safetensors: "expected a safetensors file; got one that cannot be read",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda d: d.__name__)
def test_damaged_checkpoints(checkpoint, damage):
    damage(checkpoint)
    with pytest.raises(vqvit.CheckpointError, match=DAMAGE[damage]):
        vqvit.load(checkpoint)


def test_unknown_architecture(checkpoint):
    edit(checkpoint, **{"class": "ViTForTimeTravel"})
    with pytest.raises(ArchitectureError, match="it has no 'ViTForTimeTravel'"):
        vqvit.load(checkpoint)


def test_plan_of_another_model(checkpoint):
    config = json.loads((checkpoint / CONFIG).read_text())
    (checkpoint / CONFIG).write_text(json.dumps({**config, "num_hidden_layers": 1}))
    with pytest.raises(vqvit.PlanError, match=r"a block of this model \(vit\.layers\.0\); got 'vit\.layers\.1'"):
        vqvit.load(checkpoint)


def test_not_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a vqvit checkpoint with vqvit\.json; got none"):
        vqvit.load(tmp_path / "nowhere")


def test_float_folders(tmp_path):
    model = small_vit()
    model.save_pretrained(tmp_path / "float")
    loaded = load_float(tmp_path / "float")
    assert all(torch.equal(loaded.state_dict()[k], v) for k, v in model.state_dict().items())
    with pytest.raises(FileNotFoundError, match=r"expected a Hugging Face model folder with config\.json"):
        load_float(tmp_path)
    config = tmp_path / "float" / "config.json"
    config.write_text(config.read_text().replace("ViTForImageClassification", "ViTForTimeTravel"))
    with pytest.raises(ArchitectureError, match="got 'ViTForTimeTravel'"):
        load_float(tmp_path / "float")
    config.write_text(config.read_text().replace("ViTForTimeTravel", "ViTForImageClassification"))
    (tmp_path / "float" / "model.safetensors").write_bytes(b"1234")
    with pytest.raises(ValueError, match="expected readable weights for ViTForImageClassification"):
        load_float(tmp_path / "float")


@pytest.mark.parametrize("part", ["", "vit"], ids=["whole", "part"])
def test_transformers_neither_saves_nor_loads_a_quantized_model(part, tmp_path):
    """What it would write or read are random weights."""
    import transformers

    from vqvit.nn.module import TransformersSaveError

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8)
    model = transformers.ViTForImageClassification(config).eval()
    vqvit.quantize_(model.get_submodule(part))
    with pytest.raises(TransformersSaveError, match=r"Use vqvit\.save\(model, folder\)"):
        model.save_pretrained(tmp_path / "pretrained")
    assert not list((tmp_path / "pretrained").glob("*.safetensors"))
    if not part:
        vqvit.save(model, tmp_path / "ours")
        with pytest.raises(OSError, match=r"no file named model\.safetensors"):
            transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "ours")
