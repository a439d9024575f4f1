"""The command line keeps what it reads, and repeats pictures as they were."""

from __future__ import annotations

import io
import os
import signal
import struct
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from glmimg.cli import main
from glmimg.cli_progress import ByteBar, Count, LoadBar, draw
from glmimg.pipelines.result import metadata_tokens
from glmimg.progress import watching


@pytest.fixture
def small(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Flags for a quick picture; the working folder is empty."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return ["--model", str(tiny_checkpoint), "--size", "96x64", "--steps", "2", "--dtype", "fp32", "--backend", "cpu"]


def test_what_is_read_is_kept(small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "a cat", *small, "-o", "f.png", "-q"]) == 0
    Path("p.txt").write_text("a cat\n")
    before = Path("f.png").read_bytes()
    Path("f-2.png").write_bytes(before)
    for command in (
        ["edit", "f.png", "--prompt", "red", "--save-tokens", "f.png", *small],
        ["generate", "--from", "f.png", "--save-tokens", "f.png", "-o", "g.png", *small],
        ["generate", "--prompts", "p.txt", "--save-tokens", "p.txt", *small],
        ["generate", "a cat", "-o", "a.png", "--save-tokens", "a.png", *small],
        ["generate", "a cat", "a dog", "-o", "a.png", "--preview", "a-2.png", *small],
        ["generate", "--from", "f-2.png", "-o", "a.png", "--preview", "f.png", "--best-of", "2", *small],
        ["edit", "f.png", "--prompt", "red", "--token-candidates", "4", *small],
        ["tokens", "show", "f.png", "-o", "f.png"],
        ["tokens", "extract", "f.png", "-o", "f.png"],
        ["generate", "a cat", *small, "--model", ""],
    ):
        assert main(command) == 2, command
    assert Path("f.png").read_bytes() == before and Path("p.txt").read_text() == "a cat\n"


def test_tokens_have_a_place_of_their_own(
    small: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glmimg.checkpoint.Checkpoint.vision", lambda *_: pytest.fail("weights were loaded"))
    Image.new("RGB", (64, 64), "red").save("red.png")
    Path("folder").mkdir()
    extract = ["tokens", "extract", "red.png", "--model", small[1], "--backend", "cpu"]
    for command, told in (
        ([*extract, "-o", "folder"], "cannot write folder"),
        ([*extract, "-o", "red.png/x"], "cannot write red.png"),
        ([*extract, "-o", "new.png"], "name it new.tokens"),
        (["generate", "a cat", "--save-tokens", "new.png", *small], "name it new.tokens"),
        (["tokens", "show", "folder"], "folder is a folder"),
    ):
        assert main(command) == 2
        assert told in capsys.readouterr().err


def test_several_repetitions_have_layouts_of_their_own(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "a cat", *small, "-n", "2", "-o", "f.png", "-q"]) == 0
    where = small[small.index("--model") : small.index("--model") + 2] if "--model" in small else []
    assert main(["generate", "--from", "f.png", "-n", "2", "-o", "g.png", "-q", *where]) == 0
    for name in ("f", "f-2"):
        assert metadata_tokens(f"{name}.png") == metadata_tokens(f"{name.replace('f', 'g')}.png")


