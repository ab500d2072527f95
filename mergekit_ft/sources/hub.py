"""A repo on the hub as a source, through its own client."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import (
    HfApi,
    constants,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
    utils,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (  # type: ignore[attr-defined,unused-ignore]
    build_hf_headers,
    hf_raise_for_status,
)

from mergekit_ft.errors import SourceError
from mergekit_ft.sources import adapter
from mergekit_ft.sources.files import HeaderReader
from mergekit_ft.sources.folder import choose, config_of, open_folder, unread
from mergekit_ft.sources.header import PREFIX, SourceFile, header_length, parse
from mergekit_ft.sources.layout import PICKLE, SAFE, Layout, check_index, escapes
from mergekit_ft.sources.quantised import readable
from mergekit_ft.sources.sides import WEIGHTS, side_files
from mergekit_ft.sources.source import Around, Source

http_backoff: Any = getattr(utils, "http_backoff", None)
stream_backoff: Any = getattr(utils, "http_stream_backoff", None)  # from 1.0 of the client on
TRANSPORT = [kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError"]
FAULTS: tuple[type[BaseException], ...] = (  # what the client lets through
    OSError,
    EntryNotFoundError,
    HFValidationError,
    *TRANSPORT,
)
AT_ONCE = 8  # requests
SMALL = 64 << 20  # bytes: larger side files are not fetched for headers alone
LOG_IN = "log in (`hf auth login`) or set HF_TOKEN"


@dataclass(frozen=True)
class Repo:
    """A repo at one commit and the files it holds."""

    name: str
    asked: str | None  # the revision as the plan names it
    endpoint: str
    commit: str = ""
    sizes: Mapping[str, int] | None = None  # bytes of each file
    digests: Mapping[str, str] | None = None  # SHA-256 of the large ones

    @property
    def page(self) -> str:
        """Return the address of the repo's page."""
        return f"{self.endpoint.rstrip('/')}/{self.name}"

    def __str__(self) -> str:
        return f"{self.name}@{self.asked}" if self.asked else self.name


def open_repo(
    name: str,
    revision: str | None,
    *,
    reference: str,
    offline: bool = False,
    allow_pickle: bool = False,
    headers_only: bool = False,
    endpoint: str | None = None,
) -> Source:
    """Open a repo: fetch what is needed of it, or its headers alone."""
    repo = Repo(name, revision, endpoint or constants.ENDPOINT)
    with _explained(repo):
        if offline or constants.HF_HUB_OFFLINE:
            return _from_cache(repo, reference, allow_pickle)
        repo = _resolved(repo)
        names, fetch = tuple(repo.sizes or ()), _fetcher(repo)
        layout = choose(names, fetch, reference, allow_pickle)
        sides = side_files(names, fetch)
        if headers_only:
            return _headers(repo, reference, layout, sides)
        folder = _snapshot(repo, layout, sides)
        return open_folder(folder, reference, allow_pickle=allow_pickle, revision=repo.commit)


def fetch_adapter(
    name: str, revision: str | None, *, offline: bool = False, endpoint: str | None = None
) -> tuple[Path, str]:
    """Fetch an adapter's weights, config and tokenizer; return their folder and the commit."""
    repo = Repo(name, revision, endpoint or constants.ENDPOINT)
    local = offline or constants.HF_HUB_OFFLINE
    with _explained(repo):
        repo = repo if local else _resolved(repo)
        pickled = repo.sizes is not None and adapter.SAFE not in repo.sizes
        weights = adapter.PICKLED if pickled else adapter.SAFE
        folder = Path(
            snapshot_download(
                repo.name,
                revision=repo.asked,
                endpoint=repo.endpoint,
                allow_patterns=[weights, *(f"*{ending}" for ending in adapter.BESIDE)],
                ignore_patterns="*/*",
                local_files_only=local,
            )
        )
        _require_commit(repo, folder)
        return folder, folder.name


