"""adapter_config.json: found, read strictly, written in one step."""

from __future__ import annotations

import json
import os

import pytest

from lorakit.config import LoraConfig, PeftConfig, base, files, set_resolver
from lorakit.errors import AdapterError, AdapterFormatError, AdapterNotFoundError, ConfigError

VALUES = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "target_modules": ["v", "q"]}


@pytest.fixture
def put(tmp_path):
    def write(text: str | bytes | None = None, **changes):
        data = json.dumps({**VALUES, **changes}) if text is None else text
        (tmp_path / "adapter_config.json").write_bytes(data.encode() if isinstance(data, str) else data)
        return tmp_path

    return write


@pytest.fixture
def no_resolver(monkeypatch):
    monkeypatch.setattr(base, "_resolvers", [])


def test_unknown_keys_are_kept_and_written_back(put):
    folder = put(future_option={"a": [1, None]}, extra=3)
    with pytest.warns(UserWarning, match=r"adapter_config\.json: unknown keys.*: extra, future_option"):
        config = LoraConfig.from_pretrained(folder)
    assert config.extra == {"future_option": {"a": [1, None]}, "extra": 3}
    config.save_pretrained(folder)
    written = json.loads((folder / "adapter_config.json").read_text())
    assert written["future_option"] == {"a": [1, None]}
    assert written["extra"] == 3
    assert written["target_modules"] == ["q", "v"]


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"target_modules": None}, "target_modules: got None"),
        ({"peft_type": "IA3"}, "peft_type: got 'IA3'"),
        ({"peft_type": None}, "peft_type: got None"),
        ({"peft_type": ["LORA"]}, "peft_type: got"),
        ({"r": 8.0}, "r: got 8.0"),
    ],
)
def test_wrong_values_name_the_file_and_the_field(put, changes, found):
    folder = put(**changes)
    with pytest.raises(ConfigError) as caught:
        PeftConfig.from_pretrained(folder)
    assert str(folder / "adapter_config.json") in str(caught.value)
    assert found in str(caught.value)


def test_missing_and_wrong_are_told_together(put):
    with pytest.raises(ConfigError, match=r"(?s)r: missing.*lora_alpha: missing.*bias: got 'x'"):
        LoraConfig.from_pretrained(
            put(json.dumps({"peft_type": "LORA", "target_modules": ["q"], "bias": "x"}))
        )


def test_no_target_modules_beside_target_parameters(put):
    assert (
        LoraConfig.from_pretrained(put(target_modules=None, target_parameters=["w"])).target_modules is None
    )


def test_the_base_class_needs_a_peft_type():
    with pytest.raises(ConfigError, match="peft_type: got None"):
        PeftConfig.from_dict({"r": 8})
    assert LoraConfig.from_dict({"r": 3}).r == 3


def test_no_key_is_required_of_a_dict():
    assert LoraConfig.from_dict({}) == LoraConfig()


@pytest.mark.parametrize(
    "text", ["", "[1]", '{"r": 1, "r": 2}', '{"lora_alpha": NaN}', "{", b"\xff\xfe{", "[" * 9999]
)
def test_damaged_files_are_refused_with_their_name(put, text):
    with pytest.raises((AdapterFormatError, ConfigError), match=r"adapter_config\.json"):
        PeftConfig.from_pretrained(put(text))


def test_large_files_and_odd_files_are_refused(put, tmp_path):
    with pytest.raises(AdapterFormatError, match="at most"):
        PeftConfig.from_pretrained(put(" " * (1 << 20) + "{}"))
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "adapter_config.json").mkdir()
    with pytest.raises(AdapterFormatError, match="not a regular file"):
        PeftConfig.from_pretrained(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "adapter_config.json")
    with pytest.raises(AdapterFormatError, match="not a regular file"):
        PeftConfig.from_pretrained(tmp_path)


def test_a_local_folder_never_falls_through_to_the_hub(tmp_path, monkeypatch, no_resolver):
    set_resolver(lambda *_: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user" / "adapter").mkdir(parents=True)
    for subfolder in (None, "sub"):
        with pytest.raises(AdapterNotFoundError, match=r"adapter_config\.json: no such file"):
            PeftConfig.from_pretrained("user/adapter", subfolder)


def test_other_names_go_to_the_resolver(put, no_resolver):
    folder = put()
    with pytest.raises(AdapterNotFoundError, match="user/adapter: no such folder"):
        PeftConfig.from_pretrained("user/adapter")
    asked = []

    def resolve(*args):
        asked.append(args)
        return folder

    set_resolver(resolve)
    assert PeftConfig.from_pretrained("user/adapter", "sub", revision="v1").r == 4
    assert asked == [("user/adapter", "sub", {"revision": "v1"})]


def test_subfolder(put, tmp_path):
    put()
    assert LoraConfig.from_pretrained(tmp_path.parent, subfolder=tmp_path.name).r == 4


def test_same_bytes_whatever_the_order(tmp_path):
    names = [f"m{i}" for i in range(50)]
    for folder, order in (("a", names), ("b", names[::-1])):
        LoraConfig(target_modules=order).save_pretrained(tmp_path / folder)
    assert (tmp_path / "a/adapter_config.json").read_bytes() == (
        tmp_path / "b/adapter_config.json"
    ).read_bytes()


def test_auto_mapping_of_the_save(tmp_path):
    LoraConfig(target_modules=["q"]).save_pretrained(tmp_path, auto_mapping_dict={"base_model_class": "M"})
    assert PeftConfig.from_pretrained(tmp_path).auto_mapping == {"base_model_class": "M"}


def test_a_failed_write_leaves_the_old_file_and_nothing_else(put, monkeypatch):
    folder = put()
    before = (folder / "adapter_config.json").read_bytes()

    def fail(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        LoraConfig(r=9).save_pretrained(folder)
    assert (folder / "adapter_config.json").read_bytes() == before
    assert len(list(folder.iterdir())) == 1


@pytest.mark.skipif(os.name != "posix", reason="POSIX file modes")
def test_modes_and_links(tmp_path):
    path = tmp_path / "adapter_config.json"
    old = os.umask(0o027)
    try:
        LoraConfig().save_pretrained(tmp_path)
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o640
    path.chmod(0o600)
    LoraConfig(r=2).save_pretrained(tmp_path)
    assert path.stat().st_mode & 0o777 == 0o600
    victim = tmp_path / "victim"
    victim.write_text("precious")
    path.unlink()
    path.symlink_to(victim)
    LoraConfig(r=3).save_pretrained(tmp_path)
    assert victim.read_text() == "precious"
    assert not path.is_symlink()


def test_all_errors_are_of_the_tree(tmp_path):
    with pytest.raises(AdapterError):
        LoraConfig.from_pretrained(tmp_path / "nowhere")
