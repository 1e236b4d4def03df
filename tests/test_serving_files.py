"""Exported folders that a stranger wrote: whatever is wrong in one is a `ProgramError` when it is loaded."""

import copy
import hashlib
import inspect
import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save

import vqvit
from vqvit import numerics as nm
from vqvit.backends import cpu
from vqvit.reference import COMPENSATION_TERMS
from vqvit.serving import ProgramError, Session, checks, float_checks, float_ops, int8_checks, int8_ops, symbols
from vqvit.serving.program import PROGRAM, WEIGHTS, read
from vqvit.serving.symbols import Array, Size
from vqvit.serving.weights import WeightFile

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"cpu backend: {cpu.unavailable()}")

BLOCK = "vqvit.int8_encoder_block.default"
PATCHES = "vqvit.patchify_quantize.default"
BATCH = Size(1, 0)


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=72, image_size=16, patch_size=8,
        num_labels=5,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config).eval()
    vqvit.quantize_(model)
    return vqvit.export(model, tmp_path_factory.mktemp("served") / "out")


class Forged:
    """A copy of an exported folder whose program and tensors are changed, and the hash with them."""

    def __init__(self, source: Path, folder: Path):
        self.folder = folder
        self.program = json.loads((source / PROGRAM).read_text())
        self.tensors = load_file(source / WEIGHTS)

    def step(self, op: str) -> dict:
        return next(step for step in self.program["steps"] if step["op"] == op)

    def argument(self, op: str, name: str) -> int:
        """The place of an argument by its name."""
        function = checks.RULES[op]
        return list(inspect.signature(function).parameters).index(name)

    def set(self, op: str, name: str, value: object) -> None:
        self.step(op)["arguments"][self.argument(op, name)] = value

    def weight(self, op: str, name: str) -> str:
        return self.step(op)["arguments"][self.argument(op, name)]["weight"]

    def session(self) -> Session:
        weights = save(self.tensors)
        return self.session_of(json.dumps(self.program), weights)

    def session_of(self, program: str | bytes, weights: bytes, rehash: bool = True) -> Session:
        self.folder.mkdir(exist_ok=True)
        (self.folder / WEIGHTS).write_bytes(weights)
        if rehash and isinstance(program, str):
            program = program.replace(self.program["sha256"], hashlib.sha256(weights).hexdigest())
        (self.folder / PROGRAM).write_bytes(program.encode() if isinstance(program, str) else program)
        return Session(self.folder, 1)


@pytest.fixture
def forged(exported, tmp_path) -> Forged:
    return Forged(exported, tmp_path / "forged")


def test_a_folder_whose_hash_is_written_anew_is_run(forged):
    assert forged.session()(np.zeros((3, 3, 16, 16), np.float32))["logits"].shape == (3, 5)


