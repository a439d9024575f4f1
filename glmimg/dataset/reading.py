"""A folder or file of pictures with captions -> examples. What cannot be used is said, never left out in silence.

What is understood, looked for in this order:

- a file, a row for each picture
- a folder that Hugging Face `datasets` saved (extra `data`)
- metadata.jsonl / metadata.csv in the folder
- folders source/ and target/ with files of equal names: edit pairs, the instruction in target/NAME.txt
- metadata.jsonl / metadata.csv in subfolders, as on the hub; where some are of a train split, those alone
- *.parquet with pictures inside, as on the hub (extra `data`)
- pictures, in subfolders as well, with NAME.txt beside them, one caption a line; where no .txt is there at all, the
  names are the captions
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image

from glmimg.config import parse_json
from glmimg.dataset.names import name_caption
from glmimg.dataset.spool import Spool
from glmimg.errors import BadInput, MissingExtra, UnknownName, printable
from glmimg.image_io import open_picture

__all__ = ["COLUMNS", "SUFFIXES", "Dataset", "Example", "Source", "read_dataset", "shown_name"]

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
_NOT_READ = {".avif", ".heic", ".heif", ".jfif", ".jxl"}  # pictures all the same
# What a column may be called, first come first served.
COLUMNS: dict[str, tuple[str, ...]] = {
    "picture": ("file_name", "image", "picture", "path", "target", "target_image", "edited_image", "output_image"),
    "caption": ("text", "caption", "captions", "prompt", "instruction", "edit_prompt", "edit"),
    "reference": ("source", "source_image", "reference", "input_image", "original_image", "source_file_name"),
}
_TABLES = ("metadata.jsonl", "metadata.csv")  # of both in one folder the first is read
_TRAIN = re.compile(r"(^|[/\\_.-])train([/\\_.-]|$)", re.IGNORECASE)  # in the path of a split's file
_SYSTEM = {"Thumbs.db", "desktop.ini"}


@dataclass(frozen=True)
class Source:
    """A picture's bytes: in a file, or what `data` gives. `label` names it in messages."""

    label: str
    path: Path | None = None
    data: Callable[[], bytes] | None = field(default=None, repr=False)

    def read(self) -> bytes:
        """The encoded picture; BadInput if the file cannot be read."""
        if self.data is not None:
            return self.data()
        assert self.path is not None
        try:
            if self.path.is_fifo():  # reading would wait for a writer
                raise OSError(0, "it is a pipe")
            return self.path.read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a table's name with a zero in it
            why = getattr(error, "strerror", error)
            raise BadInput(f"{self.label} cannot be read ({why}): take it out, or put it there") from error

    def open(self) -> Image.Image:
        """The picture, upright RGB; BadInput if it is none."""
        return open_picture(self.read(), self.label)

    def digest(self) -> str:
        """Of the encoded bytes."""
        return hashlib.sha256(self.read()).hexdigest()


@dataclass(frozen=True)
class Example:
    """One picture to learn from, what it is called (any number of ways), and for an edit what it was made from."""

    picture: Source
    captions: tuple[str, ...] = ()
    reference: Source | None = None

    @property
    def label(self) -> str:
        return self.picture.label


@dataclass(frozen=True)
class Dataset:
    """All examples in a fixed order; `kind` says how they were found, `notes` what was seen beside them."""

    place: str
    kind: str
    examples: tuple[Example, ...]
    notes: tuple[str, ...] = ()

    @property
    def edits(self) -> bool:
        return any(example.reference is not None for example in self.examples)


