"""What gets installed is what lies here, imports stay cheap, and the public names are the promised ones."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import glmimg

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MOVED = {"glmimg.pipelines": "pipelines", "glmimg.weights_tools": "weights_tools"}

PUBLIC = {
    "EMBEDDED",
    "BackendError",
    "BadInput",
    "Cancelled",
    "Checkpoint",
    "CheckpointError",
    "GlmimgError",
    "ImageToImagePipeline",
    "MissingExtra",
    "TextToImagePipeline",
    "TokenGrid",
    "UnknownName",
    "__version__",
    "pick_backend",
}


def test_every_folder_with_code_is_installed() -> None:
    folders = {"glmimg"} | {f"glmimg.{p.parent.name}" for p in (ROOT / "glmimg").glob("*/*.py")} | set(MOVED)
    deeper = [
        p for top in ("glmimg", *MOVED.values()) for p in (ROOT / top).glob("*/*/*.py") if "assets" not in p.parts
    ]
    assert not deeper, "list the new sub-package in pyproject.toml and here"
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == folders
    for package in folders:
        folder = ROOT / MOVED.get(package, package.replace(".", "/"))
        assert (folder / "__init__.py").is_file(), f"{folder} needs an __init__.py"


def test_every_module_imports_under_its_installed_name() -> None:
    for package in PROJECT["tool"]["setuptools"]["packages"]:
        folder = ROOT / MOVED.get(package, package.replace(".", "/"))
        installed = Path(importlib.import_module(package).__file__ or "").parent
        assert {p.name for p in folder.glob("*.py")} == {p.name for p in installed.glob("*.py")}


@pytest.mark.parametrize("name", sorted(MOVED.values()))
def test_bare_names_are_refused(name: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", f"import {name}"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert f"import glmimg.{name}" in run.stderr and "ImportError" in run.stderr


def test_public_names() -> None:
    assert set(glmimg.__all__) == PUBLIC
    assert dir(glmimg) == sorted(glmimg.__all__)
    for name in glmimg.__all__:
        assert getattr(glmimg, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = glmimg.nothing


@pytest.mark.parametrize("package", PROJECT["tool"]["setuptools"]["packages"])
def test_all_lists_hold_only_what_is_there(package: str) -> None:
    folder = ROOT / MOVED.get(package, package.replace(".", "/"))
    for file in folder.glob("*.py"):
        if file.stem == "__main__":
            continue
        module = importlib.import_module(package if file.stem == "__init__" else f"{package}.{file.stem}")
        names = getattr(module, "__all__", [])
        assert len(set(names)) == len(names)
        for name in names:
            getattr(module, name)


def test_version_is_the_projects() -> None:
    assert glmimg.__version__ == PROJECT["project"]["version"]


def test_doctor_looks_for_every_extra() -> None:
    from glmimg.cli_doctor import EXTRAS

    extras = PROJECT["project"]["optional-dependencies"]
    assert EXTRAS.keys() == extras.keys() - {"test", "dev"}
    for extra, package in EXTRAS.items():
        assert any(requirement.startswith(package) for requirement in extras[extra]), extra


def test_importing_the_package_imports_no_torch() -> None:
    program = "import sys, json, glmimg, glmimg.presets, glmimg.config, glmimg.errors, glmimg.backends\n"
    program += "print(json.dumps([m for m in ('torch', 'numpy', 'PIL', 'transformers') if m in sys.modules]))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == []


def test_only_backends_name_devices() -> None:
    kinds = ('"cuda', "'cuda", "torch.cuda", '"npu', "torch.npu", "torch_npu", '"xpu', "torch.xpu", '"mps', "torch.mps")
    for top in ("glmimg", *MOVED.values()):
        for file in sorted((ROOT / top).rglob("*.py")):
            if "backends" not in file.parts:
                found = [kind for kind in kinds if kind in file.read_text()]
                assert not found, f"{file.relative_to(ROOT)} names a kind of device: {found}"


# The table of docs/architecture.md: a file imports only from rows above its own here; a folder counts as one.
ROWS = [
    {"errors"},
    {"atomic_write", "backends", "config", "fused_linear", "packed_format", "presets", "progress", "torch_state"},
    {
        "attention",
        "image_io",
        "packed_linear",
        "positions",
        "prompt",
        "supported",
        "token_grid",
        "weight_files",
        "weight_grid",
    },
    {
        "autoencoder",
        "decoder",
        "diffusion",
        "filling",
        "generator",
        "glyph_encoder",
        "semantic_tokenizer",
        "token_sampling",
    },
    {"checkpoint", "corpus", "dataset", "lora"},
    {"training", "weights_tools"},
    {"pipelines"},
    {"evaluation", "serving"},
    {"cli"},
]


def test_imports_go_one_way() -> None:
    row_of = {name: number for number, row in enumerate(ROWS) for name in row}
    wrong = []
    for top in ("glmimg", *MOVED.values()):
        for file in sorted((ROOT / top).rglob("*.py")):
            own = _room(file.relative_to(ROOT).with_suffix("").parts[-2 if file.parent.parent != ROOT else -1])
            own = top if top in MOVED.values() else own
            if own == "__init__":
                continue
            assert own in row_of, f"{file.relative_to(ROOT)}: give {own} a row"
            for node in ast.walk(ast.parse(file.read_text())):
                modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                for other in (_room(name.split(".")[1]) for name in modules if name.startswith("glmimg.")):
                    if other != own and row_of[other] >= row_of[own]:
                        wrong.append(f"{file.relative_to(ROOT)} imports {other}")
    assert not wrong, "\n".join(wrong)


def _room(name: str) -> str:
    return "cli" if name.startswith("cli") or name == "__main__" else name


def test_files_stay_short() -> None:
    for top in ("glmimg", *MOVED.values(), "tests", "benchmarks", "samples"):
        for file in sorted((ROOT / top).rglob("*.py")):
            assert len(file.read_text().splitlines()) < 450, file


def test_text_is_utf_8_whatever_the_locale() -> None:
    """Windows' own encodings have no Chinese, and take UTF-8 for other letters."""
    wrong = []
    for file in (file for top in ("glmimg", *MOVED.values(), "benchmarks") for file in (ROOT / top).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if not isinstance(node, ast.Call) or "encoding" in {word.arg for word in node.keywords}:
                continue
            called = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
            mode = ast.unparse(node.args[1]) if len(node.args) > 1 else ""
            text = isinstance(node.func, ast.Name) and called == "open" and "b" not in mode
            if text or len(node.args) < {"read_text": 1, "write_text": 2}.get(called, 0):
                wrong.append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert not wrong, wrong


def test_the_source_archive_holds_what_its_tests_need(tmp_path: Path) -> None:
    """By itself setuptools packs tests/test_*.py alone: no fixtures, nothing in deeper folders, no documents."""
    if int(metadata.version("setuptools").split(".")[0]) < 77:
        pytest.skip("an older setuptools does not read this project")
    listing = "from setuptools import setup; setup()"
    subprocess.run([sys.executable, "-c", listing, "-q", "egg_info", "-e", str(tmp_path)], cwd=ROOT, check=True)
    packed = set((tmp_path / "glmimg.egg-info/SOURCES.txt").read_text("utf-8").splitlines())
    needed = [p for folder in ("tests", "docs", "samples", "benchmarks") for p in (ROOT / folder).rglob("*.*")]
    left_out = {str(p.relative_to(ROOT)) for p in needed if p.is_file() and p.suffix != ".pyc"} - packed
    assert not left_out


def test_python_started_in_the_source_tree_finds_everything() -> None:
    """There `glmimg` is the folder, whatever is installed: -S leaves out site-packages, editable installs too."""
    found = "import glmimg.pipelines, glmimg.weights_tools; print(glmimg.pipelines.__file__)"
    run = subprocess.run([sys.executable, "-S", "-c", found], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and Path(run.stdout.strip()).parent == ROOT / "pipelines", run.stderr


def test_the_package_runs_as_its_command() -> None:
    for arguments, status, told in (
        ("--version", 0, f"glmimg {glmimg.__version__}\n"),
        ("nothing", 2, "glmimg: command 'n"),
    ):
        run = subprocess.run([sys.executable, "-m", "glmimg", arguments], capture_output=True, text=True, check=False)
        assert run.returncode == status and (run.stdout + run.stderr).startswith(told)
