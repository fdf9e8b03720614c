"""MLflow's environment, set before anything here imports MLflow."""

import os

# MLflow reports usage to its makers unless this is set; a training needs no network.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
# Each request to a server ends within seconds: with MLflow's own 120 s and 7 repetitions it would go unnoticed for a
# quarter of an hour that the server is back. The outbox repeats.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
# A bar for every fetched file would stand between the lines of a command.
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
