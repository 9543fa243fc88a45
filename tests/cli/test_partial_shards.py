"""ls, stat and check of a store that ranks wrote parts of chunks to."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from cli.conftest import Cli, store_url
from partitions import NAMESPACE, TOKENS, flip_last_section, tp, write


@pytest.fixture
def store(tmp_path: Path) -> str:
    """Four chunks of two ranks, and two that the second rank has not saved yet."""
    url = store_url(tmp_path)

    async def fill() -> None:
        left, right = tp(2)
        await write(url, [left])
        await write(url, [right], chunks=range(2))

    asyncio.run(fill())
    return url


def test_stat_counts_the_objects_of_each_shard_and_the_chunks_that_lack_some(cli: Cli, store: str) -> None:
    ran = cli("stat", "--store", store, "--namespace", NAMESPACE.hex[:8])
    assert ran.code == 0
    assert "l0-4.h0-2 of 4, l0-4.h2-4 of 2 chunks" in ran.out
    assert "incomplete    2 chunks without some layers or heads of the model" in ran.out
    found = cli("stat", "--store", store, "--namespace", NAMESPACE.hex, "--json").json
    assert (found["chunks"], found["objects"], found["incomplete_chunks"]) == (4, 6, 2)
    assert found["shards"] == {"l0-4.h0-2": 4, "l0-4.h2-4": 2}
    assert (found["sampled_headers"], found["sampled_damaged"], found["unmarked_shards"]) == (6, 0, [])


def test_ls_lists_markers_as_nothing_foreign(cli: Cli, store: str) -> None:
    found = cli("ls", "--store", store, "--json").json
    assert (found["foreign"], found["namespaces"][0]["incomplete_chunks"]) == (0, 2)
    chunks = cli("ls", "--store", store, "--namespace", NAMESPACE.hex, "--json").json["chunk_list"]
    assert sorted(chunk["shards"] for chunk in chunks) == [1, 1, 2, 2]


@pytest.mark.parametrize("decode", [(), ("--decode",)])
def test_check_verifies_every_part(cli: Cli, store: str, tmp_path: Path, decode: tuple[str, ...]) -> None:
    sound = cli("check", "--store", store, "--json", *decode)
    assert (sound.code, sound.json["objects"], sound.json["damaged"]) == (0, 6, [])
    path = next((tmp_path / "store").rglob("[0-9a-f]*/l0-4.h2-4"))
    data = bytearray(path.read_bytes())
    flip_last_section(data)
    path.chmod(0o600)
    path.write_bytes(data)
    found = cli("check", "--store", store, "--json", *decode)
    assert (found.code, [Path(one["object"]).name for one in found.json["damaged"]]) == (4, ["l0-4.h2-4"])


def test_check_names_a_marker_that_is_missing(cli: Cli, store: str, tmp_path: Path) -> None:
    marker = tmp_path / "store" / NAMESPACE.hex / "shards" / "l0-4.h2-4"
    marker.unlink()
    found = cli("check", "--store", store, "--json")
    assert (found.code, found.json["missing_markers"]) == (1, [f"{NAMESPACE.hex}/shards/l0-4.h2-4"])
    assert "other ranks do not find its objects" in cli("check", "--store", store).out
    asyncio.run(write(store, tp(2)[1:], chunks=range(2, 4)))
    assert marker.read_text() == "l0-4.h2-4\n"
    assert cli("check", "--store", store).code == 0


def test_tokens_of_the_prompt_fill_the_chunks_that_are_counted(cli: Cli, store: str) -> None:
    assert cli("stat", "--store", store, "--json").json["tokens"] == len(TOKENS) // 16 * 16
