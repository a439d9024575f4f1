"""Every way in which pictures and captions may lie in a folder, and every way in which that may be wrong."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from glmimg.dataset.names import name_caption
from glmimg.dataset.reading import Dataset, read_dataset
from glmimg.errors import BadInput


def picture(path: Path, colour: str = "red", size: tuple[int, int] = (64, 64)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def encoded(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), colour).save(buffer, format="PNG")
    return buffer.getvalue()


def told(dataset: Dataset) -> list[tuple[str, tuple[str, ...]]]:
    return [(example.label, example.captions) for example in dataset.examples]


@pytest.mark.parametrize(
    ("stem", "caption"),
    [
        ("red_fox-02", "red fox"),
        ("a small dog (3)", "a small dog"),
        ("IMG_20240501_1234", ""),
        ("DSC00012", ""),
        ("0001", ""),
        ("3f2504e0-4f89-11d3-9a0c-0305e82c3301", ""),
        ("狐狸_1", "狐狸"),
        ("cafe\u0301-2", "caf\xe9"),  # as Macs write names
        ("3d printer", "3d printer"),
        ("IMG-20240501-WA0001", ""),
        ("WhatsApp Image 2026-01-02 at 11.33.55", ""),
        ("Screenshot 2026-01-02 at 11.33.55 AM", ""),
        ("PXL_20260102_113355123.MP", ""),
        ("IMG_0020-edited", ""),
        ("IMG_0020 (1)", ""),
        ("_DSC0012~2", ""),
        ("portrait 2", "portrait"),
        ("night on the beach", "night on the beach"),
        ("photo of a dog", "photo of a dog"),
    ],
)
def test_names_as_captions(stem: str, caption: str) -> None:
    assert name_caption(stem) == caption


def test_folder_with_text_files(tmp_path: Path) -> None:
    picture(tmp_path / "b/two.JPG")
    picture(tmp_path / "one.png")
    (tmp_path / "one.txt").write_text("﻿first way\n\n second way \n", encoding="utf-8")
    (tmp_path / "left.txt").write_text("nobody")
    picture(tmp_path / "zero.png")
    (tmp_path / "zero.txt").touch()
    found = read_dataset(tmp_path)
    assert told(found) == [("b/two.JPG", ()), ("one.png", ("first way", "second way")), ("zero.png", ())]
    assert found.notes == ("left.txt has no picture",) and "txt" in found.kind


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_of_all_systems(end: str, tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(f"one way{end}another{end}".encode())
    assert told(read_dataset(tmp_path)) == [("a.png", ("one way", "another"))]
    (tmp_path / "metadata.csv").write_bytes(f"\ufefffile_name,text{end}a.png,a cat{end}".encode())
    assert told(read_dataset(tmp_path)) == [("a.png", ("a cat",))]


def test_folder_of_names(tmp_path: Path) -> None:
    picture(tmp_path / "green_tree.webp")
    picture(tmp_path / "IMG_1.png")
    found = read_dataset(tmp_path)
    assert told(found) == [("IMG_1.png", ()), ("green_tree.webp", ("green tree",))] and "file names" in found.kind


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "list.tsv"])
def test_tables(name: str, tmp_path: Path) -> None:
    for one in ("a", "b"):
        picture(tmp_path / f"{one}.png")
    rows = [{"file_name": "a.png", "text": "an a, quoted"}, {"file_name": "b.png", "text": ""}]
    if name.endswith("jsonl"):
        text = "\n".join(json.dumps(row) for row in rows)
    else:
        mark = "," if name.endswith("csv") else "\t"
        text = f"file_name{mark}text\n" + f'a.png{mark}"an a, quoted"\n' + f"b.png{mark}\n"
    (tmp_path / name).write_text(text)
    found = read_dataset(tmp_path / name if name == "list.tsv" else tmp_path)
    assert told(found) == [("a.png", ("an a, quoted",)), ("b.png", ())] and found.kind == name


def test_columns_of_other_names(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"foto": "a.png", "words": ["x", "y"], "text": "no"}) + "\n")
    with pytest.raises(BadInput, match="none of its columns .foto, words, text. is known"):
        read_dataset(tmp_path)
    found = read_dataset(tmp_path, {"picture": "foto", "caption": "words"})
    assert told(found) == [("a.png", ("x", "y"))]
    with pytest.raises(BadInput, match="no column 'fota': it has foto"):
        read_dataset(tmp_path, {"picture": "fota"})


def test_what_a_table_leaves_out_is_told_and_links_are_followed(tmp_path: Path) -> None:
    root = tmp_path / "data"
    picture(root / "left.png")
    (root / "linked.png").symlink_to(picture(tmp_path / "elsewhere.png"))  # as in the hub's cache
    (root / "metadata.csv").write_text("file_name,text\nlinked.png,a thing\n")
    found = read_dataset(root)
    assert told(found) == [("linked.png", ("a thing",))] and found.notes == ("left.png is in no row of metadata.csv",)
    (root / "metadata.jsonl").write_text(json.dumps({"file_name": "left.png"}))
    assert set(read_dataset(root).notes) == {
        "metadata.csv is not read: metadata.jsonl is",
        "linked.png is in no row of metadata.jsonl",
    }


def test_rows_of_a_table_need_not_be_alike(tmp_path: Path) -> None:
    for one in ("a", "b"):
        picture(tmp_path / f"{one}.png")
    rows = [{"file_name": "a.png"}, {"file_name": "b.png", "text": "one\u2028line\x85", "source": "a.png"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    found = read_dataset(tmp_path)
    assert told(found) == [("a.png", ()), ("b.png", ("one\u2028line",))]
    assert found.examples[1].reference is not None and found.examples[0].reference is None


def test_tables_in_subfolders_as_on_the_hub(tmp_path: Path) -> None:
    for split in ("train", "test"):
        picture(tmp_path / split / "deep/x.png")
        (tmp_path / split / "metadata.jsonl").write_text(json.dumps({"file_name": "deep/x.png", "text": f"in {split}"}))
    picture(tmp_path / "train/left.png")
    found = read_dataset(tmp_path)
    assert told(found) == [("train/deep/x.png", ("in train",))] and found.kind == "train/metadata.jsonl"
    assert found.notes == (
        "test/metadata.jsonl is not of the train split",
        "train/left.png is in no row of train/metadata.jsonl",
    )
    (tmp_path / "train").rename(tmp_path / "more")
    assert [captions for _, captions in told(read_dataset(tmp_path))] == [("in train",), ("in test",)]


def test_capitals_and_names_that_are_no_text(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "a.TXT").write_text("a disc")
    (tmp_path / "b.TXT").write_text("of nothing")
    read = read_dataset(tmp_path)
    assert [e.captions for e in read.examples] == [("a disc",)] and "b.TXT has no picture" in read.notes
    (tmp_path / "a.TXT").rename(tmp_path / "a.Txt")
    (tmp_path / "b.TXT").rename(tmp_path / "b.tXt")
    read = read_dataset(tmp_path)
    assert [e.captions for e in read.examples] == [("a disc",)] and "b.tXt has no picture" in read.notes
    (tmp_path / "a.txt").write_text("a square")
    read = read_dataset(tmp_path)
    assert read.examples[0].captions == ("a square",) and "a.Txt is not read: a.txt is" in read.notes
    odd = tmp_path / "odd"
    odd.mkdir()
    Path(os.fsdecode(os.fsencode(odd) + b"/caf\xe9-bar.png")).write_bytes((tmp_path / "a.png").read_bytes())
    (odd / "esc\x1b[31m.png").write_bytes((tmp_path / "a.png").read_bytes())
    example, escape = read_dataset(odd).examples
    assert escape.label == "esc\\x1b[31m.png", "it would command the terminal"
    assert example.label == "caf\\udce9-bar.png" and example.captions == ("caf bar",)
    assert example.picture.open().size and example.label.encode()


def test_where_pictures_come_from_is_no_reference(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    rows = [{"file_name": "a.png", "text": "a disc", "source": "flickr"}, {"file_name": "b.png", "source": None}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert not read_dataset(tmp_path).edits
    rows[0]["source"] = "b.png"
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_dataset(tmp_path).edits
    rows[0]["source"] = "flickr"
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_dataset(tmp_path, {"reference": "source"}).edits, "what is said is believed"


def test_what_fine_tuning_wrote_is_not_learnt(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "run" / "samples").mkdir(parents=True)
    (tmp_path / "run" / "finetune.json").write_text("{}")
    picture(tmp_path / "run" / "samples" / "sheet.png")
    assert [e.label for e in read_dataset(tmp_path).examples] == ["a.png"]


def test_files_of_other_kinds_are_told(tmp_path: Path) -> None:
    for name in ("IMG_1.HEIC", "IMG_2.heic", "IMG_3.heic", "IMG_4.heic", "film.mov", ".DS_Store", "Thumbs.db"):
        (tmp_path / name).touch()
    picture(tmp_path / ".thumbnails/small.png")
    notes = (".heic is not read: IMG_1.HEIC, IMG_2.heic, IMG_3.heic and 1 more", ".mov is not read: film.mov")
    with pytest.raises(BadInput, match="holds no pictures .*; .heic is not read: IMG_1"):
        read_dataset(tmp_path)
    picture(tmp_path / "a thing.png")
    assert read_dataset(tmp_path).notes == notes


def test_edit_pairs_in_folders_and_tables(tmp_path: Path) -> None:
    for side in ("source", "target"):
        picture(tmp_path / "pairs" / side / "x.png")
    picture(tmp_path / "pairs/source/alone.png")
    (tmp_path / "pairs/target/x.txt").write_text("make it blue")
    (tmp_path / "pairs/target/y.txt").write_text("make it red")
    found = read_dataset(tmp_path / "pairs")
    assert found.edits and told(found) == [("target/x.png", ("make it blue",))]
    assert found.examples[0].reference is not None and found.examples[0].reference.label == "source/x.png"
    assert found.notes == ("source/alone.png has no target of that name", "target/y.txt has no picture")

    picture(tmp_path / "pairs/source/x.jpg")
    first = "source/x.jpg is not read: source/x.png is"
    assert read_dataset(tmp_path / "pairs").notes == (first, *found.notes)
    (tmp_path / "pairs/source/x.txt").write_text("make it red")
    assert "source/x.txt is not read: target/x.txt is" in read_dataset(tmp_path / "pairs").notes

    rows = {"source": "source/x.png", "target": "target/x.png", "instruction": "make it blue"}
    (tmp_path / "pairs/metadata.jsonl").write_text(json.dumps(rows))
    again = read_dataset(tmp_path / "pairs")
    assert told(again) == told(found) and again.examples[0].reference is not None


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    rows: list[dict[str, Any]] = [
        {"image": {"bytes": encoded(), "path": "x.png"}, "caption": "a"},
        {"image": {"bytes": encoded("blue"), "path": None}, "caption": None},
    ]
    (tmp_path / "data").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data/train-00000.parquet")
    found = read_dataset(tmp_path)
    assert [example.captions for example in found.examples] == [("a",), ()]
    assert found.examples[0].picture.open().getpixel((0, 0)) == (255, 0, 0)
    assert "x.png" in found.examples[0].label and "row 2" in found.examples[1].label
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data/test-00000.parquet")
    found = read_dataset(tmp_path)
    assert len(found.examples) == 2 and found.notes == ("data/test-00000.parquet is not of the train split",)
    for damaged in (b"PAR1 nothing PAR1", b""):
        (tmp_path / "data/train-00000.parquet").write_bytes(damaged)
        with pytest.raises(BadInput, match="no parquet file"):
            read_dataset(tmp_path)


def test_pictures_in_tables_are_not_kept_in_memory(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    data = [{"image": encoded(colour), "text": "a"} for colour in ("red", "blue", "green")]
    parquet.write_table(pyarrow.Table.from_pylist(data), tmp_path / "train.parquet")
    sources = [example.picture for example in read_dataset(tmp_path).examples]
    assert [source.read() for source in reversed(sources)] == [row["image"] for row in reversed(data)]
    held = [value for source in sources for value in vars(source).values() if isinstance(value, bytes)]
    assert not held and sources[1].open().getpixel((0, 0)) == (0, 0, 255)


def test_parquet_that_names_files(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    for folder in (tmp_path / "a", tmp_path / "b/train"):
        picture(folder / "0.png")
        picture(folder / "1.png")
        table = pyarrow.Table.from_pylist([{"file_name": "0.png", "text": "a"}])
        parquet.write_table(table, folder / "metadata.parquet")
    for root, name in (("a", ""), ("b", "train/")):
        found = read_dataset(tmp_path / root)
        assert found.examples[0].picture.open().size == (64, 64)
        assert found.notes == (f"{name}1.png is not in a parquet file",)


def test_references_in_a_table_are_read_or_told(tmp_path: Path) -> None:
    def table(**fields: Any) -> Dataset:
        (tmp_path / "metadata.jsonl").write_text(json.dumps({"target": "t.png", "instruction": "make it red"} | fields))
        return read_dataset(tmp_path)

    for name in ("s.png", "t.png"):
        picture(tmp_path / name)
    for source in ("s.png", ["s.png"]):
        (example,) = table(source=source).examples
        assert example.reference is not None and example.reference.path == tmp_path / "s.png"
    with pytest.raises(BadInput, match="2 pictures in one column"):
        table(source=["s.png", "t.png"])
    (example,) = table(source="s.heic").examples
    assert example.reference is not None, "it is a picture, if one that cannot be read"
    found = table(source="a web page")
    assert found.examples[0].reference is None and any("column source" in note for note in found.notes)


def test_links_to_folders_are_told(tmp_path: Path) -> None:
    picture(tmp_path / "data/a.png")
    picture(tmp_path / "cats/b.png")
    (tmp_path / "data/more").symlink_to(tmp_path / "cats")
    found = read_dataset(tmp_path / "data")
    assert len(found.examples) == 1 and "more is a link to a folder" in found.notes[0]


def test_names_with_accents_in_either_form(tmp_path: Path) -> None:
    picture(tmp_path / "cafe\u0301.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\ncaf\xe9.png,a cup\n", encoding="utf-8")
    assert read_dataset(tmp_path).examples[0].picture.open().size == (64, 64)


def test_saved_by_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    import pyarrow

    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})

    def saved(caption: str) -> Any:
        """With a fingerprint: the library's own wants to pickle pyarrow where that lies outside of site-packages."""
        rows = [{"image": {"bytes": encoded(), "path": None}, "text": caption}]
        table = datasets.table.InMemoryTable(pyarrow.Table.from_pylist(rows, schema=features.arrow_schema))
        return datasets.Dataset(table, info=datasets.DatasetInfo(features=features), fingerprint=caption[:1])

    saved("a thing").save_to_disk(str(tmp_path / "one"))
    found = read_dataset(tmp_path / "one")
    assert [example.captions for example in found.examples] == [("a thing",)]
    assert found.examples[0].picture.open().size == (32, 32)
    parts = datasets.DatasetDict({"test": saved("to test"), "train": saved("in train")})
    parts.save_to_disk(str(tmp_path / "parts"))
    found = read_dataset(tmp_path / "parts")
    assert [example.captions for example in found.examples] == [("in train",)]
    assert found.notes == ("the split test is left out: train is read",)
    for name in ("state.json", "dataset_info.json", "*.arrow"):
        copy = tmp_path / name.strip("*.")
        shutil.copytree(tmp_path / "one", copy)
        next(copy.glob(name)).write_bytes(b"")
        with pytest.raises(BadInput, match="no datasets folder that can be read"):
            read_dataset(copy)


