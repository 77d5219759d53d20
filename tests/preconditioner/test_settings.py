"""Settings check themselves and speak in the user's words; the package stands on torch alone."""

import ast
import dataclasses
import inspect
import sys
from pathlib import Path

import pytest
from torch import nn

import kfac_sua.preconditioner
from kfac_sua.preconditioner import KroneckerPreconditioner, KroneckerSettings, Structure

BAD_SETTINGS = {
    "damping must be a number > 0 within the range of float32, got -1.0.": {"damping": -1.0},
    "damping must be a number > 0 within the range of float32, got nan.": {"damping": float("nan")},
    "damping must be a number > 0 within the range of float32, got 0.": {"damping": 0},
    "group_size must be an integer, got 2.5.": {"group_size": 2.5},
    "inverse_period must be an integer, got 2.5.": {"inverse_period": 2.5},
    "damping must be a number, got 0.1.": {"damping": "0.1"},
    "skip must be a list of layer names, got head.": {"skip": "head"},
    "group_size must be ≥ 1 or null (no grouping), got 0.": {"group_size": 0},
    "inverse_period must be ≥ 1 mini-batch, got 0.": {"inverse_period": 0},
    "ema_decay must be in [0, 1), got 1.0.": {"ema_decay": 1.0},
    "activation_rows must be ≥ 1 or null (all of them), got 0.": {"activation_rows": 0},
    "activation_rows must be an integer, got 1.5.": {"activation_rows": 1.5},
    "activation_rows=400 takes some of a mini-batch's locations, but weight_sharing=reduce averages": {
        "activation_rows": 400,
        "weight_sharing": "reduce",
    },
    "factor_period must be a divisor of inverse_period=50": {"factor_period": 7, "ema_decay": 0.9},
    "factor_period=10 with ema_decay=0 would measure": {"factor_period": 10},
    "structure must be one of kfac, sua, got 'suaa'.": {"structure": "suaa"},
    "damping_rule must be one of factored, factored_pi, exact, got 'pi'.": {"damping_rule": "pi"},
    "products=bf16x3 splits inverses, but damping_rule=exact": {"products": "bf16x3", "damping_rule": "exact"},
    "inverse_method=low_rank cannot be combined with damping_rule=exact": {
        "inverse_method": "low_rank",
        "damping_rule": "exact",
    },
    "inverse_method=low_rank needs the rows of one mini-batch": {"inverse_method": "low_rank", "ema_decay": 0.5},
}


@pytest.mark.parametrize("sentence", BAD_SETTINGS)
def test_bad_settings_are_one_sentence(sentence):
    """Every bad setting begins with the field's name and is refused by settings and preconditioner alike."""
    options = BAD_SETTINGS[sentence]
    for build in (KroneckerSettings, lambda **kw: KroneckerPreconditioner(nn.Linear(2, 2), **kw)):
        with pytest.raises(ValueError, match=r".") as error:
            build(**options)
        assert str(error.value).startswith(sentence)
        assert "\n" not in str(error.value)


def test_choices_may_be_strings_or_members():
    """Strings become members, so that comparisons hold either way."""
    settings = KroneckerSettings(structure="sua", damping_rule="exact")
    assert settings.structure is Structure.sua
    assert settings == KroneckerSettings(structure=Structure.sua, damping_rule="exact")


def test_settings_and_options_exclude_each_other():
    """Giving both would leave one of them ignored."""
    with pytest.raises(ValueError, match=r"Give either settings or structure, damping, not both"):
        KroneckerPreconditioner(nn.Linear(2, 2), settings=KroneckerSettings(), structure="sua", damping=0.1)


def test_constructor_options_cover_every_setting():
    """Each field of the settings is an option of the constructor."""
    fields = {field.name for field in dataclasses.fields(KroneckerSettings)}
    parameters = set(inspect.signature(KroneckerPreconditioner).parameters)
    assert parameters - {"model", "settings", "seed", "distributed", "flops_per_byte"} == fields


def test_the_package_imports_torch_and_the_standard_library_only():
    """No module of the preconditioner imports anything else."""
    folder = Path(kfac_sua.preconditioner.__file__).parent
    allowed = set(sys.stdlib_module_names) | {"torch", "kfac_sua"}
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module]
            for name in names:
                assert name.split(".")[0] in allowed, f"{path.name} imports {name}"
                if name.startswith("kfac_sua"):
                    assert name.startswith("kfac_sua.preconditioner"), f"{path.name} imports {name}"
