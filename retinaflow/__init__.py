"""retinaflow: RetinaNet with focal loss on long-tailed detection data, as an MLflow Project.

The map of the package, in reading order:

- ``boxes``, ``detections``: box arithmetic; detections as columns. ``suppression_rules``: the written ways to thin out
  overlapping detections.
- ``data``: files on disk -> batches of tensors. ``taxonomy`` and ``groups`` (classes), ``openimages``, ``tables`` and
  ``csv_lines`` (the published files), ``predictions``, ``index`` and ``cache`` (annotations as memory-mapped columns),
  ``image_files`` and ``image_sizes``; ``formats`` (COCO, VOC and YOLO) and ``bucket`` (Open Images over HTTP);
  ``prediction_shards`` and ``whole_files`` (what is predicted); ``presence``, ``bins``, ``sampling`` and ``exposure``
  (frequency bins, balanced epochs); ``batching``, ``augmentation``, ``images`` (batches of one shape);
  ``exploration``, ``suspicious`` (what a set looks like); ``demo`` (the generated set).
- ``detector``: tensors -> losses and detections. ``anchors``, ``network`` with ``convolution`` and ``winograd`` (3 x 3
  convolutions that train faster on a CPU), ``weights``, ``targets``, ``focal``, ``loss``, ``postprocess``,
  ``suppression``, ``onnx_graph``.
- ``scoring``: detections and truth -> numbers, tables, pictures. ``truth``, ``claims``, ``matching``, ``evaluator``,
  ``matches`` and ``challenge`` (the rules of the Open Images Challenge metric, in their order), ``operating_points``,
  ``slices`` and ``details`` (more than one number), ``bootstrap`` with ``resampling`` and ``intervals``,
  ``error_analysis`` with ``nearest_truth``, ``report``, ``figures``, ``score_figures``, ``data_figures`` and their
  ``figure_style``, ``fonts``, ``contact_sheet``, ``box_pictures``; ``match_file`` (what is kept of a judged run),
  ``significance``, ``comparison``, ``comparison_words``, ``comparison_figures``, ``found_and_missed``,
  ``comparison_page`` (runs compared class by class); ``seeds`` and ``search_figures`` (the result of a search);
  ``calibration``, ``cross_fitting``, ``calibration_figure`` and ``fusion`` (several models as one).
- ``evaluation``: files, frames or arrays -> scores, in one call.
- ``training``: ``loop`` and ``step``, ``schedule``, ``optimizer``, ``averaging``, ``world`` and ``synced_norm``
  (several processes), ``inference``, ``thinning``, ``checkpoint``, ``precision``, ``compiling``, ``by_bin``,
  ``stopping``.
- ``written``, ``setting_types``, ``setting_groups``, ``data_settings``, ``prediction_settings``,
  ``comparison_settings``, ``config``, ``resolving``: settings, and given values made into them. ``run_files``,
  ``outbox``, ``mlflow_run``, ``tracking``, ``child_runs``: where results go; MLflow. ``served_model`` with
  ``served_images``: the detector as an MLflow model.
- ``commands``: one file per entry point, for ``search`` a folder; ``cli``: flags.

Imports point one way, in this order. Importing ``retinaflow`` loads nothing else.
"""

import os

# Threads that wait for the last one of an operation spin: by default for milliseconds, on a core that other programs or
# that last thread itself could use. Read when torch is loaded; inherited by the processes that this one starts.
# benchmarks/shared_cores.py measures it.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

__version__ = "0.1.0"