def test_numbers_that_nobody_means(small: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    for flags in (["-n", "999999999999"], ["--best-of", "999999999999"], ["--seed", "9" * 5000], ["--prompts", "-"]):
        assert main(["generate", "a cat", *small, *flags]) == 2


@pytest.mark.parametrize("several", ["-n", "--best-of"])
def test_an_edits_last_seed_is_looked_at_before_the_first_picture(small: list[str], several: str) -> None:
    Image.new("RGB", (64, 64), "red").save("red.png")
    assert main(["edit", "red.png", "--prompt", "blue", several, "10", "--seed", str(2**63 - 9), *small, "-q"]) == 2
    assert [path.name for path in Path().iterdir()] == ["red.png"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(("stream", "live"), [(Terminal(), True), (io.StringIO(), False)])
def test_progress_is_silent_at_first(stream: io.StringIO, live: bool, clock: list[float]) -> None:
    quick = ByteBar("convert", stream)
    quick(10**9, 10**9)
    assert stream.getvalue() == ""
    bar = ByteBar("convert", stream)
    for clock[0], done in ((1.0, 1), (3.0, 10**9), (5.0, 2 * 10**9)):
        bar(done, 2 * 10**9)
    assert ("1.00/2.00 GB  3.0 s left" in stream.getvalue()) == live
    assert stream.getvalue().endswith("[########################] 2.00/2.00 GB  5.0 s\n")


@pytest.mark.parametrize(("stream", "live"), [(Terminal(), True), (io.StringIO(), False)])
def test_counted_work_tells_what_is_left(stream: io.StringIO, live: bool, clock: list[float]) -> None:
    count = Count("encode", stream)
    for clock[0], done in ((50.0, 2), (53.0, 4), (56.0, 6), (62.0, 10)):  # two in three seconds
        count(done, 10)
    assert ("4/10  9.0 s left" in stream.getvalue() and "6/10  6.0 s left" in stream.getvalue()) == live
    assert stream.getvalue().endswith("[########################] 10/10  12.0 s\n")
    written = len(stream.getvalue())
    for clock[0], done in ((70.0, 1), (71.0, 2)):  # the next piece of work has its own clock
        count(done, 2)
    assert len(stream.getvalue()) == written


@pytest.mark.parametrize(("stream", "live"), [(Terminal(), True), (io.StringIO(), False)])
def test_loading_has_a_bar_for_each_piece(stream: io.StringIO, live: bool, clock: list[float]) -> None:
    bar = LoadBar(stream)
    for clock[0], what, done in ((0.0, "load", 0), (3.0, "load", 10**9), (5.0, "load", 4 * 10**9)):
        bar(what, done, 4 * 10**9)
    assert ("load    [######..................] 1.00/4.00 GB  9.0 s left" in stream.getvalue()) == live
    assert stream.getvalue().endswith("] 4.00/4.00 GB  5.0 s\n")
    written = len(stream.getvalue())
    for clock[0], done in ((6.0, 0), (7.0, 1)):
        bar("lay out", done, 1)
    bar("load", 0, 0)
    assert len(stream.getvalue()) == written


def test_bars_stay_in_one_row_of_a_narrow_terminal() -> None:
    termios, fcntl = pytest.importorskip("termios"), pytest.importorskip("fcntl")
    for columns in (40, 0):  # 0 where the terminal does not say
        master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        with open(slave, "w") as terminal:
            draw(terminal, "x" * 60, live=True, done=False)
            assert os.read(master, 100) == b"\r\x1b[K" + b"x" * (39 if columns else 60)
        os.close(master)


@pytest.mark.parametrize("quiet", [False, True])
def test_loading_is_told_unless_nobody_wants_to_know(
    quiet: bool, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, int, int]] = []
    monkeypatch.setattr("glmimg.cli.LoadBar", lambda: lambda *event: told.append(event))
    flags = ["--model", str(tiny_checkpoint), "--backend", "cpu", "--steps", "1", "-o", str(tmp_path / "a.png")]
    assert main(["generate", "a fox", *flags, *(["-q"] if quiet else [])]) == 0
    assert watching.get() is None and bool(told) != quiet
    pieces = [k for k, (_, done, _) in enumerate(told) if done == 0]
    names = [told[k][0] for k in pieces]
    assert quiet or (names.count("lay out") == 1 and names.count("load") >= 4)  # generator, glyphs, decoder, VAE
    for begin, end in pairwise([*pieces, len(told)]):
        steps = [done for _, done, _ in told[begin:end]]
        assert len({(what, total) for what, _, total in told[begin:end]}) == 1
        assert steps == sorted(set(steps)) and steps[-1] == told[begin][2] > 0


def test_ctrl_c_that_a_library_swallows_ends_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import os, signal\n"
        "def load(parser):\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        while True: pass\n"
        "    except KeyboardInterrupt:\n"
        "        raise ImportError('numpy.core.multiarray failed to import')\n"
    )
    run = _run_slow(tmp_path)
    assert run.returncode == 130 and run.stderr.strip() == "glmimg: stopped"


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="the system has no SIGHUP")
def test_a_terminal_that_closes_leaves_nothing_half_written(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import os, signal, time\n"
        "from glmimg.atomic_write import atomic_file\n"
        "def load(parser):\n"
        "    with atomic_file('a.png') as half:\n"
        "        os.kill(os.getpid(), signal.SIGHUP)\n"
        "        time.sleep(5)\n"
    )
    run = _run_slow(tmp_path)
    assert run.returncode == 143 and run.stderr.strip() == "glmimg: stopped"
    assert not [path for path in tmp_path.iterdir() if ".png" in path.name]


