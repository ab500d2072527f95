"""A finished merge on its way to the hub: hashed again, its card first, nothing sent twice."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)

from mergekit_ft.checkpoint import lock
from mergekit_ft.errors import WriteError
from mergekit_ft.inspection.verify import verify
from mergekit_ft.sources.hub import FAULTS, LOG_IN, TRANSPORT, literal
from mergekit_ft.sources.sides import RECEIPT, WEIGHTS

if TYPE_CHECKING:
    from mergekit_ft.options import Progress

CARD = "README.md"
NAMED = 3  # files named in an error before "and N more"
AGAIN = "the same command goes on from there"
PUSHING: tuple[type[BaseException], ...] = (  # what the client lets through, or wraps
    *FAULTS,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RuntimeError,
    ValueError,
)


@dataclass(frozen=True)
class Pushed:
    """What the hub holds now."""

    repo: str
    url: str
    commit: str
    private: bool
    sent: list[str]
    there: list[str]  # already, with the same content
    deleted: list[str]
    notes: list[str]


@dataclass(frozen=True)
class _Remote:
    """What a repo holds: SHA-256 of large files, git's SHA-1 of small ones."""

    commit: str
    private: bool
    digests: Mapping[str, str]

    def holds(self, name: str, path: Path, sha256: str) -> bool:
        found = self.digests.get(name)
        return found == sha256 or (found is not None and found == _git_digest(path, found))


def push(
    out: Path,
    repo: str,
    *,
    public: bool = False,
    overwrite: bool = False,
    endpoint: str | None = None,
    progress: Progress | None = None,
) -> Pushed:
    """Send a merge to a repo of the hub, private unless `public`, made where there is none.

    What the repo holds already is not sent. `overwrite` lets the weights of another model go.
    """
    files, notes = _whole(out, progress)
    api = HfApi(endpoint=endpoint)
    with _explained(repo, api.endpoint):
        made = api.create_repo(repo, private=not public, exist_ok=True)
        name = made.repo_id
        remote = _remote(api, name)
        _require_privacy(name, remote, public)
        wanted = [n for n, sha256 in files.items() if not remote.holds(n, out / n, sha256)]
        gone = _other_weights(name, remote, files, wanted, overwrite)
        _send(api, name, out, wanted, gone)
        remote = _remote(api, name)
    _require_whole(name, remote, out, files)
    there = [n for n in files if n not in wanted]
    return Pushed(name, str(made), remote.commit, remote.private, wanted, there, gone, notes)


def require_login(repo: str, *, endpoint: str | None = None) -> None:
    """Raise what would keep a push from starting, before there is anything to push."""
    api = HfApi(endpoint=endpoint)
    with _explained(repo, api.endpoint):
        api.whoami()


def _whole(out: Path, progress: Progress | None) -> tuple[dict[str, str], list[str]]:
    """Return the SHA-256 of each file of a merge, which still has it."""
    if out.name.endswith(".part"):
        raise WriteError(f"{out}: is what a stopped run left; finish it with --resume, then push")
    receipt = lock.read(out)
    files = verify(out, sample=0, inputs=False, progress=progress)["files"]
    if files["differ"]:
        first = files["differ"][0]
        more = f" and {len(files['differ']) - 1} more" if len(files["differ"]) > 1 else ""
        raise WriteError(
            f"{out}: {first['file']} {first['problem']}{more}: not what its receipt says, so not "
            "pushed; merge again"
        )
    extra = [name for name in files["extra"] if not name.startswith(".")]
    notes = [f"not in the receipt, so not sent: {_listed(extra)}"] if extra else []
    digests = {name: str(file["sha256"]) for name, file in receipt["outputs"].items()}
    own = hashlib.sha256((out / RECEIPT).read_bytes()).hexdigest()
    return {CARD: digests.pop(CARD), **digests, RECEIPT: own}, notes


def _remote(api: HfApi, name: str) -> _Remote:
    info = api.model_info(name, files_metadata=True)
    files = info.siblings or []
    digests = {f.rfilename: f.lfs.sha256 if f.lfs else f.blob_id or "" for f in files}
    return _Remote(info.sha or "", bool(info.private), digests)