def test_captions_of_a_table_are_not_lost_in_silence(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    for header, row, note in (
        ("file_name, text", "a.png, a cat", "columns ( text) is read as captions: --column caption=NAME"),
        ("file_name,id,description", "a.png,1,a cat", "columns (id, description) is read as captions"),
    ):
        (tmp_path / "metadata.csv").write_text(f"{header}\n{row}\n")
        assert note in " ".join(read_dataset(tmp_path).notes)
    (tmp_path / "metadata.csv").write_text("file_name\na.png\n")
    assert not read_dataset(tmp_path).notes
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,a cat,\n")
    assert told(read_dataset(tmp_path)) == [("a.png", ("a cat",))]
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,a cat, on a mat\n")
    with pytest.raises(BadInput, match="row 1: ' on a mat' lies beyond the last column: put double quotes"):
        read_dataset(tmp_path)
    (tmp_path / "metadata.csv").unlink()
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": NaN}\n')
    assert told(read_dataset(tmp_path)) == [("a.png", ())]


def test_of_two_columns_of_one_name_none_is_taken(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    picture(tmp_path / "a.png")
    (tmp_path / "a.csv").write_text("file_name,text,text,id,id\na.png,a cat,a dog,1,2\n")
    (tmp_path / "b.jsonl").write_text('{"file_name": "a.png", "text": "a cat", "text": "a dog"}\n')
    parquet.write_table(pyarrow.table([["a.png"], ["a"], ["b"]], ["file_name", "text", "text"]), tmp_path / "c.parquet")
    for name, message in (("a.csv", "2 columns 'text': give"), ("b.jsonl", "two values"), ("c.parquet", "2 columns")):
        with pytest.raises(BadInput, match=message):
            read_dataset(tmp_path / name)
    assert told(read_dataset(tmp_path / "a.csv", {"caption": "file_name"})) == [("a.png", ("a.png",))]


@pytest.mark.parametrize("name", ["a" * 300 + ".png", "zero\0.png"])
def test_names_that_no_file_can_have(name: str, tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "a cat"}) + "\n")
    with pytest.raises(BadInput, match="cannot be read"):
        read_dataset(tmp_path).examples[0].picture.open()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(BadInput, match="it is a pipe"):
        read_dataset(tmp_path).examples[0].picture.open()


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such folder"):
        read_dataset(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="holds no pictures .*png"):
        read_dataset(tmp_path / "empty")
    for name in ("zero.csv", "zero.tsv", "zero.jsonl"):
        (tmp_path / name).touch()
        with pytest.raises(BadInput, match=f"{name} is empty"):
            read_dataset(tmp_path / name)
        for encoding in ("utf-16-le", "utf-16-be"):
            (tmp_path / name).write_text('{"file_name": "a.png"}\n', encoding=encoding)
            with pytest.raises(BadInput, match="is no UTF-8 text .*: save it as UTF-8"):
                read_dataset(tmp_path / name)
    (tmp_path / "long").mkdir()
    (tmp_path / "long/metadata.csv").write_text("file_name,text\na.png," + "x" * 200_000)
    with pytest.raises(BadInput, match="no table that can be read"):
        read_dataset(tmp_path / "long")
    for content, message in (
        ("", "is empty"),
        ("not json\n", "line 1: no json"),
        ("[" * 10**5, "line 1: no json"),
        ("[1]\n", "line 1: a list"),
        ('{"file_name": ""}\n', "row 1: its column file_name is empty"),
        ('{"file_name": "../../etc/passwd.png"}\n', "outside"),
    ):
        folder = tmp_path / "table"
        folder.mkdir(exist_ok=True)
        (folder / "metadata.jsonl").write_text(content)
        with pytest.raises(BadInput, match=message):
            read_dataset(folder)
    (tmp_path / "latin").mkdir()
    picture(tmp_path / "latin/a.png")
    (tmp_path / "latin/a.txt").write_bytes("café".encode("latin-1"))
    assert read_dataset(tmp_path / "latin").examples[0].captions == ("caf\udce9",)  # the check tells
    with pytest.raises(BadInput, match="a .zip file"):
        (tmp_path / "a.zip").write_bytes(b"PK")
        read_dataset(tmp_path / "a.zip")
