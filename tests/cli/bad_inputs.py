"""What a user may get wrong, each with the sentence that answers it: data for ``test_bad_input.py``."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kfac_sua.training.checkpoint import MAGIC

# Command line -> what the sentence must say (a regular expression).
BAD_COMMANDS = {
    # misspelt keys, groups and options
    "optimizer.lrr=0.1": r"no key 'optimizer.lrr' \(did you mean 'optimizer.lr'\?\); the keys of optimizer=sgd are",
    "lr=0.1": r"no key 'lr' \(did you mean 'optimizer.lr'\?\); the keys of the configuration are seed, device, epochs,",
    "preconditoner=sua": r"no key 'preconditoner' \(did you mean 'preconditioner'\?\)",
    "preconditioner=suaa": r"no preconditioner=suaa \(did you mean 'sua'\?\); choose one of .*baseline,",
    "model=resnet": r"no model=resnet.*; choose one of preact_resnet50, tiny, transformer, vgg11\.",
    "optimizer=adam": r"no optimizer=adam \(did you mean 'adamw'\?\); choose one of adamw, muon, sgd\.",
    "dataset=mnist": r"no dataset=mnist; choose one of cifar10, cifar100, digits\.",
    "schedule=linear": r"no schedule=linear; choose one of constant, cosine, step\.",
    "experiment=quickstrat_sua": r"no experiment=quickstrat_sua \(did you mean 'quickstart_sua'\?\)",
    "sweep=grid": r"no sweep=grid; choose one of lr, lr_damping",
    "+foo=1": r"no key 'foo'",
    "+optimizer.foo=1": r"no key 'optimizer.foo' with optimizer=sgd; the keys of optimizer=sgd are",
    "~seed": r"'seed' was removed but is needed; leave out '~seed'\.",
    "preconditioner=baseline preconditioner.damping=0.1": (
        r"no key 'preconditioner.damping' with preconditioner=baseline; the keys of preconditioner=baseline are name\."
    ),
    "schedule.gamma=0.1": r"no key 'schedule.gamma' with schedule=constant or cosine",
    "optimizer=adamw optimizer.momentum=0.9": (
        r"no key 'optimizer.momentum' with optimizer=adamw; the keys of optimizer=adamw are name, lr, weight_decay, bet"
    ),
    "optimizer.betas=[0.9,0.99]": r"no key 'optimizer.betas' with optimizer=sgd; the keys of optimizer=sgd are",
    "optimizer=muon optimizer.ns_step=3": r"no key 'optimizer.ns_step' \(did you mean 'optimizer.ns_steps'\?\)",
    "batch_norm=false": r"no key 'batch_norm' \(did you mean 'model.batch_norm'\?\)",
    "model=preact_resnet50 model.batch_norm=false": (
        r"no key 'model.batch_norm' with model=preact_resnet50 or transformer; .* or transformer are name, width, init"
    ),
    "model=transformer model.batch_norm=false": r"no key 'model.batch_norm' with model=preact_resnet50 or transformer;",
    # wrong types
    "preconditioner.damping=abc": r"preconditioner.damping must be a number or auto, got 'abc'\.",
    "preconditioner.damping=null": r"preconditioner.damping must be a number or auto, got null\.",
    "preconditioner.group_size=2.5": r"preconditioner.group_size must be an integer or null, got 2.5\.",
    "preconditioner.group_size_scaling=depth": (
        r"preconditioner.group_size_scaling must be one of width, none, got 'depth'\."
    ),
    "preconditioner.skip=classifier": r"preconditioner.skip must be a list such as \[a,b\], got 'classifier'\.",
    "preconditioner.fisher_type=true_fisher": (
        r"preconditioner.fisher_type must be one of empirical, mc, exact, got 'true_fisher'\."
    ),
    "model.batch_norm=maybe": r"model.batch_norm must be true or false, got 'maybe'\.",
    "model.initialisation=he": (
        r"model.initialisation must be one of he_fan_out, he_fan_in, xavier, pytorch, got 'he'\."
    ),
    "optimizer=adamw optimizer.betas=0.9": r"optimizer.betas must be a list such as \[0.5,0.9\], got 0.9\.",
    "schedule=step schedule.milestones=half": r"schedule.milestones must be a list such as \[0.5,0.9\], got 'half'\.",
    "dataset=cifar10 dataset.download=maybe": r"dataset.download must be true or false, got 'maybe'\.",
    "device=gpu": r"device must be one of auto, cpu, cuda, got 'gpu'\.",
    "epochs=2.5": r"epochs must be an integer, got 2.5\.",
    "channels_last=maybe": r"channels_last must be true or false, got 'maybe'\.",
    "model=null": r"model must be one of preact_resnet50, tiny, transformer, vgg11, got null\.",
    "seed=???": r"seed must be given a value\.",
    # out of range
    "preconditioner.damping=-1": r"preconditioner.damping must be a number > 0 within the range of float32, got -1",
    "preconditioner.damping=inf": r"preconditioner.damping must be a number > 0 within the range of float32, got inf\.",
    "preconditioner=grouped preconditioner.group_size=0": r"preconditioner.group_size must be >= 1 .*, got 0\.",
    "preconditioner.inverse_period=0": r"preconditioner.inverse_period must be >= 1 mini-batch, got 0\.",
    "preconditioner.activation_rows=0": r"preconditioner.activation_rows must be >= 1 or null \(all of them\), got 0\.",
    "preconditioner.activation_rows=9 preconditioner.weight_sharing=reduce": (
        r"preconditioner.activation_rows=9 takes some of a mini-batch's locations"
    ),
    "preconditioner.kl_clip=-1 preconditioner.application=weight": (
        r"preconditioner.kl_clip must be > 0 within the range of float32, or null \(no clipping\), got -1.0\."
    ),
    "preconditioner.kl_clip=abc": r"preconditioner.kl_clip must be a number or null, got 'abc'\.",
    "preconditioner.damping_final=0": (
        r"preconditioner.damping_final must be null \(it stays as it is\) or a number > 0 .*, got 0.0\."
    ),
    "preconditioner.adaptive_damping=0": r"preconditioner.adaptive_damping must be ≥ 1 .* or null \(never\), got 0\.",
    "preconditioner.adaptive_damping=true": r"preconditioner.adaptive_damping must be an integer or null",
    "preconditioner.ema_decay=1": r"preconditioner.ema_decay must be in \[0, 1\), got 1.0\.",
    "optimizer.lr=0": r"optimizer.lr must be a number > 0 within the range of float32, got 0.0\.",
    "optimizer.lr=nan": r"optimizer.lr must be a number > 0 within the range of float32, got nan\.",
    "optimizer.momentum=1": r"optimizer.momentum must be in \[0, 1\), got 1.0\.",
    "optimizer.weight_decay=-1e-4": r"optimizer.weight_decay must be a number ≥ 0 within the range of float32",
    "optimizer=adamw optimizer.betas=[0.9]": r"optimizer.betas must be two numbers in \[0, 1\) .*, got \[0.9\]\.",
    "optimizer=adamw optimizer.eps=0": r"optimizer.eps must be a number > 0 within the range of float32, got 0.0\.",
    "optimizer=muon optimizer.ns_steps=100": r"optimizer.ns_steps must be between 1 and 99, got 100\.",
    "optimizer=muon optimizer.adamw_lr_ratio=0": r"optimizer.adamw_lr_ratio must be a number > 0 .*, got 0.0\.",
    "optimizer=muon optimizer.adamw_betas=[0.9,1]": (
        r"optimizer.adamw_betas must be two numbers in \[0, 1\) such as \[0.9,0.99\], got \[0.9, 1.0\]\."
    ),
    "epochs=0": r"epochs must be ≥ 1 and at most 1000000, got 0\.",
    "batch_size=-5": r"batch_size must be ≥ 1, got -5\.",
    "seed=-1": r"seed must be between 0 and 4294967295, got -1\.",
    "num_threads=0": r"num_threads must be between 1 and 1024, or null \(PyTorch's choice\), got 0\.",
    "model.width=0": r"model.width must be > 0 and at most 64, got 0.0\.",
    "dataset.train_size=0": r"dataset.train_size must be ≥ 1 or null \(all images\), got 0\.",
    "output_dir=''": r"output_dir must be the path of a directory, got ''\.",
    "epochs=9 schedule=step schedule.gamma=0": r"schedule.gamma must be in \(0, 1\], got 0.0\.",
    # contradictions
    "preconditioner.damping_rule=exact preconditioner.inverse_method=low_rank": (
        r"preconditioner.inverse_method=low_rank cannot be combined with damping_rule=exact"
    ),
    "preconditioner.ema_decay=0.9 preconditioner.inverse_method=low_rank": (
        r"preconditioner.inverse_method=low_rank needs the rows of one mini-batch, but ema_decay=0.9"
    ),
    "preconditioner.kl_clip=0.001": (
        r"preconditioner.kl_clip=0.001 needs the plain gradient in every step, .*; use application=weight or kl_clip="
    ),
    "epochs=2 preconditioner.damping_final=0.01 preconditioner.adaptive_damping=5": (
        r"preconditioner.damping_final=0.01 and preconditioner.adaptive_damping=5 would both set the damping; give one"
    ),
    "preconditioner.damping_final=0.01": r"preconditioner.damping_final=0.01 is that of the last epoch, .* epochs ≥ 2",
    "preconditioner.damping=1000 preconditioner.adaptive_damping=5": (
        r"preconditioner.damping=1000 is outside of the bounds 1e-06 to 100 that adaptive damping keeps to"
    ),
    "preconditioner=baseline preconditioner.kl_clip=1": r"no key 'preconditioner.kl_clip' with preconditioner=baseline",
    "preconditioner=baseline preconditioner.adaptive_damping=5": (
        r"no key 'preconditioner.adaptive_damping' with preconditioner=baseline"
    ),
    "preconditioner.adaptive_dampin=5": r"did you mean 'preconditioner.adaptive_damping'",
    "preconditioner.factor_period=7": r"preconditioner.factor_period must be a divisor of inverse_period=50, .* 7\.",
    "preconditioner.group_size=8": r"group_size=8 is called sua_grouped .*; give preconditioner=sua_grouped\.",
    "preconditioner.structure=kfac": r"structure=kfac .* is called kfac .*, not sua; give preconditioner=kfac\.",
    "preconditioner.name=baseline": r"comes with its file of configs/preconditioner; give preconditioner=… instead\.",
    "preconditioner=baseline preconditioner.name=sua": r"preconditioner.name comes with its file",
    "schedule.name=step": r"schedule.name comes with its file of configs/schedule",
    "dataset.name=cifar10": r"dataset.name comes with its file of configs/dataset; give dataset=… instead\.",
    "=1": r"=1 names no key; give key=value\.",
    "optimizer.lr=1e300": r"optimizer.lr must be a number > 0 within the range of float32, got 1e\+300\.",
    "dataset.split_seed=99999999999999999999": r"dataset.split_seed must be between 0 and 4294967295",
    "num_threads=100000": r"num_threads must be between 1 and 1024",
    "dataset=cifar100 preconditioner.fisher_type=exact": (
        r"preconditioner.fisher_type=exact takes 100 backward passes .* preconditioner.allow_exact_fisher=true\."
    ),
    "preconditioner.likelihood=gaussian": r"preconditioner.likelihood must be categorical .* got gaussian\.",
    "preconditioner.loss_reduction=sum": r"preconditioner.loss_reduction must be mean, .* got sum\.",
    "optimizer.momentum=0 optimizer.nesterov=true": r"optimizer.nesterov=true needs optimizer.momentum > 0, got 0.0\.",
    "schedule=step schedule.milestones=[5,8]": (
        r"schedule.milestones must be increasing fractions of the run between 0 and 1, .*, got \[5,8\]\."
    ),
    "schedule=step schedule.milestones=[0,0.5]": r"schedule.milestones must be increasing fractions .* got \[0,0.5\]\.",
    "schedule=step schedule.milestones=[0.5,0.3]": r"schedule.milestones must be increasing .* got \[0.5,0.3\]\.",
    "schedule=step schedule.milestones=[0.5,nan]": r"schedule.milestones must be increasing .* got \[0.5,nan\]\.",
    "optimizer=adamw": (
        r"optimizer=adamw scales the gradient by itself and cannot be combined with preconditioner=sua; give "
        r"preconditioner=baseline, or optimizer=sgd\."
    ),
    "optimizer=muon preconditioner=kfac": r"optimizer=muon .* cannot be combined with preconditioner=kfac;",
    # not key=value, or several values without -m
    "--lr 0.1": r"no flag '--lr'; give settings as key=value",
    "-x": r"no flag '-x'",
    "preconditioner": r"argument 'preconditioner' cannot be read as key=value",
    "optimizer.lr==1": r"argument 'optimizer.lr==1' cannot be read as key=value",
    "schedule.milestones=[1,2": r"argument 'schedule.milestones=\[1,2' cannot be read as key=value",
    "optimizer.lr=0.1,0.3": r"optimizer.lr=0.1,0.3 has several values; add -m to run them all",
    "optimizer.lr=${nothing}": r"cannot be composed: Interpolation key 'nothing' not found\.",
    # a sweep is checked as a whole before its first run
    "-m preconditioner=sua,suaa": r"no preconditioner=suaa",
    "-m preconditioner.damping=0.1,-1": r"preconditioner.damping must be a number > 0 within the range of float32",
    "-m preconditioner=sua,baseline preconditioner.damping=1": r"'preconditioner.damping' with preconditioner=baseline",
    "-m experiment=glob(fig9_*)": r"experiment=glob\(fig9_\*\) matches nothing",
    "-m sweep=lr,lr_damping": r"sweep=lr,lr_damping names several grids",
    "sweep=lr_damping preconditioner=baseline": r"no key 'preconditioner.damping' with preconditioner=baseline",
    # flags that start no run
    "--cfg job optimizer.lrr=0.1": r"no key 'optimizer.lrr'",
    # only data, model or device can tell
    "dataset=cifar10 dataset.data_dir=nowhere dataset.download=false": (
        r"nowhere/cifar10.npz does not exist; run `make data`"
    ),
    "batch_size=5000": r"batch_size must be between 1 and 1300,.* got 5000",
    "dataset.validation_size=1500": r"dataset.validation_size must be between 1 and 1499 .*, got 1500\.",
    "dataset.train_size=1400": r"dataset.train_size must be between 1 and 1300 .*, got 1400\.",
    "preconditioner.skip=[fc]": r"preconditioner.skip entry 'fc' matches no layer .* its layers are features.0,",
    "preconditioner.skip=['*']": r"No layer of the model can be preconditioned",
    # what asks for too much
    "seed=range(1000000000)": r"seed=range\(1000000000\) has more than 10000 values; split the sweep into several\.",
    "-m seed=range(0,1,1e-300)": r"has more than 10000 values; split the sweep into several\.",
    "-m seed=range(200) epochs=range(1,200)": r"The sweep has more than 10000 runs; split it into several\.",
    "-m seed=range(1,10,0)": r"seed=range\(1,10,0\) is no range; give range\(start,stop,step\) with a step ≠ 0\.",
    "epochs=99999999999999999999": r"epochs must be ≥ 1 and at most 1000000, got 99999999999999999999\.",
    # faults and checkpoints
    "non_finite=ignore": r"non_finite must be one of stop, skip, got 'ignore'\.",
    "checkpoint_interval_s=0": r"checkpoint_interval_s must be seconds > 0, or null \(.*\), got 0.0\.",
    "checkpoint_interval_s=-1": r"checkpoint_interval_s must be seconds > 0, or null \(.*\), got -1.0\.",
    "checkpoint_interval_s=nan": r"checkpoint_interval_s must be seconds > 0, or null \(.*\), got nan\.",
    "log_interval=0": r"log_interval must be ≥ 1 step, or null \(never\), got 0\.",
    "checkpoint_interval_s=soon": r"checkpoint_interval_s must be a number or null, got 'soon'\.",
    # more than one option where there can be one
    "preconditioner=[sua,kfac]": r"preconditioner must be one of activation_only, .*, got \['sua', 'kfac'\]\.",
    "model={name:tiny}": r"model must be one of preact_resnet50, tiny, transformer, vgg11, got \{'name': 'tiny'\}\.",
    "sweep=[lr,lr_damping]": r"sweep=\[lr,lr_damping\] names several grids; run them one after the other\.",
    # interpolations
    "seed=${seed}": r"cannot be composed: Recursive interpolation detected\.",
    "optimizer.lr=${oc.env:NOT_THERE}": r"Environment variable 'NOT_THERE' not found",
    "output_dir=${nothing:1}": r"Unsupported interpolation type nothing\.",
    "optimizer.lr=${oc.decode:": r"cannot be read as key=value",
    # names of code
    "_target_=os.system": r"_target_ names code to run, which no setting does; leave it out\.",
    "+optimizer._target_=os.system": r"optimizer._target_ names code to run",
    "hydra.launcher._target_=os.system": r"hydra.launcher._target_ names code to run",
    "+hydra.callbacks.own._target_=os.system": r"hydra.callbacks.own._target_ names code to run",
    "seed=!!python/object/apply:os.system": r"argument 'seed=!!python/object/apply:os.system' cannot be read as",
    "--experimental-rerun=config.pickle": r"no flag '--experimental-rerun=config.pickle'",
    # Hydra's own settings and flags
    "hydra.nothing=1": r"hydra\.nothing is no setting of this command: of Hydra's own settings only hydra.launcher, ",
    "hydra.run.dir=elsewhere": r"hydra\.run\.dir is no setting .* give output_dir=DIR for where all lie\.",
    "-m hydra.sweep.dir=elsewhere": r"hydra\.sweep\.dir is no setting .* give output_dir=DIR\.",
    "hydra.job.chdir=true": r"hydra\.job\.chdir is no setting .* a run writes to its own directory and stays",
    "hydra.job_logging.handlers.console.class=os.system": r"hydra\.job_logging\.handlers\.console\.class is no setting",
    "+hydra.job_logging.handlers.file={class:logging.FileHandler,filename:x}": r"handlers\.file is no setting",
    "hydra.searchpath=[file:///tmp]": r"hydra\.searchpath is no setting of this command: give --config-dir DIR",
    "hydra/sweeper={_target_:os.system}": r"hydra/sweeper names code to run, which no setting does; leave it out\.",
    "+hydra.sweeper.custom_search_space=os.system": r"custom_search_space names code to run",
    "-m hydra.verbose=true,false": r"hydra.verbose=true,false has several values, but all runs of a sweep share one",
    "~hydra/launcher": r"hydra/launcher was removed but is needed; leave out what removes it\.",
    "~hydra/sweeper": r"hydra/sweeper was removed but is needed",
    "hydra/sweeper=null": r"hydra/sweeper must be one of .*, got null\.",
    "~hydra.launcher": r"Error merging override ~hydra\.launcher .* does not support deletion\.",
    "~hydra": r"hydra is no setting of this command",
    "hydra.launcher=null": r"hydra/launcher was removed but is needed",
    "hydra.sweeper=[1]": r"Cannot merge DictConfig with ListConfig\.",
    "hydra.mode=both": r"hydra.mode must be one of RUN, MULTIRUN or null, got 'both'\.",
    "hydra/launcher=nothing": r"no hydra/launcher=nothing; choose one of",
    "hydra/job_logging=none": r"hydra\.job_logging is no setting of this command: a run's log is train\.log",
    "-m optimizer.lr=interval(0,1)": r"interval\(0,1\) is an interval, for a sweeper that optimises;",
    "sweep=optuna_lr_damping optimizer.lr=interval(-1,-0.5)": r"optimizer.lr must be a number > 0 .*, got -1\.0\.",
    "sweep=optuna_lr_damping preconditioner=baseline": r"no key 'preconditioner\.damping' with preconditioner=baseline",
    # what is there without a +, what is another command's, and other primary configurations
    "+experiment=quickstart_sua": r"adds what is there already; leave out the \+: experiment=quickstart_sua\.",
    "++preconditioner=sua": r"\+\+preconditioner=sua adds .* already; leave out the \+: preconditioner=sua\.",
    "+optimizer.lr=0.1": r"\+optimizer\.lr=0\.1 adds what is there already; leave out the \+: optimizer\.lr=0\.1\.",
    "campaign=fig1": r"campaign=fig1 is a campaign of many runs; give python -m kfac_sua\.reproduce fig1\.",
    "--config-path=somewhere": r"--config-path and --config-name would replace configs/.* give --rerun RUN",
    "--cfg=job --config-name=mine": r"--config-path and --config-name would replace configs/config\.yaml",
    "--rerun=nowhere": r"--rerun=nowhere is not the directory of a run: it has no file config\.yaml\.",
    "--cfg=jobs": r"The flag --cfg cannot be read: invalid choice: 'jobs'",
    "--cfg=job hydra.job.chdir=true": r"hydra\.job\.chdir is no setting of this command",
    "--resolve": r"The --resolve flag can only be used in conjunction with --cfg",
    "--shell-completion": r"Expecting one subcommand",
    "--config-dir=nowhere": r"--config-dir=nowhere is not a directory; give one that holds experiment/NAME\.yaml\.",
    "schema=sgd": r"Could not override 'schema'",
}


class MakesFolder:
    """An object whose unpickling makes a folder: the mark that code was run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


