from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli.conftest import CHUNK, Cli, store_url, stored_objects
from cli.tokenizer_zoo import corpus

from kvstore_s3.cli.documents import Document
from kvstore_s3.cli.prompts import PromptStyle, render_request


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "one.txt").write_text(corpus()[:2000])
    (folder / "two.md").write_text(corpus()[5000:8000])
    return folder


def test_a_warm_stores_whole_chunks_and_a_second_one_finds_them(warm: Cli, docs: Path, tmp_path: Path) -> None:
    first = warm(docs, "--json")
    assert first.code == 0, first
    report = first.json
    assert [Path(document["name"]).name for document in report["documents"]] == ["one.txt", "two.md"]
    assert all(document["whole"] % CHUNK == 0 < document["whole"] for document in report["documents"])
    assert report["chunks"] == report["chunks_new"] == len(stored_objects(tmp_path))
    assert report["chunks_present"] == 0
    assert report["raw_bytes"] == report["chunks"] * CHUNK * 2 * 2 * 2 * 16 * 2
    assert report["bytes"] == sum(path.stat().st_size for path in stored_objects(tmp_path))
    assert report["bits_per_value"] == pytest.approx(report["bytes"] * 16 / report["raw_bytes"], abs=0.01)
    assert report["tokens_computed"] == report["chunks"] * CHUNK

    second = warm(docs, "--json")
    assert second.code == 0
    assert second.json["chunks_present"] == report["chunks"]
    assert (second.json["chunks_new"], second.json["tokens_computed"], second.json["bytes"]) == (0, 0, 0)