def read_dataset(place: str | Path, columns: Mapping[str, str] | None = None) -> Dataset:
    """The examples at `place`; BadInput if there are none. `columns`: names other than those of COLUMNS."""
    if not isinstance(place, (str, Path)) or not str(place).strip():
        raise BadInput(f"data {place!r:.100}: give a folder of pictures, or a metadata.jsonl, .csv or .parquet")
    root, columns = Path(os.path.abspath(os.path.expanduser(place))), dict(columns or {})
    for role in columns:
        if role not in COLUMNS:
            raise UnknownName.of("column", role, COLUMNS)
    if not root.exists():
        raise BadInput(f"{place}: no such folder; give a folder of pictures, or a metadata.jsonl, .csv or .parquet")
    notes: list[str] = []
    if root.is_file():
        kind, examples = _table(root, root.parent, columns, notes)
    elif (root / "state.json").is_file() or (root / "dataset_dict.json").is_file():
        kind, examples = "Hugging Face datasets folder", list(_saved(root, columns, notes))
    else:
        own = [root / name for name in _TABLES if (root / name).is_file()]
        parquet = sorted(root.rglob("*.parquet"))
        if own:
            kind, examples = _tables(own, root, columns, notes)
        elif (root / "source").is_dir() and (root / "target").is_dir():
            kind, examples = "source and target folders", _pairs(root, notes)
        elif deeper := sorted(file for name in _TABLES for file in root.rglob(name)):
            kind, examples = _tables(deeper, root, columns, notes)
        elif parquet:
            train = _train(parquet, root, notes)
            kind = f"{len(train)} parquet files"
            examples = [example for file in train for example in _parquet(file, root, columns, notes)]
            named = _named(examples)
            notes += [f"{shown_name(p, root)} is not in a parquet file" for p in _pictures(root) if p not in named]
        else:
            kind, examples = _folder(root, notes)
    if not examples:
        seen = "".join(f"; {note}" for note in notes[:3])
        raise BadInput(
            f"{place} holds no pictures ({kind}): {', '.join(sorted(s[1:] for s in SUFFIXES))} are looked for{seen}"
        )
    return Dataset(str(place), kind, tuple(examples), tuple(notes))


def shown_name(path: Path, root: Path | None = None) -> str:
    """What messages and files call it: a name that is no UTF-8 could be neither printed nor written."""
    return printable(path.name if root is None else str(path.relative_to(root)))


def _pictures(root: Path) -> list[Path]:
    return [path for path in _visible(root) if path.suffix.lower() in SUFFIXES]


def _visible(root: Path) -> list[Path]:
    """All but what systems hide there, a phone's .thumbnails, a desktop's Thumbs.db, and what fine-tuning wrote."""
    found = sorted(root.rglob("*"))
    made = {p.parent for p in found if p.name == "finetune.json" and p.parent != root}
    return [
        p
        for p in found
        if p.name not in _SYSTEM
        and not any(n.startswith(".") for n in p.relative_to(root).parts)
        and made.isdisjoint(p.parents)
        and p not in made
    ]


def _unread(root: Path, texts: Mapping[Path, Path]) -> list[str]:
    """A note for each kind of file that is neither picture nor caption, a phone's own format, films; for links and
    captions of no picture too."""
    kinds: dict[str, list[str]] = defaultdict(list)
    visible, stems = _visible(root), {picture.with_suffix("") for picture in _pictures(root)}
    alone = [shown_name(text, root) for stem, text in texts.items() if stem not in stems]
    links = [shown_name(path, root) for path in visible if path.is_symlink() and path.is_dir()]
    for path in visible:
        kind = path.suffix.lower()
        if path.is_file() and kind not in {*SUFFIXES, ".txt"}:
            kinds[kind or "nameless"].append(shown_name(path, root))
    return (
        [f"{text} has no picture" for text in alone]
        + [
            f"{kind} is not read: {', '.join(paths[:3])}{f' and {len(paths) - 3} more' * (len(paths) > 3)}"
            for kind, paths in kinds.items()
        ]
        + [f"{link} is a link to a folder and is not followed: name that folder, or copy it" for link in links]
    )


def _train(files: list[Path], root: Path, notes: list[str]) -> list[Path]:
    """Those of a train split, where there are any."""
    train = [file for file in files if _TRAIN.search(str(file.relative_to(root)))] or files
    notes += [f"{shown_name(file, root)} is not of the train split" for file in files if file not in train]
    return train


