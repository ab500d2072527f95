"""`push` with the real client against a double of the hub on this machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from mergekit_ft import publishing
from mergekit_ft.errors import WriteError
from tests.checkpoints import write_checkpoint
from tests.hub_double import Double, serve
from tests.small_models import CONFIG, arithmetic, cli, hashes, merged, weights, write_models

TOKEN = "hf_secretsecret"
REPO = "some-org/merge"


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Double]:
    """Stand beside ./out, a merge, with the hub's client pointed at a double."""
    monkeypatch.setenv("MERGEKIT_FT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits before each retry
    write_models(tmp_path)
    with serve() as double:
        double.writer = TOKEN
        monkeypatch.setattr(constants, "ENDPOINT", double.endpoint)
        yield double


def made(out: str = "out", *options: str) -> dict[str, str]:
    merged(arithmetic(), out, "--max-shard-size", "1KB", *options)
    return hashes(out)


def refusal(double: Double, repo: str = REPO, out: str = "out", **options: bool) -> str:
    with pytest.raises(WriteError) as caught:
        publishing.push(Path(out), repo, endpoint=double.endpoint, **options)
    assert "\n" not in str(caught.value) and TOKEN not in str(caught.value)
    return str(caught.value)


def held(double: Double, repo: str = REPO) -> dict[str, str]:
    files = double.repos[repo].files
    return {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())}


def test_a_merge_arrives_whole_private_and_card_first(hub: Double) -> None:
    there = made()
    done = cli("push", "out", REPO)
    assert done.exit_code == 0, done.output
    assert held(hub) == there
    repo = hub.repos[REPO]
    assert repo.private
    assert repo.commits[0] == ["README.md"] and len(repo.commits) == 2
    assert f"{hub.endpoint}/{REPO} (private)" in done.stdout
    assert f"sent {len(there)} files, 0 there already" in done.stdout
    assert TOKEN not in done.output


def test_public_is_public_only_where_it_is_asked_for(hub: Double) -> None:
    made()
    assert cli("push", "out", REPO, "--public").exit_code == 0
    assert not hub.repos[REPO].private
    done = cli("push", "out", REPO)
    assert done.exit_code == 6
    assert f"{REPO}: is a public repo; --public says that this is meant" in done.stderr


def test_pushed_again_nothing_is_sent(hub: Double) -> None:
    there = made()
    assert cli("push", "out", REPO).exit_code == 0
    commits = list(hub.repos[REPO].commits)
    done = json.loads(cli("push", "out", REPO, "--json").stdout)
    assert done["sent"] == [] and sorted(done["there"]) == sorted(there)
    assert hub.repos[REPO].commits == commits
    assert all(count == len(hub.repos[REPO].objects[oid]) for oid, count in hub.received.items())


def test_a_push_that_broke_off_goes_on_and_sends_no_object_twice(hub: Double) -> None:
    there = made()
    shards = [name for name in there if name.endswith(".safetensors")]
    assert len(shards) > 2
    hub.refuse_writes = (f"/objects/{REPO}/{there[shards[1]]}", 400, "the line broke")
    message = refusal(hub)
    assert REPO in message and "the line broke" in message and "goes on from there" in message
    assert list(hub.repos[REPO].files) == ["README.md"]  # no half model to be seen
    before = dict(hub.received)
    assert there[shards[0]] in before or there[shards[2]] in before
    hub.refuse_writes = None
    assert cli("push", "out", REPO).exit_code == 0
    assert held(hub) == there
    for name in shards:
        assert hub.received[there[name]] == Path("out", name).stat().st_size  # once


def test_an_output_that_is_not_what_its_receipt_says_is_not_pushed(hub: Double) -> None:
    made()
    Path("out/config.json").write_text("{}")
    assert "config.json" in (message := refusal(hub))
    assert "not what its receipt says, so not pushed" in message
    Path("out/config.json").unlink()
    assert "config.json" in refusal(hub)
    assert not hub.calls and REPO not in hub.repos


def test_what_no_merge_made_is_not_pushed(hub: Double) -> None:
    done = cli("push", "base", REPO)
    assert done.exit_code == 4 and "mergekit_ft.lock.json" in done.stderr
    made()
    Path("out").rename("out.part")
    assert "finish it with --resume" in refusal(hub, out="out.part")
    assert not hub.calls


def test_files_beside_the_merge_stay_behind_and_are_named(hub: Double) -> None:
    there = made()
    Path("out/secrets.env").write_text("x")
    done = cli("push", "out", REPO)
    assert done.exit_code == 0
    assert "note: not in the receipt, so not sent: secrets.env" in done.stdout
    assert held(hub) == there


