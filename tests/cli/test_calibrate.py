"""kvstore-s3 calibrate: one artefact in the store, a summary, and one clear line for what cannot be calibrated."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from cli.conftest import CHUNK, Cli, Ran, store_url
from cli.tokenizer_zoo import corpus

from kvstore_s3.codec.calibration import Calibration
from kvstore_s3.namespace import Namespace

pytestmark = pytest.mark.timeout(300)

ENOUGH = 8 * (CHUNK + 127)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny models gain nothing from threads, which only wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.txt").write_text(corpus()[number * 6000 : (number + 1) * 6000])
    return folder


@pytest.fixture
def calibrate(cli: Cli, tiny_model: Path, tmp_path: Path) -> Cli:
    """`kvstore-s3 calibrate` of the tiny model, with few tokens, into the file store `tmp_path/store`."""

    def execute(*arguments: object) -> Ran:
        common = ("--model", tiny_model, "--store", store_url(tmp_path), "--chunk-tokens", CHUNK)
        return cli("calibrate", *arguments, *common, "--max-tokens", ENOUGH)

    return execute


def artefacts(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "store").rglob("*.safetensors"))


def test_a_calibration_is_stored_under_its_digest_and_named_as_the_current_one(
    calibrate: Cli, docs: Path, tmp_path: Path, tiny_model: Path
) -> None:
    report = calibrate(docs, "--json").json
    assert report["exit_code"] == 0
    (artefact,) = artefacts(tmp_path)
    data = artefact.read_bytes()
    assert artefact.stem == report["digest"] == blake3(data).hexdigest()
    assert len(data) == report["bytes"]
    current = artefact.parent.parent / "calibration.json"
    assert json.loads(current.read_text()) == {"digest": report["digest"]}
    namespace = Namespace.from_model(tiny_model, chunk_tokens=CHUNK, cache_dir=tmp_path / "cache")
    assert report["namespace"] == namespace.hex
    assert Namespace.from_json((artefact.parent.parent / "namespace.json").read_text()) == namespace
    calibration = Calibration.from_bytes(data, namespace.layout, namespace.digest)
    assert calibration.span == report["span"] == "group"
    assert calibration.report["kl"] == report["kl"]


def test_the_report_says_what_each_quality_costs_beside_fp8(calibrate: Cli, docs: Path) -> None:
    report = calibrate(docs, "--json").json
    assert 0 < report["tokens"] <= ENOUGH
    assert report["documents"] == 3
    assert report["kl"]["near-lossless"] == pytest.approx(0.25 * report["kl"]["fp8"], rel=0.5)
    assert report["kl"]["near-lossless"] < report["kl"]["balanced"] < report["kl"]["small"]
    bits = report["bits_per_value"]
    assert 0 < bits["small"] < bits["balanced"] < bits["near-lossless"] < 16


def test_documents_may_be_given_by_an_option(cli: Cli, docs: Path, tiny_model: Path, tmp_path: Path) -> None:
    ran = cli("calibrate", "--model", tiny_model, "--docs", docs, "--store", store_url(tmp_path))
    assert ran.code == 0, ran
    assert len(artefacts(tmp_path)) == 1


def test_people_get_a_table_on_stdout_and_progress_on_stderr(calibrate: Cli, docs: Path) -> None:
    ran = calibrate(docs)
    assert ran.code == 0, ran
    lines = [line.split() for line in ran.out.splitlines()]
    first = [line[0] for line in lines]
    assert first == ["namespace", "calibration", "learned", "quality", "near-lossless", "balanced", "small", "fp8"]
    assert "span group over 2 layers of 2, metric fisher" in ran.out
    assert "tokens/s" in ran.err


def test_the_same_documents_give_the_same_calibration(calibrate: Cli, docs: Path, tmp_path: Path) -> None:
    assert calibrate(docs, "--json").json["digest"] == calibrate(docs, "--json").json["digest"]
    assert len(artefacts(tmp_path)) == 1


def test_another_calibration_replaces_the_current_one_and_leaves_the_old_one_there(
    calibrate: Cli, docs: Path, tmp_path: Path
) -> None:
    old = calibrate(docs, "--json").json["digest"]
    new = calibrate(docs, "--span", "head", "--metric", "gains", "--layer-group", "1", "--json").json
    assert (new["span"], new["metric"], new["layer_group"]) == ("head", "gains", 1)
    assert {path.stem for path in artefacts(tmp_path)} == {old, new["digest"]}
    current = artefacts(tmp_path)[0].parent.parent / "calibration.json"
    assert json.loads(current.read_text()) == {"digest": new["digest"]}


def test_a_document_that_cannot_be_used_is_named_and_the_others_are_learned_from(calibrate: Cli, docs: Path) -> None:
    (docs / "latin.txt").write_bytes(b"caf\xe9")
    ran = calibrate(docs, "--json")
    assert ran.code == ran.json["exit_code"] == 1
    assert [Path(failed["name"]).name for failed in ran.json["failed"]] == ["latin.txt"]


def test_few_tokens_for_the_transform_are_warned_about(cli: Cli, docs: Path, tiny_model: Path, tmp_path: Path) -> None:
    fewest = ("--chunk-tokens", 16, "--max-tokens", 8 * (16 + 127), "--store", store_url(tmp_path))
    few = cli("calibrate", docs, "--model", tiny_model, *fewest, "--span", "all")
    assert "warning: 1,144 tokens are few for a transform of dimension 128; give 1,375 or more" in few.err
    assert "warning: " not in cli("calibrate", docs, "--model", tiny_model, *fewest, "--span", "head").err


def test_too_little_text_says_how_much_is_needed(calibrate: Cli, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text(corpus()[:1000])
    calibrate("short.txt").fails_with(2, "too little text", f"at least {ENOUGH:,} are needed")
    assert artefacts(tmp_path) == []


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--span", "heads"], ["unknown span 'heads'", "channel, head, group, all"]),
        (["--metric", "l2"], ["unknown metric 'l2'", "fisher, gains"]),
        (["--layer-group", "3"], ["a layer group of 3 layers", "1 to 2"]),
        (["--kl-ratio", "0"], ["KL ratio", "above 0"]),
        (["--dtype", "float8_e4m3fn"], ["float8_e4m3fn", "bfloat16"]),
        (["--dtype", "int4"], ["unknown dtype 'int4'"]),
        (["--chat-argument", "x=1"], ["add --chat"]),
        (["absent.txt"], ["no such file or directory: 'absent.txt'"]),
    ],
    ids=lambda value: "-".join(value)[:40] if isinstance(value, list) else None,
)
def test_a_wrong_flag_is_a_usage_error(flags: list[str], parts: list[str], calibrate: Cli, docs: Path) -> None:
    ran = calibrate(docs, *flags)
    ran.fails_with(2, *parts)
    assert ran.out == ""
    assert len(ran.err.strip().splitlines()) == 1


def test_no_documents_is_a_usage_error(calibrate: Cli) -> None:
    calibrate().fails_with(2, "no documents given")


def test_a_limit_below_what_is_needed_is_refused(cli: Cli, docs: Path, tiny_model: Path, tmp_path: Path) -> None:
    ran = cli("calibrate", docs, "--model", tiny_model, "--store", store_url(tmp_path), "--max-tokens", "100")
    ran.fails_with(2, "at least 3,064 tokens", "100 are allowed")


def test_a_store_that_cannot_be_written_is_found_out_before_the_model_is_loaded(
    cli: Cli, docs: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str, dtype: str) -> None:
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr("kvstore_s3.connectors.transformers.exact_model.load_model", refuse)
    (tmp_path / "store").write_text("a file where the store would be")
    ran = cli("calibrate", docs, "--model", tiny_model, "--store", store_url(tmp_path), "--chunk-tokens", CHUNK)
    ran.fails_with(3, "store")
