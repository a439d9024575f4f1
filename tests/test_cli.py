"""The command line: what it writes, prints and returns; the pipelines' own behaviour is tested elsewhere."""

from __future__ import annotations

import argparse
import inspect
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from glmimg import cli, cli_generate
from glmimg.cli import COMMANDS, main
from glmimg.errors import CheckpointError
from glmimg.image_io import read_metadata, save_png
from glmimg.token_grid import TokenGrid

PROGRAM = [sys.executable, "-c", "import sys; from glmimg.cli import main; sys.exit(main())"]


@pytest.fixture
def small(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Flags for a quick picture; the working folder is empty."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return ["--model", str(tiny_checkpoint), "--size", "96x64", "--steps", "2", "--dtype", "fp32", "--backend", "cpu"]


def pixels(path: str | Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


@pytest.mark.parametrize("arguments", [[], *([*name.split()] for name in COMMANDS)])
def test_help_is_quick_and_needs_no_torch(arguments: list[str]) -> None:
    program = (
        "import sys, resource\nfrom glmimg.cli import main\n"
        f"try: main({[*arguments, '--help']})\nexcept SystemExit as end: assert end.code == 0, end\n"
        "assert not {'torch', 'numpy', 'PIL'} & set(sys.modules), 'heavy imports'\n"
        "used = resource.getrusage(resource.RUSAGE_SELF); print(used.ru_utime + used.ru_stime)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("usage: glmimg")
    assert float(run.stdout.splitlines()[-1]) < 0.3, "seconds of processor time"


def test_overview_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed and description in listed for name, (description, _) in COMMANDS.items())
    assert main([]) == 2 and main(["tokens"]) == 2
    assert "tokens diff" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("glmimg 0.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generat"], "did you mean 'generate'"),
        (["tokens", "dif"], "did you mean 'diff'"),
        (["generate", "a cat", "--sed", "3"], "did you mean '--seed'"),
        (["generate"], "no prompt"),
        (["generate", "a cat", "--size", "big"], "WIDTHxHEIGHT"),
        (["generate", "a cat", "--seed", "x"], "'random'"),
        (["generate", "a cat", "-n", "0"], "at least 1"),
        (["generate", "a cat", "-o", "cat.jpg"], "written as .png"),
        (["generate", "a cat", "-o", "/dev/null/cat.png"], "cannot write"),
        (["generate", "a cat", "--region", "1,2"], "left,top,right,bottom"),
        (["generate", "a cat", "--region", "0,0,32,32"], "--tokens"),
        (["generate", "a cat", "--tokens", "none.tokens"], "none.tokens"),
        (["generate", "--prompts", "none.txt"], "none.txt"),
        (["generate", "a cat", "--from", "none.png"], "no such file"),
        (["generate", "a cat", "--backend", "cpuu"], "did you mean 'cpu'"),
        (["generate", "a cat", "--backend", "generators=cpu"], "did you mean 'generator'"),
        (["generate", "a cat", "--dtype", "bf17"], "did you mean 'bf16'"),
        (["generate", "a cat", "--offload", "blocks"], "did you mean 'block'"),
        (["generate", "a cat", "--sampler", "eular"], "did you mean 'euler'"),
        (["generate", "a cat", "--steps", "0"], "0 steps"),
        (["generate", "a cat", "--best-of", "2", "-n", "3"], "leave -n out"),
        (["generate", "a cat", "--best-of", "0"], "--best-of 0: make at least 1"),
        (["edit", "photo.png"], "no prompt"),
        (["edit", "none.png", "--prompt", "x"], "no such file"),
        (["finetune"], "required: DATA; glmimg finetune --help tells the flags"),
        (["serve", "--model", "nosuch"], "no such folder"),
        (["weights", "init", "new", "--preset", "tini"], "did you mean 'tiny'"),
    ],
)
def test_wrong_usage_is_told_in_a_line(
    small: list[str], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    command = arguments[0]
    flags = ["--model", small[1]] if command in ("generate", "edit") else []
    assert main([*arguments, *flags]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err and captured.out == ""
    assert captured.err.startswith("glmimg: ") and not list(Path().iterdir())


def test_failures_that_are_not_usage_return_1(
    small: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(parser: argparse.ArgumentParser) -> cli.Run:
        def run(arguments: argparse.Namespace) -> int:
            raise CheckpointError("the weights are damaged")

        return run

    monkeypatch.setattr(cli_generate, "generate", damaged)
    assert main(["generate"]) == 1
    assert capsys.readouterr().err == "glmimg: the weights are damaged\n"


def test_out_of_memory_is_told_with_advice(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    errors: list[BaseException] = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"), MemoryError()]
    try:
        torch.empty(1 << 60, dtype=torch.uint8)
    except RuntimeError as error:
        errors.append(error)

    def hungry(parser: argparse.ArgumentParser) -> cli.Run:
        def run(arguments: argparse.Namespace) -> int:
            raise errors.pop(0)

        return run

    monkeypatch.setattr(cli_generate, "generate", hungry)
    for _ in range(3):
        assert main(["generate"]) == 1
        assert "--offload stage" in capsys.readouterr().err
    errors.append(RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"):
        main(["generate"])


def test_generate_and_repeat(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["generate", 'a "cat"', *small, "-o", "out/cat.png", "-n", "2", "--seed", "5", "--save-tokens", "t"]) == 0
    )
    captured = capsys.readouterr()
    assert captured.out.split() == ["out/cat.png", "out/cat-2.png"]
    assert "tokens" in captured.err and "decoder" in captured.err and "4/4" in captured.err
    metadata = read_metadata("out/cat-2.png")
    assert metadata["prompt"] == 'a "cat"' and metadata["config"]["seed"] == 6
    assert TokenGrid.load("t-2") == TokenGrid.from_dict(metadata["tokens"])

    assert main(["generate", "--from", "out/cat-2.png", "-o", "again.png", "-q"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "again.png\n" and captured.err == ""
    assert (pixels("again.png") == pixels("out/cat-2.png")).all()
    assert read_metadata("again.png") == metadata

    # Flags change what they name; other steps keep the tokens, another seed draws its own.
    assert main(["generate", "--from", "out/cat-2.png", "--steps", "3", "--json", "-o", "more.png", "-q"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert line["path"] == "more.png" and line["config"] == metadata["config"] | {"num_inference_steps": 3}
    assert TokenGrid.from_dict(read_metadata("more.png")["tokens"]) == TokenGrid.load("t-2")
    assert main(["generate", "--from", "out/cat-2.png", "--seed", "5", "-o", "other.png", "-q"]) == 0
    assert (pixels("other.png") == pixels("out/cat.png")).all()

    # The layout of one, the noise of another; and a part drawn anew.
    capsys.readouterr()
    assert main(["generate", "a dog", *small, "--tokens", "out/cat.png", "--seed", "9", "-o", "dog.png", "-q"]) == 0
    assert main(["tokens", "diff", "out/cat.png", "dog.png", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["changed"] == 0
    assert main(["generate", "--from", "out/cat.png", "--region", "0,0,32,64", "-o", "part.png", "-q"]) == 0
    assert read_metadata("part.png")["config"]["seed"] == 6
    assert not TokenGrid.from_dict(read_metadata("part.png")["tokens"]).diff(TokenGrid.load("t"))[:, 1:].any()


def test_from_needs_the_right_command(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (64, 64), "red").save("plain.png")
    assert main(["generate", "--from", "plain.png"]) == 2
    assert "carries no settings" in capsys.readouterr().err
    edit = ["edit", "plain.png", "--prompt", "a cat", "--steps", "1", *small[:2], "--backend", "cpu", "--dtype", "fp32"]
    assert main([*edit, "-o", "edited.png", "-q"]) == 0
    assert main(["generate", "--from", "edited.png", "-q"]) == 2
    assert "glmimg edit" in capsys.readouterr().err
    assert main(["edit", "plain.png", "--from", "edited.png", "-o", "again.png", "-q"]) == 0
    assert (pixels("again.png") == pixels("edited.png")).all()
    Image.new("RGB", (64, 64), "blue").save("blue.png")
    assert main(["edit", "blue.png", "--from", "edited.png", "-o", "again.png", "-q"]) == 2
    assert "not the 1 reference pictures" in capsys.readouterr().err


def test_nothing_that_is_read_is_written_over(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a cat", *small, "-q"]) == 0
    before = Path("picture.png").read_bytes()
    Path("p-2.png").symlink_to("picture.png")
    for command in (
        ["generate", "--from", "picture.png"],
        ["generate", "a dog", *small, "--tokens", "picture.png", "-n", "2", "-o", "p.png"],
        ["edit", "picture.png", "--prompt", "a dog", *small, "-o", "./picture.png"],
    ):
        assert main([*command, "-q"]) == 2 and "written over" in capsys.readouterr().err
    assert Path("picture.png").read_bytes() == before
    assert main(["edit", "picture.png", "--prompt", "a dog", *small, "-q"]) == 0
    assert capsys.readouterr().out == "edited.png\n"


def test_a_picture_from_elsewhere_asks_for_its_parts(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A server's pictures carry names, not its paths."""
    assert main(["generate", "a cat", *small, "-q"]) == 0
    metadata = read_metadata("picture.png")
    where = metadata["checkpoint"]["name"]
    metadata["checkpoint"]["name"] = "mine"
    save_png(Image.open("picture.png"), "server.png", metadata)
    save_png(Image.open("picture.png"), "inked.png", metadata | {"adapters": [{"name": "ink", "strength": 0.5}]})
    again = ["-o", "again.png", "-q"]
    assert (
        main(["generate", "--from", "server.png", *again]) == 2
        and "'mine': say with --model" in capsys.readouterr().err
    )
    assert main(["generate", "--from", "server.png", "--model", where, *again]) == 0
    assert (pixels("again.png") == pixels("picture.png")).all()
    assert main(["generate", "--from", "inked.png", "--model", where, *again]) == 2
    assert "'ink': say with --adapter FOLDER:0.5" in capsys.readouterr().err


def test_the_last_of_many_prompts_is_looked_at_before_the_first_picture(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a cat\n" * 9 + "a <sop> cat\n")
    assert main(["generate", "--prompts", "prompts.txt", *small, "-q"]) == 2
    assert "<sop>" in capsys.readouterr().err and not list(tmp_path.glob("*.png"))
    assert main(["generate", "a cat", "-n", "10", "--seed", str(2**63 - 8), *small, "-q"]) == 2
    assert not list(tmp_path.glob("*.png"))


def test_many_prompts_in_one_loading(
    small: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("prompts.txt").write_text("# colours\na red cat\n\na blue cat\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("\ufeffa green cat\n"))
    monkeypatch.setattr(cli_generate, "CHUNK", 2)
    assert main(["generate", "a cat", "--prompts", "prompts.txt", "-", *small, "--json", "-q"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in lines] == ["a cat", "a green cat", "a red cat", "a blue cat"]
    assert [line["path"] for line in lines] == ["picture.png", "picture-2.png", "picture-3.png", "picture-4.png"]
    assert {line["config"]["seed"] for line in lines} == {0}, "a prompt's pictures do not depend on its place in a file"
    assert lines[-1]["timings"]["load"] == 0
    assert all(Path(line["path"]).is_file() for line in lines)
    for encoding in ("utf-16", "utf-16-le"):
        Path("prompts.txt").write_bytes("a cat\n".encode(encoding))
        assert main(["generate", "--prompts", "prompts.txt", *small, "-q"]) == 2
        assert "prompts.txt: cannot be read as text" in capsys.readouterr().err


def test_many_pictures_are_made_a_few_at_a_time(
    small: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from glmimg.pipelines import text_to_image

    calls: list[int] = []
    drawn = text_to_image.draw_tokens

    def watched(stages: Any, request: Any, *rest: Any) -> Any:
        calls.append(request.pictures)
        return drawn(stages, request, *rest)

    monkeypatch.setattr(text_to_image, "draw_tokens", watched)
    monkeypatch.setattr(cli_generate, "CHUNK", 2)
    assert main(["generate", "a cat", "a dog", *small, "--steps", "1", "-n", "3", "--seed", "4", "--json", "-q"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert calls == [2, 1, 2, 1]
    assert [(line["prompt"], line["config"]["seed"]) for line in lines] == [
        (prompt, seed) for prompt in ("a cat", "a dog") for seed in (4, 5, 6)
    ]
    assert lines[-1]["path"] == "picture-6.png" and Path("picture-6.png").is_file()


def test_a_repetition_has_the_dtypes_of_the_first(small: list[str]) -> None:
    """Eight bits for the generator, where they are the default, are no dtype that can be asked for."""
    flags = [*small[:6], "--backend", "cpu", "-q"]
    assert main(["generate", "a cat", *flags, "-o", "first.png"]) == 0
    assert main(["generate", "--from", "first.png", "--backend", "cpu", "-q", "-o", "again.png"]) == 0
    assert read_metadata("again.png") == read_metadata("first.png")
    assert (pixels("again.png") == pixels("first.png")).all()


def test_a_first_look(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a cat", *small, "--preview", "look.png", "-q"]) == 0
    assert Image.open("look.png").size == (128, 96)
    capsys.readouterr()
    several = ["--token-candidates", "2", "--preview", "chosen.png", "--json"]
    assert main(["generate", "a cat", *small, *several]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["config"]["token_candidates"] == 2
    assert "drafts  [########################] 4/4" in told.err
    assert Image.open("chosen.png").size == tuple(side // 2 for side in Image.open("picture.png").size)
    where = ["--preview", "none.png", "-q", "-o", "other.png"]
    for call in (
        ["generate", "a cat", *small, "--tokens", "picture.png"],
        ["edit", "look.png", "--prompt", "red", *small],
    ):
        assert main([*call, *where]) == 2 and "--preview" in capsys.readouterr().err
    assert not Path("none.png").exists()


def test_tokens_show_and_extract(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (96, 64), "red").save("red.png")
    assert main(["tokens", "extract", "red.png", "-o", "red.tokens", "--model", small[1]]) == 0
    assert main(["tokens", "show", "red.tokens", "-o", "red-tokens.png"]) == 0
    assert "2 x 3 tokens for 96x64 pixels" in capsys.readouterr().out
    assert Image.open("red-tokens.png").height == 32
    assert main(["tokens", "show", "red.tokens", "--json"]) == 0
    assert np.shape(json.loads(capsys.readouterr().out)["target"]) == (2, 3)
    assert main(["tokens", "diff", "red.tokens", "red.tokens"]) == 0
    assert "0 of 6 tokens differ" in capsys.readouterr().out


def test_weights_init_makes_a_usable_folder(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["weights", "init", "new", "--seed", "3", "--dtype", "bfloat16"]) == 0
    assert capsys.readouterr().out == "new\n"
    assert main(["generate", "a cat", "--model", "new", "--size", "64x64", "--steps", "1", "-q"]) == 0
    assert main(["weights", "init", "new"]) == 2
    assert "exists already" in capsys.readouterr().err


def test_best_of_from_the_command_line(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a cat", *small, "--best-of", "2", "--json", "-q"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert line["of"] == 2 and line["score"] < 0  # bits that the caption saves, less a quarter of all
    Image.new("RGB", (64, 64), "red").save("red.png")
    edit = ["edit", "red.png", "--prompt", "make it blue", *small, "--best-of", "2", "--json", "--keep", "0.5"]
    assert main(edit) == 0
    told = capsys.readouterr()
    line = json.loads(told.out)
    assert line["of"] == 2 and line["score"] < 0 and line["config"]["keep_unchanged"] == 0.5
    assert "judge   [########################] 2/2" in told.err
    pytest.importorskip("rapidocr")
    assert main(["generate", 'a sign "HI"', *small, "--best-of", "2", "--json", "-q"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert line["of"] == 2 and 0 <= line["score"] <= 1
    assert main(["generate", 'a sign "HI"', *small, "--best-of", "2", "-n", "2"]) == 2


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["backends"]["cpu"]["usable"] and report["auto"] in report["backends"]
    assert all(backend["usable"] or backend["reason"] for backend in report["backends"].values())
    assert report["packages"]["torch"]


@pytest.mark.parametrize("stage", ["tokens", "decoder"])
def test_interrupted_in_either_stage(small: list[str], monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    from glmimg.cli_progress import Bars

    def interrupted(self: Bars, event: object) -> None:
        if getattr(event, "stage", None) == stage:
            raise KeyboardInterrupt

    monkeypatch.setattr(Bars, "__call__", interrupted)
    assert main(["generate", "a cat", *small, "-o", "cat.png", "--save-tokens", "cat.tokens"]) == 130
    assert not list(Path().iterdir())


def hear_interrupts() -> None:
    """In a child before it starts: a job in the background inherits that Ctrl-C is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_a_real_interrupt(small: list[str]) -> None:
    """Ctrl-C between two steps of the decoder, from outside."""
    arguments = ["generate", "a cat", *small[:2], "--steps", "1000", "--size", "256x256", "--backend", "cpu"]
    pipes: Any = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([*PROGRAM, *arguments], **pipes, preexec_fn=hear_interrupts) as run:
        assert run.stderr is not None and run.stdout is not None
        line = run.stderr.readline()
        while line and not line.startswith("tokens"):
            line = run.stderr.readline()
        os.kill(run.pid, signal.SIGINT)
        rest = run.stderr.read()
        assert run.wait(60) == 130 and run.stdout.read() == ""
    assert "stopped" in rest and "Traceback" not in rest and not list(Path().iterdir())


def test_bars() -> None:
    from glmimg.cli_progress import Bars
    from glmimg.pipelines.result import Event

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, drawn in ((Terminal(), True), (io.StringIO(), False)):
        bars = Bars(stream)
        for step, eta in ((5, 125.0), (10, 0.0)):
            bars(Event("tokens", step, 10, 12.5, eta, (0,), list, lambda: None))
        text = stream.getvalue()
        assert ("[############............] 5/10  2 min 05 s left" in text) == drawn
        assert text.endswith("[########################] 10/10  12.5 s\n")


def test_flags_have_the_functions_defaults() -> None:
    from glmimg import ImageToImagePipeline, TextToImagePipeline
    from glmimg.weights_tools.init import init_checkpoint

    for name, pipeline in (("generate", TextToImagePipeline), ("edit", ImageToImagePipeline)):
        parser = argparse.ArgumentParser()
        getattr(cli_generate, name)(parser)
        flags = {action.dest: action.default for action in parser._actions}
        for parameter in inspect.signature(pipeline.from_pretrained).parameters.values():
            # Of these None is that of --from, else the function's default.
            default = None if parameter.name in ("model", "offload") else parameter.default
            assert flags[parameter.name] == default, parameter
        call = inspect.signature(pipeline.__call__).parameters
        assert flags["n"] == call["num_images_per_prompt"].default
        assert flags["negative"] == call["negative_prompt"].default
        assert all(flags[name] is None for name in ("size", "steps", "guidance", "tokens", "seed", "region"))
    parser = argparse.ArgumentParser()
    __import__("glmimg.cli_weights").cli_weights.init(parser)
    flags = {action.dest: action.default for action in parser._actions}
    for name in ("preset", "seed", "dtype"):
        assert flags[name] == inspect.signature(init_checkpoint).parameters[name].default