def _texts(root: Path, notes: list[str]) -> dict[Path, Path]:
    """The captions' files by their paths without .txt, .TXT or .Txt."""
    return _by_stem((p for p in _visible(root) if p.suffix.lower() == ".txt" and p.is_file()), root, notes)


def _by_stem(paths: Iterable[Path], root: Path, notes: list[str]) -> dict[Path, Path]:
    """Files by their paths without suffix; of several of one name the last, and the others are told."""
    found: dict[Path, Path] = {}
    for path in paths:
        if before := found.get(path.with_suffix("")):
            notes.append(f"{shown_name(before, root)} is not read: {shown_name(path, root)} is")
        found[path.with_suffix("")] = path
    return found


def _text_captions(picture: Path, texts: Mapping[Path, Path]) -> tuple[str, ...] | None:
    """The lines of the text beside a picture; None where there is none."""
    if (file := texts.get(picture.with_suffix(""))) is None:
        return None
    text = _text(file, "surrogateescape")  # the check finds what is no UTF-8, among all that it finds
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def _text(file: Path, errors: str = "strict") -> str:
    try:
        return file.read_text(encoding="utf-8-sig", errors=errors)
    except UnicodeDecodeError as error:
        raise BadInput(f"{file} is no UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8") from error
    except OSError as error:
        raise BadInput(f"{file} cannot be read ({error.strerror})") from error


def _folder(root: Path, notes: list[str]) -> tuple[str, list[Example]]:
    texts = _texts(root, notes)
    told = {picture: _text_captions(picture, texts) for picture in _pictures(root)}
    with_text = any(captions is not None for captions in told.values())
    examples = []
    for picture, captions in told.items():
        if captions is None:
            named = name_caption(picture.stem.encode(errors="ignore").decode())
            captions = () if with_text or not named else (named,)
        examples.append(Example(Source(shown_name(picture, root), picture), captions))
    notes += _unread(root, texts)
    return ("folder with .txt captions" if with_text else "folder, captions from file names"), examples


def _pairs(root: Path, notes: list[str]) -> list[Example]:
    sources = _by_stem(_pictures(root / "source"), root, notes)
    examples, texts = [], _texts(root, notes)
    for target in _pictures(root / "target"):
        source = sources.pop(root / "source" / target.relative_to(root / "target").with_suffix(""), None)
        if source is None:
            notes.append(f"{shown_name(target, root)} has no source of that name")
            continue
        label = shown_name(target, root)
        captions, others = (_text_captions(picture, texts) or () for picture in (target, source))
        if captions and others and captions != others:
            ours, theirs = (shown_name(texts[p.with_suffix("")], root) for p in (target, source))
            notes.append(f"{theirs} is not read: {ours} is")
        captions = captions or others
        examples.append(Example(Source(label, target), captions, Source(shown_name(source, root), source)))
    notes += [f"{shown_name(left, root)} has no target of that name" for left in sources.values()]
    apart = [p for p in _pictures(root) if {root / "source", root / "target"}.isdisjoint(p.parents)]
    notes += [f"{shown_name(picture, root)} is neither in source nor in target" for picture in apart]
    notes += _unread(root, texts)
    return examples


def _tables(found: list[Path], root: Path, columns: Mapping[str, str], notes: list[str]) -> tuple[str, list[Example]]:
    """One table for each folder; a row names pictures as seen from its table's folder."""
    first = {folder: min(_TABLES, key=lambda name: folder / name not in found) for folder in {f.parent for f in found}}
    read = _train([file for file in found if file.name == first[file.parent]], root, notes)
    notes += [f"{shown_name(f, root)} is not read: {first[f.parent]} is" for f in found if f.name != first[f.parent]]
    examples = [example for file in read for example in _table(file, root, columns, notes)[1]]
    kind = shown_name(read[0], root) if len(read) == 1 else f"{len(read)} metadata files"
    named = _named(examples)
    others = {file.parent for file in found} - {file.parent for file in read}  # of other splits, which were told
    left = [p for p in _pictures(root) if p not in named and others.isdisjoint(p.parents)]
    notes += [f"{shown_name(p, root)} is in no row of {kind}" for p in left]
    return kind, examples


