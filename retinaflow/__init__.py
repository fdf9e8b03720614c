"""retinaflow: RetinaNet with focal loss on long-tailed detection data, as an MLflow Project.

The map of the package, in reading order:

- ``boxes``, ``detections``: box arithmetic; detections as columns.
- ``data``: files on disk -> batches of tensors. ``taxonomy`` and ``groups`` (classes), ``openimages`` and ``tables``
  (the published files), ``index`` and ``cache`` (annotations as memory-mapped columns), ``image_files``;
  ``presence``, ``bins``, ``sampling`` and ``exposure`` (frequency bins, balanced epochs); ``batching``,
  ``augmentation``, ``images`` (batches of one shape); ``demo`` (the generated set).
- ``detector``: tensors -> losses and detections. ``anchors``, ``network``, ``weights``, ``targets``, ``focal``,
  ``loss``, ``postprocess``.
- ``scoring``: detections and truth -> numbers, tables, pictures. ``truth``, ``matching`` and ``challenge`` (the Open
  Images Challenge metric), ``bootstrap``, ``seeds``, ``report``, ``figures``, ``contact_sheet``, ``search_figures``.
- ``training``: ``loop``, ``inference``, ``checkpoint``, ``precision``, ``stopping``.
- ``config``, ``resolving``: settings, and given values made into them. ``run_files``, ``tracking``: where results go;
  MLflow. ``served_model``: the detector as an MLflow model.
- ``commands``: one file per entry point, for ``search`` a folder; ``cli``: flags.

Imports point one way, in this order. Importing ``retinaflow`` loads nothing else.
"""

__version__ = "0.1.0"
