from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from kvstore_s3.cli.documents import STDIN, Document, Rejected, find_sources, read_documents, read_text
from kvstore_s3.errors import InvalidArgumentError


def read(path: Path, content: bytes, **options: str) -> list[Document | Rejected]:
    path.write_bytes(content)
    return list(read_documents(path, io.BytesIO(), **options))


def reason(path: Path, content: bytes, **options: str) -> str:
    (rejected,) = read(path, content, **options)
    assert isinstance(rejected, Rejected)
    return rejected.reason


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text")


def test_a_directory_gives_its_texts_sorted_and_nothing_hidden(tmp_path: Path) -> None:
    touch(
        tmp_path, "b.txt", "a/z.MD", "a/c.rst", "a/.git/x.txt", ".h.txt", "image.png", "d.json", "q.jsonl", "q.ndjson"
    )
    names = [str(path.relative_to(tmp_path)) for path in find_sources([str(tmp_path)])]
    assert names == ["b.txt", "q.jsonl", "q.ndjson", "a/c.rst", "a/z.MD"]


def test_a_file_that_is_named_may_have_any_suffix(tmp_path: Path) -> None:
    touch(tmp_path, "data.json")
    assert find_sources([str(tmp_path / "data.json")]) == [tmp_path / "data.json"]


def test_globs_reach_into_directories(tmp_path: Path) -> None:
    touch(tmp_path, "a/b/one.py", "two.py")
    names = [path.name for path in find_sources([str(tmp_path / "**" / "*.py")])]
    assert sorted(names) == ["one.py", "two.py"]


def test_a_name_that_looks_like_a_glob_is_taken_literally_where_it_exists(tmp_path: Path) -> None:
    touch(tmp_path, "[1].txt", "1.txt")
    assert [path.name for path in find_sources([str(tmp_path / "[1].txt")])] == ["[1].txt"]


def test_a_document_that_is_named_twice_is_taken_once(tmp_path: Path) -> None:
    touch(tmp_path, "a.txt")
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    assert len(find_sources([str(tmp_path), str(tmp_path / "a.txt"), "-", "-"])) == 2


@pytest.mark.parametrize(
    ("argument", "part"),
    [("absent.txt", "no such file or directory: 'absent.txt'"), ("*.nothing", "no document matches '*.nothing'")],
)
def test_an_argument_that_matches_nothing_is_named(
    argument: str, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidArgumentError) as raised:
        find_sources([argument])
    assert part in str(raised.value)


def test_a_directory_without_documents_is_named(tmp_path: Path) -> None:
    touch(tmp_path, "image.png")
    with pytest.raises(InvalidArgumentError, match=r"no document under .*; expected \.txt, \.md"):
        find_sources([str(tmp_path)])


def test_text_is_taken_byte_for_byte(tmp_path: Path) -> None:
    (document,) = read(tmp_path / "a.txt", "\ufeffline\r\nend  \n".encode())
    assert document == Document(str(tmp_path / "a.txt"), "\ufeffline\r\nend  \n")


def test_standard_input_is_one_document() -> None:
    assert list(read_documents(STDIN, io.BytesIO(b"from a pipe"))) == [Document("standard input", "from a pipe")]


@pytest.mark.parametrize("content", [b"", b" \n\t"])
def test_an_empty_document_is_rejected(content: bytes, tmp_path: Path) -> None:
    assert "is empty" in reason(tmp_path / "a.txt", content)


def test_a_document_that_is_not_utf8_is_rejected_with_the_byte(tmp_path: Path) -> None:
    assert "is not UTF-8 (byte 0xff at offset 2)" in reason(tmp_path / "a.txt", b"ab\xff")


def test_a_file_that_has_gone_is_rejected(tmp_path: Path) -> None:
    (rejected,) = read_documents(tmp_path / "gone.txt", io.BytesIO())
    assert isinstance(rejected, Rejected)
    assert "cannot be read" in rejected.reason


def test_each_line_of_jsonl_is_a_document(tmp_path: Path) -> None:
    lines = [{"text": "one"}, {"messages": [{"role": "user", "content": "hi"}]}]
    content = "\n\n".join(json.dumps(line) for line in lines).encode() + b"\r\n"
    one, two = read(tmp_path / "d.jsonl", content)
    assert one == Document(f"{tmp_path / 'd.jsonl'}:1", "one")
    assert two == Document(f"{tmp_path / 'd.jsonl'}:3", "", ({"role": "user", "content": "hi"},))


def test_another_field_of_jsonl_can_be_chosen(tmp_path: Path) -> None:
    (document,) = read(tmp_path / "d.jsonl", b'{"text": "no", "body": "yes"}', jsonl_field="body")
    assert isinstance(document, Document)
    assert document.text == "yes"


@pytest.mark.parametrize(
    ("line", "part"),
    [
        (b"{", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[1]", "is a JSON list, expected an object"),
        (b'{"body": "x"}', "has no field 'text' or 'messages'; its fields are 'body'"),
        (b'{"text": 3}', "field 'text' is not a string"),
        (b'{"text": " "}', "is empty"),
        (b'{"text": "\\ud800"}', "lone surrogate"),
        (b'{"text": "\xff"}', "is not UTF-8"),
        (b'{"messages": []}', "is not a list of objects"),
        (b'{"messages": [{"role": "user"}]}', "is not a list of objects"),
        (b"\n  \n", "put one JSON object on each line"),
    ],
)
def test_a_wrong_line_of_jsonl_is_rejected_for_its_reason(line: bytes, part: str, tmp_path: Path) -> None:
    assert part in reason(tmp_path / "d.jsonl", line)


def test_a_wrong_line_leaves_the_others(tmp_path: Path) -> None:
    documents = read(tmp_path / "d.jsonl", b'{"text": "a"}\n{\n{"text": "b"}\n')
    assert [type(document) for document in documents] == [Document, Rejected, Document]


def test_a_prefix_file_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"--prefix-file .* cannot be read"):
        read_text(tmp_path / "absent", "--prefix-file")
    (tmp_path / "latin").write_bytes(b"\xe9")
    with pytest.raises(InvalidArgumentError, match="is not UTF-8"):
        read_text(tmp_path / "latin", "--prefix-file")
