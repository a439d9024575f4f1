"""What the documents say is so: their code runs, their links lead somewhere, their tables are the program's."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from glmimg.cli import COMMANDS, main

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# The pages whose code is run; those about training and judging need hours or other packages.
RUN = [
    "README.md",
    "docs/quickstart.md",
    "docs/checkpoint-format.md",
    "docs/backends.md",
    "docs/fine-tuning.md",
    "docs/weights.md",
]
# Flags that commands of the pages get here, so that trying them takes no time.
AT_SMOKE_SIZE = {
    "generate": ["-q"],
    "edit": ["-q"],
    "finetune": ["-q", "--steps", "2", "--resolution", "64", "--batch-size", "2", "--sample-steps", "1"],
}
SET_UP = [
    'pip install torch==2.13.0 . && glmimg generate "a 3D render of a fox on a light blue background" -o fox.png',
    'pip install ".[test]" && python -P -m pytest -q -n 2',
]


def text(page: str | Path) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> Iterator[tuple[str, str]]:
    """(language, code) of every fenced block that is not marked as not run."""
    for found in re.finditer(r"(<!-- not run[^\n]*-->\n)?^```(\w*)\n(.*?)^```", text(page), re.MULTILINE | re.DOTALL):
        if not found[1]:
            yield found[2], found[3]


@pytest.fixture
def workplace(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder, and the tiny model in the embedded one's place: the code is tried, not the pictures."""
    import glmimg.checkpoint

    found = glmimg.checkpoint._locate

    def located(model: str, *rest: object) -> Path:
        return tiny_checkpoint if model == glmimg.checkpoint.EMBEDDED else found(model, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(glmimg.checkpoint, "_locate", located)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GLMIMG_CACHE", str(tmp_path / "cache"))
    (tmp_path / "photos").mkdir()
    for k in range(3):
        Image.new("RGB", (64, 64 + 8 * k), (80 * k, 90, 100)).save(tmp_path / "photos" / f"photo of a thing {k}.png")
    (tmp_path / "samples").mkdir()
    shutil.copyfile(ROOT / "samples/prompts.txt", tmp_path / "samples/prompts.txt")


@pytest.mark.parametrize("page", RUN)
def test_code_runs(page: str, workplace: None) -> None:
    """All blocks of a page in order, in one folder and one namespace."""
    namespace: dict[str, object] = {}
    ran = 0
    for language, code in blocks(page):
        if language == "python":
            exec(compile(code, page, "exec"), namespace)
            ran += 1
        elif language == "bash":
            for line in code.splitlines():
                if line not in SET_UP:
                    run(line)
                ran += 1
        else:
            assert language == "text", f"{page}: a block of {language!r} is neither run nor text"
    assert ran >= 1


def run(line: str) -> None:
    program, *arguments = shlex.split(line)
    assert program == "glmimg", f"{line!r} is not run: use a text block"
    assert main([*arguments, *AT_SMOKE_SIZE.get(arguments[0], [])]) == 0, line


def test_readme_has_two_set_up_commands_and_they_are_right() -> None:
    assert [
        line for language, code in blocks("README.md") if language == "bash" for line in code.splitlines()
    ] == SET_UP
    run_by_ci = text(".ci/run")
    assert "python -P -m pytest -q -n 2" in run_by_ci and "2.13.0" in run_by_ci


def test_readme_commands_run(workplace: None) -> None:
    commands = re.findall(r"^\| [^|]+ \| `(glmimg [^`]+)`", text("README.md"), re.MULTILINE)
    assert len(commands) >= 8
    for command in commands:
        if command == "glmimg doctor":  # tested elsewhere, and slow
            continue
        if "--best-of 8" in command:  # its prompt has text to read
            pytest.importorskip("rapidocr")
        # A few pages make eight pictures where one shows as much.
        run(re.sub("--best-of [48]", "--best-of 1", command) + " --steps 1")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        found = page if not path else (page.parent / path).resolve()
        if found.name == "hero.webp" and not (ROOT / "glmimg/assets/mini/model_index.json").is_file():
            continue  # the embedded model draws it
        assert found.exists(), f"{page.name}: {target}"
        if anchor:
            titles = re.findall(r"^#+ (.+)$", found.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}, target


def test_pages_are_short() -> None:
    for page in PAGES:
        assert len(page.read_text(encoding="utf-8").splitlines()) < 260, page


def first_column(page: str, header: str) -> set[str]:
    """The code spans in the first column of the table under that header row."""
    table = text(page).split(f"| {header} |")[1].split("\n\n")[0]
    return {name for row in table.splitlines()[2:] for name in re.findall(r"`([^`]+)`", row.split("|")[1])}


def test_tables_are_the_programs() -> None:
    from glmimg.backends import BACKENDS
    from glmimg.config import SamplingConfig
    from glmimg.diffusion import SAMPLERS
    from glmimg.pipelines.stages import OFFLOADS

    assert first_column("docs/backends.md", "name | devices") == set(BACKENDS)
    assert first_column("docs/backends.md", "`offload` | on the device at a time") == set(OFFLOADS)
    fields = set(SamplingConfig.__dataclass_fields__)
    assert first_column("docs/quickstart.md", "field | means") == fields
    assert all(f"`{name}`" in text("docs/quickstart.md") for name in SAMPLERS)


def test_rows_are_those_that_imports_keep_to() -> None:
    rows = runpy.run_path(str(ROOT / "tests/test_packaging.py"))["ROWS"]
    listed = [
        set(re.findall(r"`(?:glmimg\.)?(\w+)/?`", line))
        for line in re.findall(r"^\| \d \| (.+) \|$", text("docs/architecture.md"), re.MULTILINE)
    ]
    here = {path.stem for folder in (ROOT, ROOT / "glmimg") for path in folder.iterdir()}
    assert listed == [row & here for row in rows]


def test_checkpoint_settings_are_those_that_are_read() -> None:
    read = set(re.findall(r'generation\.get\("(\w+)"', (ROOT / "glmimg/checkpoint.py").read_text()))
    listed = first_column("docs/checkpoint-format.md", "key | default")
    assert read == listed | {"temperature", "top_p", "top_k", "min_p"}


def test_every_command_is_mentioned() -> None:
    everything = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [name for name in COMMANDS if f"glmimg {name}" not in everything] == []
