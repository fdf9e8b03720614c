"""Detection data in other layouts -> :class:`~retinaflow.data.formats.detection_set.DetectionSet`, and back.

Reading: ``layout`` recognises the layout of a folder; ``coco``, ``voc`` and ``yolo`` read its files into a
``SourceSet`` (``source``); ``checks`` verifies it against the image files and makes a ``DetectionSet`` with ``ids`` of
its own, boxes rotated as ``orientation`` requires. ``splits`` takes a validation split out. Writing: the same modules,
``published`` for the layout of Open Images. ``conversion`` has these steps in the order of ``convert``, and copies or
links the images.
"""
