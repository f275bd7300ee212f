"""Settings of a run: checks, the YAML file, near names."""

from __future__ import annotations

from dataclasses import fields

import pytest

from lorakit import TrainConfig
from lorakit.errors import AdapterFormatError, AdapterNotFoundError, ConfigError
from lorakit.training.settings import SETTINGS_NAME, check_same_adapter, read_settings, settings_bytes

WRONG = {
    "model": "", "output": None, "data": 3, "eval_data": "", "eval_share": 0.6, "task": "PAINTING", "r": 0, "alpha": 0,
    "dropout": 1.0, "targets": "q_proj", "modules_to_save": [3], "init": "evva", "init_batches": 0, "dora": 1, "rslora": "yes", "epochs": 0,
    "max_steps": 0, "batch": 2.5, "accumulation": 0, "learning_rate": "fast", "optimizer": "adam", "schedule": "steep",
    "warmup": 2, "weight_decay": -1, "max_grad_norm": 0, "max_length": 1, "dtype": "int8", "load_in_4bit": "4",
    "gradient_checkpointing": None, "log_steps": 0, "eval_steps": 0, "save_steps": -1, "keep": 0, "seed": -1,
}  # fmt: skip


def test_every_setting_is_checked_and_all_are_named_at_once():
    assert WRONG.keys() == {field.name for field in fields(TrainConfig)}
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**WRONG)
    for name in WRONG:
        assert f"\n  - {name}" in str(caught.value)


def test_lists_become_tuples_and_defaults_are_sound():
    made = TrainConfig(model="m", output="o", targets=["q", "v"])
    assert made.targets == ("q", "v")
    with pytest.raises(ConfigError, match="eval_share: got a share beside eval_data"):
        TrainConfig(model="m", output="o", eval_data="x", eval_share=0.1)


@pytest.mark.parametrize(
    ("init", "four_bit", "message"),
    [
        ("corda", True, "'corda' begins from weights in full precision"),
        ("lora_ga", True, "'lora_ga' begins from weights in full precision"),
        ("loftq", False, "'loftq' makes up for what 4 bits take"),
    ],
)
def test_beginnings_that_do_not_go_with_the_base_are_refused(init, four_bit, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(model="m", output="o", init=init, load_in_4bit=four_bit)
    TrainConfig(model="m", output="o", init=init, load_in_4bit=not four_bit)


def test_a_run_goes_on_with_the_adapter_that_it_began_with(tmp_path):
    began = TrainConfig(model="m", output="o", r=8, targets=["q"])
    check_same_adapter(began, tmp_path)  # a checkpoint without settings
    (tmp_path / SETTINGS_NAME).write_bytes(settings_bytes(began))
    check_same_adapter(TrainConfig(model="there", output="o", r=8, targets=["q"], epochs=9), tmp_path)
    with pytest.raises(ConfigError) as caught:
        check_same_adapter(TrainConfig(model="m", output="o", r=4, targets=["q"], init="eva"), tmp_path)
    for line in ("r: got 4, the run began with 8", "init: got 'eva', the run began with 'default'"):
        assert line in str(caught.value)
    assert "targets" not in str(caught.value)
    (tmp_path / SETTINGS_NAME).write_bytes(b"{")
    with pytest.raises(AdapterFormatError, match=r"settings\.json"):
        check_same_adapter(began, tmp_path)


def written(tmp_path, text):
    (tmp_path / "run.yaml").write_text(text)
    return tmp_path / "run.yaml"


def test_a_file_of_settings_is_read(tmp_path):
    text = "model: m\nlearning_rate: 1e-4\nepochs: 2\ntargets: [q_proj, v_proj]\ndora: true\n"
    found = read_settings(written(tmp_path, text))
    assert found == {
        "model": "m",
        "learning_rate": 1e-4,
        "epochs": 2,
        "targets": ["q_proj", "v_proj"],
        "dora": True,
    }
    assert TrainConfig(output="o", **found).learning_rate == 1e-4
    assert read_settings(written(tmp_path, "")) == {}


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (
            "learning_rte: 1\nbath: 2\nshiny: 3",
            ConfigError,
            r"did you mean 'learning_rate'(?s:.*)'batch'(?s:.*)shiny: no such",
        ),
        ("r: 8\nr: 16", AdapterFormatError, "r given more than once"),
        ("- r", AdapterFormatError, "holds a list"),
        ("r: [", AdapterFormatError, "not valid YAML"),
        ("r: !!python/object:os.system x", AdapterFormatError, "not valid YAML"),
    ],
)
def test_a_file_that_says_something_else_is_refused(tmp_path, text, error, message):
    with pytest.raises(error, match=message):
        read_settings(written(tmp_path, text))


def test_a_file_that_is_not_there_or_too_large(tmp_path):
    with pytest.raises(AdapterNotFoundError, match="no such file"):
        read_settings(tmp_path / "none.yaml")
    with pytest.raises(AdapterFormatError, match="more than"):
        read_settings(written(tmp_path, "#" * (1 << 20) + "#"))


def test_a_number_that_is_none_is_left_for_the_checks(tmp_path):
    found = read_settings(written(tmp_path, "learning_rate: fast"))
    with pytest.raises(ConfigError, match="learning_rate: got 'fast'"):
        TrainConfig(model="m", output="o", **found)
