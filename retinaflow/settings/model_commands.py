"""Settings of the commands that use a trained model: ``predict``, ``visualize``, ``export``; see ``config``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from retinaflow.settings.fields import Fraction, Names, OptionalPath, OptionalText
from retinaflow.settings.groups import DetectorSettings, ImagesFields, PostprocessFields, TrackingSettings


class ModelFields(PostprocessFields):
    """A trained model. score_threshold, nms and the other settings of detections are those of its training unless
    given."""

    from_run: OptionalText = None
    """The model: run id, models:/NAME@ALIAS or models:/NAME/VERSION, or a checkpoint file; none: the last training
    run."""


class DetectingFields(DetectorSettings, ModelFields, ImagesFields):
    """A trained model that detects on images."""

    parents: Literal["trained", "expand"] = "trained"
    """Detections of parent classes: as the model was trained, or expand: each detection is also one of every ancestor
    of its class, of duplicates the best."""


class PredictConfig(TrackingSettings, DetectingFields):
    """``predict``: detections of a trained model on a folder, a list or a split of images, in files; an interrupted run
    is resumed by the same command."""

    output: Path = Path("outputs/predict")
    """Folder of the predictions, and of the shards that an interrupted run resumes from."""
    file_format: Literal["csv", "parquet"] = "csv"
    """The file of all predictions: predictions.csv or predictions.parquet, columns as evaluate reads them."""
    submission: OptionalPath = None
    """Also write a Kaggle submission of the Challenge (ImageId,PredictionString) to this file; none: no."""
    nproc: Annotated[int, Field(ge=1)] = 1
    """Processes that predict together on this machine, one per GPU where there are GPUs."""
    shard_size: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Images of one shard: an interrupted run loses at most the shards in progress. auto: 1,000, or fewer, so that each
    process has four shards at least."""
    overwrite: bool = False
    """Begin anew whatever output holds; else predictions of another model, other settings or other images are
    refused."""


class VisualizeConfig(TrackingSettings, DetectingFields):
    """``visualize``: pictures with boxes drawn in, of a model or of a file of predictions, ground truth beside them where it
    is known."""

    output: Path = Path("outputs/visualize")
    """Folder that the pictures are written to, tracked or not."""
    predictions: OptionalPath = None
    """CSV, Parquet or Kaggle submission of detections to draw instead of a model's."""
    samples: Annotated[int, Field(ge=1)] = 12
    """Images drawn at random, by seed."""
    ids: Names = ()
    """Ids of the images to draw; none: a random sample."""
    min_score: Fraction = 0.3
    """Detections below this score are not drawn."""
    ground_truth: bool = True
    """Draw the annotated boxes of the split beside the detections, if there are any."""
    longest_side: Annotated[int, Field(ge=64)] = 1024
    """Longest side of a drawn image, pixels; larger ones are made smaller, small ones are drawn at up to four times
    their size."""


class ExportConfig(TrackingSettings, ModelFields):
    """``export``: a trained model as an ONNX file."""

    output: Path = Path("outputs/model.onnx")
    """File to write."""