def _require_privacy(name: str, remote: _Remote, public: bool) -> None:
    if not remote.private and not public:
        raise WriteError(f"{name}: is a public repo; --public says that this is meant")


def _other_weights(
    name: str, remote: _Remote, files: Mapping[str, str], wanted: list[str], overwrite: bool
) -> list[str]:
    """Return the weights that are not the merge's; they go with the push, if that is allowed."""
    weights = [n for n in remote.digests if n.endswith(WEIGHTS)]
    other = [n for n in weights if n not in files or n in wanted]
    if other and not overwrite:
        raise WriteError(
            f"{name}: holds the weights of another model ({_listed(other)}); name another repo, or "
            "give --overwrite to replace them"
        )
    return [n for n in other if n not in files]


def _send(api: HfApi, name: str, out: Path, wanted: list[str], gone: list[str]) -> None:
    """Commit the card, then all the rest at once: nobody sees half a model."""
    if CARD in wanted:
        api.upload_file(
            path_or_fileobj=out / CARD, path_in_repo=CARD, repo_id=name, commit_message="Card"
        )
    rest = [n for n in wanted if n != CARD]
    if rest or gone:
        api.upload_folder(
            repo_id=name,
            folder_path=out,
            allow_patterns=[literal(n) for n in rest] or ["\0"],
            delete_patterns=[literal(n) for n in gone] or None,
            commit_message="A merge by mergekit-ft",
        )


def _require_whole(name: str, remote: _Remote, out: Path, files: Mapping[str, str]) -> None:
    missing = [n for n, sha256 in files.items() if not remote.holds(n, out / n, sha256)]
    if missing:
        raise WriteError(
            f"{name}: {_listed(missing)} did not arrive as sent (does a .gitignore keep it out?); "
            "look at the repo, then push again"
        )


def _git_digest(path: Path, like: str) -> str:
    """Return git's SHA-1 of a file, where that is what there is to compare with."""
    if len(like) != 40:
        return ""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


@contextmanager
def _explained(repo: str, endpoint: str) -> Iterator[None]:
    """Turn whatever the client raises into one line that never holds the token."""
    try:
        yield
    except PUSHING as error:
        said = " ".join(f"{repo}: {_explain(_root(error), endpoint)}".split())
        token = get_token()
        raise WriteError(said.replace(token, "***") if token else said) from None


def _root(error: BaseException) -> Any:
    """Return the hub's own error behind those that its client wraps around it."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, (HfHubHTTPError, *TRANSPORT)):
        found = found.__cause__
    return error if found is None else found


def _explain(error: Any, endpoint: str) -> str:
    if isinstance(error, LocalTokenNotFoundError):
        return f"nobody is logged in: {LOG_IN}, with a token that may write"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it to push"
    if isinstance(error, HFValidationError):
        return "is no name of a repo; write ORG/NAME"
    if isinstance(error, HfHubHTTPError):
        return _explain_status(error.response.status_code, error.server_message, endpoint)
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.strerror}: {error.filename}"
    if isinstance(error, (OSError, *TRANSPORT)):
        kind = type(error).__name__
        return f"{endpoint} cannot be reached, or broke off ({kind}): check the network; {AGAIN}"
    return f"the hub's client refuses: {error}"


def _explain_status(status: int, said: str | None, endpoint: str) -> str:
    because = f" ({status}{f', {said}' if said else ''})"
    if status == 401:
        return f"the hub does not know this login{because}: {LOG_IN}, with a token that may write"
    if status == 403:
        return f"this login may not write there{because}: ask its owner, or name a repo of yours"
    if status == 404:
        return f"no such repo, or not for this login{because}: check the name, or {LOG_IN}"
    if status in (409, 412):
        return f"somebody else writes to it{because}: {AGAIN}"
    if status == 429:
        return f"too many requests{because}: wait a little; {AGAIN}"
    return f"{endpoint} gave no good answer{because}: try again later; {AGAIN}"
