"""What a request holds is bounded before it is parsed, and every form of a request leads to the same images."""

from __future__ import annotations

import io
import json
import time
import tracemalloc
from typing import Any

import pandas as pd
import pytest

from retinaflow.runs.served_images import Limits
from retinaflow.runs.served_requests import BadRequest, body_kind, checked_body

JSON, CSV, PARQUET = "application/json", "text/csv", "application/vnd.apache.parquet"
LIMITS = Limits(max_images=3)

SAME = {
    "split": {"dataframe_split": {"columns": ["id", "image"], "data": [[1, "aa"], [2, "bb"]], "index": [7, 8]}},
    "records": {"dataframe_records": [{"image": "aa", "id": 1}, {"image": "bb"}]},
    "instances": {"instances": [{"image": "aa"}, {"image": "bb"}]},
    "instances of texts": {"instances": ["aa", "bb"]},
    "inputs": {"inputs": {"image": ["aa", "bb"]}},
    "inputs of texts": {"inputs": ["aa", "bb"]},
}


@pytest.mark.parametrize("form", SAME)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_every_form_of_a_table_is_passed_on_as_the_plainest(form: str, encoding: str) -> None:
    expected: dict[str, Any] = {"dataframe_split": {"columns": ["image"], "data": [["aa"], ["bb"]]}}
    assert json.loads(checked_body(json.dumps(SAME[form]).encode(encoding), JSON, LIMITS)) == expected
    with_params = json.dumps({**SAME[form], "params": {"score_threshold": 0.5}}).encode(encoding)
    assert json.loads(checked_body(with_params, JSON, LIMITS)) == {**expected, "params": {"score_threshold": 0.5}}


def _columns(*names: Any) -> dict[str, Any]:
    return {"dataframe_split": {"columns": names, "data": [["a"] * len(names)]}}


def _params(value: str) -> str:
    return '{"instances": ["a"], "params": {"score_threshold": ' + value + "}}"


REFUSED: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "must be a JSON object, but Expecting property name"),
    "a list": ([], "must be a JSON object, but is a list"),
    "no table": ({"a": 1}, "must have one of dataframe_split, .* but has none"),
    "two tables": ({"inputs": [], "instances": []}, "but has instances and inputs"),
    "a chat": ({"messages": [{"role": "user", "content": "hello"}]}, "but has none"),
    "another column": (_columns("photo"), "dataframe_split must have a column image"),
    "a column that is an object": (_columns({"a": 1}), "dataframe_split must have a column image"),
    "a row cut short": ({"dataframe_split": {"columns": ["id", "image"], "data": [[1]]}}, "with a value in each row"),
    "rows of other things": ({"dataframe_records": [1]}, "dataframe_records must have a column image"),
    "no rows": ({"inputs": None}, "inputs must have a column image"),
    "an image that is a number": ({"instances": ["a", 3]}, "row 1: image must be base64 text, but is a int"),
    "an image that is a list": ({"instances": [{"image": ["a"]}]}, "row 0: image must be base64 text, but is a list"),
    "too many images": ({"instances": ["a"] * 4}, r"may have 3 images \(max_images\), but has 4"),
    "params that are a list": ({"instances": [], "params": [1]}, "params must be an object of names and numbers"),
    "a number of 401 digits": (_params("1" + "0" * 400), "params must be an object of names and numbers"),
    "a number of 6,000 digits": (_params("1" + "0" * 6000), "Exceeds the limit"),
    "infinity": (_params("Infinity"), "params must be an object of names and numbers"),
    "no number": (_params("NaN"), "params must be an object of names and numbers"),
    # The second where torch's compiler has raised Python's limit of this process.
    "nested too deep": ('{"a":' + "[" * 1200 + "]" * 1200 + "}", "maximum recursion depth|must have one of dataframe"),
    "many values": ('{"dataframe_records": [' + "{}," * 1_000_000 + "{}]}", "may have 1,300 values"),
    "many columns": ({"dataframe_records": [{f"c{n}": 1 for n in range(5000)}]}, "may have 1,300 values"),
    "one letter beyond ASCII": ({"instances": ["A" * (1 << 20)]}, "must be ASCII"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_request_is_refused_with_the_rule_in_a_short_message(name: str) -> None:
    given, message = REFUSED[name]
    text = given if isinstance(given, str) else json.dumps(given)
    if name == "one letter beyond ASCII":
        text = text.replace("A", "é", 1)
    with pytest.raises(BadRequest, match=message) as caught:
        checked_body(text.encode(), JSON, LIMITS)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("text", ["image\n" + "1\n" * 1_000_000, "image\n" + "," * 1_000_000, "c" * 2000 + "\naa\n"])
def test_a_csv_is_bounded_too(text: str) -> None:
    with pytest.raises(BadRequest, match=r"may have 1,300 values|the first line of a CSV names its columns"):
        checked_body(text.encode(), CSV, LIMITS)


def test_a_csv_and_a_kind_that_mlflow_refuses_are_passed_on_as_they_are() -> None:
    for kind, content in ((CSV, b"image\naa\n"), ("text/xml", b"<xml/>" * 100_000)):
        assert checked_body(content, kind, LIMITS) is content


def test_a_body_that_expands_when_it_is_read_is_refused_by_its_headers() -> None:
    file = io.BytesIO()
    pd.DataFrame({"image": ["A" * 1000] * 60_000}).to_parquet(file, compression="zstd")
    assert len(file.getvalue()) < 100_000, "60 MB in memory"
    for headers in (
        {"content-type": PARQUET},
        {"content-type": f"{PARQUET}; charset=utf-8"},
        {"content-type": JSON, "content-encoding": "gzip"},
        {"content-type": CSV, "content-encoding": "br"},
        {"content-type": ""},
        {},
    ):
        with pytest.raises(BadRequest, match="must be application/json or text/csv, not compressed, but got content-"):
            body_kind(headers)
    assert body_kind({"content-type": "application/json; charset=utf-8", "content-encoding": "identity"}) == JSON


def test_a_long_text_beside_short_ones_costs_what_it_is_long() -> None:
    # MLflow makes an array of inputs, in which every text is as long as the longest: 33 x 40 MB here.
    content = json.dumps({"inputs": {"image": ["A" * 10_000_000, *["a"] * 32]}}).encode()
    tracemalloc.start()
    started = time.process_time()
    checked_body(content, JSON, Limits(max_images=33))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000_000
    assert time.process_time() - started < 5
