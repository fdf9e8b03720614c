"""Tensors -> losses and detections. Torch and torchvision only: no image files, no CSV, no MLflow.

In reading order: ``anchors`` (where boxes may be), ``network`` (images -> logits and deltas), ``weights`` (published
weights into the network), ``targets`` (which anchor answers for which box, and where nothing may be punished),
``focal`` (the classification loss), ``loss`` (both losses of a batch), ``postprocess`` (outputs -> detections) with
``suppression`` (Soft-NMS). ``hierarchy`` checks tensors per class.

Boxes are ``xyxy`` pixels of the resized image here, sizes are ``(height, width)``, classes ``0..K-1``; ``postprocess``
is the border at which boxes become normalised to [0, 1].
"""