# Folder that a hostile file would make, within the folder of the file.
MARK = "code was run"


@dataclasses.dataclass(frozen=True)
class BadFile:
    """A file that cannot be used.

    Attributes:
        write: Given the path, makes the file.
        sentence: What must be said (a regular expression).
    """

    write: Callable[[Path], object]
    sentence: str


def _arrays(**changes: Any) -> dict[str, Any]:
    """Return a small CIFAR-10 with some arrays replaced; ``None`` leaves one out."""
    arrays = {
        "train_images": np.zeros((40, 32, 32, 3), np.uint8),
        "train_labels": np.repeat(np.arange(10), 4),
        "test_images": np.zeros((20, 32, 32, 3), np.uint8),
        "test_labels": np.tile(np.arange(10), 2),
        "classes": np.array([f"class {number}" for number in range(10)]),
    }
    return {name: value for name, value in (arrays | changes).items() if value is not None}


def _archive(**changes: Any) -> Callable[[Path], None]:
    return lambda path: np.savez(path, **_arrays(**changes))


def _truncated_archive(path: Path) -> None:
    np.savez(path, **_arrays())
    path.write_bytes(path.read_bytes()[:-500])


def _archive_with_flipped_byte(path: Path) -> None:
    np.savez(path, **_arrays())
    content = bytearray(path.read_bytes())
    content[20_000] ^= 0xFF
    path.write_bytes(content)


