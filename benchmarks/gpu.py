"""What a GPU makes of this project, beside the targets: one table, made to take under five minutes on one H100 or H200.

    python benchmarks/gpu.py                     # parts a to f, the generated set for e
    python benchmarks/gpu.py --parts a,c         # some of them
    python benchmarks/gpu.py --data /data/bccd   # part e on a data folder
    python benchmarks/gpu.py --dry_run           # all of it, small, on a CPU

It needs no MLflow, Optuna or albumentations, and prints which packages are missing before it starts. A part that fails
prints its error, and the others run. A part stops measuring when its time is over.

a  the step of MLPerf's RetinaNet (docs/mlperf-retinanet.yaml) on random images: images a second, memory, the fraction
   of the measured bfloat16 matrix-product rate; plain and compiled
b  the step of ResNet-50 with 500 classes, 800 pixels, 16 images, beside torchvision's RetinaNet in the same precision
c  the class loss beside torchvision's, and loss and gradients of GPU and CPU against each other
d  the loader: images a second of all cores, 1024 x 768 JPEGs to 800 x 800
e  a short training in bfloat16, resumed once: AP, beside the same training on a CPU where that was measured
f  detection with suppression: images a second
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "torchvision", "numpy", "pandas", "pyarrow", "cv2", "scipy", "pydantic", "yaml", "PIL")
BUDGET = {"a": 110.0, "b": 40.0, "c": 15.0, "d": 25.0, "e": 70.0, "f": 20.0}
"""Seconds of each part; a part begun is finished, so the sum is under five minutes."""


@dataclass
class Row:
    """One figure of the table."""

    what: str
    value: str
    target: str = ""


@dataclass(frozen=True)
class Scale:
    """How large everything is."""

    device: Any
    dry: bool
    data: str

    @property
    def precision(self) -> Any:
        """bfloat16, which many CPUs emulate slowly."""
        return "float32" if self.dry else "bfloat16"

    def of(self, real: int, dry: int) -> int:
        return dry if self.dry else real


def main() -> None:
    arguments = parse()
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"these packages are missing: {', '.join(missing)}")
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import torch

    if not arguments.dry_run and not torch.cuda.is_available():
        sys.exit("there is no GPU that torch can use; --dry_run runs the script small on a CPU")
    device = torch.device("cpu" if arguments.dry_run else "cuda")
    triton = importlib.util.find_spec("triton") is not None
    print(f"torch {torch.__version__}, Triton {'found' if triton else 'missing: the loss is not fused'}", flush=True)
    torch.backends.cudnn.benchmark = True
    table: list[tuple[str, Row]] = []
    start = time.perf_counter()
    for part in arguments.parts.split(","):
        began = time.perf_counter()
        try:
            rows = PARTS[part](Scale(device, arguments.dry_run, arguments.data), began + BUDGET[part])
            for row in rows:
                table.append((part, row))
                print(f"{part}  {row.what}: {row.value}  {row.target}", flush=True)
        except Exception as error:
            traceback.print_exc()
            table.append((part, Row("failed", f"{type(error).__name__}: {error}".splitlines()[0][:120])))
        reset(device)
        print(f"part {part}: {time.perf_counter() - began:.0f} s", flush=True)
    card = f"{(arguments.dry_run and 'dry run on a CPU') or torch.cuda.get_device_name()}"
    print(f"\n| {card} | measured | target |\n| --- | --- | --- |")
    for part, row in table:
        print(f"| {part}: {row.what} | {row.value} | {row.target} |")
    print(f"\n{time.perf_counter() - start:.0f} s in all")
    if any(row.what == "failed" for _, row in table):
        sys.exit(1)


def reset(device: Any) -> None:
    """Nothing of one part takes memory from the next."""
    import torch

    gc.collect()
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def wait(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(run: Callable[[], Any], device: Any, until: float, *, most: int, warm: int = 2) -> float:
    """Mean of up to ``most`` calls, after ``warm`` that are not counted; at least one."""
    for _ in range(warm):
        run()
    wait(device)
    start, calls = time.perf_counter(), 0
    while calls < most and (calls == 0 or time.perf_counter() < until):
        run()
        calls += 1
    wait(device)
    return (time.perf_counter() - start) / calls


def peak_gib(device: Any, run: Callable[[], Any]) -> float:
    """Peak memory of a call above what stands before it; 0 on a CPU."""
    import torch

    if device.type != "cuda":
        return 0.0
    wait(device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    wait(device)
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def matmul_rate(device: Any, side: int) -> float:
    """Operations a second of a bfloat16 matrix product of random values."""
    import torch

    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / seconds(lambda: a @ b, device, time.perf_counter() + 2, most=20, warm=3)


def batch_of(classes: int, size: int, count: int, boxes: int = 8) -> Any:
    """A batch as the loader makes it."""
    import torch

    from retinaflow.data.dataset import Batch

    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    corner = torch.rand(count * boxes, 2, generator=generator) * size * 0.7
    side = size * (0.05 + 0.25 * torch.rand(count * boxes, 2, generator=generator))
    nothing = torch.zeros(0, dtype=torch.int64)
    batch = Batch(
        images.contiguous(memory_format=torch.channels_last),
        torch.cat([corner, corner + side], 1),
        torch.randint(0, classes, (count * boxes,), generator=generator),
        torch.arange(count).repeat_interleave(boxes),
        torch.zeros(0, 4),
        nothing,
        nothing,
        torch.ones(count, classes, dtype=torch.bool),
        torch.arange(count),
    )
    return batch.pin_memory() if torch.cuda.is_available() else batch


def stepper_of(backbone: str, classes: int, scale: Scale, *, batch_norm: str = "frozen") -> tuple[Any, Any]:
    """A network and what takes its steps, as a training makes them."""
    from retinaflow.detector.detection_loss import LossConfig
    from retinaflow.detector.network import RetinaNet
    from retinaflow.inference.checkpoint import on_device
    from retinaflow.settings.training_settings import NetworkSettings, OptimizationSettings
    from retinaflow.training.distributed import ALONE
    from retinaflow.training.optimizer import make_optimizer
    from retinaflow.training.step import Stepper

    settings = NetworkSettings(
        backbone=backbone,
        head_norm="none",
        head_depth=scale.of(4, 1),
        fpn_channels=scale.of(256, 64),
        batch_norm=batch_norm,
        trainable_layers=3,
    )
    model = on_device(RetinaNet(settings, classes), scale.device).train()
    stepper = Stepper(
        model,
        make_optimizer(model, OptimizationSettings(), fused=True),
        loss=LossConfig(box_loss="l1"),
        clip=5.0,
        precision=scale.precision,
        device=scale.device,
        ancestors=None,
        world=ALONE,
        deferred=scale.device.type == "cuda",
    )
    return model, stepper


def take(stepper: Any, batch: Any) -> Callable[[], None]:
    def run() -> None:
        stepper.take([batch], 1e-5)
        if stepper.num_pending >= 10:
            stepper.read()

    return run


def part_a(scale: Scale, until: float) -> Iterator[Row]:
    from torch.utils.flop_counter import FlopCounterMode

    from retinaflow.training.compilation import compile_network

    classes, size, count = scale.of(264, 7), scale.of(800, 64), scale.of(32, 2)
    rate = matmul_rate(scale.device, scale.of(8192, 256))
    yield Row("bfloat16 matrix product", f"{rate / 1e12:.1f} TFLOP/s")
    model, stepper = stepper_of(("resnext50_32x4d", "resnet18")[scale.dry], classes, scale)
    batch = batch_of(classes, size, count)
    run = take(stepper, batch)
    with FlopCounterMode(display=False) as counter:
        run()
    operations = counter.get_total_flops()
    for name, target in (("plain", "145 or more"), ("compiled", "220 or more (290 is the record)")):
        if name == "compiled" and scale.dry:
            # Minutes of a compiler's work on a CPU.
            yield Row("MLPerf's step, compiled", "not compiled in a dry run", target)
            break
        if name == "compiled":
            compile_network(model, scale.device, batch_size=count)
        each = seconds(
            run, scale.device, until - (60 if name == "plain" else 0), most=scale.of(30, 1), warm=scale.of(3, 0)
        )
        yield Row(f"MLPerf's step, {name}", f"{count / each:.1f} images/s", target)
        yield Row(f"fraction of the matrix-product rate, {name}", f"{operations / each / rate:.0%}")
        yield Row(f"memory above weights, {name}", f"{peak_gib(scale.device, run):.1f} GiB", "20 GB in all")
        if name == "plain":
            yield Row("host waits in a step, by the profile", host_waits(run, scale.device), "none")
    stepper.read()


def host_waits(run: Callable[[], None], device: Any) -> str:
    """Calls in which the host waits for the device, by name."""
    from torch.profiler import ProfilerActivity, profile

    if device.type != "cuda":
        return "not measured on a CPU"
    wait(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        run()
    waits = [e.key for e in profiled.key_averages() if e.key in ("cudaStreamSynchronize", "cudaEventSynchronize")]
    return ", ".join(waits) or "none"


def part_b(scale: Scale, until: float) -> Iterator[Row]:
    import torch
    from torchvision.models.detection import retinanet_resnet50_fpn

    from retinaflow.detector.device import autocast

    classes, size, count = scale.of(500, 7), scale.of(800, 64), scale.of(16, 2)
    batch = batch_of(classes, size, count)
    _, stepper = stepper_of("resnet50", classes, scale)
    run = take(stepper, batch)
    ours, memory = measured(run, scale, (until + time.perf_counter()) / 2)
    del stepper, run
    reset(scale.device)
    peer = retinanet_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=classes, min_size=size, max_size=size
    ).to(scale.device)
    optimizer = torch.optim.AdamW([p for p in peer.parameters() if p.requires_grad], lr=1e-5, fused=True)
    images = [image.float().to(scale.device) / 255 for image in batch.images.contiguous()]
    targets = [
        {
            "boxes": batch.boxes[batch.owner == n].to(scale.device),
            "labels": batch.labels[batch.owner == n].to(scale.device),
        }
        for n in range(count)
    ]

    def step() -> None:
        with autocast(scale.device, scale.precision):
            losses = peer(images, targets)
        optimizer.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 5.0)
        optimizer.step()

    theirs, their_memory = measured(step, scale, until)
    yield Row("ResNet-50, 500 classes", f"{count / ours:.1f} images/s")
    yield Row("torchvision's", f"{count / theirs:.1f} images/s")
    yield Row("times torchvision's images/s", f"{theirs / ours:.2f}", "1.5 or more")
    yield Row("memory above weights", f"{memory:.1f} GiB, torchvision's {their_memory:.1f} GiB", "at most half")


def measured(run: Callable[[], None], scale: Scale, until: float) -> tuple[float, float]:
    each = seconds(run, scale.device, until, most=scale.of(15, 1), warm=scale.of(3, 0))
    return each, peak_gib(scale.device, run)


def part_c(scale: Scale, until: float) -> Iterator[Row]:
    import torch
    from torchvision.ops import sigmoid_focal_loss

    from retinaflow.detector.anchors import anchor_grid
    from retinaflow.detector.detection_loss import LossConfig, detection_loss
    from retinaflow.detector.network import RawOutput
    from retinaflow.training.step import targets_of

    classes, size, count = scale.of(500, 7), scale.of(800, 64), scale.of(8, 2)
    anchors = anchor_grid((size, size), device=scale.device).boxes
    batch = batch_of(classes, size, count).to(scale.device)
    shape = (count, len(anchors), classes)
    logits = torch.randn(shape, device=scale.device, dtype=torch.bfloat16).sub_(4).requires_grad_()
    deltas = torch.zeros(count, len(anchors), 4, device=scale.device, requires_grad=True)

    def ours() -> None:
        logits.grad = deltas.grad = None
        detection_loss(RawOutput(logits, deltas), anchors, targets_of(batch), config=LossConfig()).class_loss.backward()

    labels = torch.randint(0, classes, (count, len(anchors)), device=scale.device)
    is_positive = torch.rand(count, len(anchors), device=scale.device) < 0.001

    def theirs() -> None:
        logits.grad = None
        for image in range(count):
            chosen = is_positive[image]
            wanted = torch.zeros_like(logits[image])
            wanted[chosen, labels[image][chosen]] = 1.0
            (sigmoid_focal_loss(logits[image], wanted, reduction="sum") / chosen.sum().clamp(min=1)).backward()

    peer = seconds(theirs, scale.device, (until + time.perf_counter()) / 2, most=scale.of(20, 1))
    own = seconds(ours, scale.device, until, most=scale.of(50, 1))
    yield Row("class loss with matching", f"{own * 1e3:.2f} ms, torchvision's loss alone {peer * 1e3:.2f} ms")
    yield Row("times as fast", f"{peer / own:.1f}", "4 or more")
    yield Row("loss and gradients, GPU against CPU, float32", agreement(scale, torch.float32), "under 1e-4")
    yield Row("the same in bfloat16", agreement(scale, torch.bfloat16), "under 1e-2")


def agreement(scale: Scale, kind: Any) -> str:
    """Largest difference of loss and gradient on the device from those in float32 on the CPU, relative to the largest
    value, for both class losses, with a hierarchy and group-of regions."""
    from dataclasses import replace

    import torch

    from retinaflow.detector.anchors import anchor_grid
    from retinaflow.detector.detection_loss import LossConfig, detection_loss
    from retinaflow.detector.network import RawOutput
    from retinaflow.training.step import targets_of

    batch = batch_of(7, 128, 2)
    batch = replace(batch, ignore_boxes=batch.boxes[:3], ignore_labels=batch.labels[:3], ignore_owner=batch.owner[:3])
    anchors = anchor_grid((128, 128)).boxes
    ancestors = torch.zeros(7, 7, dtype=torch.bool)
    ancestors[0, 1] = ancestors[2, 3] = True
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, len(anchors), 7, generator=generator) - 2
    deltas = torch.randn(2, len(anchors), 4, generator=generator)
    worst = 0.0
    for config in (LossConfig(learn_ancestors=True), LossConfig(equalized_scale=8.0, box_loss="giou")):
        found = []
        for device, dtype in ((torch.device("cpu"), torch.float32), (scale.device, kind)):
            x, d = (value.to(kind).to(device, dtype, copy=True).requires_grad_() for value in (logits, deltas))
            losses = detection_loss(
                RawOutput(x, d),
                anchors.to(device),
                targets_of(batch.to(device)),
                config=config,
                ancestors=ancestors.to(device),
                ratio=torch.linspace(0, 1, 7, dtype=torch.float64, device=device),
            )
            losses.total.backward()
            found.append([losses.class_loss, losses.box_loss, x.grad, d.grad, losses.class_gradients])
        for one, other in zip(*found, strict=True):
            one, other = (value.detach().double().cpu() for value in (one, other))
            worst = max(worst, float((one - other).abs().max() / one.abs().max().clamp(min=1e-12)))
    return f"{worst:.1e}"


def part_d(scale: Scale, until: float) -> Iterator[Row]:
    import numpy as np
    import torch

    sys.path.insert(0, str(Path(__file__).parent))
    from loader import write_photos

    from retinaflow.data.augmentation import Augmentation
    from retinaflow.data.batching import AspectBuckets, plan_batches
    from retinaflow.data.dataset import BatchLoader, DetectionDataset

    size, cores = scale.of(800, 64), os.cpu_count() or 1
    workers = scale.of(cores, 0)
    with tempfile.TemporaryDirectory() as folder:
        index = write_photos(Path(folder), scale.of(48, 2))
        buckets = AspectBuckets(((size, size),))
        plan = np.resize(np.arange(len(index)), scale.of(16 * 32, 4))
        batches = plan_batches(plan, buckets.assign(index.sizes), buckets, batch_size=scale.of(32, 2))
        flips = Augmentation(np.zeros(index.num_classes), base=0.0, horizontal_flip=True)
        loader = BatchLoader(DetectionDataset(index, flips), workers=workers, pin_memory=torch.cuda.is_available())
        # The first batch waits for the workers to start.
        images, start = 0, 0.0
        for number in range(100):
            for batch in loader.load(batches, seed=(0, number)):
                if start == 0.0:
                    start = time.perf_counter()
                else:
                    images += len(batch)
            if time.perf_counter() > until - 15 or scale.dry:
                break
        speed = images / (time.perf_counter() - start)
    yield Row(f"loader on {cores} cores", f"{speed:.0f} images/s", "more than a")


def part_e(scale: Scale, until: float) -> Iterator[Row]:
    from retinaflow.data.training_data import load_training_data
    from retinaflow.settings.commands import TrainConfig
    from retinaflow.training.fit_to_data import fit_to_data

    short = {"augment": 0.0, "rare_augment": 0.0, "horizontal_flip": True, "track": False, "eval_every": 1}
    epochs = {"epochs": 2, "epoch_length": 8, "image_size": 64} if scale.dry else {"epochs": 6}
    config = TrainConfig(
        **{"data": scale.data, "precision": scale.precision, "workers": scale.of(8, 0), **short, **epochs}
    )
    data = load_training_data(config)
    config = fit_to_data(config, data.train)
    start = time.perf_counter()
    trainer, speed, resumed = trained(config, data, until)
    spent = time.perf_counter() - start
    yield Row(
        f"training, {trainer.epoch} epochs of {scale.data}", f"{speed:.0f} images/s, {spent:.0f} s, loss {resumed:.3f}"
    )
    score = average_precision(config, data, trainer, scale)
    yield Row("AP after a training that was resumed once", f"{score:.3f}", "that of the same training on a CPU")


def trained(config: Any, data: Any, until: float) -> tuple[Any, float, float]:
    """The trainer after its epochs, resumed in a new one half-way; images a second and loss of the last epoch."""
    from retinaflow.data.batching import AspectBuckets
    from retinaflow.data.training_data import plans
    from retinaflow.training.build import build_dataset, build_trainer
    from retinaflow.training.distributed import ALONE

    buckets = AspectBuckets.fit(data.train.sizes, image_size=config.image_size, num_buckets=config.num_buckets)
    half = max(1, config.epochs // 2)
    trainer = build_trainer(config, data, ALONE, load=True)
    for epoch in trainer.fit(build_dataset(config, data), buckets, plans(config, data)):
        trainer.finish_epoch()
        if epoch.epoch == half:
            break
    weights = {name: value.clone() for name, value in trainer.evaluated_model.state_dict().items()}
    state = trainer.state()
    trainer = build_trainer(config, data, ALONE, load=False)
    trainer.load(weights, state)
    epoch = None
    for epoch in trainer.fit(build_dataset(config, data), buckets, plans(config, data)):  # noqa: B007
        trainer.finish_epoch()
        if time.perf_counter() > until:
            break
    assert epoch is not None
    return trainer, epoch.images_per_second, epoch.loss_class + epoch.loss_box


def average_precision(config: Any, data: Any, trainer: Any, scale: Scale) -> float:
    """mAP of the Challenge's rules on the validation images."""
    from retinaflow.data.batching import AspectBuckets
    from retinaflow.inference.checkpoint import Checkpoint
    from retinaflow.inference.detector import Detector
    from retinaflow.metric.challenge import challenge_scores
    from retinaflow.settings.model_settings import DetectorSettings
    from retinaflow.settings.resolve import with_absolute_paths

    buckets = AspectBuckets.fit(data.train.sizes, image_size=config.image_size, num_buckets=config.num_buckets)
    checkpoint = Checkpoint(
        network=trainer.model.config,
        state={},
        taxonomy=data.train.taxonomy,
        bins=data.bins,
        buckets=buckets,
        parents=config.parents,
        settings=with_absolute_paths(config),
        data_digest=data.digest,
        epoch=trainer.epoch,
    )
    settings = DetectorSettings(workers=scale.of(8, 0))
    detector = Detector.around(trainer.evaluated_model, checkpoint, settings)
    found = detector.detect(data.evaluated)
    return challenge_scores(found, data.evaluated, group_of_weight=1.0).mean_ap