def test_where_all_is_stored_the_weights_are_not_loaded(warm: Cli, docs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert warm(docs).code == 0

    def refuse(name: str, dtype: str) -> None:
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr("kvstore_s3.connectors.pretrained.load_model", refuse)
    assert warm(docs).code == 0
    assert warm(docs, "--salt", "tenant", "--dry-run").code == 0
    with pytest.raises(AssertionError, match="weights were loaded"):
        warm(docs, "--salt", "tenant")


def test_a_dry_run_says_what_a_run_would_do_and_stores_nothing(warm: Cli, docs: Path, tmp_path: Path) -> None:
    dry = warm(docs, "--dry-run", "--json").json
    assert stored_objects(tmp_path) == []
    assert (dry["dry_run"], dry["chunks_present"], dry["chunks_new"]) == (True, 0, 0)
    real = warm(docs, "--json").json
    assert (dry["chunks"], dry["chunks_missing"], dry["tokens"]) == (real["chunks"], real["chunks_new"], real["tokens"])
    assert dry["raw_bytes"] == real["raw_bytes"]
    again = warm(docs, "--dry-run", "--json").json
    assert (again["chunks_missing"], again["chunks_present"], again["raw_bytes"]) == (0, real["chunks"], 0)


def test_people_get_a_summary_on_stdout_and_progress_on_stderr(warm: Cli, docs: Path) -> None:
    ran = warm(docs)
    lines = {line.split()[0]: line for line in ran.out.splitlines()}
    assert lines["documents"].split()[1] == "2,"
    assert "new, 0 present, of 64 tokens" in lines["chunks"]
    assert "ratio" in lines["stored"]
    assert "bits a value" in lines["stored"]
    assert "tokens computed and stored at" in lines["time"]
    assert "tokens/s" in ran.err
    assert "warm: " in ran.err


def test_a_system_prompt_that_documents_share_is_stored_once(warm: Cli, docs: Path, tmp_path: Path) -> None:
    prefix = tmp_path / "system.txt"
    prefix.write_text(corpus()[20_000:22_000])
    report = warm(docs, "--prefix-file", prefix, "--json").json
    assert report["chunks_new"] == report["chunks"] == len(stored_objects(tmp_path))
    shared = sum(document["whole"] for document in report["documents"]) // CHUNK - report["chunks"]
    assert shared >= 3
    assert report["tokens_computed"] == report["chunks"] * CHUNK


@pytest.mark.parametrize("chat", [False, True])
def test_a_client_that_builds_its_request_as_documented_hits_all_that_was_warmed(
    chat: bool, warm: Cli, docs: Path, tmp_path: Path, tiny_model: Path
) -> None:
    from transformers import AutoTokenizer

    from kvstore_s3 import Namespace, Settings, connect

    (tmp_path / "system.txt").write_text("You answer questions.\n")
    report = warm(docs, "--prefix-file", "system.txt", *(["--chat"] if chat else []), "--salt", "s", "--json").json
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    text = (docs / "one.txt").read_text()
    if chat:
        messages = [
            {"role": "system", "content": "You answer questions.\n"},
            {"role": "user", "content": text + "\n\nWhat is it about?"},
        ]
        request = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    else:
        request = tokenizer("You answer questions.\n" + text + "\n\nWhat is it about?")["input_ids"]
    namespace = Namespace.from_model(tiny_model, chunk_tokens=CHUNK, cache_dir=tmp_path / "cache")
    assert namespace.hex == report["namespace"]
    with connect(store_url(tmp_path), namespace, Settings()) as store:
        assert store.lookup(request, salt="s").tokens == report["documents"][0]["whole"]
        assert store.lookup(request).tokens == 0


def test_jsonl_standard_input_and_globs_are_documents(
    warm: Cli, docs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation = [{"role": "user", "content": corpus()[9000:10_000]}]
    lines = [{"text": corpus()[3000:4000]}, {"messages": conversation}]
    (tmp_path / "many.jsonl").write_text("\n".join(map(json.dumps, lines)))
    stdin = tmp_path / "stdin"
    stdin.write_text(corpus()[11_000:12_000])
    with stdin.open() as file:
        monkeypatch.setattr("sys.stdin", file)
        report = warm("many.jsonl", "docs/*.md", "-", "--chat", "--dry-run", "--json").json
    names = [document["name"] for document in report["documents"]]
    assert names == ["many.jsonl:1", "many.jsonl:2", "docs/two.md", "standard input"]


def test_documents_that_cannot_be_used_are_named_and_the_others_are_done(
    warm: Cli, docs: Path, tiny_model: Path
) -> None:
    (docs / "empty.txt").write_text("")
    (docs / "latin.txt").write_bytes(b"caf\xe9")
    (docs / "long.txt").write_text(corpus()[:40_000])
    (docs / "short.txt").write_text("A few words.")
    ran = warm(docs, "--json")
    assert ran.code == ran.json["exit_code"] == 1
    reasons = {Path(failed["name"]).name: failed["reason"] for failed in ran.json["failed"]}
    assert set(reasons) == {"empty.txt", "latin.txt", "long.txt"}
    assert "the model's context is 4,096" in reasons["long.txt"]
    assert ran.json["chunks_new"] == ran.json["chunks"] > 0
    told = warm(docs)
    assert "too short  1 with less than one chunk" in told.out
    assert (told.out + told.err).count("empty.txt") == 1, "what failed is named once"


@pytest.mark.parametrize("text", ["", corpus()[:40_000]], ids=["empty", "longer than the context"])
def test_a_single_document_that_cannot_be_used_gets_one_line(warm: Cli, tmp_path: Path, text: str) -> None:
    document = tmp_path / "one.txt"
    document.write_text(text)
    ran = warm(document)
    assert (ran.code, len(ran.err.splitlines()), ran.out) == (2, 1, "")


def test_a_lost_description_of_the_namespace_is_put_back(warm: Cli, docs: Path, tmp_path: Path) -> None:
    namespace = warm(docs, "--json").json["namespace"]
    description = tmp_path / "store" / namespace / "namespace.json"
    before = description.read_bytes()
    description.unlink()
    assert warm(docs).code == 0
    assert description.read_bytes() == before


def test_another_dtype_is_another_namespace(warm: Cli, docs: Path) -> None:
    reports = [warm(docs, "--json", *flags).json for flags in ([], ["--dtype", "float32"])]
    assert [report["dtype"] for report in reports] == ["bfloat16", "float32"]
    assert reports[1]["chunks_new"] == reports[0]["chunks_new"]
    assert reports[1]["raw_bytes"] == 2 * reports[0]["raw_bytes"]


def test_the_text_of_a_request_is_the_prefix_the_document_and_the_question() -> None:
    style = PromptStyle("P\n")
    assert render_request(None, Document("d", "D"), "Q", style) == "P\nDQ"  # type: ignore[arg-type]
