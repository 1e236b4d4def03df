"""Tables of tuned choices: what is looked up, which files are believed, and how `vqvit tune` measures.

Kernels run in Triton's interpreter, where no time means anything: times are given.
"""

import dataclasses
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import CASES

import vqvit
from vqvit import tuning
from vqvit.plan import QuantConfig

pytest.importorskip("triton")
pytest.importorskip("transformers")
from vqvit.kernels import attention_s8, gemm_s8, launch, tuned

ROOT = Path(vqvit.__file__).resolve().parents[1]
H100 = launch.Device(arch=90, sms=132)
ODD = launch.Device(arch=90, sms=7)  # no shipped table
FACTS = {"device": "a GPU"}
GEMM = tuned.Launch("gemm", 1576, (768, 3072))


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No tables are loaded, before and after."""
    monkeypatch.delenv(tuned.VARIABLE, raising=False)
    monkeypatch.setattr(tuned, "_user_folder", None)
    tuned.tables.cache_clear()
    yield
    tuned.tables.cache_clear()


def document(device=ODD, source="measured", chosen=((GEMM, 2),)) -> dict:
    choices = [tuning.Choice(each, tuned.configs(each.kind, device.arch), (), 0, index) for each, index in chosen]
    return tuning.table(choices, device, source, FACTS)


def user_table(folder: Path, device=ODD, **kwargs) -> Path:
    path = folder / tuned.file_name(device)
    tuning.write(path, document(device, **kwargs))
    tuned.search(folder)
    return path


# ---- lookup ---------------------------------------------------------------------------------------------------------


@given(st.integers(1, 2**40))
def test_buckets_are_an_eighth_of_an_octave(m):
    top = tuned.bucket(m)
    assert m <= top <= m * 9 / 8
    assert tuned.bucket(top) == top and tuned.bucket(top + 1) > top


def test_choose_takes_the_measured_config_in_its_bucket_and_elsewhere_predicts(tmp_path):
    predicted = gemm_s8.choose(ODD, 1576, 768, 3072, 16)
    user_table(tmp_path)
    tuned.tables.cache_clear()
    chosen = gemm_s8.GEMM_CONFIGS[90][2]
    assert chosen is not predicted
    assert gemm_s8.choose(ODD, 1576, 768, 3072, 16) is gemm_s8.choose(ODD, 1600, 768, 3072, 16) is chosen
    for m, n, k in ((1800, 768, 3072), (1576, 3072, 768)):
        assert gemm_s8.choose(ODD, m, n, k, 16) is gemm_s8.predict(ODD, m, n, k)
    assert gemm_s8.choose(ODD, 1576, 768, 3072, 16, groups=True) in gemm_s8.GROUP_CONFIGS[90]
    assert gemm_s8.choose(ODD, 1576, 768, 3072, 4) is gemm_s8.RAGGED_CONFIG


@pytest.mark.parametrize("order", [(196, 197), (197, 196)])
def test_of_two_measurements_in_a_bucket_the_larger_m_counts(order):
    choices = {tuned.Launch("gemm", m, (768, 768)): m for m in order}
    assert tuned.Table(ODD, "measured", {}, choices).find(tuned.Launch("gemm", 200, (768, 768))) == 197


def test_a_predicted_entry_holds_for_its_very_m(tmp_path):
    user_table(tmp_path, source="predicted")
    assert tuned.find(ODD, GEMM) is gemm_s8.GEMM_CONFIGS[90][2]
    assert tuned.find(ODD, dataclasses.replace(GEMM, m=1577)) is None


def test_the_users_table_comes_before_the_shipped_one_and_both_are_logged_once(tmp_path, caplog):
    shipped = tuned.find(H100, GEMM)
    tuned.tables.cache_clear()
    other = next(c for c in gemm_s8.GEMM_CONFIGS[90] if c is not shipped)
    path = user_table(tmp_path, H100, chosen=[(GEMM, gemm_s8.GEMM_CONFIGS[90].index(other))])
    with caplog.at_level(logging.INFO, "vqvit"):
        assert [tuned.find(H100, GEMM) for _ in range(3)] == [other] * 3
    assert tuned.find(H100, tuned.Launch("gemm", 197, (768, 3072))) is not None, "the shipped table still serves"
    logged = [record.getMessage() for record in caplog.records]
    assert len(logged) == 2 and f"1 measured choices of tiles from {path}" in logged[0]
    assert f"predicted choices of tiles from {tuned.SHIPPED}" in logged[1]


def test_the_named_file_comes_instead_of_the_users(tmp_path, monkeypatch):
    user_table(tmp_path / "user", chosen=[(GEMM, 3)])
    named = tmp_path / "mine.json"
    tuning.write(named, document(chosen=[(GEMM, 1)]))
    monkeypatch.setenv(tuned.VARIABLE, str(named))
    assert tuned.find(ODD, GEMM) is gemm_s8.GEMM_CONFIGS[90][1]
    assert len(tuned.tables(ODD)) == 1


def test_attention_takes_the_launches_of_the_table(tmp_path, monkeypatch):
    wide = launch.Device(arch=90, sms=10**6)  # predicted: two launches
    at = tuned.Launch("attention_quantize", 10, (2, 64, 5, 70))
    monkeypatch.setattr(attention_s8, "device_of", lambda tensor: wide)
    codes, scale = (torch.randint(-127, 128, (2, 2, s, 64), dtype=torch.int8) for s in (5, 70, 70)), torch.rand
    operands = (*codes, scale(2, 2, 5) * 0.02, scale(2, 2, 70) * 0.02, scale(2, 2, 64), 0.125)
    two = attention_s8.int8_attention_quantize(*operands)
    user_table(tmp_path, wide, chosen=[(at, 0)])
    tuned.tables.cache_clear()
    monkeypatch.setattr(attention_s8, "int8_attention", lambda *_: pytest.fail("two launches"))
    one = attention_s8.int8_attention_quantize(*operands)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_no_table_serves_the_interpreter(tmp_path, monkeypatch):
    monkeypatch.setenv(tuned.VARIABLE, str(tmp_path / "absent.json"))
    assert tuned.tables(launch.Device(launch.INTERPRETER, 1)) == ()


# ---- files ----------------------------------------------------------------------------------------------------------


def changed(**fields) -> str:
    return json.dumps(document() | fields)


def unknown_config() -> str:
    good = document()
    good["configs"]["gemm"][2]["block_m"] = 96
    return json.dumps(good)


BAD = {
    "text": ("{", "in JSON; it fails to parse"),
    "list": ("[]", "of format 1; got None"),
    "newer": (changed(format=2), "format 1; got 2, written by a later version of vqvit"),
    "source": (changed(source="guessed"), "expected one of measured, predicted; got 'guessed'"),
    "config": (unknown_config(), "expected one of the configs that ship for sm_90: GemmConfig.block_m=128"),
    "field": (changed(configs={"gemm": [{"tile": 1}]}), "configs that ship for sm_90.*got {'tile': 1}"),
    "kind": (changed(configs={"conv": []}), "expected one of gemm, gemm_groups, attention_quantize; got 'conv'"),
    "row": (changed(row=91), "expected one of the config tables' rows; got 91"),
    "index": (changed(entries=[{"kind": "gemm", "m": 1, "shape": [1, 2], "config": 99}]), "config below 20; got 99"),
    "no fields": (json.dumps({"format": 1}), "expected the fields of a table; got KeyError: 'row'"),
    "another device": (json.dumps(document(H100)), "row 90 with 7 multiprocessors; got one for row 90 with 132"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_table_is_an_error_if_named_and_ignored_if_found(tmp_path, monkeypatch, caplog, kind):
    content, message = BAD[kind]
    path = tmp_path / tuned.file_name(ODD)
    path.write_text(content)
    tuned.search(tmp_path)
    assert gemm_s8.choose(ODD, 1576, 768, 3072, 16) is gemm_s8.predict(ODD, 1576, 768, 3072)
    assert "ignoring a table" in caplog.text and str(path) in caplog.text
    tuned.tables.cache_clear()
    monkeypatch.setenv(tuned.VARIABLE, str(path))
    with pytest.raises(tuned.TableError, match=message):
        gemm_s8.choose(ODD, 1576, 768, 3072, 16)


def test_a_named_file_that_is_absent_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv(tuned.VARIABLE, str(tmp_path / "absent.json"))
    with pytest.raises(tuned.TableError, match="No such file"):
        tuned.find(ODD, GEMM)


def test_tables_survive_reordered_configs_and_new_fields_with_defaults(tmp_path, monkeypatch):
    path = user_table(tmp_path)

    @dataclasses.dataclass(frozen=True)
    class WiderConfig(gemm_s8.GemmConfig):
        cluster: int = 1

    later = tuple(WiderConfig(**dataclasses.asdict(c)) for c in reversed(gemm_s8.GEMM_CONFIGS[90]))
    monkeypatch.setitem(gemm_s8.GEMM_CONFIGS, 90, (WiderConfig(64, 64, 64, 4, 4, 1, cluster=2), *later))
    assert tuned.read(path, ODD).choices[GEMM] is later[-1 - 2]


SHIPPED = sorted(path.name for path in tuned.SHIPPED.glob("*.json"))


def test_each_predicted_part_has_a_shipped_table():
    from vqvit.kernels.devices import config_row

    parts = {launch.Device(config_row(p.capability), p.multiprocessors) for p in tuning.PARTS.values()}
    assert {tuned.file_name(device) for device in parts} == set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_tables_say_what_they_are_and_predictions_are_current(name):
    table = tuned.read(tuned.SHIPPED / name)
    assert tuned.file_name(table.device) == name and len(table.choices) > 100
    assert set(table.provenance) >= {"device", "capability", "date", "torch", "triton", "commit", "command"}
    if table.source == "predicted":
        stale = [at for at, config in table.choices.items() if tuned.predict(table.device, at) != config]
        part = table.provenance["device"]
        assert not stale, f"the model changed: vqvit tune --predict {part} --output kernels/tables/{name}"


def test_installations_have_the_tables(tmp_path):
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (tables,) = tmp_path.rglob("tables")
    assert tables.parent.name == "kernels" and sorted(os.listdir(tables)) == SHIPPED


# ---- measuring ------------------------------------------------------------------------------------------------------


def tiny_models() -> list[torch.nn.Module]:
    from transformers import ViTConfig, ViTForImageClassification

    shape = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256}
    return tuning.quantized(ViTForImageClassification(ViTConfig(image_size=32, patch_size=16, **shape)).eval())


def given_times(us: dict[str, float]):
    """A timer that runs the last call of every candidate and returns `us`, or 10 where that says nothing."""

    def timer(candidates, device):
        for calls in candidates.values():
            calls[-1]()
        return {name: us.get(name, 10.0) for name in candidates}

    return timer


def test_launches_of_a_model_are_measured_and_the_table_is_used(tmp_path):
    calls = list(tuning.record(tiny_models(), [torch.randn(2, 3, 32, 32)]))
    assert {call.launch for call in calls} == {
        tuned.Launch("gemm_groups", 10, (384, 128)),  # q, k and v
        tuned.Launch("gemm", 10, (128, 128)),  # attn_out
        tuned.Launch("gemm", 10, (256, 128)),  # fc1
        tuned.Launch("gemm", 10, (128, 256)),  # fc2
        tuned.Launch("gemm_groups", 10, (128, 128)),
        tuned.Launch("gemm_groups", 10, (256, 128)),
        tuned.Launch("gemm_groups", 10, (128, 256)),
        tuned.Launch("attention_quantize", 10, (2, 64, 5, 5)),
        tuned.Launch("gemm", 2, (128, 128)),  # the last block, for CLS alone
        tuned.Launch("gemm", 2, (256, 128)),
        tuned.Launch("gemm", 2, (128, 256)),
        tuned.Launch("gemm_groups", 2, (128, 128)),
        tuned.Launch("gemm_groups", 2, (256, 128)),
        tuned.Launch("gemm_groups", 2, (128, 256)),
        tuned.Launch("attention_quantize", 2, (2, 64, 1, 5)),
        tuned.Launch("gemm", 8, (128, 768)),  # patches
        tuned.Launch("gemm", 2, (2, 128)),  # head
    }
    calls = [call for call in calls if call.launch.m > 2]  # all kinds; the interpreter takes its time
    timer = given_times({"0": 10.0, "1": 8.0, "2": 12.0})
    choices = list(tuning.measure(calls, ODD, torch.device("cpu"), timer))
    assert [choice.problem for choice in choices] == [""] * len(calls)
    assert {choice.chosen for choice in choices} == {1}
    tuning.write(tmp_path / tuned.file_name(ODD), tuning.table(choices, ODD, "measured", FACTS))
    tuned.search(tmp_path)
    for call in calls:
        assert tuned.find(ODD, call.launch) is tuned.configs(call.launch.kind, 90)[1]


def stub(result, at=GEMM) -> tuning.Call:
    """A call whose result is `result` of the config in force."""
    return tuning.Call(lambda x: result(tuned.find(ODD, at)), (torch.zeros(3),), {}, at)


def test_a_gain_within_the_noise_does_not_move_the_choice():
    predicted = gemm_s8.GEMM_CONFIGS[90].index(gemm_s8.predict(ODD, 1576, 768, 3072))
    faster = (predicted + 1) % len(gemm_s8.GEMM_CONFIGS[90])
    for us, chosen in ((9.9, predicted), (9.7, faster)):
        timer = given_times({str(faster): us})
        (choice,) = tuning.measure([stub(lambda c: torch.ones(3))], ODD, torch.device("cpu"), timer)
        assert (choice.predicted, choice.chosen, choice.us[faster]) == (predicted, chosen, us)


def test_other_bits_and_failures_make_no_entry():
    def wrong(config):
        return torch.ones(3) + (config is gemm_s8.GEMM_CONFIGS[90][2])

    def failing(config):
        if config is gemm_s8.GEMM_CONFIGS[90][1]:
            raise RuntimeError("out of resources\nmore")
        return torch.ones(3)

    calls = [stub(wrong), stub(failing), stub(lambda c: torch.tensor([torch.nan, 1.0]))]
    choices = list(tuning.measure(calls, ODD, torch.device("cpu"), given_times({})))
    assert "block_m=64, block_n=128" in choices[0].problem and "other results than" in choices[0].problem
    assert choices[1].problem.endswith("RuntimeError: out of resources") and choices[2].problem == ""
    assert len(tuning.table(choices[:2], ODD, "measured", FACTS)["entries"]) == 0
    assert tuned._forced == {}


def test_operands_rotate_until_no_cache_holds_them():
    seen = []

    def timer(candidates, device):
        for calls in candidates.values():
            seen.append(len({call.args[1][0].data_ptr() for call in calls}))
        return dict.fromkeys(candidates, 1.0)

    small, large = (tuning.Call(lambda x: x, (torch.zeros(size),), {}, GEMM) for size in (10, 4_000_000))
    list(tuning.measure([small, large], ODD, torch.device("cpu"), timer))
    count = len(gemm_s8.configs(90))
    assert seen == [20] * count + [5] * count


LOOKUPS = ("int8_mm", "int8_linear", "int8_linear_quantize", "int8_linear_qkv", "int8_attention_quantize")


class LookedUp(Exception):  # noqa: N818  (no error: the kernel need not run)
    pass


@pytest.mark.parametrize("op", LOOKUPS)
def test_recorded_launches_are_those_that_the_kernels_look_up(monkeypatch, op):
    def find(device, at):
        raise LookedUp(at)

    for kernels in (gemm_s8, attention_s8):
        monkeypatch.setattr(kernels, "device_of", lambda tensor: H100)
    monkeypatch.setattr(tuned, "find", find)
    compared = 0
    with vqvit.backend("triton"):
        for draw in CASES[op].values():
            arguments = draw()
            if arguments[0].numel() == 0 or not arguments[0].is_contiguous():
                continue
            call = getattr(torch.ops.vqvit, op)
            expected = tuning.launch_of(call.default, arguments, {})
            if expected is None:
                call(*arguments)
                continue
            with pytest.raises(LookedUp) as asked:
                call(*arguments)
            assert asked.value.args == (expected,)
            compared += 1
    assert compared


def test_static_and_asymmetric_plans_are_recorded_too():
    from transformers import ViTConfig, ViTForImageClassification

    shape = {"hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 256}
    model = ViTForImageClassification(ViTConfig(image_size=32, patch_size=16, **shape)).eval()
    vqvit.quantize_(model, QuantConfig(tier="int8_asym", activation="per_token_asym", attention="float"))
    found = {call.launch.kind for call in tuning.record([model], [torch.randn(1, 3, 32, 32)])}
    assert found == {"gemm"}
