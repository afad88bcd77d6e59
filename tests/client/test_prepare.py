"""Text becomes packed ids, as bytes and by a real tokenizer."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from maskwire.data.file_data import open_data
from maskwire.data.prepare import prepare
from maskwire.data.prepared_folder import PreparedMetadata

TEXTS = {"b.txt": "the cat sat on the mat", "a.txt": "the dog sat on the log\n", "c/d.txt": "čeština, 日本語"}


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    for name, text in TEXTS.items():
        path = tmp_path / "texts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (tmp_path / "texts" / "empty.txt").touch()
    return tmp_path / "texts"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE(unk_token=None))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["[MASK]"],
    )  # fmt: skip
    made.train_from_iterator(TEXTS.values(), trainer)
    made.enable_truncation(4)  # files on the hub often have it on
    path = tmp_path / "tokenizer.json"
    made.save(str(path))
    return path


def test_bytes_are_packed_into_one_file_with_document_ends(texts: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    meta = prepare(texts, tmp_path / "out", on_progress=lambda *place: told.append(place))
    total = sum(len(text.encode()) for text in TEXTS.values())
    assert (meta.num_tokens, meta.mask_id, meta.dtype, meta.tokenizer) == (257, 256, "uint8", "bytes")
    assert (meta.tokens, meta.text_bytes, meta.documents) == (total, total, 3)
    assert told[-1] == (total, total)
    assert PreparedMetadata.read(tmp_path / "out") == meta
    packed = (tmp_path / "out" / "tokens.bin").read_bytes()
    assert packed == b"".join(TEXTS[name].encode() for name in ("a.txt", "b.txt", "c/d.txt"))


def test_a_tokenizer_encodes_each_document_and_its_hash_is_recorded(
    texts: Path, tmp_path: Path, tokenizer: Path
) -> None:
    from tokenizers import Tokenizer

    meta = prepare(texts, tmp_path / "out", tokenizer=tokenizer)
    loaded = Tokenizer.from_file(str(tokenizer))
    loaded.no_truncation()
    size = loaded.get_vocab_size()
    assert meta.mask_id == loaded.token_to_id("[MASK]"), "the tokenizer's own"
    assert (meta.end_id, meta.num_tokens, meta.dtype) == (size, size + 1, "uint16"), "the end is added"
    assert meta.tokenizer == f"sha256:{hashlib.sha256(tokenizer.read_bytes()).hexdigest()}"
    ids = np.fromfile(tmp_path / "out" / "tokens.bin", dtype="<u2")
    ends = np.load(tmp_path / "out" / "documents.npy")
    documents = np.split(ids, ends[:-1])
    for name, document in zip(("a.txt", "b.txt", "c/d.txt"), documents, strict=True):
        assert document.tolist() == [*loaded.encode(TEXTS[name], add_special_tokens=False).ids, size]
    data = open_data(tmp_path / "out", length=4, batch_size=3)
    assert data.tokenizer == meta.tokenizer
    assert data.bytes_per_token == pytest.approx(meta.text_bytes / ids.size)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == tokenizer.read_bytes()


def special(tokenizer: Path, template: str) -> dict[str, int]:
    """Give a tokenizer's file a template such as "<s> $A </s>"; the ids of its special tokens."""
    from tokenizers import Tokenizer, processors

    loaded = Tokenizer.from_file(str(tokenizer))
    names = [part for part in template.split() if part != "$A"]
    loaded.add_special_tokens(names)
    ids = {name: loaded.token_to_id(name) for name in names}
    loaded.post_processor = processors.TemplateProcessing(single=template, special_tokens=list(ids.items()))
    loaded.save(str(tokenizer))
    return ids


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("<s> $A </s>", "each document starts with id {<s>} and ends with id {</s>} (--no-special-tokens"),
        ("$A <|endoftext|>", "each document ends with id {<|endoftext|>} (--no-special-tokens"),
        ("[CLS] <s> $A", "each document starts with id {[CLS]}, {<s>} and ends with id {added} ("),
        ("$A", "each document ends with id {added} (--no-special-tokens leaves special tokens out)"),
    ],
)
def test_special_tokens_are_added_and_reported(
    texts: Path, tmp_path: Path, tokenizer: Path, template: str, words: str
) -> None:
    from tokenizers import Tokenizer
    from typer.testing import CliRunner

    from maskwire.cli import app

    ids = special(tokenizer, template)
    start, _, end = template.partition("$A")
    before, after = [ids[name] for name in start.split()], [ids[name] for name in end.split()]
    if not after:  # the document's end is added after the tokenizer's last id
        after = [Tokenizer.from_file(str(tokenizer)).get_vocab_size()]
        ids["added"] = after[0]
    command = ["data", "prepare", str(texts), "--tokenizer", str(tokenizer)]
    said = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "kept")])
    for name, token in ids.items():
        words = words.replace(f"{{{name}}}", str(token))
    assert words in said.stdout
    meta = PreparedMetadata.read(tmp_path / "kept")
    assert (meta.document_start, meta.document_end) == (before, after)
    loaded = Tokenizer.from_file(str(tokenizer))
    loaded.no_truncation()

    def documents(folder: Path) -> list[list[int]]:
        found = np.fromfile(folder / "tokens.bin", dtype="<u2")
        return [part.tolist() for part in np.split(found, np.load(folder / "documents.npy")[:-1])]

    bare = [
        loaded.encode(TEXTS[name], add_special_tokens=False).ids for name in ("a.txt", "b.txt", "c/d.txt")
    ]
    assert documents(tmp_path / "kept") == [[*before, *text, *after] for text in bare]
    said = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "bare"), "--no-special-tokens"])
    assert "none (--no-special-tokens)" in said.stdout
    assert documents(tmp_path / "bare") == bare
    assert PreparedMetadata.read(tmp_path / "bare").document_start == []