def _hostile_archive(path: Path) -> None:
    np.savez(path, **_arrays(train_labels=np.array([MakesFolder(path.parent / MARK)], dtype=object)))


def _archive_with_torn_header(path: Path) -> None:
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (3,"
    np.savez(path, **_arrays(train_images=None))
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("train_images.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)


def _archive_of_text(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        for name in _arrays():
            file.writestr(f"{name}.npy", b"no array")


# dataset=cifar10 with this at <data_dir>/cifar10.npz.
BAD_ARCHIVES = {
    "truncated": BadFile(_truncated_archive, r"is not a readable .npz archive \(truncated"),
    "empty": BadFile(lambda path: path.write_bytes(b""), r"is not a readable .npz archive"),
    "text": BadFile(lambda path: path.write_text("<html>404</html>"), r"is not a readable .npz archive"),
    "directory": BadFile(lambda path: path.mkdir(), r"is not a readable .npz archive"),
    "pickle": BadFile(lambda path: path.write_bytes(pickle.dumps({})), r"is not a readable .npz archive"),
    "dead link": BadFile(lambda path: path.symlink_to("nowhere"), r"does not exist; run `make data`"),
    "endless link": BadFile(lambda path: path.symlink_to(path), r"cifar10.npz"),
    "flipped byte": BadFile(_archive_with_flipped_byte, r"at array 'train_images' \(BadZipFile: Bad CRC"),
    "pickle inside": BadFile(_hostile_archive, r"cannot be read at array 'train_labels' \(ValueError: Object arrays"),
    "torn header": BadFile(_archive_with_torn_header, r"cannot be read at array 'train_images' \(TokenError"),
    "no arrays inside": BadFile(_archive_of_text, r"must hold classes as two or more strings"),
    "missing array": BadFile(_archive(test_labels=None), r"has no array test_labels \(it holds train_images,"),
    "float images": BadFile(
        _archive(train_images=np.zeros((40, 32, 32, 3))), r"must hold train_images as uint8 .*, got float64"
    ),
    "channels first": BadFile(
        _archive(test_images=np.zeros((20, 3, 32, 32), np.uint8)),
        r"test_images as uint8 .* \[20, 3, 32, 32\]",
    ),
    "no images": BadFile(
        _archive(test_images=np.zeros((0, 32, 32, 3), np.uint8), test_labels=np.zeros(0, int)),
        r"must hold test_images as uint8 .*, got uint8 \[0, 32, 32, 3\]",
    ),
    "too few labels": BadFile(_archive(train_labels=np.arange(9)), r"train_labels as integers \[40\], got int64 \[9\]"),
    "float labels": BadFile(_archive(train_labels=np.zeros(40)), r"train_labels as integers .*, got float64 \[40\]"),
    "label out of range": BadFile(
        _archive(train_labels=np.arange(40)), r"must hold train_labels within 0\.\.9, got 0\.\.39"
    ),
    "negative label": BadFile(_archive(test_labels=np.full(20, -1)), r"test_labels within 0\.\.9, got -1\.\.-1"),
    "other classes": BadFile(_archive(classes=np.array(["cat", "dog"])), r"must hold 10 classes, got 2"),
}


def _sealed(payload: bytes) -> bytes:
    """Return the bytes of a checkpoint file whose digest matches."""
    return MAGIC + hashlib.sha256(payload).digest() + payload


def _saved(values: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(values, buffer)
    return _sealed(buffer.getvalue())


def _changed(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(change(path.read_bytes()))


def _of_other_version(path: Path) -> None:
    values = torch.load(io.BytesIO(path.read_bytes()[len(MAGIC) + 32 :]), weights_only=True)
    path.write_bytes(_saved(values | {"format_version": 99}))


def _of_other_run(path: Path) -> None:
    values = torch.load(io.BytesIO(path.read_bytes()[len(MAGIC) + 32 :]), weights_only=True)
    path.write_bytes(_saved(values | {"fingerprint": "0" * 64}))


def _hostile_checkpoint(path: Path) -> None:
    path.write_bytes(_saved({"format_version": 2, "model": MakesFolder(path.parent / MARK)}))


# An interrupted run goes on from this instead of its checkpoint, and there is no previous one.
BAD_CHECKPOINTS = {
    "truncated": BadFile(_changed(lambda content: content[:-1]), r"is damaged or not a checkpoint of format 2"),
    "empty": BadFile(_changed(lambda content: b""), r"is damaged or not a checkpoint of format 2; move it away"),
    "flipped byte": BadFile(
        _changed(lambda content: content[:-100] + bytes([content[-100] ^ 1]) + content[-99:]), r"is damaged"
    ),
    "foreign": BadFile(
        lambda path: torch.save({"state_dict": {}}, path), r"is damaged or not a checkpoint of format 2"
    ),
    "text with a digest": BadFile(lambda path: path.write_bytes(_sealed(b"text")), r"is not a checkpoint \(.*Error\)"),
    "list with a digest": BadFile(lambda path: path.write_bytes(_saved([1])), r"is not a checkpoint of format 2, got"),
    "other version": BadFile(_of_other_version, r"is not a checkpoint of format 2, got 99; move it away to start"),
    "other configuration": BadFile(_of_other_run, r"belongs to another run \(configuration 00000000, seed 0; this is"),
    "hostile pickle": BadFile(_hostile_checkpoint, r"is not a checkpoint \(UnpicklingError\); move it away"),
    "hostile pickle alone": BadFile(
        lambda path: path.write_bytes(pickle.dumps(MakesFolder(path.parent / MARK))), r"is damaged or not a checkpoint"
    ),
    "directory": BadFile(lambda path: (path.unlink(), path.mkdir()), r"checkpoint.state is not a file; move it away"),
}

# The records of a finished or interrupted run, damaged.
BAD_RECORDS = {
    "run.json": {
        "text": BadFile(lambda path: path.write_text("no JSON"), r"run.json is not valid JSON"),
        "empty": BadFile(lambda path: path.write_text(""), r"run.json is not valid JSON"),
        "list": BadFile(lambda path: path.write_text("[]"), r"was not written by this version: .* \(list\)"),
        "nested without end": BadFile(lambda path: path.write_text("[" * 100_000), r"run.json"),
        "not UTF-8": BadFile(lambda path: path.write_bytes(b"\xff\xfe"), r"run.json is not valid JSON"),
        "wrong type": BadFile(
            lambda path: path.write_text(
                path.read_text().replace('"seed": 0,\n  "commit"', '"seed": "0",\n  "commit"')
            ),
            r"run.json is not as it was written; restore it, or delete the run's directory\.",
        ),
        "unknown field": BadFile(
            lambda path: path.write_text(path.read_text().replace("{", '{"own": 1,', 1)),
            r"run.json is not as it was written",
        ),
    },
    "metrics.csv": {
        "foreign": BadFile(lambda path: path.write_text("a,b\n1,2\n"), r"line 1: expected the header of metrics.csv"),
        "text for a number": BadFile(
            lambda path: path.write_text(path.read_text().replace("\n0,", "\nzero,")), r"line 2: expected 27 numbers"
        ),
        "missing epoch": BadFile(
            lambda path: path.write_text("".join(path.read_text().splitlines(keepends=True)[:1])), r"lacks epochs that"
        ),
    },
}

# Environment variables and what follows.
BAD_ENVIRONMENTS = {
    "OMP_NUM_THREADS=abc": r"The environment variable OMP_NUM_THREADS must be a whole number ≥ 1, got 'abc'\.",
    "OMP_NUM_THREADS=0": r"OMP_NUM_THREADS must be a whole number ≥ 1, got '0'\.",
    "OMP_NUM_THREADS=": r"OMP_NUM_THREADS must be a whole number ≥ 1, got ''\.",
    "OMP_NUM_THREADS=2,-1": r"OMP_NUM_THREADS must be a whole number ≥ 1, got '2,-1'\.",
}

# Where a directory cannot be: the path, given a file of the name "occupied" in the working directory.
BAD_OUTPUT_DIRS = {
    "occupied": r"Cannot use occupied/.*: Not a directory\.",
    "/dev/null": r"Cannot use /dev/null/.*: Not a directory\.",
    "/proc/nowhere": r"Cannot use /proc/nowhere.*: No such file or directory\.",
    "a" * 300: r"Cannot use a+.*: File name too long\.",
}

# Of the other commands: module, arguments -> what stderr must say.
BAD_OTHER_COMMANDS = {
    "kfac_sua.reproduce fig9": r"There is no campaign 'fig9'; choose one of ablation_",
    "kfac_sua.reproduce fig1 --seeds 0": r"must be a whole number of at least 1, got '0'",
    "kfac_sua.reproduce fig1 --scale huge": r"invalid choice: 'huge'",
    "kfac_sua.reproduce fig1 --dry-run optimizer.lrr=1": r"There is no key 'optimizer.lrr'",
    "kfac_sua.reproduce fig1 --dry-run --only nothing": r"nothing",
    "kfac_sua.bench --model mnist": r"There is no model=mnist",
    "kfac_sua.bench --width -1": r"model.width must be > 0",
    "kfac_sua.bench --settings suaa": r"suaa",
    "kfac_sua.bench --rounds 0": r"must be a whole number of at least 1, got '0'",
    "kfac_sua.bench --tolerance nan": r"must be a number ≥ 0 such as 0.03, got 'nan'",
    "kfac_sua.bench --against nowhere.json": r"nowhere.json",
    "kfac_sua.bench --against garbage": r"garbage",
    "kfac_sua.bench --json nowhere/new.json --model tiny": r"Cannot use nowhere/new.json: No such file or directory\.",
    "kfac_sua.bench.scaling --out occupied": r"Cannot use occupied",
    "kfac_sua.bench.scaling --out new --largest-width 3": r"must be a number of channels from",
    "kfac_sua.bench.scaling --out new --memory-limit-gib nan": r"must be a number of GiB above 0, got 'nan'",
    "kfac_sua.bench.scaling --out garbage_scaling": r"scaling.csv",
    "kfac_sua.runs.collect nowhere": r"nowhere",
    "kfac_sua.runs.collect garbage_runs": r"run.json is not valid JSON",
    "kfac_sua.runs.collect . --best-by luck": r"invalid choice: 'luck'",
    "kfac_sua.figures.fig1 nowhere --out new": r"nowhere",
    "kfac_sua.figures.fig1 garbage_runs --out new": r"run.json is not valid JSON",
    "kfac_sua.figures.fig2 nowhere --out new": r"nowhere",
    "kfac_sua.figures.fig2 garbage_runs --out new": r"run.json is not valid JSON",
    "kfac_sua.figures.scaling nowhere.csv --out new": r"nowhere.csv",
    "kfac_sua.figures.scaling garbage --out new": r"garbage",
}
