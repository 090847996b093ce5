"""Ranks that meet in a store full of what dead ranks left."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from engine.training.rendezvous import fresh


@pytest.fixture
def server() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def start(server: dist.TCPStore, ranks: list[int], patience: float = 30.0) -> list[dist.Store | None]:
    """Where each of `ranks` (of three) ends up, started one after the other; None: nowhere, it gave up."""

    def one(rank: int) -> dist.Store | None:
        client = dist.TCPStore("127.0.0.1", server.port, is_master=False)
        try:
            return fresh(client, rank, 3, patience=patience)
        except dist.DistError:
            return None

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(one, ranks))


def test_every_start_meets_in_a_place_of_its_own(server):
    """Of five starts, the second and the fourth lack a rank and come to nothing."""
    for ranks in ([0, 1, 2], [0, 2], [2, 1, 0], [1, 2], [1, 0, 2]):
        whole = len(ranks) == 3
        places = start(server, ranks, 30.0 if whole else 0.5)
        if not whole:
            assert places == [None, None]
            continue
        for place in places:
            place.add("arrived", 1)
        assert [int(place.get("arrived")) for place in places] == [3, 3, 3]