def test_the_weights_of_another_model_are_not_replaced_unasked(hub: Double, tmp_path: Path) -> None:
    there = made()
    other = write_checkpoint(tmp_path / "other", weights(9), shards=2, config=CONFIG)
    hub.add(REPO, other, private=True)
    message = refusal(hub)
    assert "holds the weights of another model (model-00001-of-00002.safetensors" in message
    assert hub.repos[REPO].commits == []
    done = cli("push", "out", REPO, "--overwrite")
    assert done.exit_code == 0, done.output
    assert held(hub) == there
    assert "deleted: model-00001-of-00002.safetensors" in done.stdout


@pytest.mark.parametrize(
    ("where", "status", "said"),
    [
        ("/api/repos/create", 403, "this login may not write there (403, no)"),
        ("/commit/", 429, "too many requests (429, no): wait a little"),
        ("/commit/", 412, "somebody else writes to it (412, no)"),
        ("/preupload/", 404, "no such repo, or not for this login (404"),
        ("/objects/batch", 500, "gave no good answer (500"),
    ],
)
def test_what_the_hub_refuses_is_one_line_that_says_what_to_do(
    hub: Double, where: str, status: int, said: str
) -> None:
    made()
    hub.refuse_writes = (where, status, "no")
    message = refusal(hub)
    assert message.startswith(f"{REPO}: ") and said in message


def test_a_wrong_or_missing_login_says_how_to_log_in(
    hub: Double, monkeypatch: pytest.MonkeyPatch
) -> None:
    made()
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    message = refusal(hub)
    assert "does not know this login (401" in message and "hf auth login" in message
    assert "hf_wrong" not in message
    monkeypatch.delenv("HF_TOKEN")
    assert "hf auth login" in refusal(hub)


def test_a_token_that_the_hub_repeats_is_not_printed(hub: Double) -> None:
    made()
    hub.refuse_writes = ("/api/repos/create", 400, f"bad token {TOKEN}")
    assert "bad token ***" in refusal(hub)


def test_a_hub_that_is_not_there_is_named(hub: Double) -> None:
    made()
    hub.endpoint = "http://127.0.0.1:9"
    assert "cannot be reached" in (message := refusal(hub))
    assert "check the network" in message


def test_a_name_that_no_repo_can_have_is_refused(hub: Double) -> None:
    made()
    assert "is no name of a repo" in refusal(hub, "a/b/c")


def test_offline_is_told(hub: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    made()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refusal(hub)


def test_a_file_that_the_hub_leaves_out_is_missed(
    hub: Double, monkeypatch: pytest.MonkeyPatch
) -> None:
    made()
    monkeypatch.setattr("tests.hub_double._ignored", lambda name: name == "config.json")
    assert "config.json did not arrive as sent" in refusal(hub)


def test_a_merge_may_be_pushed_at_once(hub: Double) -> None:
    Path("plan.yaml").write_text(arithmetic())
    done = cli("merge", "plan.yaml", "out", "--push", REPO)
    assert done.exit_code == 0, done.output
    assert held(hub) == hashes("out") and hub.repos[REPO].private
    assert "changed 12 of 12" in done.stdout and "(private) at" in done.stdout
    found = json.loads(cli("merge", "plan.yaml", "two", "--push", REPO, "--json").stdout)
    assert found["pushed"]["repo"] == REPO


def test_a_login_that_fails_is_told_before_the_merge(
    hub: Double, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("plan.yaml").write_text(arithmetic())
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    done = cli("merge", "plan.yaml", "out", "--push", REPO)
    assert done.exit_code == 6 and "hf auth login" in done.stderr
    assert not Path("out").exists() and not Path("out.part").exists()


def test_a_push_that_fails_after_the_merge_leaves_it_and_says_how_to_send_it(hub: Double) -> None:
    Path("plan.yaml").write_text(arithmetic())
    hub.refuse_writes = ("/api/repos/create", 403, "no")
    done = cli("merge", "plan.yaml", "out", "--push", REPO)
    assert done.exit_code == 6
    assert f"out is whole, and `mergekit-ft push out {REPO}` sends it" in done.stderr
    assert cli("verify", "out").exit_code == 0


def test_options_of_a_push_without_one_are_refused(hub: Double) -> None:
    Path("plan.yaml").write_text(arithmetic())
    assert cli("merge", "plan.yaml", "out", "--public").exit_code == 2
    assert cli("merge", "plan.yaml", "out", "--push", REPO, "--offline").exit_code == 2