def part_f(scale: Scale, until: float) -> Iterator[Row]:
    import torch

    from retinaflow.detector.device import autocast
    from retinaflow.detector.postprocess import detect
    from retinaflow.settings.model_settings import PostprocessSettings

    classes, size, count = scale.of(500, 7), scale.of(800, 64), scale.of(16, 2)
    model, _ = stepper_of("resnet50", classes, scale)
    model.eval()
    images = batch_of(classes, size, count).images.to(scale.device)
    grid = model.anchors((size, size))

    def run() -> int:
        with torch.inference_mode(), autocast(scale.device, scale.precision):
            return len(detect(model(images), grid, config=PostprocessSettings(score_threshold=0.005)))

    each = seconds(run, scale.device, until, most=scale.of(20, 1))
    yield Row(
        "detection with suppression, ResNet-50", f"{count / each:.1f} images/s, {run() / count:.0f} detections each"
    )


PARTS = {"a": part_a, "b": part_b, "c": part_c, "d": part_d, "e": part_e, "f": part_f}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="which of a to f (default: all)")
    parser.add_argument("--data", default="demo", help="data folder of part e; demo: the generated set")
    parser.add_argument("--dry_run", action="store_true", help="all of it, small, on a CPU")
    arguments = parser.parse_args()
    unknown = set(arguments.parts.split(",")) - set(PARTS)
    if unknown:
        parser.error(f"--parts must be of {', '.join(PARTS)}, but got {', '.join(sorted(unknown))}")
    return arguments


if __name__ == "__main__":
    main()
