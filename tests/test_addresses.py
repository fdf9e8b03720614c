"""No secret of an address is left, and nothing else is changed."""

from __future__ import annotations

import pytest

from retinaflow.addresses import without_secrets

SECRETS = {
    "user and password": ("http://ann:S3cret@h:5000/#/runs/1", "http://h:5000/#/runs/1"),
    "a database": ("postgresql+psycopg://ann:S3cret@h/db", "postgresql+psycopg://h/db"),
    "a password alone": ("redis://:S3cret@h", "redis://h"),
    "a token as user": ("https://S3cret@h/a.git", "https://h/a.git"),
    "signs that should be quoted": ("postgresql://ann:S3/cret?y#z@h/db", "postgresql://h/db"),
    "quoted signs": ("http://ann:S3cret%40%2F@h/", "http://h/"),
    "digits alone": ("http://ann:12345@h/", "http://h/"),
    "two, in quotation marks": ("from 'http://a:S3cret@h' to \"ftp://b:S3cret@i\"", "from 'http://h' to \"ftp://i\""),
    "in the query": ("postgresql://h/db?user=ann&password=S3cret", "postgresql://h/db?user=***&password=***"),
    "a signed address": ("https://h/a?X-Amz-Signature=S3cret&n=1#p", "https://h/a?X-Amz-Signature=***&n=1#p"),
}


@pytest.mark.parametrize(("text", "shown"), SECRETS.values(), ids=SECRETS)
def test_secrets_are_cut_out_of_an_address(text: str, shown: str) -> None:
    assert without_secrets(text) == shown
    assert without_secrets(f"({text} is away)") == f"({shown} is away)"


@pytest.mark.parametrize(
    "text",
    [
        "http://h:5000/#/models/flowers@champion",
        "models:/flowers@champion",
        "sqlite:////srv/a@b/mlflow.db",
        "s3://bucket/a:b@c",
        "mail ann@h, see http://h:80 or ann@h",
        "https://h/list?n=1&page=2",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert without_secrets(text) == text
