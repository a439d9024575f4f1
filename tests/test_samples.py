"""The programs of samples/ run as they stand, on a tiny checkpoint."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from glmimg.image_io import read_metadata

SAMPLES = Path(__file__).parent.parent / "samples"
WRITES = {
    "edit.py": ["apple-on-blue.png", "apple.png"],
    "keep_the_layout.py": ["first.png", "layout.png", "layout.tokens", "other-half.png", "other-noise.png"],
    "text_to_image.py": ["fox-2.png", "fox.png"],
    "watch_and_stop.py": ["first-look.png", "sign.png"],
}


def run(program: str, *arguments: str | Path, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, SAMPLES / program, *arguments],
        capture_output=True, text=True, cwd=folder, check=False, env=os.environ | {"PYTHONSAFEPATH": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_every_program_is_tested() -> None:
    assert {path.name for path in SAMPLES.glob("*.py")} == {*WRITES, "generate_samples.py"}


@pytest.mark.parametrize("program", sorted(WRITES))
def test_example(program: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    run(program, tiny_checkpoint, folder=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == WRITES[program]
    for name in WRITES[program]:
        if name.endswith(".png"):
            low, high = Image.open(tmp_path / name).convert("L").getextrema()
            assert int(high) - int(low) > 20, f"{name} is flat"


def test_generate_samples(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text('# two\na "cat" & a dog\n一只猫\n', encoding="utf-8")
    flags = [
        "--prompts",
        "prompts.txt",
        "--output",
        "page",
        "--steps",
        "1",
        "--size",
        "96x64",
        "-n",
        "2",
        "--seed",
        "4",
    ]
    out = run("generate_samples.py", *flags, "--model", tiny_checkpoint, folder=tmp_path)
    assert out.strip() == str(Path("page/index.html"))
    text = (tmp_path / "page/index.html").read_text(encoding="utf-8")
    assert "a &quot;cat&quot; &amp; a dog" in text and "一只猫" in text and "seed 5" in text
    names = ["01.png", "01-2.png", "02.png", "02-2.png"]
    for name in names:
        assert read_metadata(tmp_path / "page" / name)["config"]["seed"] in (4, 5)
        assert f'src="{name}"' in text and f'src="{Path(name).stem}-layout.png"' in text
    assert Image.open(tmp_path / "page/sheet.png").size == (4 * (96 + 8) + 8, 64 + 40 + 16)


def test_prompt_file_has_no_duplicates() -> None:
    prompts = [line for line in (SAMPLES / "prompts.txt").read_text(encoding="utf-8").splitlines() if line[:1] != "#"]
    assert len(prompts) == len(set(prompts)) >= 8 and all(prompt.strip() == prompt for prompt in prompts)
