"""The checkpoint around the weights: files, index, config, side files, card, receipt."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from mergekit_ft.checkpoint import card, config, layout, licences, lock, sides
from mergekit_ft.errors import SourceError
from mergekit_ft.plan import read
from mergekit_ft.resolution import Resolution
from mergekit_ft.sources import open_source
from mergekit_ft.stages import resolve
from tests.checkpoints import write_checkpoint

NAMES = [
    "model.embed_tokens.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.1.mlp.up_proj.weight",
    "model.norm.weight",
]


def weights(value: float = 1.0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: torch.full((2, 8), value, dtype=dtype) for name in NAMES}  # 64 bytes in float32


def resolved(folder: Path, **words: Any) -> Resolution:
    """Resolve the merge of a folder with itself and another."""
    other = write_checkpoint(folder.parent / "other", weights(3.0), config={"model_type": "llama"})
    models = [{"model": str(path), "parameters": {"weight": 0.5}} for path in (folder, other)]
    return resolve(read({"merge_method": "linear", "models": models, **words}))


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("300000", 300_000),
        ("5GB", 5_000_000_000),
        ("500MB", 500_000_000),
        ("1GiB", 1_073_741_824),
        ("256MiB", 268_435_456),
        ("1.5G", 1_500_000_000),
        ("2 kb", 2_000),
        (".5KiB", 512),
    ],
)
def test_a_size_is_bytes_or_a_number_with_a_unit(text: str, size: int) -> None:
    assert layout.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "5XB", "-1GB", "GB", "1,5GB", "1e9", "0", "0.1B"])
def test_what_is_no_size_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        layout.parse_size(text)


def test_the_output_has_the_donors_files_tensors_and_metadata(tmp_path: Path) -> None:
    metadata = {"format": "pt", "origin": "elsewhere"}
    base = write_checkpoint(tmp_path / "base", weights(), shards=2, metadata=metadata)
    files = layout.out_files(resolved(base), None)
    assert [file.name for file in files] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert [[entry.name for entry in file.entries] for file in files] == [NAMES[:2], NAMES[2:]]
    assert all(file.metadata == metadata for file in files)
    assert {(e.dtype, e.shape) for file in files for e in file.entries} == {("F32", (2, 8))}


def test_a_file_without_metadata_gets_its_format(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", weights(), metadata={})
    assert layout.out_files(resolved(base), None)[0].metadata == {"format": "pt"}


@pytest.mark.parametrize(
    ("limit", "counts"), [(64, [1, 1, 1, 1]), (128, [2, 2]), (200, [3, 1]), (1, [1, 1, 1, 1])]
)
def test_shards_are_filled_in_the_donors_order(
    tmp_path: Path, limit: int, counts: list[int]
) -> None:
    base = write_checkpoint(tmp_path / "base", weights())
    files = layout.out_files(resolved(base), limit)
    assert [len(file.entries) for file in files] == counts
    total = len(counts)
    assert [file.name for file in files] == [
        f"model-0000{i}-of-0000{total}.safetensors" for i in range(1, total + 1)
    ]
    assert [entry.name for file in files for entry in file.entries] == NAMES


def test_a_limit_that_holds_everything_gives_one_file_and_no_index(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", weights(), shards=2)
    resolution = resolved(base)
    files = layout.out_files(resolution, 256)
    assert [file.name for file in files] == ["model.safetensors"]
    assert layout.index_json(resolution, files) is None


def test_a_single_file_without_index_gets_none(tmp_path: Path) -> None:
    resolution = resolved(write_checkpoint(tmp_path / "base", weights()))
    assert layout.index_json(resolution, layout.out_files(resolution, None)) is None


def test_the_index_keeps_its_order_and_metadata_and_counts_the_new_bytes(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", weights(), shards=2)
    path = base / "model.safetensors.index.json"
    donated = json.loads(path.read_text())
    donated["metadata"] = {"total_parameters": 64, "total_size": 256.0}
    donated["weight_map"] = dict(reversed(donated["weight_map"].items()))
    path.write_text(json.dumps(donated))
    resolution = resolved(base, dtype="bfloat16")
    index = layout.index_json(resolution, layout.out_files(resolution, None))
    assert index is not None
    assert index["metadata"] == {"total_parameters": 64, "total_size": 128}
    assert list(index["weight_map"].items()) == list(donated["weight_map"].items())


def test_shards_of_a_single_file_get_an_index(tmp_path: Path) -> None:
    resolution = resolved(write_checkpoint(tmp_path / "base", weights()))
    index = layout.index_json(resolution, layout.out_files(resolution, 128))
    assert index == {
        "metadata": {"total_size": 256},
        "weight_map": {
            NAMES[0]: "model-00001-of-00002.safetensors",
            NAMES[1]: "model-00001-of-00002.safetensors",
            NAMES[2]: "model-00002-of-00002.safetensors",
            NAMES[3]: "model-00002-of-00002.safetensors",
        },
    }


CONFIG = """{
   "model_type": "llava",
   "torch_dtype" : "float32",
   "rms_norm_eps": 1e-5,
   "note": "a \\"dtype\\": \\"float32\\" in words, \u00e9",
   "text_config": {"torch_dtype": "float32", "inner": {"dtype": "float32"}},
   "vision_config": {"dtype": "float16"},
   "dtypes": ["float32"]
}
"""


def config_of(base: Path, **words: Any) -> bytes | None:
    return config.config_bytes(resolved(base, **words))


def test_the_config_comes_along_byte_for_byte(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", weights())
    raw = CONFIG.replace("\n", "\r\n").encode()
    (base / "config.json").write_bytes(raw)
    assert config_of(base) == raw
    assert config_of(base, dtype="float32") == raw.replace(b'"float16"', b'"float32"')


def test_only_the_dtypes_of_weights_change_in_the_config(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", weights())
    (base / "config.json").write_text(CONFIG, encoding="utf-8")
    changed = CONFIG.replace('"torch_dtype" : "float32"', '"torch_dtype" : "bfloat16"')
    changed = changed.replace('{"torch_dtype": "float32"', '{"torch_dtype": "bfloat16"')
    changed = changed.replace('{"dtype": "float16"', '{"dtype": "bfloat16"')
    assert (config_of(base, out_dtype="bfloat16") or b"").decode() == changed


def test_a_config_that_names_no_dtype_stays_as_it_is(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", weights(), config={"torch_dtype": None, "a": 1})
    assert config_of(base, dtype="bfloat16") == (base / "config.json").read_bytes()
    assert config.config_bytes(resolved(write_checkpoint(tmp_path / "bare", weights()))) is None


def differences(tmp_path: Path, one: Mapping[str, Any], two: Mapping[str, Any]) -> list[str]:
    a = write_checkpoint(tmp_path / "a", weights(), config=one)
    b = write_checkpoint(tmp_path / "b", weights(), config=two)
    return [
        line.replace(f"{tmp_path}/", "")
        for line in config.differences(open_source(str(a)), open_source(str(b)))
    ]


@pytest.mark.parametrize(
    ("one", "two", "told"),
    [
        ({"rope_theta": 1e4}, {"rope_theta": 1e6}, "rope_theta: 10000.0 in a, 1000000.0 in b"),
        ({"rope_theta": 1e6}, {}, "rope_theta: 1000000.0 in a, not given in b"),
        (
            {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}},
            {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", "factor": 4.0}},
            "factor: 8.0 in a, 4.0 in b",
        ),
        (
            {"text_config": {"rms_norm_eps": 1e-5}},
            {"text_config": {"rms_norm_eps": 1e-6}},
            "text_config.rms_norm_eps: 1e-05 in a, 1e-06 in b",
        ),
        (
            {"tie_word_embeddings": True},
            {"tie_word_embeddings": False},
            "tie_word_embeddings: true in a, false in b",
        ),
        (
            {"sliding_window": None},
            {"sliding_window": 4096},
            "sliding_window: null in a, 4096 in b",
        ),
        ({"hidden_act": "silu"}, {"hidden_act": "gelu"}, 'hidden_act: "silu" in a, "gelu" in b'),
    ],
)
def test_configs_that_give_weights_another_meaning_are_told_apart(
    tmp_path: Path, one: dict[str, Any], two: dict[str, Any], told: str
) -> None:
    same = {"model_type": "llama"}
    assert differences(tmp_path, same | one, same | two) == [told]


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ({"torch_dtype": "float32"}, {"dtype": "bfloat16"}),
        ({"rope_theta": 1e4, "rope_scaling": None}, {"rope_parameters": {"rope_theta": 10000}}),
        ({"transformers_version": "4.40"}, {"transformers_version": "5.0", "use_cache": False}),
        ({}, {"head_dim": 16, "attention_bias": False, "rope_theta": 10000.0}),
    ],
)
def test_configs_that_say_the_same_in_other_words_are_not(
    tmp_path: Path, one: dict[str, Any], two: dict[str, Any]
) -> None:
    same = {"model_type": "llama"}
    assert differences(tmp_path, same | one, same | two) == []


def with_sides(tmp_path: Path) -> Path:
    base = write_checkpoint(tmp_path / "base", weights(), config={"torch_dtype": "float32"})
    for name, content in {
        "tokenizer.json": b"\x00\xff{}",
        "chat_template.jinja": b"{{ messages }}\r\n",
        "LICENSE": b"terms",
        "README.md": b"---\nlicense: apache-2.0\n---\n# Base\n",
        "1_Pooling/config.json": b'{"dtype": "float32"}',
        "modeling_odd.py": b"raise SystemExit",
        "mergekit_ft.lock.json": b"{}",
        "optimizer.pt": b"state",
    }.items():
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_bytes(content)
    return base


def test_every_side_file_comes_along_byte_for_byte(tmp_path: Path) -> None:
    base, part = with_sides(tmp_path), tmp_path / "part"
    copied = sides.copy_sides(resolved(base, dtype="bfloat16"), part, copy_code=False)
    there = {path.relative_to(part).as_posix() for path in part.rglob("*") if path.is_file()}
    assert there == set(copied)
    assert there == {
        "1_Pooling/config.json",
        "LICENSE",
        "README.base.md",
        "chat_template.jinja",
        "config.json",
        "tokenizer.json",
    }
    for name in there - {"config.json", "README.base.md"}:
        assert (part / name).read_bytes() == (base / name).read_bytes()
    assert (part / "README.base.md").read_bytes() == (base / "README.md").read_bytes()
    assert json.loads((part / "config.json").read_text()) == {"torch_dtype": "bfloat16"}


def test_custom_code_comes_along_only_when_asked(tmp_path: Path) -> None:
    resolution = resolved(with_sides(tmp_path))
    assert "modeling_odd.py" in sides.copy_sides(resolution, tmp_path / "part", copy_code=True)
    assert (tmp_path / "part" / "modeling_odd.py").read_bytes() == b"raise SystemExit"
    code, *others = sides.notes(resolution, copy_code=False)
    assert "modeling_odd.py" in code and "--copy-code" in code
    assert list(sides.notes(resolution, copy_code=True)) == others


def test_the_card_of_a_merge_of_merges_keeps_every_earlier_card(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", weights())
    (base / "README.md").write_text("of the merge")
    (base / "README.base.md").write_text("of its base")
    sides.copy_sides(resolved(base), tmp_path / "part", copy_code=False)
    assert (tmp_path / "part" / "README.base.md").read_text() == "of the merge"
    assert (tmp_path / "part" / "README.base.base.md").read_text() == "of its base"


def front_matter(text: str) -> Any:
    return yaml.safe_load(text.split("---\n")[1])


def card_of(resolution: Any) -> str:
    file = {"size": 3, "sha256": "00"}
    changed = dict.fromkeys([task.name for task in resolution.tasks], True)
    changed[resolution.tasks[0].name] = False
    return card.card(
        resolution, lock.receipt(resolution, {"b.safetensors": file}, {}, {}, {}, changed)
    )


def licensed(home: Path, **names: str) -> Any:
    """Return a resolution of models whose cards state these licences."""
    words = {"merge_method": "task_arithmetic", "parameters": {"weight": 0.5}, "models": []}
    for name, front in names.items():
        folder = write_checkpoint(home / name, weights())
        (folder / "README.md").write_text(f"---\n{front}\n---\n")
        words["models"].append({"model": str(folder)})
    return resolve(read(words | {"base_model": str(home / next(iter(names)))}))


def test_licences_that_agree_are_the_cards(tmp_path: Path) -> None:
    found = licensed(tmp_path, base="license: mit", one="license: mit")
    assert list(licences.warnings(found)) == []
    assert front_matter(card_of(found))["license"] == "mit"


def test_licences_that_conflict_are_told_and_the_card_names_none(tmp_path: Path) -> None:
    found = licensed(tmp_path, base="license: mit", one="license: [apache-2.0, gpl-3.0]")
    (told,) = licences.warnings(found)
    assert "differ" in told and f"{tmp_path / 'one'}: apache-2.0 and gpl-3.0" in told
    assert "license" not in front_matter(card_of(found))


@pytest.mark.parametrize(
    "front",
    [
        "license: cc-by-nc-4.0",
        "license: other\nlicense_name: mistral-ai-research-licence",
        "license_name: Acme Non-Commercial",
    ],
)
def test_a_licence_that_speaks_against_commercial_use_is_told(tmp_path: Path, front: str) -> None:
    (told,) = licences.warnings(licensed(tmp_path, base=front, one=front))
    assert "speak against commercial use" in told and str(tmp_path / "one") in told


def test_a_model_that_states_no_licence_beside_one_that_does_is_told(tmp_path: Path) -> None:
    found = licensed(tmp_path, base="license: mit", one="tags: [x]")
    (told,) = licences.warnings(found)
    assert told.startswith(f"no licence is stated by {tmp_path / 'one'}")
    assert f"- `{tmp_path / 'one'}`: licence not stated\n" in card_of(found)


def test_a_card_of_odd_front_matter_states_nothing(tmp_path: Path) -> None:
    for i, front in enumerate(("license: {a: b", "- license", "license:")):
        found = licensed(tmp_path / str(i), base=front, one=front)
        assert list(licences.warnings(found)) == []


def test_the_card_says_what_was_merged_and_how_to_check_it(tmp_path: Path) -> None:
    text = card_of(resolved(with_sides(tmp_path)))
    assert front_matter(text) == {
        "license": "apache-2.0",
        "library_name": "transformers",
        "tags": ["merge", "mergekit-ft"],
    }
    assert "\n# linear merge of base + other\n" in text
    assert "`linear`" in text and "weighted average" in text
    assert f"- `{tmp_path / 'base'}`: licence apache-2.0\n" in text
    assert "- Changed 3 of 4 tensors.\n" in text
    assert "| `b.safetensors` | 3 | `00` |" in text
    assert "mergekit-ft verify" in text


def test_the_card_names_models_of_the_hub_and_no_folders(tmp_path: Path) -> None:
    resolution = resolved(write_checkpoint(tmp_path / "base", weights()))
    resolution.donor.reference = "some-org/model.v1@main+some-org/adapter"
    front = front_matter(card_of(resolution))
    assert front["base_model"] == ["some-org/model.v1", "some-org/adapter"]
    assert front["base_model_relation"] == "merge"


def test_the_card_holds_the_plan_word_for_word_even_with_fences_in_it(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", weights())
    text = (
        f"# ``` a comment with a fence\nmerge_method: linear\nmodels:\n  - model: {base}\n"
        "    parameters: {weight: 1.0}\n"
    )
    found = card_of(resolve(read(text)))
    assert f"````yaml\n{text}````\n" in found


def a_receipt(tmp_path: Path, changed: Mapping[str, bool] | None = None) -> dict[str, Any]:
    base = write_checkpoint(tmp_path / "base", weights(), config={"model_type": "llama"})
    resolution = resolved(base)
    file = {"size": 3, "sha256": "00"}
    inputs = {source.reference: {"model.safetensors": file} for source in resolution.sources}
    return lock.receipt(
        resolution,
        {"b.json": file, "a.json": file},
        inputs,
        {"merge": None},
        {"device": "cpu"},
        changed or dict.fromkeys(NAMES, True),
    )


def test_the_receipt_does_not_depend_on_the_order_of_work(tmp_path: Path) -> None:
    one = a_receipt(tmp_path, dict.fromkeys(NAMES, True))
    two = a_receipt(tmp_path, dict.fromkeys(reversed(NAMES), True))
    assert json.dumps(one) == json.dumps(two)
    assert list(one["outputs"]) == ["a.json", "b.json"]
    assert list(one["changed"]) == NAMES


def test_the_receipt_names_sources_versions_and_the_plan(tmp_path: Path) -> None:
    receipt = a_receipt(tmp_path)
    assert yaml.safe_load(receipt["plan"])["merge_method"] == "linear"
    assert [source["reference"] for source in receipt["sources"]] == receipt["ids"]
    assert all(re.fullmatch("[0-9a-f]{64}", s["config"]) for s in receipt["sources"])
    assert set(receipt["versions"]) == {"mergekit_ft", "python", "torch"}


def test_a_receipt_is_read_back(tmp_path: Path) -> None:
    receipt = a_receipt(tmp_path)
    (tmp_path / "mergekit_ft.lock.json").write_text(json.dumps(receipt))
    assert lock.read(tmp_path) == receipt


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "has no mergekit_ft.lock.json"),
        ("{", "cannot be read"),
        ("[]", "not a receipt"),
        ('{"format": 99}', "format 99"),
        ('{"format": 1, "plan": "", "outputs": {"x": 3}}', "outputs: x"),
    ],
)
def test_a_receipt_that_is_absent_or_broken_is_a_source_error(
    tmp_path: Path, content: str | None, said: str
) -> None:
    if content is not None:
        (tmp_path / "mergekit_ft.lock.json").write_text(content)
    with pytest.raises(SourceError, match=said):
        lock.read(tmp_path)
