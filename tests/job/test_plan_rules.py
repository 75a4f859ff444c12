"""The rules of a plan: pure functions of dataset, machine and given options."""

import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given as examples
from hypothesis import settings
from hypothesis import strategies as st

from flexunet.errors import ContentError
from flexunet.settings import fields_of, parse_settings
from flexunet.storage import LocalStore
from job.config import TrainConfig
from job.distributed.rendezvous import ProcessSpec
from job.models.registry import build_model
from job.planning import facts as facts_module
from job.planning.advice import prep_command
from job.planning.facts import DatasetFacts, MachineFacts, machine_facts, parse_gpus
from job.planning.network_cost import network_cost, receptive_field
from job.planning.plan_file import PLAN_NAME, PLANNED, Plan, plan_json, read_plan
from job.planning.rules import RULES, make_plan
from job.planning.situation import GIB, Limits
from tests.source_tree import ROOT

FACTS = DatasetFacts(
    num_train=24,
    num_valid=6,
    height=256,
    width=256,
    channels=1,
    classes=("background", "cell"),
    class_shares=(0.9, 0.1),
    foreground_share=1.0,
    geometry="stretch",
    is_oriented=False,
    region_side=None,
    source_side=512,
)
LAPTOP = MachineFacts(
    host="laptop", device="cpu", memory_bytes=16 * GIB, cores=2, precision="float32"
)
GPU = MachineFacts(
    host="node", device="gpu", memory_bytes=16 * GIB, cores=8, precision="mixed_bfloat16"
)


def plan(
    facts: dict[str, Any] | None = None,
    machine: MachineFacts = LAPTOP,
    given: dict[str, Any] | None = None,
    limits: Limits | None = None,
) -> Plan:
    return make_plan(FACTS.model_copy(update=facts or {}), machine, given or {}, limits)


def values(found: Plan) -> dict[str, Any]:
    return {each.option: each.value for each in found.choices}


@settings(max_examples=40)
@examples(
    st.integers(20, 300),
    st.sampled_from([(128, 128), (256, 256), (512, 384), (565, 584), (1024, 1024), (96, 100)]),
    st.sampled_from([LAPTOP, GPU]),
    st.sampled_from([3, 6, 12, 40]),
    st.integers(1, 6),
    st.floats(0, 1),
)
def test_every_plan_is_a_valid_config_that_fits_dataset_memory_and_workers(
    num_train: int,
    size: tuple[int, int],
    machine: MachineFacts,
    gib: int,
    num_replicas: int,
    share: float,
) -> None:
    height, width = size
    machine = machine.model_copy(update={"memory_bytes": gib * GIB, "num_replicas": num_replicas})
    facts = {"num_train": num_train, "height": height, "width": width, "foreground_share": share}
    found = plan(facts, machine)
    config = parse_settings(TrainConfig, found.values(), "plan")
    multiple = 2 ** (config.model.num_layers - 1)
    assert height % multiple == width % multiple == 0
    local, rest = divmod(config.global_batch_size, num_replicas)
    assert rest == 0
    assert local % config.accumulate == 0
    assert config.global_batch_size >= 4
    assert found.memory_bytes <= found.machine.memory_bytes or found.notes
    assert 500 <= found.num_steps <= 9000 + local * num_replicas
    assert set(values(found)) == PLANNED
    assert all(each.reason for each in found.choices)
    assert Plan.model_validate_json(plan_json(found)) == found


def test_a_given_option_wins_and_the_others_are_planned_around_it() -> None:
    free, deeper = plan(), plan(given={"model.num_layers": 6})
    assert values(free)["model.num_layers"] == 5
    chosen = {each.option: each for each in deeper.choices}
    assert (chosen["model.num_layers"].value, chosen["model.num_layers"].source) == (6, "given")
    # 6 levels of 16 filters have as many parameters as few samples may have.
    assert values(plan(machine=GPU))["model.base_filters"] == 32
    assert values(plan(machine=GPU, given={"model.num_layers": 6}))["model.base_filters"] == 16
    # More filters need more memory, so less of the batch is computed at once.
    small = LAPTOP.model_copy(update={"memory_bytes": 2 * GIB})
    wide = plan(machine=small, given={"model.base_filters": 32})
    assert values(wide)["accumulate"] > values(plan(machine=small))["accumulate"]
    assert values(plan(given={"epochs": 3}))["schedule.warmup_epochs"] == 0.15
    assert plan(given={"epochs": 3}).num_steps == 18
    for given in (
        {"schedule.reduce_on_plateau": True},
        {"model.normalization": "batch"},
        {"model.name": "residual-unet"},
        {"model.name": "encoder-unet", "model.encoder_batch_norm": "synchronized"},
    ):
        parse_settings(TrainConfig, plan(given=given, machine=small).values(), "plan")


