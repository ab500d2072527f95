"""The real hub client against a double of the hub on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from mergekit_ft.errors import SourceError
from mergekit_ft.sources import Source, adapted, open_adapter, open_source
from mergekit_ft.tokens.vocabulary import files_of, read_vocabulary
from tests.checkpoints import write_checkpoint
from tests.hub_double import Double, serve
from tests.vocabularies import words

REPO = "some-org/some.model"
CONFIG = {"model_type": "llama", "tie_word_embeddings": True}
TENSORS = {
    "model.embed_tokens.weight": torch.randn(64, 16),
    "model.layers.0.mlp.up_proj.weight": torch.randn(256, 16),
    "model.layers.1.mlp.up_proj.weight": torch.randn(256, 16, dtype=torch.float64),
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Double]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    with serve() as double:
        yield double


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = write_checkpoint(tmp_path / "made", TENSORS, shards=3, config=CONFIG)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "modeling_own.py").write_text("x = 1")
    for unwanted in ("pytorch_model.bin", "model.gguf", "onnx/model.onnx", "flax_model.msgpack"):
        (folder / unwanted).parent.mkdir(exist_ok=True)
        (folder / unwanted).write_bytes(b"unwanted" * 1000)
    return folder


def opened(double: Double, reference: str = REPO, **options: object) -> Source:
    return open_source(reference, endpoint=double.endpoint, **options)  # type: ignore[arg-type]


def refusal(double: Double, reference: str = REPO, **options: object) -> str:
    with pytest.raises(SourceError) as caught:
        opened(double, reference, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_repo_is_read_like_the_folder_it_was_made_from(hub: Double, folder: Path) -> None:
    repo = hub.add(REPO, folder)
    source = opened(hub)
    assert source.revision == repo.commit
    assert source.reference == REPO
    assert {name: list(info.shape) for name, info in source.items()} == {
        name: list(tensor.shape) for name, tensor in TENSORS.items()
    }
    for name, tensor in TENSORS.items():
        assert torch.equal(source.tensor(name), tensor)
    assert source.locate("lm_head.weight") == "model.embed_tokens.weight"
    assert list(map(str, source.side_files())) == [
        "chat_template.jinja",
        "config.json",
        "tokenizer.json",
    ]
    assert list(map(str, source.code_files())) == ["modeling_own.py"]
    assert source.folder is not None
    assert (source.folder / "chat_template.jinja").read_text() == "{{ messages }}"


def test_only_the_files_that_are_needed_are_fetched(hub: Double, folder: Path) -> None:
    hub.add(REPO, folder)
    opened(hub)
    assert sorted(hub.sent) == [
        "chat_template.jinja",
        "config.json",
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
        "modeling_own.py",
        "tokenizer.json",
    ]


def test_the_digest_that_the_hub_states_comes_along(hub: Double, folder: Path) -> None:
    import hashlib

    repo = hub.add(REPO, folder)
    for source in (opened(hub, headers_only=True), opened(hub)):
        for file in source.files:
            assert file.sha256 == hashlib.sha256(repo.files[file.name]).hexdigest()


def test_headers_only_asks_for_no_byte_of_weights(hub: Double, folder: Path) -> None:
    repo = hub.add(REPO, folder)
    source = opened(hub, headers_only=True)
    for file in source.files:
        header = 8 + int.from_bytes(repo.files[file.name][:8], "little")
        assert hub.ranges[file.name] == ["bytes=0-7", f"bytes=8-{header - 1}"]
        assert hub.sent[file.name] == header
    whole = opened(hub)
    assert dict(source) == dict(whole)
    assert [file.size for file in source.files] == [file.size for file in whole.files]
    assert source.config == CONFIG
    assert source.ties == whole.ties
    assert source.index == whole.index
    assert source.side_files() == whole.side_files()
    assert source.folder is not None
    assert (source.folder / "tokenizer.json").is_file()


def test_headers_only_brings_the_tokenizer_that_rows_are_aligned_by(
    hub: Double, folder: Path
) -> None:
    words("x", "cat", added=["<s>"]).save(str(folder / "tokenizer.json"))
    hub.add(REPO, folder)
    found = read_vocabulary(files_of(opened(hub, headers_only=True)), REPO)
    assert found is not None
    assert found.ids == {"x": 0, "cat": 1, "<s>": 2}


def test_headers_only_cannot_be_read_further(hub: Double, folder: Path) -> None:
    hub.add(REPO, folder)
    source = opened(hub, headers_only=True)
    with pytest.raises(SourceError, match="only its headers were fetched"):
        source.tensor("model.embed_tokens.weight")
    source.will_need("model.embed_tokens.weight", 0, 8)
    source.close()


def test_a_server_that_ignores_ranges_is_not_read_to_the_end(hub: Double, folder: Path) -> None:
    big = {"model.embed_tokens.weight": torch.zeros(16 << 20, dtype=torch.uint8)}
    hub.add(REPO, write_checkpoint(folder.parent / "big", big, config=CONFIG))
    hub.ignore_ranges = True
    assert list(opened(hub, headers_only=True)) == list(big)
    assert hub.sent["model.safetensors"] == 0  # both sends were broken off by the client


def test_a_revision_may_be_a_branch_or_stand_behind_an_at(hub: Double, folder: Path) -> None:
    repo = hub.add(REPO, folder, refs={"tried": "a" * 40})
    assert opened(hub, revision="tried").revision == repo.commit
    assert opened(hub, f"{REPO}@tried").revision == repo.commit
    assert opened(hub, f"{REPO}@{repo.commit}").revision == repo.commit
    assert "names a revision" in refusal(hub, f"{REPO}@tried", revision="main")


def test_what_was_fetched_is_there_offline(hub: Double, folder: Path) -> None:
    repo = hub.add(REPO, folder)
    opened(hub)
    hub.calls.clear()
    source = opened(hub, offline=True)
    assert source.revision == repo.commit
    assert torch.equal(source.tensor("model.embed_tokens.weight"), TENSORS[next(iter(TENSORS))])
    assert hub.calls == []


def test_the_hubs_own_offline_switch_is_obeyed(
    hub: Double, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(REPO, folder)
    opened(hub)
    hub.calls.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    opened(hub)
    assert hub.calls == []


def test_what_was_never_fetched_is_named_offline(hub: Double, folder: Path) -> None:
    hub.add(REPO, folder)
    message = refusal(hub, offline=True)
    assert REPO in message and "--offline" in message
    opened(hub, headers_only=True)
    assert "run once without --offline" in refusal(hub, revision="a" * 40, offline=True)


def test_a_repo_that_does_not_exist_is_named_with_both_readings(hub: Double) -> None:
    message = refusal(hub, "no-such/thing")
    assert "no-such/thing" in message
    assert "no such folder here" in message
    assert f"{hub.endpoint}/no-such/thing" in message


def test_a_private_repo_says_how_to_log_in(hub: Double, folder: Path) -> None:
    hub.add(REPO, folder, refuse=(401, "RepoNotFound"))
    assert "hf auth login" in refusal(hub)


def test_a_gated_repo_names_its_page_and_opens_with_a_token(
    hub: Double, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(REPO, folder, gate=True, token="hf_secretsecret")
    for options in ({}, {"headers_only": True}):
        message = refusal(hub, **options)
        assert f"accept its terms at {hub.endpoint}/{REPO}" in message
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "hf_wrong" not in refusal(hub)
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    assert len(opened(hub)) == len(TENSORS)


def test_a_plain_403_says_access_was_refused(hub: Double, folder: Path) -> None:
    hub.add(REPO, folder, refuse=(403, "Forbidden"))
    assert "access refused (403)" in refusal(hub)


def test_a_revision_that_does_not_exist_is_named(hub: Double, folder: Path) -> None:
    hub.add(REPO, folder)
    assert "no revision 'nope'" in refusal(hub, revision="nope")


def test_a_broken_server_is_named(hub: Double, folder: Path) -> None:
    hub.add(REPO, folder, refuse=(500, "Oops"))
    assert "answered 500" in refusal(hub)


def test_a_server_that_is_not_there_is_named(folder: Path, hub: Double) -> None:
    hub.endpoint = "http://127.0.0.1:9"
    message = refusal(hub)
    assert "cannot be reached" in message and "--offline" in message


def test_a_server_that_does_not_answer_is_named(
    hub: Double, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(REPO, folder)
    hub.hang = 1.0
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    assert "did not answer in time" in refusal(hub)


def test_a_transfer_that_breaks_off_is_an_error_and_leaves_no_shard(
    hub: Double, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits before each retry
    hub.add(REPO, folder)
    hub.cut["model-00002-of-00003.safetensors"] = 100
    message = refusal(hub)
    assert REPO in message
    hub.cut.clear()
    assert len(opened(hub)) == len(TENSORS)


def test_a_header_that_breaks_off_is_an_error(
    hub: Double, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.add(REPO, folder)
    hub.cut["model-00002-of-00003.safetensors"] = 5
    assert REPO in refusal(hub, headers_only=True)


def test_a_hostile_header_is_refused_before_anything_else_is_read(
    hub: Double, folder: Path
) -> None:
    shard = folder / "model-00001-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])
    hub.add(REPO, folder)
    assert "truncated" in refusal(hub, headers_only=True)
    assert "truncated" in refusal(hub)


def test_a_listing_that_leads_out_of_the_folder_is_refused(hub: Double, folder: Path) -> None:
    repo = hub.add(REPO, folder)
    repo.files["../evil.json"] = b"{}"
    assert "outside its folder" in refusal(hub)


def test_pickles_are_refused_before_they_are_fetched(hub: Double, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    torch.save(TENSORS, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    hub.add(REPO, folder)
    assert "--allow-pickle" in refusal(hub)
    assert "pytorch_model.bin" not in hub.sent
    assert "pickles" in refusal(hub, allow_pickle=True, headers_only=True)
    assert list(opened(hub, allow_pickle=True)) == list(TENSORS)


def test_one_file_without_an_index_is_fetched(hub: Double, tmp_path: Path) -> None:
    hub.add(REPO, write_checkpoint(tmp_path / "one", TENSORS, config=CONFIG))
    assert opened(hub).index is None
    assert list(opened(hub, headers_only=True)) == list(opened(hub))


def test_a_branch_that_moves_while_it_is_fetched_is_an_error(
    hub: Double, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergekit_ft.sources import hub as room

    repo = hub.add(REPO, folder)
    real = room._resolved

    def moved(asked: room.Repo) -> room.Repo:
        found = real(asked)
        repo.commit = repo.refs["main"] = "c" * 40
        repo.files["config.json"] = b"{}"
        return found

    monkeypatch.setattr(room, "_resolved", moved)
    monkeypatch.setattr(room, "_fetcher", lambda at: lambda name: repo.files[name])
    assert "moved from" in refusal(hub)


def test_environment_variables_are_obeyed_as_the_hub_has_them(
    hub: Double, folder: Path, tmp_path: Path
) -> None:
    hub.add(REPO, folder, refuse=(401, "RepoNotFound"), token="hf_secretsecret")
    home = tmp_path / "home of its own"
    environment = {
        **{
            key: value
            for key, value in os.environ.items()
            if "HF_" not in key and "OFFLINE" not in key
        },
        "HF_HOME": str(home),
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": "hf_secretsecret",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    code = f"from mergekit_ft.sources import open_source; print(open_source({REPO!r}).folder)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(str(home))


def test_a_missing_folder_with_a_path_in_it_never_asks_the_hub(hub: Double) -> None:
    for reference in ("./made/up", "/made/up", "~/made/up", "../up", "a/b/c", "gpt2", "C:\\up"):
        assert "no such folder" in refusal(hub, reference)
    assert hub.calls == []


def test_the_folder_wins_over_the_repo_of_the_same_name(
    hub: Double, folder: Path, tmp_path: Path
) -> None:
    hub.add(REPO, folder)
    write_checkpoint(tmp_path / REPO, {"one.weight": torch.ones(2)})
    assert list(opened(hub)) == ["one.weight"]
    assert hub.calls == []


def adapter_folder(folder: Path) -> Path:
    """Write an adapter on one module of the model above, as a trainer leaves it."""
    folder.mkdir()
    words = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": REPO}
    (folder / "adapter_config.json").write_text(json.dumps(words))
    (folder / "tokenizer.json").write_text("{}")
    module = "base_model.model.model.layers.0.mlp.up_proj"
    factors = {f"{module}.lora_A.weight": torch.ones(2, 16), f"{module}.lora_B.weight": B}
    save_file(factors, folder / "adapter_model.safetensors")
    for unwanted in ("optimizer.pt", "checkpoint-10/adapter_model.safetensors"):
        (folder / unwanted).parent.mkdir(exist_ok=True)
        (folder / unwanted).write_bytes(b"unwanted" * 1000)
    return folder


B = torch.arange(512.0).view(256, 2)
ADAPTER = "some-org/an-adapter"


def test_an_adapter_on_the_hub_is_put_on_its_model(hub: Double, folder: Path) -> None:
    hub.add(REPO, folder)
    commit = hub.add(ADAPTER, adapter_folder(folder.parent / "adapter")).commit
    base = opened(hub)
    hub.sent.clear()
    adapter = open_adapter(ADAPTER, endpoint=hub.endpoint)
    assert sorted(hub.sent) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
    ]
    source = adapted(base, adapter)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(source.tensor(name), TENSORS[name] + 2 * B.sum(1, keepdim=True))
    assert source.adapter == (ADAPTER, commit) and source.revision == base.revision
    assert len(source.notes) == 1  # neither another base nor another tokenizer
    again = open_adapter(ADAPTER, endpoint=hub.endpoint, offline=True)
    assert again.revision == commit


def test_an_adapter_that_the_hub_lacks_is_told_like_a_model(hub: Double) -> None:
    with pytest.raises(SourceError, match="no such folder here, and no such model at"):
        open_adapter(ADAPTER, endpoint=hub.endpoint)
