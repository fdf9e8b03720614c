"""Tensors -> losses and detections. Torch and torchvision only: no image files, no CSV, no MLflow.

In reading order: ``anchors`` (reference boxes), ``network`` (images -> logits and offsets), ``weights`` (published
weights into the network), ``targets`` (which anchor is matched to which box, and which negatives are ignored),
``focal_loss`` (the classification loss), ``detection_loss`` (both losses of a batch), ``postprocess`` (outputs ->
detections) with ``nms``, ``onnx`` (the detector as one graph), ``device`` (device, precision, loader processes).
``winograd`` makes 3 x 3 convolutions faster on a CPU; only ``network`` uses it.

Boxes are ``xyxy`` pixels of the resized image here, sizes are ``(height, width)``, classes ``0..K-1``; ``postprocess``
is the border at which boxes become normalised to [0, 1].
"""