ARGUMENTS = {
    "heads_0": (BLOCK, "num_heads", 0, "num_heads: an integer"),
    "heads_-5": (BLOCK, "num_heads", -5, "num_heads: an integer"),
    "heads_65": (BLOCK, "num_heads", 65, "divisible by 3 · 65 heads"),
    "heads_2^31-1": (BLOCK, "num_heads", 2**31 - 1, "num_heads: an integer"),
    "heads_2^63": (BLOCK, "num_heads", 2**63, "an integer of 64 bits"),
    "heads_true": (BLOCK, "num_heads", True, "num_heads: an integer"),
    "heads_of_text": (BLOCK, "num_heads", "2", "num_heads: an integer"),
    "heads_as_a_list": (BLOCK, "num_heads", [2], "num_heads: an integer"),
    "heads_of_a_value": (BLOCK, "num_heads", {"value": "pixel_values"}, "weights and constants behind x"),
    "eps_nan": (BLOCK, "eps1", {"number": "nan"}, "eps1: a finite number of at least 0"),
    "eps_negative": (BLOCK, "eps2", -1e-6, "eps2: a finite number of at least 0"),
    "delta_inf": (BLOCK, "qkv_delta", {"number": "inf"}, "qkv_delta: a finite number"),
    "sm_scale_huge": (BLOCK, "sm_scale", 1e300, "sm_scale: a finite number"),
    "activation": (BLOCK, "activation", "exp", "activation in"),
    "activation_of_another_type": (BLOCK, "activation", {"dtype": "int8"}, "activation in"),
    "groups_as_a_number": (BLOCK, "fc2_groups", 7, "fc2_groups: true or false"),
    "leading_tokens_0": (BLOCK, "leading_tokens", 0, "leading_tokens: an integer"),
    "leading_tokens_too_many": (BLOCK, "leading_tokens", 6, "leading_tokens: an integer from 1 to 5"),
    "weight_missing": (BLOCK, "fc1", None, "fc1: an array"),
    "weight_unknown": (BLOCK, "fc1", {"weight": "nowhere"}, "a weight of the file"),
    "x_missing": (BLOCK, "x", None, "x: float32|x: an array"),
    "x_unknown": (BLOCK, "x", {"value": "nowhere"}, "a value that an earlier step gives"),
    "x_from_itself": (BLOCK, "x", {"value": "int8_encoder_block"}, "a value that an earlier step gives"),
    "x_from_a_later_step": (BLOCK, "x", {"value": "int8_encoder_block_1"}, "a value that an earlier step gives"),
    "x_of_other_sizes": (BLOCK, "x", {"value": "pixel_values"}, "x: float32"),
    "x_of_panels": (BLOCK, "x", {"weight": "vit.layers.0.fc1.codes"}, "x: an array"),
    "patch_size_0": (PATCHES, "patch_height", 0, "patch_height: an integer from 1 to 16"),
    "patch_size_-8": (PATCHES, "patch_width", -8, "patch_width: an integer from 1 to 16"),
    "patch_size_huge": (PATCHES, "patch_width", 2**31 - 1, "patch_width: an integer from 1 to 16"),
    "patch_size_5": (PATCHES, "patch_width", 5, "in multiples of"),
    "an_object_of_two_keys": (PATCHES, "equalizer", {"value": "x", "weight": "y"}, "an argument of one key"),
    "an_unknown_object": (PATCHES, "equalizer", {"file": "/etc/passwd"}, "a value, weight, number or dtype"),
    "a_name_that_is_none": (PATCHES, "equalizer", {"weight": ["x"]}, "the name of a weight"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_that_do_not_fit_are_refused(forged, name):
    op, argument, value, message = ARGUMENTS[name]
    forged.set(op, argument, value)
    with pytest.raises(ProgramError, match=message):
        forged.session()


VECTORS = (
    "norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias", "qkv", "qkv_scale", "qkv_bias", "attn_out",
    "attn_out_scale", "attn_out_bias", "fc1", "fc1_scale", "fc1_bias", "fc2", "fc2_scale", "fc2_bias",
)  # fmt: skip


@pytest.mark.parametrize("vector", VECTORS)
def test_every_operand_of_a_block_needs_its_shape_and_dtype(forged, vector):
    name = forged.weight(BLOCK, vector)
    right = forged.tensors[name]
    flat = right.reshape(-1)
    others = [flat[: flat.size // 2], flat[:1], np.concatenate([flat, flat]), flat.reshape(1, -1)]
    others.append(right.astype(np.int32) if right.dtype == np.float32 else right.astype(np.float32))
    if right.ndim == 4:
        others += [right[:, :-1], right[:, :2], np.concatenate([right, right]), right.transpose(0, 1, 3, 2)]
    for wrong in others:
        forged.tensors[name] = np.ascontiguousarray(wrong)
        with pytest.raises(ProgramError, match=r"expected .*; got "):
            forged.session()


def changed(program: dict, change) -> dict:
    program = copy.deepcopy(program)
    change(program)
    return program


PROGRAMS = {
    "image_size_0": (lambda p: p["inputs"][0]["shape"].__setitem__(2, 0), "sizes of at least 1"),
    "image_size_-1": (lambda p: p["inputs"][0]["shape"].__setitem__(2, -1), "sizes of at least 1"),
    "image_size_2^63": (lambda p: p["inputs"][0]["shape"].__setitem__(2, 2**63), "sizes of at least 1"),
    "image_size_2^20": (lambda p: p["inputs"][0].update(shape=["batch", 3, 2**20, 2**20]), "at most .* elements"),
    "image_size_32": (lambda p: p["inputs"][0].update(shape=["batch", 3, 32, 32]), "expected"),
    "no_batch": (lambda p: p["inputs"][0]["shape"].__setitem__(0, 4), "the shape .batch"),
    "batch_twice": (lambda p: p["inputs"][0]["shape"].__setitem__(1, "batch"), "the shape .batch"),
    "no_inputs": (lambda p: p.update(inputs=[]), "a list of inputs"),
    "inputs_twice": (lambda p: p["inputs"].append(p["inputs"][0]), "a name of its own"),
    "no_outputs": (lambda p: p.update(outputs={}), "outputs by name"),
    "outputs_as_a_list": (lambda p: p.update(outputs=["logits"]), "outputs by name"),
    "an_unknown_output": (lambda p: p.update(outputs={"logits": "nowhere"}), "among the values"),
    "an_output_that_is_a_size": (lambda p: p.update(outputs={"n": "sym_size_int_3"}), "an array for the output"),
    "an_output_that_is_a_number": (lambda p: p.update(outputs={"logits": 3}), "the name of a value"),
    "steps_of_numbers": (lambda p: p.update(steps=[1, 2]), "a step"),
    "a_result_twice": (lambda p: p["steps"].append(p["steps"][-1]), "a name of its own"),
    "a_result_that_is_the_input": (lambda p: p["steps"][0].update(results="pixel_values"), "a name of its own"),
    "a_result_that_is_a_number": (lambda p: p["steps"][0].update(results=3), "the name of a result"),
    "too_many_results": (lambda p: p["steps"][0].update(results=["a", "b"]), "expected"),
    "no_arguments": (lambda p: p["steps"][-1].update(arguments=[]), "arguments; got 0"),
    "too_many_arguments": (lambda p: p["steps"][-1]["arguments"].extend([None] * 99), "arguments; got"),
    "lists_in_lists": (lambda p: p["steps"][-1].update(arguments=[[[[1]]]]), "at most one list in another"),
    "an_unknown_operation": (lambda p: p["steps"][0].update(op="os.system"), "operations that this version knows"),
    "no_format": (lambda p: p.pop("format"), "expected format 1; got None"),
    "format_true": (lambda p: p.update(format=True), "expected format 1; got True"),
    "another_field": (lambda p: p.update(more=1), "the fields"),
    "hash_as_a_number": (lambda p: p.update(sha256=5), "the SHA-256"),
    "hash_of_another_file": (lambda p: p.update(sha256="0" * 64), "truncated or corrupted"),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_that_are_none_are_refused(forged, name):
    change, message = PROGRAMS[name]
    with pytest.raises(ProgramError, match=message):
        forged.session_of(json.dumps(changed(forged.program, change)), save(forged.tensors))


TEXTS = {
    "empty": b"",
    "not_utf8": b'{"format": "\xff"}',
    "deep": b"[" * 200_000 + b"]" * 200_000,
    "deep_objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "an_integer_of_10,000_digits": b'{"format": ' + b"9" * 10_000 + b"}",
    "nan": b'{"format": NaN}',
    "a_list": b"[1, 2]",
    "a_name_twice": b'{"format": 1, "format": 1}',
    "null": b"null",
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts_that_are_no_program_are_refused(forged, name):
    with pytest.raises(ProgramError, match=r"program\.json: expected"):
        forged.session_of(TEXTS[name], save(forged.tensors), rehash=False)


@pytest.mark.parametrize("depth", [50, 900, 990, 20_000])
def test_depth_of_json_is_refused_however_deep(forged, depth):
    deep: object = "[" * depth + "]" * depth
    text = json.dumps({**forged.program, "steps": "STEPS"}).replace('"STEPS"', str(deep))
    with pytest.raises(ProgramError):
        forged.session_of(text, save(forged.tensors))


def with_header(weights: bytes, change) -> bytes:
    size = int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + weights[8 + size :]


def first(header: dict) -> dict:
    return next(entry for name, entry in header.items() if name != "__metadata__")


HEADERS = {
    "an_offset_behind_the_end": lambda h: first(h)["data_offsets"].__setitem__(1, 2**40),
    "a_negative_offset": lambda h: first(h)["data_offsets"].__setitem__(0, -4),
    "offsets_in_the_wrong_order": lambda h: first(h)["data_offsets"].reverse(),
    "an_offset_of_another_type": lambda h: first(h)["data_offsets"].__setitem__(0, 0.0),
    "three_offsets": lambda h: first(h)["data_offsets"].append(3),
    "a_huge_shape": lambda h: first(h).update(shape=[2**40, 2**40]),
    "a_shape_that_overflows": lambda h: first(h).update(shape=[2**32, 2**32]),
    "a_negative_shape": lambda h: first(h).update(shape=[-1, -32]),
    "a_shape_of_text": lambda h: first(h).update(shape="32"),
    "a_shape_of_hundred_dimensions": lambda h: first(h).update(shape=[1] * 100),
    "an_unknown_dtype": lambda h: first(h).update(dtype="F8_E4M3"),
    "a_dtype_that_is_a_list": lambda h: first(h).update(dtype=["F32"]),
    "the_bytes_of_another_tensor": lambda h: first(h).update(copy.deepcopy(list(h.values())[-1])),
    "a_tensor_that_is_a_number": lambda h: h.update(more=3),
    "no_tensors": lambda h: h.clear(),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_of_weights_that_are_wrong_are_refused(forged, name):
    weights = with_header(save(forged.tensors), HEADERS[name])
    with pytest.raises(ProgramError, match=r"weights\.safetensors: expected"):
        forged.session_of(json.dumps(forged.program), weights)


@pytest.mark.parametrize("length", [0, 7, 8, 100, -1])
def test_weights_that_are_cut_are_refused(forged, length):
    weights = save(forged.tensors)
    with pytest.raises(ProgramError, match="truncated"):
        forged.session_of(json.dumps(forged.program), weights[:length])


@pytest.mark.parametrize("size", [2**31, 2**63, 2**64 - 1])
def test_nothing_is_allocated_for_a_header_that_the_file_does_not_hold(forged, size):
    with pytest.raises(ProgramError, match="truncated"):
        forged.session_of(json.dumps(forged.program), struct.pack("<Q", size) + save(forged.tensors)[8:])


def test_outputs_that_are_weights_cannot_be_written_to(forged):
    forged.program["steps"].append(
        {"op": "aten.view.default", "arguments": [{"weight": "classifier.scale"}, [-1]], "results": "leak"}
    )
    forged.program["outputs"]["leak"] = "leak"
    session, images = forged.session(), np.zeros((1, 3, 16, 16), np.float32)
    with pytest.raises(ValueError, match="read-only"):
        session(images)["leak"][:] = 0


def test_results_that_numpy_makes_otherwise_than_foreseen_do_not_reach_a_kernel(forged, monkeypatch):
    session = forged.session()
    monkeypatch.setitem(float_ops.OPS, "aten.add.Tensor", lambda x, y, alpha: (x + y).astype(np.float64))
    session = forged.session()
    with pytest.raises(ProgramError, match=r"aten\.add\.Tensor: expected float32 .*; got float64"):
        session(np.zeros((1, 3, 16, 16), np.float32))


def parameters(function) -> list[tuple]:
    """Whether each stands for any number of arguments, and its default."""
    return [(p.kind is p.VAR_POSITIONAL, p.default) for p in inspect.signature(function).parameters.values()]


def test_rules_have_the_parameters_of_their_operations():
    functions = {**float_ops.OPS, **int8_ops.OPS, int8_ops.ENCODER_BLOCK: int8_ops.encoder_block}
    assert functions.keys() == checks.RULES.keys() == float_checks.RULES.keys() | int8_checks.RULES.keys()
    for op, function in functions.items():
        own, rule = parameters(function), parameters(checks.RULES[op])
        if op == int8_ops.ENCODER_BLOCK:
            rule = rule[1:]  # x comes with each call
        elif op in int8_ops.OPS:
            own = own[1:]  # the number of threads
        assert own == rule, op


def test_limits_are_those_of_the_arithmetic():
    assert int8_checks.K_MOST == (nm.K_MAX_SYMMETRIC, nm.K_MAX_ONE_ZERO_POINT, nm.K_MAX_TWO_ZERO_POINTS)
    assert (int8_checks.NORM_K_MOST, int8_checks.MOST_KEYS) == (nm.NORM_K_MAX, nm.MAX_KEYS)
    for mode, terms in COMPENSATION_TERMS.items():
        assert int8_ops.TERM_BITS[mode] == sum(bit << i for i, bit in enumerate(terms))


SIZES = {
    "sum": (lambda: symbols.plus(BATCH, 3), Size(1, 3)),
    "difference": (lambda: symbols.minus(Size(2, 3), Size(2, 1)), 2),
    "product": (lambda: symbols.times(Size(2, 3), 4), Size(8, 12)),
    "quotient": (lambda: symbols.quotient(Size(6, 3), 3), Size(2, 1)),
    "quotient_of_sizes": (lambda: symbols.quotient(Size(10, 5), Size(2, 1)), 5),
    "view": (lambda: float_checks.view(Array((BATCH, 6, 4), "int8"), [-1, 8]), Array((Size(3, 0), 8), "int8")),
    "cat_of_images": (lambda: float_checks.cat([Array((BATCH, 2), "int8"), Array((1, 2), "int8")], 0),
                      Array((Size(1, 1), 2), "int8")),
    "slice": (lambda: float_checks.slice_(Array((BATCH, 9), "int8"), 1, -7, 100, 2), Array((BATCH, 4), "int8")),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_known_for_any_number_of_images(name):
    computed, wanted = SIZES[name]
    assert computed() == wanted


REFUSED = {
    "images_times_images": lambda: symbols.times(BATCH, BATCH),
    "a_quotient_that_is_none": lambda: symbols.quotient(Size(3, 0), 2),
    "division_by_zero": lambda: symbols.quotient(6, 0),
    "division_by_less_images": lambda: symbols.quotient(BATCH, Size(2, 0)),
    "a_size_that_is_negative_for_one_image": lambda: symbols.array((Size(1, -2),), "int8"),
    "a_size_that_falls": lambda: symbols.array((Size(-1, 100),), "int8"),
    "too_many_elements": lambda: symbols.array((BATCH, 2**20, 2**20), "int8"),
    "sizes_beyond_int64": lambda: symbols.times(2**47, 2**47),
    "elements_of_another_number": lambda: float_checks.view(Array((BATCH, 6), "int8"), [BATCH, 5]),
    "two_free_sizes": lambda: float_checks.view(Array((BATCH, 6), "int8"), [-1, -1]),
    "a_choice_of_images": lambda: float_checks.slice_(Array((BATCH, 2), "int8"), 0, 1, None, 1),
    "an_image_beyond_the_first": lambda: float_checks.select(Array((BATCH, 2), "int8"), 0, 1),
    "a_step_of_zero": lambda: float_checks.slice_(Array((BATCH, 9), "int8"), 1, 0, 9, 0),
    "an_empty_slice": lambda: float_checks.slice_(Array((BATCH, 9), "int8"), 1, 5, 5, 1),
    "axes_twice": lambda: float_checks.permute(Array((BATCH, 9), "int8"), [1, 1]),
    "negative_padding": lambda: float_checks.pad(Array((BATCH, 9), "float32"), [-3, 0], "constant", None),
    "huge_padding": lambda: float_checks.pad(Array((BATCH, 9), "float32"), [0, 2**40], "constant", None),
    "integers_and_floats": lambda: float_checks.binary(Array((3,), "float32"), Array((3,), "int64"), 1),
    "an_expansion_without_end": lambda: float_checks.expand(Array((1,), "float32"), [2**20, 2**20], False),
}


@pytest.mark.parametrize("name", REFUSED)
def test_sizes_that_cannot_be_are_refused(name):
    with pytest.raises(ProgramError):
        REFUSED[name]()


def test_the_check_is_paid_once(exported):
    """Python calls of a check: what a ViT of 12 blocks needs in it takes 1.3 ms."""
    program, calls = read(exported), 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event == "call"

    with WeightFile(exported / WEIGHTS) as file:
        sys.setprofile(count)
        try:
            checks.check(program, file.tensors)
        finally:
            sys.setprofile(None)
    assert calls < 150 * len(program.steps)
