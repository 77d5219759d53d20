"""Channels per group at every width: as many groups as at width 1, unless the key says otherwise."""

import shutil

import pytest
import torch
from tiny_runs import directory_of, tiny_config

from kfac_sua.bench.communication.counted import ShapeModel
from kfac_sua.bench.settings import compose_settings, parse_items
from kfac_sua.build import build_model, build_preconditioner
from kfac_sua.compose import compose_config
from kfac_sua.compose.saved import overrides_of
from kfac_sua.config import Config, KroneckerConfig, scaled_group_size, to_plain
from kfac_sua.preconditioner.report import LayerReport
from kfac_sua.runs.directory import fingerprint, with_channels_per_group
from kfac_sua.runs.run_info import read_run_info, write_run_info
from kfac_sua.training.loop import run

GIVEN = ("optimizer.lr=0.1", "preconditioner.damping=0.1")  # what auto stands for may change
UNSCALED = "preconditioner.group_size_scaling=none"
NARROW = "sua_grouped (groups of 8)"
NETWORKS = {"vgg11": 32, "preact_resnet50": 64}  # with the paper's channels per group
# Fingerprints on a CPU of configurations of before the key, which scaled nothing: network, preconditioner and width.
FINGERPRINTS_OF_BEFORE = {
    ("vgg11", "sua", 0.25): "6a1ad1c9",
    ("vgg11", "grouped", 1.0): "dfa1b86f",
    ("vgg11", "grouped", 0.25): "3d31be30",
    ("vgg11", "sua_grouped", 1.0): "0be24f32",
    ("vgg11", "sua_grouped", 0.25): "0b01cae5",
    ("preact_resnet50", "sua_grouped", 0.125): "97f34e52",
}


def config_of(model: str, preconditioner: str, width: float, *overrides: str) -> Config:
    """Return the configuration of a network at a width."""
    names = (f"model={model}", f"model.width={width}", f"preconditioner={preconditioner}")
    return compose_config([*names, *GIVEN, *overrides])


def convolutions(model: str, width: float, *overrides: str) -> dict[str, LayerReport]:
    """Return the rows of the preconditioner's table, as training makes it, but for the classifier."""
    config = config_of(model, "sua_grouped", width, f"preconditioner.group_size={NETWORKS[model]}", *overrides)
    preconditioner = build_preconditioner(config, build_model(config, 10, torch.device("cpu")))
    assert preconditioner is not None
    return {row.name: row for row in preconditioner.describe().rows if row.kind == "Conv2d" and not row.reason}


@pytest.mark.parametrize("width", [0.25, 0.125])
@pytest.mark.parametrize("model", NETWORKS)
def test_a_layer_has_as_many_groups_as_at_width_1(model, width):
    """On both sides of every convolution; those groups hold a quarter or an eighth of the channels."""
    whole, narrow = convolutions(model, 1.0), convolutions(model, width)
    assert narrow.keys() == whole.keys()
    for name, row in narrow.items():
        for side in ("activation_blocks", "gradient_blocks"):
            count, size = getattr(row, side)
            whole_count, whole_size = getattr(whole[name], side)
            assert count == whole_count, name
            assert size == (whole_size * width if whole_size > 3 else 3), name  # an image has 3 channels at any width


def test_without_scaling_a_narrow_network_has_fewer_groups():
    """None of the 3×3 convolutions of ResNet50 at an eighth of the width was split in the runs of before the key."""
    before, now = (convolutions("preact_resnet50", 0.125, *more) for more in ([UNSCALED], []))
    assert {row.gradient_blocks[0] for name, row in before.items() if name.endswith("conv2")} == {1}
    assert {row.gradient_blocks[0] for name, row in now.items() if name.endswith("conv2")} == {1, 2, 4, 8}


@pytest.mark.parametrize(
    ("group_size", "width", "expected"),
    [(32, 1.0, 32), (32, 0.25, 8), (64, 0.125, 8), (32, 2.0, 64), (32, 0.3, 10), (32, 1 / 64, 1), (10, 0.25, 2)],
)
def test_sizes_are_rounded_like_channels(group_size, width, expected):
    """To the nearest integer, ties to even, and never to none."""
    assert scaled_group_size(group_size, width) == expected
    config = config_of("vgg11", "grouped", width, f"preconditioner.group_size={group_size}").preconditioner
    assert isinstance(config, KroneckerConfig)
    assert config.channels_per_group(width) == config.settings(width).group_size == expected


