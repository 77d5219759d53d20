"""Bad input: exit code 2, one sentence on stderr that names key, value and choices, and nothing on disk."""

import re
import sys

import pytest

from kfac_sua import train
from kfac_sua.compose import compose_config
from kfac_sua.config import ConfigError

TINY = ["model=tiny", "dataset=digits", "device=cpu", "epochs=1"]

# Command line -> what the sentence must say (a regular expression).
BAD_COMMANDS = {
    # misspelt keys, groups and options
    "optimizer.lrr=0.1": r"no key 'optimizer.lrr' \(did you mean 'optimizer.lr'\?\); the keys of optimizer=sgd are",
    "lr=0.1": r"no key 'lr' \(did you mean 'optimizer.lr'\?\); the keys of the configuration are seed, device, epochs,",
    "preconditoner=sua": r"no key 'preconditoner' \(did you mean 'preconditioner'\?\)",
    "preconditioner=suaa": r"no preconditioner=suaa \(did you mean 'sua'\?\); choose one of baseline, grouped, kfac,",
    "model=resnet": r"no model=resnet.*; choose one of preact_resnet50, tiny, vgg11\.",
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
        r"no key 'model.batch_norm' with model=preact_resnet50; the keys of model=preact_resnet50 are name, width\."
    ),
    # wrong types
    "preconditioner.damping=abc": r"preconditioner.damping must be a number, got 'abc'\.",
    "preconditioner.damping=null": r"preconditioner.damping must be a number, got null\.",
    "preconditioner.group_size=2.5": r"preconditioner.group_size must be an integer or null, got 2.5\.",
    "preconditioner.skip=classifier": r"preconditioner.skip must be a list such as \[a,b\], got 'classifier'\.",
    "preconditioner.fisher_type=true_fisher": (
        r"preconditioner.fisher_type must be one of empirical, mc, exact, got 'true_fisher'\."
    ),
    "model.batch_norm=maybe": r"model.batch_norm must be true or false, got 'maybe'\.",
    "optimizer=adamw optimizer.betas=0.9": r"optimizer.betas must be a list such as \[0.5,0.9\], got 0.9\.",
    "schedule=step schedule.milestones=half": r"schedule.milestones must be a list such as \[0.5,0.9\], got 'half'\.",
    "device=gpu": r"device must be one of auto, cpu, cuda, got 'gpu'\.",
    "epochs=2.5": r"epochs must be an integer, got 2.5\.",
    "channels_last=maybe": r"channels_last must be true or false, got 'maybe'\.",
    "model=null": r"model must be one of preact_resnet50, tiny, vgg11, got null\.",
    "seed=???": r"seed must be given a value\.",
    # out of range
    "preconditioner.damping=-1": r"preconditioner.damping must be a number > 0 within the range of float32, got -1",
    "preconditioner.damping=inf": r"preconditioner.damping must be a number > 0 within the range of float32, got inf\.",
    "preconditioner=grouped preconditioner.group_size=0": r"preconditioner.group_size must be ≥ 1 .*, got 0\.",
    "preconditioner.inverse_period=0": r"preconditioner.inverse_period must be ≥ 1 mini-batch, got 0\.",
    "preconditioner.activation_rows=0": r"preconditioner.activation_rows must be ≥ 1 or null \(all of them\), got 0\.",
    "preconditioner.activation_rows=9 preconditioner.weight_sharing=reduce": (
        r"preconditioner.activation_rows=9 takes some of a mini-batch's locations"
    ),
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
    "epochs=0": r"epochs must be ≥ 1, got 0\.",
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
    "dataset=cifar10 dataset.data_dir=nowhere": r"nowhere/cifar10.npz does not exist; run `make data`",
    "batch_size=5000": r"batch_size must be between 1 and 1300,.* got 5000",
    "dataset.validation_size=1500": r"dataset.validation_size must be between 1 and 1499 .*, got 1500\.",
    "dataset.train_size=1400": r"dataset.train_size must be between 1 and 1300 .*, got 1400\.",
    "preconditioner.skip=[fc]": r"preconditioner.skip entry 'fc' matches no layer .* its layers are features.0,",
    "preconditioner.skip=['*']": r"No layer of the model can be preconditioned",
}


@pytest.mark.parametrize("command", BAD_COMMANDS)
def test_bad_input_is_one_sentence(command, tmp_path, monkeypatch, capsys):
    """The exit code is 2, the sentence says what it must, there is no traceback, and nothing is written."""
    arguments = command.split()
    given = {argument.partition("=")[0] for argument in arguments if "." not in argument.partition("=")[0]}
    tiny = [argument for argument in TINY if argument.partition("=")[0] not in given]
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.setattr(sys, "argv", ["train", *arguments, *tiny])
    code = call_main()
    captured = capsys.readouterr()
    assert code == 2
    assert re.search(BAD_COMMANDS[command], captured.err), captured.err
    assert captured.err.count("\n") == 1
    assert captured.err.endswith((".\n", ".)\n"))
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def call_main() -> int:
    """Return the exit code of the command line in ``sys.argv``."""
    try:
        return train.main()
    except SystemExit as stop:
        return int(str(stop.code))


def test_missing_cuda_device_is_named(tmp_path, monkeypatch, capsys):
    """device=cuda on a machine without one is refused before anything is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["train", "model=tiny", "dataset=digits", "device=cuda"])
    assert call_main() == 2
    assert "device=cuda, but PyTorch finds no usable CUDA device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_missing_muon_is_named_with_the_version(monkeypatch):
    """Where PyTorch has no Muon, the sentence says which PyTorch that is."""
    monkeypatch.delattr("torch.optim.Muon")
    with pytest.raises(ConfigError, match=r"needs torch.optim.Muon, which PyTorch \d+\.\d+.* lacks; install torch>="):
        compose_config(["optimizer=muon", "preconditioner=baseline"])


def test_failure_that_is_not_bad_input_has_another_code(tmp_path, monkeypatch, capsys):
    """A directory that cannot be made is a failure (1), named in one sentence."""
    (tmp_path / "occupied").write_text("a file")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train", *TINY, "preconditioner=baseline", "output_dir=occupied"])
    assert call_main() == 1
    assert re.fullmatch(r"Cannot use occupied/.*: Not a directory\.\n", capsys.readouterr().err)


def test_failed_factorisation_is_one_sentence(tmp_path, monkeypatch, capsys):
    """A RuntimeError of PyTorch or the preconditioner keeps its message and says how to see where."""

    def fail(config):
        raise RuntimeError("Factors of layer 'x'\nare not positive definite; raise the damping.")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "run", fail)
    monkeypatch.setattr(sys, "argv", ["train", *TINY])
    assert call_main() == 1
    assert capsys.readouterr().err == (
        "Factors of layer 'x' are not positive definite; raise the damping. (HYDRA_FULL_ERROR=1 shows where.)\n"
    )


def test_full_error_shows_the_traceback(tmp_path, monkeypatch):
    """With HYDRA_FULL_ERROR=1, the exception comes through as it is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", ["train", *TINY, "batch_size=5000"])
    with pytest.raises(Exception, match="batch_size must be between 1 and 1300"):
        train.main()


def test_exact_fisher_on_many_classes_can_be_asked_for():
    """The refusal of a hundred backward passes has the switch that it names."""
    overrides = ["dataset=cifar100", "preconditioner.fisher_type=exact", "preconditioner.allow_exact_fisher=true"]
    assert compose_config(overrides).preconditioner.fisher_type == "exact"
