"""Messages: one line, what, where, value, remedy; no secret ever."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from lib.core.errors import (
    EnvError,
    InputError,
    Interrupted,
    SeveralErrors,
    UserError,
    raise_all,
    redact,
    report_lines,
)


def test_an_error_is_one_line_with_file_value_and_remedy():
    error = InputError("sha256 differs", file=Path.cwd() / "a/b.bin", value="x\ny", remedy="again")
    assert report_lines(error) == ["error: sha256 differs in a/b.bin: x y; again"]
    assert (UserError("x").code, error.code, EnvError("x").code) == (2, 3, 4)
    assert report_lines(Interrupted("stopped")) == ["stopped"]
    assert len(str(UserError("x", value="v" * 500))) < 100


def test_several_errors_are_printed_one_a_line_with_their_count():
    with pytest.raises(SeveralErrors) as caught:
        raise_all([UserError("one"), UserError("two")])
    assert report_lines(caught.value) == ["error: one", "error: two", "2 errors"]
    assert caught.value.code == 2
    raise_all([])


def test_errors_cross_a_process_border():
    error = EnvError("disk full", file="x", value=1, remedy="free")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_f6_secrets_are_taken_out_of_every_message(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "canary-one-123")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary/two+456")
    text = redact(
        "canary-one-123 canary/two+456 https://bob:pw77@host/x?X-Amz-Signature=abc&y=1 "
        "Authorization: Bearer tok.en hf_abcdefghijkl"
    )
    for secret in ("canary", "pw77", "abc&", "tok.en", "hf_a"):
        assert secret not in text, text
    assert "y=1" in text


def test_a_value_that_cannot_cross_a_process_border_does_so_as_text():
    """A library's exception as the value once ended a worker pool with a PicklingError."""
    error = InputError("damaged", file="x.gz", value=ValueError(lambda: None))
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
