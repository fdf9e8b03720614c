"""retinaflow: RetinaNet with focal loss on long-tailed detection data, as an MLflow Project.

The map of the package, in reading order. Imports point one way: a line may import from the lines above it.

- ``addresses``, ``errors``: addresses without their passwords; what users can cause or meet, which the command line
  shows without a traceback.
- ``boxes``, ``detections``, ``taxonomy``: values in numpy: box arithmetic, detections as columns, the class hierarchy.
- ``files``, ``progress``, ``interrupts``: atomic files and locks; progress bars and lines; stopping on request.
- ``settings``: every setting, declared once: types, groups of one subject, commands, and how values are merged.
- ``demo``: the generated data set, written in the published layout.
- ``detector``: batches of images -> losses and detections: anchors, network, weights, targets, losses, NMS, ONNX.
- ``data``: published files -> batches: index, class groups, frequency bins, sampling, exposure, augmentation;
  ``formats`` (COCO, VOC, YOLO), ``download`` (Open Images over HTTP).
- ``metric``: detections and ground truth -> AP: the rules of the Open Images Challenge, details, error analysis.
- ``statistics``: how sure a number is: bootstrap, intervals, significance, calibration.
- ``inference``: a checkpoint -> detections: one Detector for all commands.
- ``runs``: where results go: a folder or MLflow, the registry, the served model. The only room that imports mlflow.
- ``training``: the loop, steps, optimizer, several processes, resuming.
- ``reports``: figures, contact sheets, HTML pages.
- ``comparison``, ``ensemble``: runs against each other, class by class; several models as one.
- ``search``: better settings with Optuna. The only room that imports optuna.
- ``commands``: one script for each entry point; ``cli``: flags, help, exit codes.

Importing ``retinaflow`` loads nothing else.
"""

import os

# Threads that wait for the last one of an operation spin: by default for milliseconds, on a core that other programs or
# that last thread itself could use. Read when torch is loaded; inherited by the processes that this one starts.
# benchmarks/shared_cores.py measures it.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

# Read when OpenCV is loaded. Its own limit, 1,073,741,824 pixels, is 3 GB for an image, whose file may have 3 MB.
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", "178956970")

__version__ = "0.1.0"