def _named(examples: Iterable[Example]) -> set[Path | None]:
    return {source.path for e in examples for source in (e.picture, e.reference) if source is not None}


def _table(file: Path, root: Path, columns: Mapping[str, str], notes: list[str]) -> tuple[str, list[Example]]:
    kind = file.suffix.lower()
    if kind == ".parquet":
        return "parquet file", list(_parquet(file, root, columns, notes))
    if kind not in (".jsonl", ".csv", ".tsv"):
        raise BadInput(f"{file} is a {kind or 'nameless'} file; .jsonl, .csv, .tsv and .parquet are known, and folders")
    text = _text(file)
    if "\0" in text:
        raise BadInput(f"{file} is no UTF-8 text (its letters have two bytes): save it as UTF-8")
    if not text.strip():
        raise BadInput(f"{file} is empty: write a row for each picture, or delete it to read the folder's own pictures")
    if kind == ".jsonl":
        rows = list(_json_rows(file, text))
        names = list(dict.fromkeys(name for row in rows for name in row))
    else:
        try:
            reader = csv.DictReader(io.StringIO(text), restkey="\0", delimiter="," if kind == ".csv" else "\t")
            rows, names = list(reader), [name for name in reader.fieldnames or () if name]
        except csv.Error as error:
            raise BadInput(f"{file} is no table that can be read ({error}): save it again") from error
        for number, row in enumerate(rows, 1):
            if any(beyond := row.get("\0", ())):
                beyond = f"{beyond[0]!r:.60} lies beyond the last column"
                raise BadInput(f"{file.name}, row {number}: {beyond}: put double quotes around texts with commas")
    return file.name, list(_rows(rows, root, file, columns, names, notes))