def test_names_in_letters_that_the_output_has_not_are_told(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("def load(parser):\n    return lambda _: print('\\u56fe-\\udcff.png') or 0\n")
    for encoding, told in (("cp1252", b"\\u56fe-\\udcff.png"), ("utf-8", "\u56fe-\\udcff.png".encode())):
        run = _run_slow(tmp_path, text=False, env=os.environ | {"PYTHONIOENCODING": encoding})
        assert run.returncode == 0 and run.stdout.strip() == told, run.stderr


def test_an_old_peft_that_breaks_diffusers_is_told(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """It is imported where it is found: by diffusers, not by us."""
    for file, text in (
        ("peft-0.17.1.dist-info/METADATA", "Metadata-Version: 2.1\nName: peft\nVersion: 0.17.1\n"),
        ("peft/__init__.py", "raise ImportError(\"cannot import name 'HybridCache' from 'transformers'\")"),
    ):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).write_text(text)
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "glmimg", "generate", "a cat", "--model", str(tiny_checkpoint), "--backend", "cpu"]
    run = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert run.returncode == 1 and "\nglmimg: diffusers cannot be imported (Failed to import" in run.stderr
    assert "'HybridCache' from 'transformers'): update or uninstall" in run.stderr and "Traceback" not in run.stderr
    program = "import glmimg.training.autoencoder_task\nfrom glmimg import TextToImagePipeline\n"
    program += f"TextToImagePipeline.from_pretrained({str(tiny_checkpoint)!r}, 'cpu').to_diffusers()"
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert "\nglmimg.errors.GlmimgError: diffusers cannot be imported (Failed to import" in run.stderr


@pytest.mark.parametrize("arguments", [["--version"], ["generate", "--help"], ["weights", "inspect", "embedded"]])
def test_output_that_nobody_takes_ends_in_a_line_at_most(arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    full = os.open("/dev/full", os.O_WRONLY) if os.path.exists("/dev/full") else writing
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    for place in (writing, full):
        command = [sys.executable, "-m", "glmimg", *arguments]
        run = subprocess.run(command, stdout=place, stderr=subprocess.PIPE, text=True, env=env, check=False)
        assert run.returncode == 1 and run.stderr in ("", "glmimg: [Errno 28] No space left on device\n")
    for place in {writing, full}:
        os.close(place)


def _run_slow(folder: Path, **how: Any) -> subprocess.CompletedProcess[Any]:
    """`glmimg slow`, which is what the folder's slow.py loads."""
    program = "import sys; from glmimg import cli; cli.COMMANDS['slow'] = ('wait', 'slow:load'); "
    program += "sys.argv = ['glmimg', 'slow']; sys.exit(cli.main())"
    how = {"text": True, "timeout": 60} | how
    return subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, check=False, **how)
