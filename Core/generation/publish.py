"""Upload of an exported adapter to the Hugging Face Hub."""

from pathlib import Path

from Core.utils.hub import HUB_ID


def refuse_name(name: str) -> None:
    """Raise ValueError for what is no hub id to push to."""
    if not HUB_ID.fullmatch(name) or "@" in name:
        raise ValueError(f"--push takes a hub id (owner/name), got {name!r}")


def push(folder: Path, name: str, *, public: bool = False) -> str:
    """Upload ``folder`` as the model repository ``name``, which is created if need be; returns the commit's address.

    Args:
        public: a repository that is created can be read by everybody.

    Raises:
        OSError: the hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(name, repo_type="model", private=not public, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name, folder_path=folder, repo_type="model", commit_message="Adapter and model card"
        )
    except Exception as error:  # the client's own errors, and those of the libraries it asks by
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise OSError(
            f"{name} was not pushed: {reason}; {folder} is complete: once `hf auth login` has been run and the hub can "
            f"be reached, push it by `hf upload {name} {folder}`"
        ) from error
    return str(commit.commit_url)
