"""Lines of a command: without secrets, and no end of the work when nobody reads them any more."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

from retinaflow.progress import print_to, report

LINES = """
import sys, time
from retinaflow.progress import print_to, report
report("first")
sys.stdin.readline()
for stream in (sys.stdout, sys.stderr):
    for _ in range(3):
        print_to(stream, "x" * 100_000)
open(sys.argv[1], "w").write("stored")
"""


def test_a_line_has_no_secret(capsys: pytest.CaptureFixture[str]) -> None:
    report("storage http://ann:S3cret@h is away")
    assert capsys.readouterr().out == "storage http://h is away\n"


def test_the_work_continues_when_the_reader_of_its_lines_has_ended(tmp_path: Path) -> None:
    """Ctrl-C ends ``| tee`` at once, while the command has results to store."""
    result = tmp_path / "result"
    with subprocess.Popen(
        [sys.executable, "-c", LINES, str(result)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "first\n"
        process.stdout.close()
        process.stderr.close()
        process.stdin.write("\n")
        process.stdin.close()
        assert process.wait() == 0
    assert result.read_text(encoding="utf-8") == "stored"


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_a_name_that_the_encoding_of_the_log_lacks_is_written_as_an_escape(encoding: str) -> None:
    with io.TextIOWrapper(io.BytesIO(), encoding=encoding) as stream:
        print_to(stream, "skipped 日本.jpg, \udce9.jpg")
        stream.seek(0)
        written = stream.read()
    name = "日本" if encoding == "utf-8" else r"\u65e5\u672c"
    assert written == f"skipped {name}.jpg, \\udce9.jpg\n"