def _require_commit(repo: Repo, folder: Path) -> None:
    """Require that what was fetched is what was asked about."""
    if repo.commit and folder.name != repo.commit:
        raise SourceError(
            f"{repo}: moved from {repo.commit} to {folder.name} while it was fetched: run again, "
            "or name a commit as its revision"
        )


def _resolved(repo: Repo) -> Repo:
    """Ask for the commit and the files of a repo."""
    info = HfApi(endpoint=repo.endpoint).model_info(
        repo.name, revision=repo.asked, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
    )
    files = info.siblings or []
    for file in files:
        if escapes(file.rfilename):
            raise SourceError(f"{repo}: lists a file outside its folder: {file.rfilename!r}")
    return replace(
        repo,
        commit=info.sha or "",
        sizes={file.rfilename: file.size or 0 for file in files},
        digests={file.rfilename: file.lfs.sha256 for file in files if file.lfs},
    )


def _fetcher(repo: Repo) -> Callable[[str], bytes]:
    def fetch(name: str) -> bytes:
        return Path(_download(repo, name)).read_bytes()

    return fetch


def _download(repo: Repo, name: str) -> str:
    return hf_hub_download(repo.name, name, revision=repo.commit, endpoint=repo.endpoint)


def _snapshot(repo: Repo, layout: Layout, sides: tuple[str, ...]) -> Path:
    """Fetch the chosen files, and record the revision so that it resolves offline."""
    wanted = {*layout.files, *sides}
    wanted.update(name for name in (SAFE.index, PICKLE.index) if name in (repo.sizes or ()))
    folder = Path(
        snapshot_download(
            repo.name,
            revision=repo.asked,
            endpoint=repo.endpoint,
            allow_patterns=sorted(map(literal, wanted)),
        )
    )
    _require_commit(repo, folder)
    return folder


