"""A short, deterministic part of `make fuzz`: every seed, every former finding, and some mutants of each."""

from __future__ import annotations

import logging
import warnings
from random import Random

import pytest

from segpipe.sources.readers import TRUSTED
from tools.fuzz.mutate import mutate
from tools.fuzz.target import UnclearError, check_text, execute
from tools.fuzz.targets import FOUND, TARGETS, inputs_of


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are opened here, as a reader process does, and nothing is logged."""
    monkeypatch.setenv(TRUSTED, "1")
    logging.disable()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", TARGETS)
def test_what_comes_in_is_read_or_refused_in_a_line(name):
    target, inputs = TARGETS[name], inputs_of(name)
    assert inputs
    contents = [path.read_bytes() for path in inputs]
    for path, content in zip(inputs, contents, strict=True):
        try:
            execute(target, content)
        except Exception as error:
            raise AssertionError(f"{path}: {type(error).__name__}") from error
    for number in range(target.mutants):
        random = Random(f"{name} {number}")
        content = mutate(random.choice(contents), target.form, random)
        try:
            execute(target, content)
        except Exception as error:
            raise AssertionError(f"mutant {number} of {name}: {content[:400]!r}") from error


def test_every_former_finding_has_a_target():
    assert {path.name for path in FOUND.iterdir()} <= set(TARGETS)


@pytest.mark.parametrize("text", ["", "  ", "a\nb", "a.tif: bad\n"])
def test_an_error_that_is_no_line_is_a_finding(text):
    with pytest.raises(UnclearError):
        check_text(text, several=False)


def test_mutants_are_the_same_in_every_run():
    content = b'{"a": [1, 2.5, "b"]}'
    assert mutate(content, "json", Random(7)) == mutate(content, "json", Random(7))
    assert len({mutate(content, "json", Random(n)) for n in range(50)}) > 30