@pytest.mark.parametrize(
    ("facts", "option", "value"),
    [
        ({"height": 128, "width": 128}, "model.num_layers", 4),
        ({"height": 1024, "width": 1024}, "model.num_layers", 7),
        ({"height": 100, "width": 100}, "model.num_layers", 3),
        ({"region_side": 150.0}, "model.num_layers", 6),
        ({"foreground_share": 0.2}, "foreground_share", 0.5),
        ({"foreground_share": 0.8}, "foreground_share", None),
        ({"is_oriented": True}, "augmentation.hflip_probability", 0.0),
        ({"channels": 3, "classes": tuple("abcde")}, "augmentation.vflip_probability", 0.0),
        ({"num_train": 200}, "augmentation.preset", "light"),
        ({"foreground_share": 0.2}, "foreground_share_end", 0.0),
        ({"num_train": 3}, "global_batch_size", 4),
        ({"num_train": 2}, "global_batch_size", 2),
    ],
)
def test_the_dataset_decides(facts: dict[str, Any], option: str, value: Any) -> None:
    assert values(plan(facts))[option] == value


@pytest.mark.parametrize(("replicas", "batch"), [(1, 4), (2, 4), (3, 6), (5, 5), (6, 6), (8, 8)])
def test_the_replicas_divide_the_batch(replicas: int, batch: int) -> None:
    machine = LAPTOP.model_copy(update={"num_replicas": replicas})
    assert values(plan(machine=machine))["global_batch_size"] == batch


def test_limits_of_a_dry_step_are_kept() -> None:
    found = values(plan(limits=Limits(samples_at_once=1, base_filters=6)))
    assert (found["accumulate"], found["model.base_filters"]) == (4, 6)


def test_short_memory_lowers_first_the_samples_then_the_filters() -> None:
    def on(gib: float, side: int) -> tuple[Any, Any]:
        machine = LAPTOP.model_copy(update={"memory_bytes": int(gib * GIB)})
        found = values(plan({"height": side, "width": side}, machine))
        return found["model.base_filters"], found["accumulate"]

    filters, parts = zip(*(on(gib, 1024) for gib in (32, 12, 6, 3, 2)), strict=True)
    assert list(filters) == sorted(filters, reverse=True)
    assert parts[0] == 1 < max(parts)
    assert filters[-1] < filters[0]


def test_a_time_budget_gives_the_length_and_a_network_for_it() -> None:
    short, long = (plan(given={"time_budget": minutes}) for minutes in (2.0, 60.0))
    config = parse_settings(TrainConfig, short.values(), "plan")
    assert (config.epochs, config.time_budget) == (None, 2.0)
    assert values(short)["model.base_filters"] < values(long)["model.base_filters"]
    assert 1.9 < short.minutes < 2.1
    assert values(short)["optimizer.ema_momentum"] < values(long)["optimizer.ema_momentum"]
    assert plan(given={"time_budget": 2.0, "epochs": 3}).num_steps == 18


@pytest.mark.parametrize(
    ("given", "levels"),
    [
        ({"model.deep_supervision": 4}, 6),
        ({"model.dropout_rate": 0.25}, 4),
        ({"model.dropout_rate": 0.5}, 2),
    ],
)
def test_levels_are_planned_around_supervision_and_dropout(
    given: dict[str, Any], levels: int
) -> None:
    found = plan(given=given)
    assert found.value("model.num_layers") == levels
    parse_settings(TrainConfig, found.values(), "plan")


def test_the_command_for_tiles_can_be_given() -> None:
    facts = FACTS.model_copy(update={"prep_options": {"geometry": "pad", "image_size": 512}})
    words = shlex.split(prep_command(facts, tile=512, tile_overlap=64))
    assert words[4:] == ["--tile", "512", "--tile-overlap", "64"]
    assert "--geometry pad" in prep_command(facts, image_size=768)


def test_lost_regions_give_the_command_that_keeps_them() -> None:
    lost = {"num_regions": 113, "num_lost": 9, "num_emptied": 1}
    (note,) = plan(lost | {"prep_options": {"image_size": 256, "group_regex": "p[0-9]+"}}).notes
    assert "lose 9 of 113 mask regions, and 1 image lost all foreground" in note
    assert "flexunet prep SOURCE DATASET --group-regex 'p[0-9]+' --image-size 512" in note
    (note,) = plan(lost | {"source_side": 3000}).notes
    assert note.endswith("--tile 512 --tile-overlap 64")
    assert prep_command(FACTS, image_size=64).endswith("DATASET --image-size 64")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_layers": 1, "normalization": "group"},
        {"num_layers": 4, "normalization": "none"},
        {"num_layers": 4, "normalization": "group", "max_filters": 16},
        {"name": "residual-unet", "num_layers": 3, "normalization": "group"},
        {"name": "residual-unet", "num_layers": 4, "normalization": "none", "max_filters": 16},
        {"name": "encoder-unet", "num_layers": 6, "encoder_weights": "none"},
        {"name": "encoder-unet", "num_layers": 6, "encoder_weights": "none"}
        | {"encoder": "mobilenet-v2", "normalization": "group"},
    ],
    ids=str,
)
def test_the_estimated_parameters_are_those_of_the_network(changes: dict[str, Any]) -> None:
    model = {"base_filters": 6, **changes}
    config = parse_settings(TrainConfig, {"model": model}, "test").model
    built = build_model(config, image_shape=(32, 32, 3), num_classes=2)
    trainable = sum(math.prod(each.shape) for each in built.trainable_weights)
    assert network_cost(config, (32, 32, 3), 2).num_parameters == trainable


