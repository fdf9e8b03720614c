"""``export``: a trained model as an ONNX file, which onnxruntime runs without retinaflow and without torch."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from retinaflow.detector.onnx import onnx_detector
from retinaflow.files import atomic_file
from retinaflow.inference.model import ChosenModel
from retinaflow.progress import report
from retinaflow.runs import tracking
from retinaflow.settings.commands import ExportConfig


def run(config: ExportConfig) -> Path:
    """Write the file. Raises ValueError for a model whose detections an ONNX graph cannot make, or without onnx."""
    model = ChosenModel.open(config)
    config, checkpoint = model.config, model.checkpoint
    with tracking.start_run(
        "export", track=config.track, experiment=config.experiment, output=config.output.parent
    ) as run:
        run.log_params(config.model_dump())
        run.set_tags(model.tags() | {"retinaflow.output": str(config.output.absolute())})
        try:
            graph = onnx_detector(
                checkpoint.build(torch.device("cpu")),
                config,
                notes={
                    "class_ids": json.dumps(checkpoint.taxonomy.ids),
                    "class_names": json.dumps(checkpoint.taxonomy.labels),
                    "shapes": json.dumps(checkpoint.buckets.shapes),
                    "model_digest": checkpoint.digest,
                },
            )
        except ImportError as error:
            raise ValueError(f"export needs {error.name}: pip install onnx onnxruntime") from None
        with atomic_file(config.output) as partial:
            partial.write_bytes(graph.SerializeToString())
    shapes = ", ".join(f"{height}x{width}" for height, width in checkpoint.buckets.shapes)
    if checkpoint.parents == "expand":
        report("parents=expand is not in the graph: detections of a class are not copied to its ancestors")
    report(f"{config.output}: {config.output.stat().st_size / 1e6:.1f} MB; give it images of {shapes} (height x width)")
    return config.output
