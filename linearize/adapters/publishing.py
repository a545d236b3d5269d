"""A student on the Hub, with a model card."""

import logging
import tempfile
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError

from ..networks import denoiser
from .adapter import manifest_of, save_adapter
from .base import source_of
from .hub import FAILED_REQUEST, is_repository
from .license import license_of
from .merging import save_merged
from .model_card import CARD_FILE, adapter_card, merged_card
from .place import find_place

logger = logging.getLogger(__name__)


def push_to_hub(
    pipe_or_model: Any,
    repo_id: str,
    *,
    merged: bool = False,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
) -> str:
    """Upload a student with a model card in one commit; `lineardit.from_pretrained(repo_id)` loads it.

    Args:
        pipe_or_model: A pipeline or denoiser after `linearize_`.
        repo_id: "owner/name"; created if it does not exist.
        merged: Upload the whole pipeline (`save_merged`) instead of the adapter (`save_adapter`).
        private: Visibility of a repository that is created; None: the owner's default.
        revision: The branch to commit to; None: the default branch.
        commit_message: None: a message that names what is uploaded.
        token: Access token; None: the one of `hf auth login`.
    Returns:
        The URL of the repository.
    Raises:
        ValueError: nothing is converted, `repo_id` is not of the form owner/name, or the Hub refuses or cannot be
            reached.
    """
    if not is_repository(repo_id):
        raise ValueError(f"repo_id must have the form owner/name, got {repo_id!r}")
    _, model = denoiser(pipe_or_model)
    source = source_of(pipe_or_model, model)
    if source.license is None and source.name is not None and is_repository(source.name):
        license_of(find_place(source.name, revision=source.revision))  # fetched into the cache for all calls below
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "student"
        (save_merged if merged else save_adapter)(pipe_or_model, folder)
        manifest = manifest_of(model, source_of(pipe_or_model, model))
        card = (merged_card if merged else adapter_card)(manifest, repo_id)
        (folder / CARD_FILE).write_text(card, encoding="utf-8")
        if not merged and (manifest.base is None or not is_repository(manifest.base)):
            logger.warning("the base of this adapter is not on the Hub: others must pass base= to load it")
        api = huggingface_hub.HfApi(token=token)
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                commit_message=commit_message or f"Upload lineardit {'pipeline' if merged else 'adapter'}",
            )
        except HfHubHTTPError as error:
            raise ValueError(
                f"the Hub refused {repo_id}: {error}; log in with `hf auth login` to an account that may write to it"
            ) from error
        except (FAILED_REQUEST, OSError) as error:
            raise ValueError(
                f"the Hub cannot be reached: {error}; check the network, or write a folder with "
                f"lineardit.{'save_merged' if merged else 'save_adapter'} and upload it from another machine"
            ) from error
    return f"https://huggingface.co/{repo_id}"
