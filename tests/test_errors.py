"""Errors teach: what came, what is allowed, what to do."""

from __future__ import annotations

import pytest

from glmimg import errors
from glmimg.errors import BadInput, GlmimgError, MissingExtra, UnknownName


def test_unknown_name_lists_the_choices_and_guesses() -> None:
    message = str(UnknownName.of("sampler", "eular", ["heun", "euler"]))
    assert message == "sampler 'eular': choose from euler, heun; did you mean 'euler'?"


def test_no_guess_when_nothing_is_near() -> None:
    assert str(UnknownName.of("backend", "toaster", ["cpu", "npu"])) == "backend 'toaster': choose from cpu, npu"


def test_case_is_forgiven_in_the_guess() -> None:
    assert str(UnknownName.of("backend", "CUDA", ["cpu", "cuda"])).endswith("did you mean 'cuda'?")


def test_missing_extra_gives_the_command() -> None:
    assert "pip install 'glmimg[ocr]'" in str(MissingExtra.of("rapidocr", "ocr", "reading text in pictures"))


@pytest.mark.parametrize("name", [name for name in errors.__all__ if name[0].isupper()])
def test_one_base_catches_all(name: str) -> None:
    assert issubclass(getattr(errors, name), GlmimgError)


def test_messages_do_not_command_the_terminal() -> None:
    told = "\x1b]0;title\x07 \u202etxt\r \ud800 \x9b31m"
    assert str(BadInput(told)) == r"\x1b]0;title\x07 \u202etxt\r \ud800 \x9b31m"
    kept = "three\nlines,\ta café, 猫\u3000と犬, \u06a9\u200c\u0647, 👩\u200d🎨"
    assert str(BadInput(kept)) == kept and str(BadInput(3)) == "3"


def test_standard_classes_catch_them_too() -> None:
    assert issubclass(UnknownName, BadInput)
    assert issubclass(BadInput, ValueError)
    assert issubclass(MissingExtra, ImportError)
