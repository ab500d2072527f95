"""Rows drawn by k-means of hidden states and by quality; k-means against SciPy's."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.cluster.vq import kmeans2

from mergekit_ft.algebra.clusters import clustered, lloyd, silhouette
from mergekit_ft.data.rows import read_rows
from mergekit_ft.data.selecting import allotted, select
from mergekit_ft.errors import OperatorError, PlanError, SourceError
from mergekit_ft.models.opening import open_speaker
from mergekit_ft.models.pooling import pooled
from mergekit_ft.models.speaker import ModelSpeaker
from mergekit_ft.plan import ModelReference
from tests.small_models import cli
from tests.tuned import model_of, rows, small_base

WORDS = ("red", "sun", "map", "cup", "fig", "oak", "ten", "six")


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> ModelSpeaker:
    base = small_base(tmp_path_factory.mktemp("selecting") / "base")
    return open_speaker(ModelReference(model=str(base)))


def kinds(folder: Path, name: str = "rows.jsonl") -> Path:
    """Write rows of two kinds that no model could mix up, 24 and 8."""
    short = [{"prompt": f"{w} {i}", "completion": w, "quality": i} for i in range(3) for w in WORDS]
    long = [{"prompt": "0" * 40 + str(i), "completion": "1" * 30, "quality": -i} for i in range(8)]
    return rows(folder, short + long, name)


def blobs(seed: int, *sizes: int) -> torch.Tensor:
    dice = torch.Generator().manual_seed(seed)
    return torch.cat(
        [torch.randn(n, 3, generator=dice) + 20 * i for i, n in enumerate(sizes)]
    ).double()


def test_lloyds_rounds_are_scipys() -> None:
    points = (
        blobs(0, 30, 20, 25)
        + torch.randn(75, 3, generator=torch.Generator().manual_seed(9)).double() * 8
    )
    start = points[[0, 1, 2, 40]]
    made = lloyd(points, start)
    centres, of = kmeans2(points.numpy(), start.numpy(), iter=300, minit="matrix")
    assert np.allclose(made.centres.numpy(), centres, atol=1e-9)
    assert made.of.tolist() == of.tolist()
    by_hand = float(((points.numpy() - centres[of]) ** 2).sum())
    assert made.inertia == pytest.approx(by_hand, rel=1e-9)


def test_clusters_that_stand_apart_are_found_and_their_number_has_the_best_silhouette() -> None:
    points = blobs(1, 30, 20, 25, 10)
    made = clustered(points, 4, 0)
    assert sorted(Counter(made.of.tolist()).values()) == [10, 20, 25, 30]
    apart = {k: silhouette(points, clustered(points, k, 0)) for k in (2, 4, 8)}
    assert max(apart, key=lambda k: apart[k]) == 4
    # by hand: two points a side, 2 and 8 apart
    four = torch.tensor([[0.0], [2.0], [10.0], [12.0]])
    a, b = 1.0, [11.0, 9.0, 9.0, 11.0]
    wanted = sum((x - a) / x for x in b) / 4
    assert silhouette(four, clustered(four, 2, 0)) == pytest.approx(wanted)


def test_points_that_are_no_numbers_and_too_few_are_refused() -> None:
    with pytest.raises(OperatorError, match="not of numbers"):
        clustered(torch.tensor([[0.0], [torch.nan]]), 1, 0)
    with pytest.raises(OperatorError, match="3 clusters of 2 distinct points"):
        clustered(torch.tensor([[0.0], [1.0], [1.0]]), 3, 0)


def test_a_texts_vector_is_the_mean_of_its_last_hidden_states(speaker: ModelSpeaker) -> None:
    texts = [speaker.tokenizer(text)["input_ids"] for text in ("abc", "a longer text", "x")]
    found = pooled(speaker, texts, batch=2)
    for row, text in zip(found, texts, strict=True):
        with torch.no_grad():
            said = speaker.model.model(input_ids=torch.tensor([text]))  # type: ignore[operator]
        assert torch.allclose(row, said.last_hidden_state[0].mean(dim=0), atol=1e-5)


def test_clusters_give_rows_by_their_size_and_the_better_ones_sooner(
    speaker: ModelSpeaker, tmp_path: Path
) -> None:
    file = kinds(tmp_path)
    made = select(speaker, [file], 8, clusters=2, quality="quality", temperature=0.01, rows="raw")
    drawn = [json.loads(line) for line in made.lines]
    short = [row["prompt"] for row in drawn if len(row["prompt"]) < 10]
    long = [row["prompt"] for row in drawn if len(row["prompt"]) > 10]
    assert (len(short), len(long)) == (6, 2)  # of 24 and 8
    assert {prompt.split()[1] for prompt in short} == {"2"}  # the best third
    assert sorted(prompt[-1] for prompt in long) == ["0", "1"]
    assert all(row.keys() == {"prompt", "completion"} for row in drawn)  # as tune reads them


def test_rows_come_out_as_they_stand_and_a_seed_draws_the_same(
    speaker: ModelSpeaker, tmp_path: Path
) -> None:
    lines = [f'{{"prompt":  "{w}\\u00e9", "completion": "{i}"}}' for i, w in enumerate(WORDS)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    one = select(speaker, [file], 5, clusters=2, rows="raw", seed=3)
    two = select(speaker, [file], 5, clusters=2, rows="raw", seed=3)
    assert one == two
    assert set(one.lines) <= set(lines)
    assert len(set(one.lines)) == 5
    seeds = {
        tuple(select(speaker, [file], 5, clusters=2, rows="raw", seed=s).lines) for s in range(6)
    }
    assert len(seeds) > 1


def test_a_later_round_draws_from_the_rest_and_more_where_more_was_gained(
    speaker: ModelSpeaker, tmp_path: Path
) -> None:
    file = kinds(tmp_path)
    more: dict[str, Any] = {"clusters": 2, "quality": "quality", "rows": "raw"}
    first = select(speaker, [file], 8, **more)
    of, drawn = first.report["clusters"], first.report["drawn"]
    long = of[-1]
    gains = [{"gain": 3.0 if of[i] == long else 1.0} for i in drawn]
    file_of_gains = rows(tmp_path, gains, "gains.jsonl")
    second = select(
        speaker, [file], 8, quality="quality", rows="raw", after=first.report, gains=[file_of_gains]
    )
    # by hand: w = (3/4, 1/4), gains (1, 3): (3/4, 3/4), so half of the rows each
    assert second.report["weights"][str(long)] == pytest.approx(0.5)
    assert second.report["budgets"][str(long)] == 4
    assert not set(second.report["drawn"]) & set(drawn)
    assert second.report["round"] == 2
    assert set(second.report["earlier"]) == set(drawn)


def test_what_a_cluster_lacks_goes_to_the_others() -> None:
    assert allotted({0: 0.5, 1: 0.5}, {0: 10, 1: 10}, 5) == {0: 3, 1: 2}
    assert allotted({0: 0.9, 1: 0.1}, {0: 2, 1: 10}, 8) == {0: 2, 1: 6}
    assert allotted({0: 0.0, 1: 1.0}, {0: 5, 1: 3}, 6) == {0: 3, 1: 3}
    assert (
        sum(allotted({i: 1 / 7 for i in range(7)}, dict.fromkeys(range(7), 9), 10).values()) == 10
    )


def test_what_cannot_be_drawn_is_refused(speaker: ModelSpeaker, tmp_path: Path) -> None:
    file = kinds(tmp_path)
    for count, more, said in (
        (0, {}, "count 0: there are 32 rows"),
        (33, {}, "count 33: there are 32 rows"),
        (4, {"clusters": 40}, "clusters 40: there are 32 distinct"),
        (4, {"quality": None, "temperature": 0.5}, "temperature has no effect"),
        (4, {"clusters": 2, "after": {}}, "clusters has no effect"),
        (4, {"temperature": 0.0}, "temperature 0: must be above 0"),
        (4, {"gains": [file]}, "gains are of an earlier round"),
    ):
        with pytest.raises(PlanError, match=said):
            select(speaker, [file], count, **({"quality": "quality", "rows": "raw"} | more))  # type: ignore[arg-type]
    with pytest.raises(SourceError, match=r"rows\.jsonl:1: grade is a number; got none"):
        select(speaker, [file], 4, quality="grade")
    bad = rows(tmp_path, [{"prompt": "a", "completion": "b", "quality": "high"}], "bad.jsonl")
    with pytest.raises(SourceError, match=r"bad\.jsonl:1: quality is a number; got 'high'"):
        select(speaker, [bad], 1, quality="quality")
    first = select(speaker, [file], 4, clusters=2, quality="quality", rows="raw").report
    with pytest.raises(SourceError, match="of other rows"):
        select(
            speaker,
            [kinds(tmp_path / ".", "again.jsonl"), file],
            4,
            quality="quality",
            after=first,
            gains=[file],
        )
    none = rows(tmp_path, [{"gain": -1.0}] * 4, "none.jsonl")
    with pytest.raises(SourceError, match="no cluster gained anything"):
        select(speaker, [file], 4, quality="quality", after=first, gains=[none])


def test_the_command_draws_and_what_it_wrote_can_be_tuned_on(
    speaker: ModelSpeaker, tmp_path: Path
) -> None:
    file, base = kinds(tmp_path), small_base(tmp_path / "base")
    out, report = tmp_path / "out.jsonl", tmp_path / "report.json"
    words = ("data", "select", str(base), str(file), str(out), "--count", "6", "--rows", "raw")
    done = cli(*words, "--quality", "quality", "--report", str(report))
    assert done.exit_code == 0, done.output
    assert "6 of 32 rows" in done.stdout
    assert len(read_rows([out])) == 6
    assert len(json.loads(report.read_text())["drawn"]) == 6
    again = cli(*words, "--quality", "quality")
    assert again.exit_code != 0
    assert "--overwrite" in again.stderr
    assert model_of(base) is not None
