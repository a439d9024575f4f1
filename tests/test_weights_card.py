"""Cards say what the folder says, and only that."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from glmimg.checkpoint import EMBEDDED, Checkpoint
from glmimg.cli import main
from glmimg.errors import BadInput, CheckpointError
from glmimg.weights_tools.card import card, describe, write_card
from glmimg.weights_tools.quantize import quantize_checkpoint


def test_hashes_and_counts(tiny_checkpoint: Path) -> None:
    calls: list[tuple[int, int]] = []
    told = describe(tiny_checkpoint, lambda *call: calls.append(call))
    opened = Checkpoint.open(tiny_checkpoint)
    assert told["hash"] == opened.hash and len(told["files"]) == 4
    for name, row in told["files"].items():
        assert row["sha256"] == hashlib.sha256((tiny_checkpoint / name).read_bytes()).hexdigest()
    decoder = opened.decoder()
    assert told["components"]["transformer"]["parameters"] == sum(p.numel() for p in decoder.parameters())
    assert calls[-1][0] == calls[-1][1] == sum(row["bytes"] for row in told["files"].values())


def test_what_is_missing_is_said(tiny_checkpoint: Path) -> None:
    text = card(describe(tiny_checkpoint))
    assert text.startswith("---\nlicense: other\n") and "no licence was stated" in text
    assert "no record of its making" in text and "no sources of its training data" in text


def test_lineage_is_told(tiny_copy: Path, tmp_path: Path) -> None:
    (tiny_copy / "training.json").write_text(json.dumps({"decoder": {"steps": 12, "held_out": {"loss": 0.123456}}}))
    (tiny_copy / "ATTRIBUTION.md").write_text("- Some Emoji, MIT\n")
    (tiny_copy / "LICENSE").write_text("text")
    quantize_checkpoint(tiny_copy, tmp_path / "q", 4, components=["transformer"])
    told = write_card(tmp_path / "q", tmp_path / "q/README.md", license="Apache-2.0", base="zai-org/GLM-Image")
    text = (tmp_path / "q/README.md").read_text()
    assert "license: apache-2.0" in text and "base_model: zai-org/GLM-Image" in text
    assert "| decoder | 12 | - | loss 0.1235 |" in text and "- Some Emoji, MIT" in text and "in LICENSE." in text
    assert "1. quantize of" in text and told["lineage"][0]["hash"] in text and "12 matrices in 4 bits" in text
    whole = describe(tiny_copy)["components"]["transformer"]["parameters"]
    assert told["components"]["transformer"]["parameters"] == whole


def test_a_card_is_not_written_into_the_hubs_cache(tiny_copy: Path, tmp_path: Path) -> None:
    blob = tmp_path / "models--zai-org--GLM-Image" / "blobs" / "0123"
    blob.parent.mkdir(parents=True)
    blob.write_text("theirs", encoding="utf-8")
    (tiny_copy / "README.md").symlink_to(blob)
    with pytest.raises(BadInput, match="leads into the hub's cache.*another place"):
        write_card(tiny_copy, tiny_copy / "README.md")
    assert blob.read_text(encoding="utf-8") == "theirs"


def test_the_embedded_checkpoint_has_a_whole_card() -> None:
    text = card(describe(EMBEDDED), license="Apache-2.0")
    assert "# glmimg mini" in text and "from_pretrained()(" in text and "Twemoji" in text and "| generator | " in text


@pytest.mark.parametrize(
    ("file", "content"), [("training.json", "{"), ("training.json", "[]"), ("lineage.json", "[1]")]
)
def test_damaged_records(tiny_copy: Path, file: str, content: str) -> None:
    (tiny_copy / file).write_text(content)
    with pytest.raises(CheckpointError, match=file):
        describe(tiny_copy)


def test_command(tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "README.md"
    assert main(["weights", "card", str(tiny_checkpoint), "-o", str(target), "--license", "MIT"]) == 0
    assert capsys.readouterr().out.strip() == str(target) and "license: mit" in target.read_text()
    assert main(["weights", "card", str(tiny_checkpoint), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["files"]) == 4
    assert main(["weights", "card", str(tiny_checkpoint)]) == 0
    assert "## Files" in capsys.readouterr().out
    with pytest.raises(BadInput, match="SPDX"):
        write_card(tiny_checkpoint, target, license="all mine")


def test_records_of_strangers(tiny_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes into a card is text of this folder, and not endless."""
    (tiny_copy / "training.json").write_text(json.dumps({"decoder": {"held_out": 0.5}, "vae": {"held_out": [1]}}))
    config = tiny_copy / "vae/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization": 5}))
    assert "| decoder | - | - | 0.5 |" in card(describe(tiny_copy))
    file = tiny_copy / "ATTRIBUTION.md"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="ATTRIBUTION.md is no UTF-8 text"):
        describe(tiny_copy)
    file.unlink()
    (tmp_path / "secret").write_text("a key")
    for name in ("ATTRIBUTION.md", "lineage.json"):
        (tiny_copy / name).symlink_to(tmp_path / "secret")
        with pytest.raises(CheckpointError, match="outside its folder"):
            describe(tiny_copy)
        (tiny_copy / name).unlink()
    file.write_text("a" * 100)
    monkeypatch.setattr("glmimg.weights_tools.card._MAX_RECORD", 99)
    with pytest.raises(CheckpointError, match="more than 99 bytes"):
        describe(tiny_copy)
