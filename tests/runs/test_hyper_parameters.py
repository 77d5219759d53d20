"""The HPARAMS tab: what it shows unasked, what it leaves out, and columns that are those of all runs."""

import os

import pytest
from tensorboard.plugins.hparams.api_pb2 import DATA_TYPE_BOOL, DATA_TYPE_FLOAT64, DATA_TYPE_STRING, Experiment
from tensorboard.plugins.hparams.backend_context import _sort_and_reduce_to_hparams_limit
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from kfac_sua.compose import compose_config
from kfac_sua.config import to_plain
from kfac_sua.runs.hyper_parameters import BOOKKEEPING, KEYS, hyper_parameter_summaries, hyper_parameters
from kfac_sua.runs.tensorboard import SCALARS

TYPES = {bool: DATA_TYPE_BOOL, int: DATA_TYPE_FLOAT64, float: DATA_TYPE_FLOAT64, str: DATA_TYPE_STRING}
CHOICES = [
    ("preconditioner=baseline", "optimizer=muon", "schedule=step", "model=transformer", "dataset=digits"),
    ("preconditioner=baseline", "optimizer=adamw", "schedule=cosine", "num_threads=2"),
    ("preconditioner=sua_grouped", "preconditioner.kl_clip=0.001", "preconditioner.application=weight"),
]


def values_of(*overrides: str) -> dict:
    """Return the settings of a run."""
    return hyper_parameters(to_plain(compose_config(list(overrides))))


def experiment_of(values: dict) -> Experiment:
    """Return what a run says of the columns, in the order in which the server gives them away."""
    summary, _ = hyper_parameter_summaries(values, 0.0)
    experiment = HParamsPluginData.FromString(summary.value[0].metadata.plugin_data.content).experiment
    _sort_and_reduce_to_hparams_limit(experiment)
    return experiment


@pytest.mark.parametrize("overrides", CHOICES)
def test_any_run_names_the_columns_of_all(overrides):
    """The tab takes them from one run, which may be a baseline; their types are those of all runs' values."""
    columns = {info.name: info for info in experiment_of(values_of(*overrides)).hparam_infos}
    assert set(columns) == KEYS
    for others in CHOICES:
        for key, value in values_of(*others).items():
            assert columns[key].type == TYPES[type(value)], key
            choices = [one.string_value for one in columns[key].domain_discrete.values]
            assert not choices or not isinstance(value, str) or value in choices, key


def test_what_usually_differs_comes_first():
    """Five settings, which is how many are shown unasked, and the training loss beside the validation error."""
    experiment = experiment_of(values_of("preconditioner=baseline"))
    names = [info.name for info in experiment.hparam_infos]
    assert names[:5] == ["dataset", "model", "optimizer.lr", "preconditioner", "preconditioner.damping"]
    tags = [info.name.tag for info in experiment.metric_infos]
    assert tags[:2] == ["val/error", "train/eval_loss"]
    assert set(tags) <= set(SCALARS)
    assert len(tags) <= 5


def test_a_directory_whose_name_is_no_text_is_shown_by_its_code():
    """Event files hold UTF-8 only."""
    values = hyper_parameters({"start_from": os.fsdecode(b"caf\xe9")})
    assert values == {"start_from": r"caf\udce9"}
    assert len(hyper_parameter_summaries(values, 0.0)) == 2


def test_bookkeeping_is_left_out():
    """Where and how a run is carried out; each of these keys exists."""
    config = to_plain(compose_config(["num_threads=2", "log_interval=1", "checkpoint_interval_s=3"]))
    flat = {*config, *(f"dataset.{name}" for name in config["dataset"])}
    assert flat >= BOOKKEEPING
    assert not BOOKKEEPING & (hyper_parameters(config).keys() | KEYS)
