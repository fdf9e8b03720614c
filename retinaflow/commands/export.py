"""``export``: a trained model as an ONNX file, which onnxruntime runs without retinaflow and without torch."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from retinaflow.detector.onnx import onnx_detector
from retinaflow.errors import SettingError
from retinaflow.files import atomic_file
from retinaflow.inference.detector import Detector, as_trained
from retinaflow.inference.merged_checkpoint import MergedCheckpoint
from retinaflow.progress import report
from retinaflow.runs import tracking
from retinaflow.runs.models import TrainedModel
from retinaflow.runs.names import run_name
from retinaflow.settings.commands import ExportConfig
from retinaflow.settings.model_settings import DetectorSettings, PostprocessSettings


def run(config: ExportConfig) -> Path:
    """Write the file. Raises SettingError for detections that an ONNX graph cannot make, or without onnx."""
    model = TrainedModel.find(config.from_run)
    checkpoint = model.checkpoint
    if isinstance(checkpoint, MergedCheckpoint):
        raise SettingError(
            f"from_run={model.name}: an ONNX graph holds one network, and this model is merged from several; export "
            f"its members: from_run={', '.join(member.run for member in checkpoint.members)}"
        )
    config = as_trained(config, checkpoint)
    settings = DetectorSettings(**config.part(PostprocessSettings).model_dump())
    detector = Detector.around(checkpoint.build(torch.device("cpu")), checkpoint, settings)
    notes = {
        "class_ids": json.dumps(detector.taxonomy.ids),
        "class_names": json.dumps(detector.taxonomy.labels),
        "shapes": json.dumps(detector.buckets.shapes),
        "model_digest": checkpoint.digest,
    }
    with tracking.start_path_run("export", config, default_name=run_name("export", config)) as run:
        run.log_params(config.model_dump())
        run.log_model_input(model.model_id if config.track else None)
        run.set_tags(model.tags() | {"retinaflow.output": str(config.output.absolute())})
        try:
            graph = onnx_detector(detector.network, detector.postprocess, notes=notes)
        except ImportError as error:
            raise SettingError(f"export needs {error.name}: pip install onnx onnxruntime") from None
        with atomic_file(config.output) as partial:
            partial.write_bytes(graph.SerializeToString())
    if detector.ancestors is not None:
        report("parents=expand is not in the graph: detections of a class are not copied to its ancestors")
    shapes = ", ".join(f"{height}x{width}" for height, width in detector.buckets.shapes)
    report(f"{config.output}: {config.output.stat().st_size / 1e6:.1f} MB; give it images of {shapes} (height x width)")
    return config.output
