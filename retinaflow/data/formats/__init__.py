"""Detection data in other tools' layouts -> :class:`~retinaflow.data.formats.detection_set.DetectionSet`, and back.

Reading: ``detecting`` says which layout a folder has; ``coco``, ``voc`` and ``yolo`` give what their files say as a
``SourceSet`` (``source``); ``checking`` measures it against the image files and makes a ``DetectionSet`` of it, with
ids from ``naming`` and boxes turned as ``turning`` says. ``splitting`` takes a validation split out. Writing: the same
files, ``published`` for the layout of Open Images, and ``placing`` for image files and the folder as a whole.
"""
