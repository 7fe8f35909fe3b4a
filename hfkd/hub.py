"""The Hub: what of a student goes there, and what to do about an error that comes from there."""

from __future__ import annotations

import glob
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers.dynamic_module_utils import custom_object_save
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import hf_api

from hfkd.checkpoints import UNFINISHED_NAME


if TYPE_CHECKING:
    from hfkd.trainer import DistillationTrainer

LAST_CHECKPOINT = "last-checkpoint"
_WEIGHTS = re.compile(
    r"(adapter_|generation_)?config\.json|(adapter_)?model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
)
_PICTURE = re.compile(r"!\[[^\]]*\]\(([^)\s]+)\)|<img[^>]*\ssrc=\"([^\"]+)\"")
_NETWORK = {"NetworkError", "TimeoutException", "RemoteProtocolError", "ConnectionError"}  # of httpx, and Python's


def remedy_for(error: BaseException) -> str | None:
    """What the Hub answered and what to do about it; None where an error, and what caused it, is none of the Hub's."""
    return _reason(error)[1]


def _reason(error: BaseException | None) -> tuple[type[OSError], str | None]:
    found, seen = (OSError, None), set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OfflineModeIsEnabled):
            return ConnectionError, "HF_HUB_OFFLINE is set: unset it, or download elsewhere and pass the folder"
        if isinstance(error, HfHubHTTPError) and not isinstance(error, RemoteEntryNotFoundError):
            return _answer(error)
        if _NETWORK & {cls.__name__ for cls in type(error).__mro__}:
            remedy = "check the network, the proxy and HF_ENDPOINT, and start again"
            found = ConnectionError, f"{constants.ENDPOINT} cannot be reached, or breaks off: {remedy}"
        error = error.__cause__ or error.__context__
    return found


def _answer(error: HfHubHTTPError) -> tuple[type[OSError], str]:
    status, log_in = error.response.status_code, "`hf auth login`, or HF_TOKEN"
    if isinstance(error, GatedRepoError):
        return PermissionError, f"it is gated ({status}): ask for access on its page, and log in ({log_in})"
    if isinstance(error, RevisionNotFoundError):
        return FileNotFoundError, f"it has no such branch, tag or commit ({status}): correct the revision"
    if isinstance(error, RepositoryNotFoundError) or status == 404:
        remedy = f"correct the name, or log in to an account that may see it ({log_in})"
        return FileNotFoundError, f"there is no such repository, or it is private ({status}): {remedy}"
    if status == 401:
        return PermissionError, f"the token is not accepted ({status}): log in again ({log_in}), or correct hub_token"
    if status == 403:
        remedy = "take one with that right (hf.co/settings/tokens), and push to a name of your own (hub_model_id)"
        return PermissionError, f"the token may not do that ({status}): {remedy}"
    if status == 429:
        return ConnectionError, f"too many requests ({status}): wait some minutes, and log in, which raises the limit"
    if status >= 500:
        return ConnectionError, f"the Hub is in trouble ({status}): try again later"
    return OSError, f"the Hub refuses it ({status}): {error}"


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Say what failed, and the remedy, where the Hub is why.

    Raises:
        PermissionError: If the Hub does not know the token, or it may not do that.
        FileNotFoundError: If there is no such repository.
        ConnectionError: If the Hub has a fault, or cannot be reached.
    """
    try:
        yield
    except Exception as error:
        kind, remedy = _reason(error)
        if remedy is None:
            raise
        raise kind(f"{what}: {remedy}") from error


def files_of_student(trainer: DistillationTrainer, folder: str | Path) -> list[str]:
    """What a push sends of a folder that the student was saved in, whatever else lies there.

    That is the student's configuration and weights, its tokenizer or processor, its modelling code where it has some
    of its own, the model card and the pictures in it.

    Returns:
        Their paths below the folder.
    """
    folder = Path(folder)
    processing = trainer.processing_class or getattr(trainer.data_collator, "tokenizer", None)
    with tempfile.TemporaryDirectory() as scratch:  # nobody else knows how many files these make
        if processing is not None:
            processing.save_pretrained(scratch)
        if getattr(trainer.model, "_auto_class", None) is not None:
            custom_object_save(trainer.model, scratch, trainer.model.config)
        names = {path.relative_to(scratch).as_posix() for path in Path(scratch).rglob("*") if path.is_file()}
    names |= {path.name for path in folder.iterdir() if _WEIGHTS.fullmatch(path.name)} | {"README.md"}
    if (folder / "README.md").is_file():
        card = (folder / "README.md").read_text(encoding="utf-8")
        names |= {os.path.normpath(one or other) for one, other in _PICTURE.findall(card)}
    return sorted(name for name in names if (folder / name).is_file() and not name.startswith(("/", "..")))


def push_student(
    trainer: DistillationTrainer, message: str, *, blocking: bool, token: str | None, revision: str | None
):
    """Upload the student from the output folder, which it was saved in."""
    folder = trainer.args.output_dir
    return hf_api().upload_folder(
        repo_id=trainer.hub_model_id,
        folder_path=folder,
        allow_patterns=[glob.escape(name) for name in files_of_student(trainer, folder)],
        commit_message=message,
        token=token,
        run_as_future=not blocking,
        revision=revision,
    )


def push_checkpoint(trainer: DistillationTrainer, checkpoint: str) -> Future:
    """Upload a checkpoint's student while training goes on, and where the strategy says so all of the checkpoint.

    From links to its files, as the checkpoint may be deleted before they are sent.
    """
    args, checkpoint = trainer.args, Path(checkpoint)
    staged = tempfile.TemporaryDirectory(prefix="_push-", dir=args.output_dir, ignore_cleanup_errors=True)
    for name in files_of_student(trainer, checkpoint):
        place = Path(staged.name, name)
        place.parent.mkdir(parents=True, exist_ok=True)
        _link(checkpoint / name, place)
    folder = {HubStrategy.CHECKPOINT: LAST_CHECKPOINT, HubStrategy.ALL_CHECKPOINTS: checkpoint.name}
    whole = folder.get(HubStrategy(args.hub_strategy))
    if whole is not None:
        skipped = shutil.ignore_patterns(UNFINISHED_NAME)
        shutil.copytree(checkpoint, Path(staged.name, whole), copy_function=_link, ignore=skipped)
    job = hf_api().upload_folder(
        repo_id=trainer.hub_model_id,
        folder_path=staged.name,
        # What the checkpoint before had and this one has not, such as another shard, would be resumed from too.
        delete_patterns=f"{whole}/*" if whole == LAST_CHECKPOINT else None,
        commit_message=f"Training in progress, step {trainer.state.global_step}",
        token=args.hub_token,
        run_as_future=True,
        revision=args.hub_revision,
    )
    job.add_done_callback(lambda _: staged.cleanup())
    return job


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)
