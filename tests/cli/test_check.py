from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from cli.conftest import CHUNK, Cli, store_url, stored_objects
from cli.tokenizer_zoo import corpus

from kvstore_s3.cli.app import run


@pytest.fixture(scope="module")
def sound_store(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a document and the store that it was warmed into."""
    folder = tmp_path_factory.mktemp("sound")
    (folder / "doc.txt").write_text(corpus()[:3000])
    flags = ["--model", str(tiny_model), "--store", store_url(folder), "--chunk-tokens", str(CHUNK)]
    assert run(["warm", str(folder / "doc.txt"), *flags]) == 0
    assert len(stored_objects(folder)) >= 5
    return folder


@pytest.fixture
def warmed(sound_store: Path, tmp_path: Path) -> Path:
    """A copy of that store, extended attributes included, to be damaged."""
    shutil.copytree(sound_store, tmp_path, dirs_exist_ok=True)
    return tmp_path / "store"


def rewrite(path: Path, content: bytes) -> None:
    path.chmod(0o600)
    path.write_bytes(content)


def flip(position: int) -> Callable[[list[Path]], list[Path]]:
    def damage(objects: list[Path]) -> list[Path]:
        content = bytearray(objects[1].read_bytes())
        content[position] ^= 0x10
        rewrite(objects[1], bytes(content))
        return [objects[1]]

    return damage


def truncate(objects: list[Path]) -> list[Path]:
    rewrite(objects[2], objects[2].read_bytes()[:-20])
    return [objects[2]]


def empty(objects: list[Path]) -> list[Path]:
    rewrite(objects[0], b"")
    return [objects[0]]


def lengthen(objects: list[Path]) -> list[Path]:
    rewrite(objects[0], objects[0].read_bytes() + bytes(16))
    return [objects[0]]


def swap(objects: list[Path]) -> list[Path]:
    one, other = objects[0].read_bytes(), objects[3].read_bytes()
    rewrite(objects[0], other)
    rewrite(objects[3], one)
    return [objects[0], objects[3]]


def rename_shard(objects: list[Path]) -> list[Path]:
    target = objects[0].with_name("l0-9.h0-2")
    objects[0].rename(target)
    return [target]


def names_of(store: Path, objects: list[Path]) -> set[str]:
    return {path.relative_to(store).as_posix() for path in objects}


def test_a_sound_store_is_found_sound(warmed: Path, cli: Cli, tmp_path: Path) -> None:
    for flags in ([], ["--decode"]):
        ran = cli("check", "--store", store_url(tmp_path), "--json", *flags)
        assert ran.code == 0
        assert ran.json["objects"] == len(stored_objects(tmp_path))
        assert ran.json["damaged"] == ran.json["deleted"] == []


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (flip(3), "BAD_MAGIC"),
        (flip(100), None),
        (flip(-40), "SECTION_CHECKSUM"),
        (truncate, "TRUNCATED"),
        (empty, "TRUNCATED"),
        (lengthen, "TRAILING_BYTES"),
        (swap, "WRONG_KEY"),
        (rename_shard, "WRONG_SHARD"),
    ],
    ids=["magic", "header", "payload", "truncated", "empty", "longer", "swapped", "renamed"],
)
def test_damage_is_named_deleted_and_mended_by_the_next_warm(
    damage: Callable[[list[Path]], list[Path]],
    fault: str | None,
    warmed: Path,
    warm: Cli,
    cli: Cli,
    tmp_path: Path,
) -> None:
    sound = {path: path.read_bytes() for path in stored_objects(tmp_path)}
    damaged = names_of(warmed, damage(stored_objects(tmp_path)))
    check = ("check", "--store", store_url(tmp_path))
    ran = cli(*check)
    assert ran.code == 4
    assert {line.split()[1] for line in ran.out.splitlines() if line.startswith("damaged ")} == damaged
    listed = cli(*check, "--json", "--delete")
    assert listed.code == listed.json["exit_code"] == 4
    assert {item["object"] for item in listed.json["damaged"]} == damaged == set(listed.json["deleted"])
    if fault is not None:
        assert {item["fault"] for item in listed.json["damaged"]} == {fault}
    assert not any((warmed / name).exists() for name in damaged)
    assert cli(*check).code == 0
    assert warm("doc.txt").code == 0
    assert cli(*check).code == 0
    assert {path: path.read_bytes() for path in stored_objects(tmp_path)} == sound


def test_an_object_that_is_gone_is_a_miss_that_the_next_warm_fills(
    warmed: Path, warm: Cli, cli: Cli, tmp_path: Path
) -> None:
    count = len(stored_objects(tmp_path))
    stored_objects(tmp_path)[1].unlink()
    assert cli("check", "--store", store_url(tmp_path), "--json").json["objects"] == count - 1
    assert warm("doc.txt", "--json").json["chunks_new"] == 1
    assert len(stored_objects(tmp_path)) == count


@pytest.mark.parametrize("content", [None, b"{}", b"", b"not json", "flipped"])
def test_a_namespace_without_its_description_is_damage(
    content: bytes | str | None, warmed: Path, warm: Cli, cli: Cli, tmp_path: Path
) -> None:
    (description,) = warmed.glob("*/namespace.json")
    sound = description.read_bytes()
    description.chmod(0o600)
    if content is None:
        description.unlink()
    else:
        description.write_bytes(sound.replace(b"bfloat16", b"bfloat17") if isinstance(content, str) else content)
    check = ("check", "--store", store_url(tmp_path), "--json")
    ran = cli(*check, "--delete")
    assert ran.code == 4
    assert [item["object"] for item in ran.json["damaged"]] == [f"{description.parent.name}/namespace.json"]
    assert ran.json["unverifiable"] == len(stored_objects(tmp_path))
    assert cli("ls", "--store", store_url(tmp_path)).code == 0
    assert warm("doc.txt").code == 0
    assert description.read_bytes() == sound
    assert cli(*check).code == 0


def test_what_others_put_into_the_store_is_left_alone(warmed: Path, cli: Cli, tmp_path: Path) -> None:
    (warmed / "readme.txt").write_text("hello")
    ran = cli("check", "--store", store_url(tmp_path), "--json", "--delete")
    assert (ran.code, ran.json["foreign"]) == (0, 1)
    assert (warmed / "readme.txt").exists()


def test_one_namespace_can_be_checked_alone(warmed: Path, cli: Cli, tmp_path: Path) -> None:
    (description,) = warmed.glob("*/namespace.json")
    sound = description.parent.name
    other = ("0" if sound[0] != "0" else "1") * 64
    shutil.copytree(description.parent, warmed / other)  # right bytes, wrong namespace
    store = ("--store", store_url(tmp_path))
    assert cli("check", *store, "--namespace", sound[:8]).code == 0
    assert cli("check", *store, "--namespace", other[:8]).code == 4
    cli("check", *store, "--namespace", "xyz").fails_with(2, "expected 1 to 64 hex digits")
    cli("check", *store, "--namespace", "abcdef0123").fails_with(2, "no namespace starts with 'abcdef0123'")


def test_ls_and_stat_show_what_lies_in_the_store(warmed: Path, cli: Cli, tmp_path: Path) -> None:
    store = ("--store", store_url(tmp_path))
    chunks = len(stored_objects(tmp_path))
    size = sum(path.stat().st_size for path in stored_objects(tmp_path))
    (row,) = cli("ls", *store, "--json").json["namespaces"]
    assert (row["model"], row["dtype"], row["chunks"], row["tokens"], row["bytes"]) == (
        "LlamaForCausalLM",
        "bfloat16",
        chunks,
        chunks * CHUNK,
        size,
    )
    assert row["namespace"][:16] in cli("ls", *store).out
    prefix = ("--namespace", row["namespace"][:6])
    listed = cli("ls", *store, *prefix, "--json").json["chunk_list"]
    assert [chunk["chunk"] for chunk in listed] == [path.parent.name for path in stored_objects(tmp_path)]
    assert cli("ls", *store, *prefix).out.count("\n") == chunks + 1
    totals = cli("stat", *store, "--json").json
    assert (totals["namespaces"], totals["chunks"], totals["bytes"]) == (1, chunks, size)
    assert cli("stat", *store).code == 0
    details = cli("stat", *store, *prefix, "--json").json
    assert details["sampled_headers"] == chunks
    assert sum(details["sections_by_codec"].values()) == chunks
    assert details["bits_per_value"] == pytest.approx(size * 8 / (chunks * CHUNK * 2 * 2 * 2 * 16), abs=0.01)
    assert details["identity"]["chunk_tokens"] == CHUNK
    assert "1 damaged" not in cli("stat", *store, *prefix).out


def test_an_empty_store_is_no_error(cli: Cli, tmp_path: Path) -> None:
    store = ("--store", store_url(tmp_path))
    for verb in ("ls", "stat", "check"):
        ran = cli(verb, *store, "--json")
        assert (ran.code, ran.err) == (0, "")
        assert json.loads(ran.out)["exit_code"] == 0


def test_a_check_that_is_interrupted_ends_at_once(
    warmed: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def interrupt(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("kvstore_s3.cli.check.verify_sections", interrupt)
    ran = cli("check", "--store", store_url(tmp_path))
    assert ran.code == 130
    assert ran.err.count("\n") == 1