def test_the_receptive_field_is_that_of_the_layers() -> None:
    def reach(**model: Any) -> int:
        return receptive_field(parse_settings(TrainConfig, {"model": model}, "test").model)

    assert reach(num_layers=1, base_kernels=(3, 3)) == 5
    # Level 0: 4 convolutions of 3x3; pooling; level 1: 2 of them at every second pixel.
    assert reach(num_layers=2, base_kernels=(3, 3)) == 1 + 4 * 2 + 1 + 2 * 2 * 2
    assert reach(num_layers=1, base_kernels=(5, 3), dilation=(2, 1)) == 1 + 2 * 4 * 2


def test_gpus_are_those_that_the_process_may_use() -> None:
    text = "0, GPU-a, 16384, 7.5\n1, GPU-b, 81920, 9.0\n2, GPU-c, [N/A], 8.0\n"
    both = parse_gpus(text, None)
    assert [each.capability for each in both] == [(7, 5), (9, 0)]
    assert parse_gpus(text, "1") == parse_gpus(text, "GPU-b") == both[1:]
    assert parse_gpus(text, "") == parse_gpus(text, "-1,0") == []
    long = text.replace("GPU-a", "GPU-ab12").replace("GPU-b", "GPU-abff")
    assert parse_gpus(long, "GPU-abf") == both[1:]
    assert parse_gpus(long, "GPU-ab") == parse_gpus(long, "GPU-c1") == []


def test_a_gpu_that_tensorflow_cannot_use_is_not_planned_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listed = parse_gpus("0, GPU-a, 16384, 7.5\n1, GPU-b, 81920, 9.0\n", None)
    monkeypatch.setattr(facts_module, "visible_gpus", lambda: listed)
    config = TrainConfig(data="data")
    for num_seen, device, replicas in ((0, "cpu", 1), (1, "gpu", 1), (2, "gpu", 2)):
        monkeypatch.setattr(facts_module, "num_tensorflow_gpus", lambda num=num_seen: num)
        for machine in (machine_facts(config), machine_facts(config, num_gpus=num_seen)):
            assert (machine.device, machine.local_replicas) == (device, replicas)


def test_the_memory_is_shared_with_others_on_the_machine() -> None:
    config = TrainConfig(data="data")
    whole = machine_facts(config, num_gpus=0).memory_bytes
    two_here = ProcessSpec(0, ("a:1", "a:2", "b:1"))
    for spec, share, expected in ((None, 0.5, 0.5), (two_here, 1.0, 0.5), (two_here, 0.25, 0.25)):
        found = machine_facts(config, spec, num_gpus=0, node_share=share).memory_bytes
        assert found == pytest.approx(whole * expected, rel=1e-6)


@pytest.mark.parametrize(("change", "option"), [("twice", "epochs"), ("unknown", "seed")])
def test_a_stored_plan_chooses_each_planned_option_once(
    change: str, option: str, tmp_path: Path
) -> None:
    values = json.loads(plan_json(plan()))
    (epochs,) = (each for each in values["choices"] if each["option"] == "epochs")
    values["choices"].append({**epochs, "option": option})
    store = LocalStore(str(tmp_path))
    store.put(PLAN_NAME, json.dumps(values).encode())
    with pytest.raises(ContentError, match=rf"plan\.json: choices: .* option {option} is chosen"):
        read_plan(store)


def test_a_plan_with_an_option_that_earlier_rules_chose_is_read(tmp_path: Path) -> None:
    values = json.loads(plan_json(plan()))
    earlier = {"option": "augmentation.shrink_probability", "value": 0.5, "reason": "few images"}
    values["choices"].append(earlier)
    store = LocalStore(str(tmp_path))
    store.put(PLAN_NAME, json.dumps(values).encode())
    stored = read_plan(store)
    assert stored is not None
    assert stored.value("augmentation.shrink_probability") == 0.5


def test_the_rules_choose_options_that_exist_and_are_documented() -> None:
    assert {".".join(path) for path, _ in fields_of(TrainConfig)} >= PLANNED
    assert sorted(option for rule in RULES for option in rule.options) == sorted(PLANNED)
    page = (ROOT / "docs" / "how-to" / "plan.md").read_text(encoding="utf-8")
    rows = [
        f"| {', '.join(f'`{option}`' for option in rule.options)} | {rule.text} |" for rule in RULES
    ]
    assert re.findall(r"^\| `.*", page, re.MULTILINE) == rows
