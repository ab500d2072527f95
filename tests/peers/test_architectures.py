"""What mergekit 0.1.5 cannot merge, so that the other tests go round it by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.peers.both import our_merge
from tests.peers.conftest import Checkpoints
from tests.peers.families import INFERRED, Family
from tests.peers.peer import Peer, PeerError, Plan, in_mergekits_words, tensors_of
from tests.peers.plans import plan_of

pytestmark = pytest.mark.peer


def plan_for(family: Family) -> Plan:
    return {**plan_of("task_arithmetic", family, [{"weight": 0.5}]), "dtype": "float32"}


@pytest.mark.parametrize(
    ("family_name", "said"),
    [
        ("bert_encoder", "TypeError: can only concatenate list"),
        ("bert_masked_lm", "bert.pooler.dense"),
        ("t5", "DenseReluDense.wi_0.weight"),
    ],
)
def test_where_the_peers_own_definition_fails_ours_merges_every_tensor(
    peer: Peer, checkpoints: Checkpoints, family_name: str, said: str
) -> None:
    family = checkpoints(family_name)
    with pytest.raises(PeerError, match=said):
        peer.merge(plan_for(family))
    assert set(our_merge(plan_for(family))) == set(tensors_of(Path(family.base)))


def test_the_peer_infers_no_bert_encoder_either(peer: Peer, checkpoints: Checkpoints) -> None:
    family = checkpoints("bert_encoder")
    assert peer.merge(in_mergekits_words(plan_for(family), INFERRED)) == {}