def literal(name: str) -> str:
    """Return a pattern that matches one name."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _from_cache(repo: Repo, reference: str, allow_pickle: bool) -> Source:
    folder = Path(
        snapshot_download(
            repo.name,
            revision=repo.asked,
            local_files_only=True,
            ignore_patterns=[f"*{ending}" for ending in WEIGHTS],
        )
    )
    try:
        return open_folder(folder, reference, allow_pickle=allow_pickle, revision=folder.name)
    except SourceError as error:
        raise SourceError(
            f"{error} (offline: only the cache was looked into; run once without --offline)"
        ) from None


def _headers(repo: Repo, reference: str, layout: Layout, sides: tuple[str, ...]) -> Source:
    """Make a source out of range requests for the headers and the small side files."""
    if layout.pickled:
        raise SourceError(f"{repo}: the headers of pickles cannot be read without fetching them")
    sizes = repo.sizes or {}
    small = [name for name in sides if sizes[name] <= SMALL]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        fetched = pool.map(lambda name: _download(repo, name), small)
        files = tuple(pool.map(lambda name: _header(repo, name), layout.files))
        paths = dict(zip(small, fetched, strict=True))
    held = {file.name: {info.name for info in file.tensors} for file in files}
    check_index(layout, held, reference)
    folder = _root(paths)
    config = config_of(tuple(paths), _fetcher(repo), reference)
    around = Around(folder, layout.index, config, sides, unread(tuple(sizes), layout))
    return readable(Source(reference, files, HeaderReader(reference), around, repo.commit))


def _root(paths: Mapping[str, str]) -> Path | None:
    """Return the folder of the cache that the fetched files lie in."""
    for name, path in paths.items():
        return Path(path).parents[name.count("/")]
    return None


def _header(repo: Repo, name: str) -> SourceFile:
    size, where = (repo.sizes or {})[name], f"{repo}: {name}"
    prefix = _range(repo, name, 0, PREFIX) if size > PREFIX else b""
    length = header_length(prefix, size, where)
    raw = _range(repo, name, PREFIX, PREFIX + length)
    metadata, tensors = parse(raw, size, name, where)
    digest = (repo.digests or {}).get(name)
    return SourceFile(name, Path(repo.name) / name, size, metadata, tensors, 0, digest)


def _range(repo: Repo, name: str, begin: int, end: int) -> bytes:
    """Fetch the bytes [begin, end) of a file and nothing after them."""
    url = hf_hub_url(repo.name, name, revision=repo.commit, endpoint=repo.endpoint)
    headers = {
        **build_hf_headers(),
        "Range": f"bytes={begin}-{end - 1}",
        "Accept-Encoding": "identity",
    }
    data = _streamed(url, headers, begin, end - begin)
    if len(data) < end - begin:
        raise SourceError(f"{repo}: {name}: the transfer broke off within its header: run again")
    return data


def _streamed(url: str, headers: dict[str, str], begin: int, count: int) -> bytes:
    """Read `count` bytes of an answer as it comes and leave the rest; fewer if it breaks off."""
    options: dict[str, Any] = {"headers": headers, "timeout": constants.HF_HUB_DOWNLOAD_TIMEOUT}
    if stream_backoff is None:  # before 1.0 the client stood on requests
        with http_backoff("GET", url, stream=True, **options) as response:
            hf_raise_for_status(response)
            return _some(response.iter_content(1 << 16), response.status_code, begin, count)
    with stream_backoff("GET", url, **options) as response:
        hf_raise_for_status(response)
        return _some(response.iter_bytes(), response.status_code, begin, count)


def _some(chunks: Iterable[bytes], status: int, begin: int, count: int) -> bytes:
    skip = begin if status == 200 else 0  # 200: from a server that ignores ranges
    data = bytearray()
    try:
        for chunk in chunks:
            data += chunk
            if len(data) >= skip + count:
                break
    except FAULTS:  # within the client's own retries it would be thrown at the wrong place
        pass
    return bytes(data[skip : skip + count])


@contextmanager
def _explained(repo: Repo) -> Iterator[None]:
    """Turn whatever the client raises into one line."""
    try:
        yield
    except FAULTS as error:
        raise SourceError(_explain(repo, error)) from error


def _explain(repo: Repo, error: Any) -> str:
    if isinstance(error, GatedRepoError):
        return f"{repo}: gated: accept its terms at {repo.page}, then {LOG_IN}"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{repo}: no such folder here, and no such model at {repo.page}, or a private one: "
            f"check the name, or {LOG_IN}"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{repo}: the repo has no revision {repo.asked!r}: see {repo.page}/tree/main"
    if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
        return _explain_cache(repo)
    if isinstance(error, EntryNotFoundError):
        return f"{repo}: lists a file that it does not give: try again later"
    if isinstance(error, HfHubHTTPError):
        return _explain_status(repo, error.response.status_code)
    return _explain_transport(repo, error)


def _explain_cache(repo: Repo) -> str:
    return (
        f"{repo}: no such folder here, and not whole in the hub's cache: run once without "
        "--offline (and without HF_HUB_OFFLINE), with the network up"
    )


def _explain_status(repo: Repo, status: int) -> str:
    if status in (401, 403):
        return f"{repo}: access refused ({status}): see {repo.page}, and {LOG_IN}"
    if status == 429:
        return f"{repo}: too many requests (429): wait a little, or {LOG_IN}"
    return f"{repo}: {repo.endpoint} answered {status}: try again later"


def _explain_transport(repo: Repo, error: Exception) -> str:
    kind = type(error).__name__
    if "Timeout" in kind:
        return f"{repo}: {repo.endpoint} did not answer in time: try again, or use --offline"
    if isinstance(error, OSError) and error.strerror:
        return f"{repo}: {error.strerror}: {error.filename or 'while it was fetched'}"
    return (
        f"{repo}: no such folder here, and {repo.endpoint} cannot be reached ({kind}): check the "
        "network, or use --offline if the model is in the cache"
    )
