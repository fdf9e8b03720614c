"""MLflow's environment, set before anything here imports MLflow."""

import os
from urllib.parse import unquote, urlsplit, urlunsplit

# MLflow reports usage to its makers unless this is set; a training needs no network.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
# Each request to a server ends within seconds: with MLflow's own 120 s and 7 repetitions it would go unnoticed for a
# quarter of an hour that the server is back. The outbox repeats.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
# A bar for every fetched file would stand between the lines of a command.
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")


def _user_out_of_the_address() -> None:
    """Move user and password of the tracking server from its address to the variables that MLflow has for them.

    MLflow writes the address into links, tags and messages; the variables it only sends to the server.
    """
    address = urlsplit(os.environ.get("MLFLOW_TRACKING_URI", ""))
    if address.scheme in ("http", "https") and address.username is not None:
        os.environ["MLFLOW_TRACKING_URI"] = urlunsplit(address._replace(netloc=address.netloc.rpartition("@")[2]))
        os.environ["MLFLOW_TRACKING_USERNAME"] = unquote(address.username)
        os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(address.password or "")


_user_out_of_the_address()