def _json_rows(file: Path, text: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would cut at signs that strings may hold
        if not line.strip():
            continue
        try:
            row = parse_json(line, _once)
        except ValueError as error:
            raise BadInput(f"{file}, line {number}: no json ({error})") from error
        if not isinstance(row, dict):
            raise BadInput(f"{file}, line {number}: a {type(row).__name__}, and an object with names is needed")
        yield row


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError(f"two values of one name: {', '.join(name for name, _ in pairs)}")
    return found


def _parquet(file: Path, root: Path, columns: Mapping[str, str], notes: list[str]) -> Iterator[Example]:
    if find_spec("pyarrow") is None:
        raise MissingExtra.of("pyarrow", "data", "reading parquet files")
    import pyarrow.parquet as parquet

    try:
        opened = parquet.ParquetFile(file)
        rows = (row for batch in opened.iter_batches(64) for row in batch.to_pylist())
        yield from _rows(rows, root, file, columns, opened.schema_arrow.names, notes)
    except (OSError, ValueError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{file} is no parquet file that can be read ({error}): download it again") from error


def _saved(root: Path, columns: Mapping[str, str], notes: list[str]) -> Iterator[Example]:
    if find_spec("datasets") is None:
        raise MissingExtra.of("datasets", "data", "reading a folder that Hugging Face datasets saved")
    import datasets

    try:
        loaded: Any = datasets.load_from_disk(str(root))
        if isinstance(loaded, datasets.DatasetDict):
            split = "train" if "train" in loaded else min(loaded)
            notes += [f"the split {name} is left out: {split} is read" for name in loaded if name != split]
            loaded = loaded[split]
        for name, feature in loaded.features.items():
            if isinstance(feature, datasets.Image):  # as bytes: decoding and checking is ours
                loaded = loaded.cast_column(name, datasets.Image(decode=False))
        yield from _rows(loaded, root, root, columns, list(loaded.features), notes)
    except (OSError, ValueError, LookupError, TypeError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{root} is no datasets folder that can be read ({error}): save or download it again") from error


def _rows(
    rows: Iterable[Mapping[str, Any]],
    root: Path,
    place: Path,
    columns: Mapping[str, str],
    names: Sequence[str],
    notes: list[str],
) -> Iterator[Example]:
    """The rows' paths begin at the table's folder, and none may leave `root`."""
    base, found, spool = place.parent if place != root else root, _columns(names, place, columns), Spool()
    guessed = found["reference"] if "reference" not in columns else None
    others = [name for name in names if name not in found.values()]
    if others and found["caption"] is None:
        notes.append(f"none of {place.name}'s columns ({', '.join(others)}) is read as captions: --column caption=NAME")
    for number, row in enumerate(rows, 1):
        if guessed and row.get(guessed):  # the first that is filled: "source" is as often where pictures come from
            if not _names_a_picture(row[guessed]):
                found["reference"] = None
                notes.append(f"column {guessed} of {place.name} names no pictures, and is not read as references")
            guessed = None
        label = f"{place.name}, row {number}"
        picture = _source(row.get(found["picture"] or ""), root, label, base, spool)
        reference = _source(row.get(found["reference"]), root, label, base, spool) if found["reference"] else None
        if picture is None:
            raise BadInput(f"{label}: its column {found['picture']} is empty: name a picture, or delete the row")
        yield Example(picture, _captions(row.get(found["caption"] or "")), reference)


def _names_a_picture(value: Any) -> bool:
    return not isinstance(value, str) or Path(value).suffix.lower() in SUFFIXES | _NOT_READ


def _columns(names: Sequence[str], place: Path, columns: Mapping[str, str]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for role, known in COLUMNS.items():
        wanted = columns.get(role)
        if wanted and wanted not in names:
            raise BadInput(f"{place} has no column {wanted!r}: it has {', '.join(names)}")
        name = found[role] = wanted or next((name for name in known if name in names), None)
        if name and names.count(name) > 1:
            raise BadInput(f"{place} has {names.count(name)} columns {name!r}: give all but one another name")
    if found["picture"] is None:
        raise BadInput(
            f"{place}: none of its columns ({', '.join(names)}) is known to hold pictures; call it file_name or image, "
            "or say which it is with --column picture=NAME"
        )
    return found


def _captions(value: Any) -> tuple[str, ...]:
    if value is None or value != value:  # pandas writes NaN where there is none
        return ()
    texts = value if isinstance(value, (list, tuple)) else [value]
    return tuple(str(text).strip() for text in texts if str(text).strip())


def _source(value: Any, root: Path, label: str, base: Path, spool: Spool) -> Source | None:
    """A path from `base`, or what Hugging Face keeps: {"bytes": ..., "path": ...}; or a list of one such."""
    if isinstance(value, (list, tuple)):
        if len(value) > 1:
            raise BadInput(f"{label}: {len(value)} pictures in one column, and one is learnt from: make a row for each")
        value = value[0] if value else None
    if isinstance(value, Mapping):
        name = value.get("path")
        if value.get("bytes"):
            return Source(f"{label} ({name})" if name else label, data=spool.put(value["bytes"]))
        value = name
    if isinstance(value, (bytes, bytearray)):
        return Source(label, data=spool.put(bytes(value)))
    if not isinstance(value, str) or not value.strip():
        return None
    # by name alone: the hub's cache and many data sets hold links to pictures elsewhere
    path = Path(os.path.abspath(base / value))
    if root not in path.parents:
        raise BadInput(f"{label}: {value} lies outside {root}; keep a data set's pictures in its folder")
    if not os.path.exists(path):  # a name with accents may be written in another form than the file's
        forms = (path.with_name(unicodedata.normalize(form, path.name)) for form in ("NFC", "NFD"))
        path = next((form for form in forms if os.path.exists(form)), path)
    return Source(shown_name(path, root), path)
