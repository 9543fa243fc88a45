"""Lossy profiles on the command line: warm, the question of a calibration, and what ls, stat and check make of it."""

from __future__ import annotations

import io
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.conftest import CHUNK, Cli, Ran, store_url, stored_objects
from cli.tokenizer_zoo import corpus
from codec.calibrations import make_calibration

from kvstore_s3 import Hit, KVStore, Namespace
from kvstore_s3.cli.inventory import parse_name

VALUES = CHUNK * 2 * 2 * 2 * 16
"""Values in a chunk of the tiny model."""


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "one.txt").write_text(corpus()[:3000])
    return folder


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes standard input and error those of a person who will type what is given."""

    def type_in(answer: str) -> None:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(answer.encode())))
        monkeypatch.setattr("kvstore_s3.cli.warm_calibration._is_terminal", lambda stream: True)

    return type_in


def calibrations(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "store").glob("*/calibration/*.safetensors"))


def publish(tiny_model: Path, tmp_path: Path) -> Path:
    """A calibration of random values for the tiny model's namespace, as `calibrate` would have left it."""
    import torch

    namespace = Namespace.from_model(tiny_model, chunk_tokens=CHUNK)
    layout = namespace.layout

    def draw(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(layout.layers, 2, 128, layout.kv_heads, layout.head_dim, generator=generator)

    from kvstore_s3.runtime import connect

    data = make_calibration(layout, "head", draw, namespace=namespace.digest).to_bytes()
    with connect(store_url(tmp_path), namespace) as store:
        digest = store.runtime.run(store.kv.calibrations.publish(data))
    return tmp_path / "store" / namespace.hex / "calibration" / f"{digest.hex()}.safetensors"


# warm


def test_a_lossy_warm_stores_less_and_says_how_it_can_be_better(
    warm: Cli, docs: Path, tiny_model: Path, tmp_path: Path
) -> None:
    ran = warm(docs, "--profile", "balanced", "--json")
    assert ran.code == 0, ran
    assert (ran.json["profile"], ran.json["calibrated"]) == ("balanced", False)
    assert ran.json["chunks_new"] == len(stored_objects(tmp_path)) > 0
    assert ran.json["bits_per_value"] < 11
    (line,) = [line for line in ran.err.splitlines() if "no calibration" in line]
    command = shlex.split(line.rpartition("calibrate first with: ")[2])
    assert command[:2] == ["kvstore-s3", "calibrate"]
    assert command[2:] == [
        str(docs), "--model", str(tiny_model), "--store", store_url(tmp_path), "--chunk-tokens", str(CHUNK)
    ]  # fmt: skip
    shown = warm(docs, "--profile", "small", "--salt", "another")
    assert "bits a value, near-lossless, balanced and small together" in shown.out, "not what a reader of small fetches"
    shown = warm(docs, "--profile", "small")
    assert shown.code == 0
    assert "0 new" in shown.out, "what balanced stored serves small"


def test_a_lossless_warm_replaces_what_a_lossy_one_stored(warm: Cli, docs: Path) -> None:
    lossy = warm(docs, "--profile", "small", "--json").json
    lossless = warm(docs, "--json").json
    assert lossless["chunks_new"] == lossy["chunks_new"]
    assert lossless["bytes"] > lossy["bytes"]
    assert warm(docs, "--profile", "small", "--json").json["chunks_new"] == 0, "lossless objects serve any quality"


def test_a_warm_builds_on_the_best_that_is_stored_whatever_its_profile_reads(
    warm: Cli, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `small` adds to a prefix is read by others as near-lossless, so it must not come from a small prefix."""
    (tmp_path / "part.txt").write_text(corpus()[:1500])
    (tmp_path / "whole.txt").write_text(corpus()[:3000])
    assert warm(tmp_path / "part.txt", "--profile", "small").code == 0
    read: list[str] = []
    real = KVStore.load

    async def load(self: KVStore, hit: Hit, **given: Any) -> torch.Tensor:
        read.extend(hit.qualities)
        return await real(self, hit, **given)

    monkeypatch.setattr(KVStore, "load", load)
    ran = warm(tmp_path / "whole.txt", "--profile", "small", "--json")
    assert (ran.code, ran.json["profile"], ran.json["calibrated"]) == (0, "small", False)
    assert set(read) == {"near-lossless"}


def test_the_profile_may_be_a_setting(warm: Cli, docs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSTORE_S3_PROFILE", "near-lossless")
    assert warm(docs, "--json").json["profile"] == "near-lossless"
    assert warm(docs, "--profile", "lossless", "--json").json["profile"] == "lossless"
    monkeypatch.setenv("KVSTORE_S3_PROFILE", "near")
    warm(docs).fails_with(2, "KVSTORE_S3_PROFILE", "near-lossless", "'near'")


def test_with_a_calibration_nobody_is_asked_or_told(
    warm: Cli, docs: Path, tiny_model: Path, tmp_path: Path, terminal: Callable[[str], None]
) -> None:
    publish(tiny_model, tmp_path)
    terminal("")
    ran = warm(docs, "--profile", "balanced", "--json")
    assert ran.json["calibrated"] is True
    assert "no calibration" not in ran.err


@pytest.mark.parametrize("answer", ["n\n", "No\n", ""])
def test_a_person_who_declines_gets_an_uncalibrated_warm(
    answer: str, warm: Cli, docs: Path, tmp_path: Path, terminal: Callable[[str], None]
) -> None:
    terminal(answer)
    ran = warm(docs, "--profile", "balanced", "--json")
    assert "calibrate first on these documents? [Y/n]" in ran.err
    assert ran.json["calibrated"] is False
    assert calibrations(tmp_path) == []


@pytest.mark.parametrize("how", ["yes", "flag"])
def test_a_person_who_agrees_gets_a_calibrated_warm(
    how: str, warm: Cli, tmp_path: Path, terminal: Callable[[str], None]
) -> None:
    (tmp_path / "long.txt").write_text(corpus()[:10000])
    flags = ["--calibrate"] if how == "flag" else []
    if how == "yes":
        terminal("\n")
    ran = warm(tmp_path / "long.txt", "--profile", "near-lossless", "--json", *flags)
    assert ran.code == 0, ran
    assert ("[Y/n]" in ran.err) == (how == "yes")
    assert ran.json["calibrated"] is True
    assert len(calibrations(tmp_path)) == 1


def test_a_flag_decides_without_a_question(
    warm: Cli, docs: Path, tmp_path: Path, terminal: Callable[[str], None]
) -> None:
    terminal("y\n")
    ran = warm(docs, "--profile", "balanced", "--no-calibrate", "--json")
    assert "[Y/n]" not in ran.err
    assert ran.json["calibrated"] is False
    warm("-", "--profile", "balanced", "--calibrate").fails_with(2, "standard input")


def test_a_dry_run_asks_nothing_and_calibrates_nothing(
    warm: Cli, docs: Path, tmp_path: Path, terminal: Callable[[str], None]
) -> None:
    terminal("y\n")
    ran = warm(docs, "--profile", "balanced", "--calibrate", "--dry-run")
    assert ran.code == 0
    assert "[Y/n]" not in ran.err
    assert not list((tmp_path / "store").rglob("*.safetensors"))


# ls, stat, check


@pytest.fixture
def calibrated(warm: Cli, docs: Path, tiny_model: Path, tmp_path: Path) -> Path:
    """The artefact of a store with calibrated objects."""
    artefact = publish(tiny_model, tmp_path)
    assert warm(docs, "--profile", "balanced").code == 0
    return artefact


def verify(cli: Cli, tmp_path: Path, *flags: str) -> Ran:
    return cli("check", "--store", store_url(tmp_path), "--json", *flags)


def test_ls_and_stat_show_levels_and_calibrations(calibrated: Path, cli: Cli, tmp_path: Path) -> None:
    (row,) = cli("ls", "--store", store_url(tmp_path), "--json").json["namespaces"]
    assert row["calibrations"] == [calibrated.stem]
    assert row["objects"] == len(stored_objects(tmp_path))
    assert row["bytes"] == sum(path.stat().st_size for path in stored_objects(tmp_path)), "artefacts are not counted"
    ran = cli("stat", "--store", store_url(tmp_path), "--namespace", row["namespace"], "--json").json
    assert ran["objects_by_profile"] == {"scalable": row["objects"]}
    assert ran["objects_by_calibration"] == {calibrated.stem: row["objects"]}
    assert (ran["levels"], ran["current_calibration"]) == (3, calibrated.stem)
    assert ran["calibration_bytes"] == {calibrated.stem: calibrated.stat().st_size}
    bits = ran["bits_per_value_by_quality"]
    assert 0 < bits["small"] < bits["balanced"] < bits["near-lossless"] < ran["bits_per_value"]
    assert sum(ran["bits_per_value_by_level"]) == pytest.approx(bits["near-lossless"], abs=0.002)
    lines = cli("stat", "--store", store_url(tmp_path), "--namespace", row["namespace"]).out
    assert "bits a value that are read: small" in lines
    assert f"calibration   {calibrated.stem[:16]}" in lines


@pytest.mark.parametrize("flags", [(), ("--decode",)], ids=["", "decode"])
def test_a_sound_lossy_store_is_found_sound(calibrated: Path, cli: Cli, tmp_path: Path, flags: tuple[str, ...]) -> None:
    ran = verify(cli, tmp_path, *flags)
    assert (ran.code, ran.json["damaged"], ran.json["foreign"]) == (0, [], 0)
    assert (ran.json["objects"], ran.json["calibrations"]) == (len(stored_objects(tmp_path)), 1)
    assert ran.json["lacking_calibration"] == []


def test_uncalibrated_and_mixed_stores_decode(
    warm: Cli, docs: Path, tiny_model: Path, cli: Cli, tmp_path: Path
) -> None:
    assert warm(docs, "--profile", "small").code == 0
    publish(tiny_model, tmp_path)
    (docs / "two.txt").write_text(corpus()[5000:8000])
    assert warm(docs, "--profile", "small").code == 0
    ran = verify(cli, tmp_path, "--decode")
    assert (ran.code, ran.json["objects"]) == (0, len(stored_objects(tmp_path)))


@pytest.mark.parametrize("how", ["flipped", "short", "not one"])
def test_a_damaged_artefact_is_damage_and_its_objects_are_reported(
    how: str, calibrated: Path, cli: Cli, tmp_path: Path
) -> None:
    data = calibrated.read_bytes()
    damaged = {"flipped": data[:-1] + bytes([data[-1] ^ 1]), "short": data[:-1], "not one": b"nonsense"}
    calibrated.write_bytes(damaged[how])
    ran = verify(cli, tmp_path, "--decode")
    assert ran.code == 4
    key = str(calibrated.relative_to(tmp_path / "store"))
    named = str(calibrated.parent.parent.relative_to(tmp_path / "store") / "calibration.json")
    assert [damage["object"] for damage in ran.json["damaged"]] == [key, named]
    assert len(ran.json["lacking_calibration"]) == len(stored_objects(tmp_path))
    assert ran.json["objects"] == len(stored_objects(tmp_path)), "their checksums are verified all the same"
    deleted = verify(cli, tmp_path, "--delete").json["deleted"]
    assert sorted(deleted) == sorted([key, named, *ran.json["lacking_calibration"]])
    assert stored_objects(tmp_path) == []
    assert verify(cli, tmp_path).code == 0


def test_objects_without_their_calibration_are_reported_deleted_and_stored_again(
    calibrated: Path, warm: Cli, docs: Path, cli: Cli, tmp_path: Path
) -> None:
    calibrated.unlink()
    (calibrated.parent.parent / "calibration.json").unlink()
    ran = verify(cli, tmp_path)
    assert (ran.code, ran.json["damaged"]) == (1, [])
    assert len(ran.json["lacking_calibration"]) == len(stored_objects(tmp_path))
    assert "coded with a calibration that is not there" in cli("check", "--store", store_url(tmp_path)).out
    deleted = verify(cli, tmp_path, "--delete").json["deleted"]
    assert sorted(deleted) == sorted(ran.json["lacking_calibration"])
    again = warm(docs, "--profile", "balanced", "--json").json
    assert (again["chunks_new"], again["calibrated"]) == (len(stored_objects(tmp_path)), False)
    assert verify(cli, tmp_path, "--decode").code == 0


def test_an_object_that_is_damaged_and_lacks_its_calibration_is_listed_and_deleted_once(
    calibrated: Path, cli: Cli, tmp_path: Path
) -> None:
    calibrated.unlink()
    (calibrated.parent.parent / "calibration.json").unlink()
    damaged, *others = stored_objects(tmp_path)
    data = damaged.read_bytes()
    damaged.write_bytes(data[:-20] + bytes([data[-20] ^ 1]) + data[-19:])  # a payload: the header is sound
    ran = verify(cli, tmp_path, "--delete")
    assert (ran.code, len(ran.json["damaged"]), len(ran.json["lacking_calibration"])) == (4, 1, len(others))
    assert len(set(ran.json["deleted"])) == len(ran.json["deleted"]) == 1 + len(others)


def test_a_warm_stores_what_lacks_its_calibration_again(
    calibrated: Path, warm: Cli, docs: Path, cli: Cli, tmp_path: Path
) -> None:
    calibrated.unlink()
    planned = warm(docs, "--profile", "balanced", "--dry-run", "--json").json
    assert (planned["chunks_missing"], planned["chunks_present"]) == (len(stored_objects(tmp_path)), 0)
    again = warm(docs, "--profile", "balanced", "--json")
    assert (again.json["chunks_new"], again.json["calibrated"]) == (len(stored_objects(tmp_path)), False)
    assert verify(cli, tmp_path, "--decode").json["lacking_calibration"] == []


def test_a_damaged_calibration_json_is_damage(calibrated: Path, cli: Cli, tmp_path: Path) -> None:
    named = calibrated.parent.parent / "calibration.json"
    for document in (b"{", json.dumps({"digest": "0" * 64}).encode(), b""):
        named.write_bytes(document)
        ran = verify(cli, tmp_path)
        assert (ran.code, [damage["fault"] for damage in ran.json["damaged"]]) == (4, ["CALIBRATION"])
        assert ran.json["lacking_calibration"] == []


def test_an_artefact_of_another_namespace_is_damage(calibrated: Path, cli: Cli, tmp_path: Path, docs: Path) -> None:
    assert cli("check", "--store", store_url(tmp_path)).code == 0
    other = tmp_path / "store" / ("ab" * 32) / "calibration"
    other.mkdir(parents=True)
    (other / calibrated.name).write_bytes(calibrated.read_bytes())
    ran = verify(cli, tmp_path)
    assert ran.code == 4, "its namespace has no description"


@pytest.mark.parametrize(
    ("rest", "ours"),
    [
        ("namespace.json", True),
        ("calibration.json", True),
        (f"calibration/{'0' * 64}.safetensors", True),
        (f"calibration/{'0' * 63}.safetensors", False),
        (f"calibration/{'G' * 64}.safetensors", False),
        (f"calibration/{'0' * 64}.pt", False),
        (f"calibration/{'0' * 64}", False),
        ("calibration", False),
        (f"calibrations/{'0' * 64}.safetensors", False),
    ],
)
def test_names_are_taken_apart_strictly(rest: str, ours: bool) -> None:
    name = parse_name(f"{'ab' * 32}/{rest}")
    assert (name is not None) == ours
    assert name is None or not name.is_chunk