def digits(folder: Path, kind: str) -> Path:
    """A tokenizer of digits alone, with a template "[BOS] $A [EOS]" and no unknown token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {"[BOS]": 0, "[EOS]": 1, **{str(digit): 2 + digit for digit in range(10)}}
    made = Tokenizer(
        {
            "bpe": lambda: models.BPE(vocabulary, []),
            "wordlevel": lambda: models.WordLevel(vocabulary),
            "wordpiece": lambda: models.WordPiece(vocabulary),
            "unigram": lambda: models.Unigram([(word, -1.0) for word in vocabulary]),
        }[kind]()
    )
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(["[BOS]", "[EOS]"])
    made.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 0), ("[EOS]", 1)]
    )
    made.save(str(folder / f"{kind}.json"))
    return folder / f"{kind}.json"


@pytest.mark.parametrize("kind", ["bpe", "wordlevel", "wordpiece", "unigram"])
def test_special_tokens_are_detected_from_encoded_texts(tmp_path: Path, kind: str) -> None:
    (tmp_path / "texts").mkdir()
    # The first text has no token of its own, the second begins and ends as the tokenizer's template does.
    for name, text in {"a": "\n", "b": "[BOS] 3 [EOS]", "c": "4 5"}.items():
        (tmp_path / "texts" / f"{name}.txt").write_text(text)
    tokenizer = digits(tmp_path, kind)
    meta = prepare(tmp_path / "texts", tmp_path / "out", tokenizer=tokenizer, parse_special_tokens=True)
    assert (meta.document_start, meta.document_end) == ([0], [1])
    ids = np.fromfile(tmp_path / "out" / "tokens.bin", dtype="<u2")
    assert ids.tolist() == [0, 0, 5, 1, 1, 0, 6, 7, 1]
    assert meta.dropped == {"no tokens": 1}


def test_a_special_token_that_a_text_spells_out_is_text_unless_asked(tmp_path: Path, tokenizer: Path) -> None:
    stop = special(tokenizer, "$A <stop>")["<stop>"]
    (tmp_path / "a.txt").write_text("the <stop> sat")
    found = []
    for parse in (False, True):
        prepare(
            tmp_path / "a.txt", tmp_path / "out", tokenizer=tokenizer, parse_special_tokens=parse, force=True
        )
        found.append(np.fromfile(tmp_path / "out" / "tokens.bin", dtype="<u2").tolist().count(stop))
    assert found == [1, 2], "one is the end of the document"
    with pytest.raises(ValueError, match="needs a tokenizer file, got tokenizer='bytes'"):
        prepare(tmp_path / "a.txt", tmp_path / "bytes", parse_special_tokens=True)


def test_a_hugging_face_folder_says_which_tokens_are_special(tmp_path: Path, tokenizer: Path) -> None:
    from tokenizers import Tokenizer

    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (tmp_path / "a.txt").write_text("the cat sat")
    with pytest.raises(ValueError, match=r"the folder has no tokenizer\.json; write one with transformers"):
        prepare(tmp_path / "a.txt", tmp_path / "out", tokenizer=folder)
    loaded = Tokenizer.from_file(str(tokenizer))
    loaded.add_special_tokens(["<gap>", "<stop>", "<fill>"])
    loaded.save(str(folder / "tokenizer.json"))
    names = {"mask_token": "<gap>", "eos_token": {"content": "<stop>"}, "pad_token": "<fill>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    ids = [loaded.token_to_id(name) for name in ("<gap>", "<stop>", "<fill>")]
    meta = prepare(tmp_path / "a.txt", tmp_path / "out", tokenizer=folder)
    assert [meta.mask_id, meta.end_id, meta.pad_id] == ids
    assert meta.num_tokens == loaded.get_vocab_size(), "nothing is added"
    names["pad_token"] = "<stop>"  # as GPT-2 has it: documents would end in padding
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    assert prepare(tmp_path / "a.txt", tmp_path / "out", tokenizer=folder, force=True).pad_id is None


@pytest.mark.parametrize("kind", ["wordlevel", "wordpiece", "unigram"])
def test_a_text_that_cannot_be_encoded_is_an_error_with_a_remedy(tmp_path: Path, kind: str) -> None:
    from typer.testing import CliRunner

    from maskwire.cli import app

    (tmp_path / "texts").mkdir()
    for name, text in {"a": "1 2", "b": "3 x", "c": "4"}.items():
        (tmp_path / "texts" / f"{name}.txt").write_text(text)
    command = ["data", "prepare", str(tmp_path / "texts"), "--out", str(tmp_path / "out"), "--tokenizer"]
    for more in ([], ["--no-special-tokens"]):
        said = CliRunner().invoke(app, [*command, str(digits(tmp_path, kind)), *more])
        assert said.exit_code == 2
        words = f"{tmp_path / 'texts' / 'b.txt'}: the tokenizer {tmp_path / kind}.json cannot encode the text"
        assert words in said.stderr
        assert "unknown token" in said.stderr
    assert not (tmp_path / "out").exists()


def test_texts_that_yield_only_special_tokens_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc")
    with pytest.raises(ValueError, match="the tokenizer produced no tokens from the text"):
        prepare(tmp_path / "a.txt", tmp_path / "out", tokenizer=digits(tmp_path, "bpe"))


def test_folders_prepared_by_older_versions_are_read(texts: Path, tmp_path: Path) -> None:
    meta = prepare(texts, tmp_path / "out")
    path = tmp_path / "out" / "maskwire-data.json"
    fields = json.loads(path.read_text())
    for name in (
        "document_start", "document_end", "pad_id", "end_id", "prompts", "longest", "dropped"
    ):  # fmt: skip
        del fields[name]
    fields["format"] = 1
    path.write_text(json.dumps(fields))
    read = PreparedMetadata.read(tmp_path / "out")
    assert read == dataclasses.replace(meta, longest=0)


def test_a_large_vocabulary_is_packed_as_int32(texts: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word for text in TEXTS.values() for word in text.split()}
    vocabulary = {f"w{i}": i for i in range(70_000)} | {
        word: 70_000 + i for i, word in enumerate(sorted(words))
    }
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.save(str(tmp_path / "t.json"))
    meta = prepare(texts, tmp_path / "out", tokenizer=tmp_path / "t.json")
    assert (meta.dtype, meta.mask_id) == ("int32", 70_000 + len(words))
    assert np.fromfile(tmp_path / "out" / "tokens.bin", dtype="<i4").max() == meta.end_id


def test_an_existing_folder_is_replaced_only_with_force(texts: Path, tmp_path: Path) -> None:
    first = prepare(texts, tmp_path / "out")
    with pytest.raises(
        ValueError, match="choose another folder, or replace the prepared data in it with --force"
    ):
        prepare(texts, tmp_path / "out")
    assert prepare(texts, tmp_path / "out", force=True) == first
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"already exists; choose another folder$"):
        prepare(texts, tmp_path / "mine", force=True)
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_a_failure_names_the_file_and_leaves_no_output(texts: Path, tmp_path: Path, tokenizer: Path) -> None:
    (texts / "z.txt").write_bytes(b"abc\xff")
    with pytest.raises(ValueError, match=r"z\.txt: not UTF-8 at byte 3"):
        prepare(texts, tmp_path / "out", tokenizer=tokenizer)
    with pytest.raises(ValueError, match="there is no file"):
        prepare(texts, tmp_path / "out", tokenizer=tmp_path / "none.json")
    (tmp_path / "junk.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(ValueError, match=r"not a tokenizer\.json"):
        prepare(texts, tmp_path / "out", tokenizer=tmp_path / "junk.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["junk.json", "texts", "tokenizer.json"]


def test_without_the_extra_the_error_says_what_to_install(
    texts: Path, tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r'pip install "maskwire\[tokenizers\]"'):
        prepare(texts, tmp_path / "out", tokenizer=tokenizer)