def test_without_groups_there_is_nothing_to_scale():
    """The whole layer stays one block."""
    config = config_of("vgg11", "kfac", 0.25).preconditioner
    assert isinstance(config, KroneckerConfig)
    assert config.settings(0.25).group_size is None


@pytest.mark.parametrize("setting", FINGERPRINTS_OF_BEFORE)
def test_runs_of_before_the_key_keep_their_fingerprints(setting):
    """Also under the new default, where it changes no number: at width 1 and without groups."""
    is_same = setting[1] == "sua" or setting[2] == 1
    for overrides in ([UNSCALED], []):
        found = fingerprint(config_of(*setting, *overrides), "cpu")[:8]
        assert (found == FINGERPRINTS_OF_BEFORE[setting]) == (is_same or bool(overrides))


def test_a_fingerprint_goes_by_the_channels_that_a_group_has():
    """However they came to be so many, the run is the same."""
    scaled = config_of("vgg11", "grouped", 0.25)
    given = config_of("vgg11", "grouped", 0.25, "preconditioner.group_size=8", UNSCALED)
    assert fingerprint(scaled, "cpu") == fingerprint(given, "cpu")
    assert with_channels_per_group(to_plain(scaled)) == with_channels_per_group(to_plain(given))
    assert with_channels_per_group(to_plain(scaled))["preconditioner"]["group_size"] == 8


def test_a_record_of_before_the_key_means_what_the_run_did():
    """Its groups hold as many channels as it says, at any width."""
    config = config_of("vgg11", "grouped", 0.25, UNSCALED)
    record = to_plain(config)
    del record["preconditioner"]["group_size_scaling"], record["model"]["initialisation"]
    assert with_channels_per_group(record)["preconditioner"]["group_size"] == 32
    again = compose_config(overrides_of(record, "run.json"))
    assert to_plain(again) == to_plain(config)
    assert fingerprint(again, "cpu")[:8] == FINGERPRINTS_OF_BEFORE["vgg11", "grouped", 0.25]


def test_a_run_of_before_the_key_is_told_of(tmp_path, capsys):
    """The same command makes another run now; it says where the older one is and how to go on with that, once."""
    command = ("preconditioner=grouped", "preconditioner.group_size=8", "model.width=0.5", "epochs=1", *GIVEN)
    before, now = (directory_of(tiny_config(tmp_path, *command, *more)) for more in ([UNSCALED], []))

    def said() -> str:
        """Return what the command says on stderr."""
        run(tiny_config(tmp_path, *command))
        return capsys.readouterr().err

    run(tiny_config(tmp_path, *command, UNSCALED))
    assert said() == ""  # a run with the key was meant as it is
    info = read_run_info(before.info)
    del info.config["preconditioner"]["group_size_scaling"]
    write_run_info(before.info, info)
    shutil.rmtree(now.path)
    sentence = said()
    assert sentence.startswith("This is a new run, in groups of 4")
    assert f"group_size_scaling=none to go on with that, {before.path}." in sentence
    assert said() == ""  # the new run has begun


def test_a_record_scales_anew_at_another_width():
    """A configuration keeps what was asked for: a run again at full width has the paper's groups."""
    record = to_plain(config_of("vgg11", "grouped", 0.25))
    wide = compose_config([*overrides_of(record, "run.json"), "model.width=1"])
    assert fingerprint(wide, "cpu")[:8] == FINGERPRINTS_OF_BEFORE["vgg11", "grouped", 1.0]


@pytest.mark.parametrize(("width", "name", "blocks"), [(1.0, "sua_grouped", (2, 32)), (0.25, NARROW, (2, 8))])
def test_measurements_of_cost_have_the_groups_of_training(width, name, blocks):
    """And name them where the width has scaled them: an earlier measurement of groups of 32 is of another setting."""
    items = parse_items(["sua", "sua_grouped"])
    plain_sgd, sua, grouped = compose_settings(items, [], {"model": "vgg11", "model.width": width, "device": "cpu"})
    assert [plain_sgd.name, sua.name, grouped.name] == ["baseline", "sua", name]
    assert ShapeModel(grouped.config).layers[0].layout.gradient_blocks == blocks
