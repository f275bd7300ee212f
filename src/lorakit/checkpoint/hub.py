"""Adapters and checkpoints on the Hugging Face hub: the only module that may use a network.

A path that exists is never looked up on the hub, nor is anything that is not written `user/name`. Of an adapter only the
config and the weights are downloaded, of a model what a checkpoint consists of; all from one commit. What the cache has is
not downloaded again, and under `HF_HUB_OFFLINE=1` nothing is.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from lorakit.checkpoint.files import CONFIG_NAME, PICKLE_NAME, README_NAME, WEIGHTS_NAME
from lorakit.checkpoint.reading import open_adapter
from lorakit.checkpoint.shards import CONFIG, INDEX, WEIGHT_SUFFIXES, weight_files
from lorakit.errors import AdapterError, AdapterNotFoundError, AdapterStateError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def resolve_adapter(
    path_or_repo: str | os.PathLike[str],
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
    allow_pickle_bin: bool = False,
    config_only: bool = False,
) -> Path:
    """A local folder for `open_adapter`: the given one, or a repository's files in the hub's cache.

    Args:
        path_or_repo: a folder, or `user/name` on the hub. A `Path` object, and a text that is absolute, starts with
            `.` or `~`, or has a backslash or another number of slashes than one, is always a folder.
        subfolder: a folder inside it.
        revision: branch, tag or commit; the default branch if None.
        token: as huggingface_hub takes it.
        cache_dir: where downloads are kept.
        force_download: download again what the cache has.
        local_files_only: look into the cache alone.
        allow_pickle_bin: download `adapter_model.bin` where there is no safetensors file.
        config_only: download no weights.

    Raises:
        AdapterNotFoundError: no such folder or repository, the files are not in it, or the hub cannot be reached.
    """
    inside = _checked_subfolder(subfolder)
    local = _local(path_or_repo)
    if local is not None:
        return _inside(local, inside)
    text = os.fspath(path_or_repo)

    def fetch(name: str, at: str | None) -> Path:
        import huggingface_hub

        return Path(
            huggingface_hub.hf_hub_download(
                text,
                name,
                subfolder=inside,
                revision=at,
                token=token,
                cache_dir=None if cache_dir is None else Path(cache_dir),
                force_download=force_download,
                local_files_only=local_files_only,
            )
        )

    place = f"{text}/{inside}" if inside else text
    weights = () if config_only else (WEIGHTS_NAME, PICKLE_NAME)[: 2 if allow_pickle_bin else 1]
    return _download(fetch, place, revision, weights)


def resolve_model(path_or_repo: str | os.PathLike[str]) -> Path:
    """A local folder for `open_shards`: the given one, or a repository's in the hub's cache.

    Of a repository: the safetensors files that `model.safetensors` or its index mean, and what is no weights (configs,
    tokenizer).

    Args:
        path_or_repo: as of `resolve_adapter`.

    Raises:
        AdapterNotFoundError: no such folder or repository, or the hub cannot be reached.
        AdapterFormatError: the index is damaged.
    """
    local = _local(path_or_repo)
    if local is not None:
        return local
    import huggingface_hub

    repository = os.fspath(path_or_repo)
    with _named(repository, "a model", "the name, the token and the network"):
        others = [f"*{suffix}" for suffix in WEIGHT_SUFFIXES if not INDEX.endswith(suffix)]
        folder = Path(huggingface_hub.snapshot_download(repository, ignore_patterns=others))
        huggingface_hub.snapshot_download(
            repository, revision=_commit(folder / INDEX), allow_patterns=weight_files(folder)
        )
    return folder


def resolve_model_config(path_or_repo: str | os.PathLike[str]) -> Path:
    """A local folder with a model's `config.json`: the given one, or one in the hub's cache; errors as `resolve_model`."""
    local = _local(path_or_repo)
    if local is not None:
        return local
    import huggingface_hub

    repository = os.fspath(path_or_repo)
    with _named(repository, "a model", f"the name, the file {CONFIG}, the token and the network"):
        return Path(huggingface_hub.hf_hub_download(repository, CONFIG)).parent


def push_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    commit_description: str | None = None,
) -> str:
    """Upload the config, the weights and the README of a saved adapter in one commit; nothing else of the folder.

    Args:
        folder: a local folder that `open_adapter` accepts.
        repo_id: `user/name`; made if it does not exist.
        private: whether a new repository is private.
        token: as huggingface_hub takes it.
        revision: the branch to commit to.
        commit_message: first line of the commit.
        create_pr: open a pull request instead of committing.
        commit_description: the rest of the commit's message.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        AdapterNotFoundError, AdapterFormatError: the folder is not a whole adapter.
        AdapterStateError: the last save into it was cut and its config is stale.
    """
    import huggingface_hub

    adapter = open_adapter(folder)
    if adapter.repaired:
        raise AdapterStateError(
            f"{adapter.config_path}: missing or older than the weights (a save was cut); save the adapter again, "
            "then push it"
        )
    api = huggingface_hub.HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=str(adapter.folder),
        allow_patterns=[CONFIG_NAME, WEIGHTS_NAME, README_NAME],
        revision=revision,
        commit_message=commit_message or "Upload adapter",
        commit_description=commit_description,
        create_pr=create_pr,
    )
    return str(commit.pr_url or commit.commit_url)


def _local(path_or_repo: str | os.PathLike[str]) -> Path | None:
    """The path, or None for a repository of the hub.

    Raises:
        AdapterNotFoundError: nothing is there, and it is not written as a repository is.
    """
    local = Path(path_or_repo).expanduser()
    if os.path.lexists(local):
        return local
    text = os.fspath(path_or_repo)
    if not isinstance(path_or_repo, str) or _looks_like_path(text):
        raise AdapterNotFoundError(
            f"{local}: no such folder; wanted one that is there, or a repository of the hub, as user/name"
        )
    return None


def _looks_like_path(text: str) -> bool:
    return (
        text.startswith((".", "~", "/")) or "\\" in text or text.count("/") != 1 or Path(text).is_absolute()
    )


def _checked_subfolder(subfolder: str | None) -> str | None:
    if not subfolder:
        return None
    parts = PurePosixPath(subfolder).parts
    if subfolder.startswith("/") or ".." in parts or "\\" in subfolder or ":" in subfolder:
        raise AdapterNotFoundError(
            f"subfolder {subfolder!r}: must be a relative path that stays inside the adapter's folder"
        )
    return "/".join(parts) or None


def _inside(folder: Path, subfolder: str | None) -> Path:
    if subfolder is None:
        return folder
    inner = folder / subfolder
    root = os.path.realpath(folder)
    if os.path.commonpath([root, os.path.realpath(inner)]) != root:
        raise AdapterNotFoundError(f"{inner}: leads outside of {folder} through a symbolic link")
    return inner


def _download(
    fetch: Callable[[str, str | None], Path], place: str, revision: str | None, weights: tuple[str, ...]
) -> Path:
    """The folder of the config and of the first of the weights files that the repository has."""
    import huggingface_hub.errors as hub

    absent: Any = hub.EntryNotFoundError
    with _named(
        place,
        "an adapter",
        f"the name, the files {CONFIG_NAME} and {WEIGHTS_NAME}, the token and the network",
    ):
        config = fetch(CONFIG_NAME, revision)
        commit = _commit(config) or revision
        for name in weights:
            try:
                fetch(name, commit)
                break
            except absent:
                if name == weights[-1]:
                    raise
    return config.parent


@contextmanager
def _named(place: str, what: str, check: str) -> Iterator[None]:
    """Make one error of whatever the hub or the way there refuses."""
    import huggingface_hub.errors as hub

    failed: Any = (hub.EntryNotFoundError, hub.HfHubHTTPError, hub.HFValidationError, OSError)
    try:
        yield
    except AdapterError:
        raise
    except failed as error:
        raise AdapterNotFoundError(
            f"{place}: neither a local folder nor {what} that the hub gives "
            f"({type(error).__name__}: {' '.join(str(error).split())[:300]}); check {check}"
        ) from error


def _commit(file: Path) -> str | None:
    """The commit that a file in the hub's cache belongs to: `.../snapshots/<commit>/...`."""
    parts = file.parts
    places = [index for index, part in enumerate(parts[:-2]) if part == "snapshots"]
    return parts[places[-1] + 1] if places else None
