"""When the hub is asked, for what, and when it is not; without a network."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects

from lorakit.checkpoint.hub import push_folder, resolve_adapter, resolve_model, resolve_model_config
from lorakit.checkpoint.layout import pending_config_name
from lorakit.checkpoint.reading import open_adapter
from lorakit.errors import AdapterFormatError, AdapterNotFoundError, AdapterStateError

REAL_API = huggingface_hub.HfApi
COMMIT = "c" * 40


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """Each download that was asked for; the repository has what `has` names."""
    log = SimpleNamespace(asked=[], has={"adapter_config.json", "adapter_model.safetensors"}, error=None)
    signature = inspect.signature(huggingface_hub.hf_hub_download)

    def download(*args, **kwargs):
        asked = signature.bind(*args, **kwargs).arguments
        log.asked.append(asked)
        if log.error:
            raise log.error
        if asked["filename"] not in log.has:
            raise errors.EntryNotFoundError(f"no {asked['filename']}")
        return str(
            tmp_path / "models--u--n/snapshots" / COMMIT / (asked.get("subfolder") or "") / asked["filename"]
        )

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return log


@pytest.mark.parametrize("subfolder", [None, "sub", "sub/deeper/"])
def test_downloads_two_files_of_one_commit(calls, tmp_path, subfolder):
    found = resolve_adapter(
        "u/n", subfolder=subfolder, revision="main", token="t", cache_dir=tmp_path, force_download=True
    )
    inside = (subfolder or "").strip("/")
    assert found == tmp_path / "models--u--n/snapshots" / COMMIT / inside
    assert [(row["filename"], row["revision"]) for row in calls.asked] == [
        ("adapter_config.json", "main"),
        ("adapter_model.safetensors", COMMIT),
    ]
    for row in calls.asked:
        assert (row["repo_id"], row["subfolder"], row["token"]) == ("u/n", inside or None, "t")
        assert (row["force_download"], row["local_files_only"], row["cache_dir"]) == (True, False, tmp_path)


def test_pickle_only_if_allowed(calls):
    calls.has = {"adapter_config.json", "adapter_model.bin"}
    with pytest.raises(AdapterNotFoundError, match="u/n"):
        resolve_adapter("u/n")
    assert len(calls.asked) == 2
    resolve_adapter("u/n", allow_pickle_bin=True)
    assert calls.asked[-1]["filename"] == "adapter_model.bin"


@pytest.mark.parametrize(
    "name",
    ["/no/where", "./no", "../no", "~/no", "a\\b", "a/b/c", ".", "..", Path("u/n"), "C:\\x", "n"],
    ids=str,
)
def test_what_looks_like_a_path_is_never_asked_for(calls, name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    if name in (".", ".."):
        assert resolve_adapter(name) == Path(name)
    else:
        with pytest.raises(AdapterNotFoundError):
            resolve_adapter(name)
    assert calls.asked == []


@pytest.mark.parametrize("kind", ["folder", "file", "broken link"])
def test_what_exists_is_never_asked_for(calls, monkeypatch, tmp_path, kind):
    monkeypatch.chdir(tmp_path)
    Path("u").mkdir()
    {
        "folder": Path("u/n").mkdir,
        "file": Path("u/n").touch,
        "broken link": lambda: Path("u/n").symlink_to("x"),
    }[kind]()
    folder = resolve_adapter("u/n")
    assert folder == Path("u/n")
    with pytest.raises(AdapterNotFoundError):
        open_adapter(folder)
    assert calls.asked == []


@pytest.mark.parametrize("subfolder", ["..", "a/../..", "/etc", "a\\..\\b", "C:x"])
@pytest.mark.parametrize("name", ["u/n", "."])
def test_subfolders_stay_inside(calls, name, subfolder):
    with pytest.raises(AdapterNotFoundError, match="stays inside"):
        resolve_adapter(name, subfolder=subfolder)
    assert calls.asked == []


def test_local_subfolders(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "out").symlink_to(tmp_path)
    assert resolve_adapter(tmp_path / "a", subfolder="b") == tmp_path / "a" / "b"
    assert resolve_adapter(str(tmp_path / "a"), subfolder="") == tmp_path / "a"
    with pytest.raises(AdapterNotFoundError, match="symbolic link"):
        resolve_adapter(tmp_path / "a", subfolder="out")


RESPONSE = SimpleNamespace(headers={}, request=None)


@pytest.mark.parametrize(
    "error",
    [
        errors.RepositoryNotFoundError("404", response=RESPONSE),
        errors.RevisionNotFoundError("404", response=RESPONSE),
        errors.GatedRepoError("403", response=RESPONSE),
        errors.LocalEntryNotFoundError("offline"),
        errors.HFValidationError("bad name"),
        ConnectionError("down"),
        OSError(28, "No space left"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_every_failure_is_one_error(calls, error):
    calls.error = error
    with pytest.raises(
        AdapterNotFoundError, match=f"u/n: neither a local folder.*{type(error).__name__}"
    ) as caught:
        resolve_adapter("u/n")
    assert caught.value.__cause__ is error
    assert len(calls.asked) == 1


class Api:
    def __init__(self, token=None):
        self.log = [("token", token)]
        Api.last = self

    def create_repo(self, repo_id, **options):
        self.log.append(("create", repo_id, options))

    def upload_folder(self, **options):
        self.log.append(("upload", options))
        return SimpleNamespace(
            commit_url="http://commit", pr_url="http://pr" if options["create_pr"] else None
        )


@pytest.mark.parametrize(("create_pr", "url"), [(False, "http://commit"), (True, "http://pr")])
def test_push(saved, monkeypatch, create_pr, url):
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert push_folder(saved, "u/n", private=True, token="t", create_pr=create_pr, commit_message="m") == url
    token, create, upload = Api.last.log
    assert token == ("token", "t")
    assert create == ("create", "u/n", {"private": True, "exist_ok": True})
    assert upload[1]["allow_patterns"] == ["adapter_config.json", "adapter_model.safetensors", "README.md"]
    assert (upload[1]["folder_path"], upload[1]["commit_message"]) == (str(saved), "m")
    known = inspect.signature(REAL_API.upload_folder).parameters
    assert set(upload[1]) <= set(known)


def test_push_refuses_half_a_save(saved, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", None)
    digest = open_adapter(saved).metadata["lorakit.digest"]
    (saved / "adapter_config.json").rename(saved / pending_config_name(digest))
    with pytest.raises(AdapterStateError, match="save the adapter again"):
        push_folder(saved, "u/n")
    with pytest.raises(AdapterNotFoundError):
        push_folder(saved / "nowhere", "u/n")


def test_a_config_alone_downloads_no_weights(calls, tmp_path):
    from lorakit import LoraConfig

    calls.has = {"adapter_config.json"}
    folder = tmp_path / "models--u--n/snapshots" / COMMIT
    folder.mkdir(parents=True)
    LoraConfig(target_modules=["q_proj"]).save_pretrained(folder)
    assert isinstance(LoraConfig.from_pretrained("u/n"), LoraConfig)
    assert [row["filename"] for row in calls.asked] == ["adapter_config.json"]


# ---- models ---------------------------------------------------------------------------------------------------


SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
BESIDE = ["config.json", "tokenizer.json", "original/params.json"]
OTHER = ["pytorch_model.bin", "consolidated.safetensors", "original/weights.pth", "onnx/model.onnx"]


@pytest.fixture
def models(monkeypatch, tmp_path):
    """A hub with one repository: what of its files each download asked for, at which revision."""
    log = SimpleNamespace(asked=[], files={}, error=None)
    folder = tmp_path / "models--u--m/snapshots" / COMMIT

    def download(repository, *, revision=None, allow_patterns=None, ignore_patterns=None):
        assert repository == "u/m"
        if log.error:
            raise log.error
        chosen = sorted(
            filter_repo_objects(log.files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        )
        log.asked.append((revision, chosen))
        for name in chosen:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(log.files[name])
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return log


def index_of(*files):
    return json.dumps({"weight_map": {f"w{number}": name for number, name in enumerate(files)}})


def test_a_model_is_its_safetensors_and_what_is_no_weights(models, tmp_path):
    models.files = dict.fromkeys([*SHARDS, *BESIDE, *OTHER], "") | {
        "model.safetensors.index.json": index_of(*SHARDS)
    }
    assert resolve_model("u/m") == tmp_path / "models--u--m/snapshots" / COMMIT
    assert models.asked == [(None, sorted([*BESIDE, "model.safetensors.index.json"])), (COMMIT, SHARDS)]


def test_a_model_of_one_file(models):
    models.files = dict.fromkeys(["model.safetensors", *BESIDE, *OTHER], "")
    resolve_model("u/m")
    assert models.asked[1] == (COMMIT, ["model.safetensors"])


def test_an_index_that_leads_elsewhere_is_refused(models):
    models.files = {"model.safetensors.index.json": index_of("../../x.safetensors")}
    with pytest.raises(AdapterFormatError, match="wanted a weight_map"):
        resolve_model("u/m")
    assert len(models.asked) == 1


@pytest.mark.parametrize("resolve", [resolve_model, resolve_model_config])
def test_models_that_the_hub_does_not_give(calls, models, resolve):
    models.error = calls.error = errors.LocalEntryNotFoundError("offline,\nand not in the cache")
    with pytest.raises(
        AdapterNotFoundError, match=r"u/m: neither a local folder nor a model.*offline, and not"
    ):
        resolve("u/m")


@pytest.mark.parametrize("resolve", [resolve_model, resolve_model_config])
@pytest.mark.parametrize("name", ["./u", "a/b/c", "gpt2", Path("u/m")], ids=str)
def test_models_that_are_paths(calls, models, resolve, name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdapterNotFoundError, match=r"no such folder; wanted"):
        resolve(name)
    Path(name).mkdir(parents=True)
    assert resolve(name) == Path(name)
    assert calls.asked == models.asked == []


def test_of_a_config_one_file_is_downloaded(calls, tmp_path):
    calls.has = {"config.json"}
    assert resolve_model_config("u/n") == tmp_path / "models--u--n/snapshots" / COMMIT
    assert [row["filename"] for row in calls.asked] == ["config.json"]
