"""Which sampling strategy helps the rare classes of the demo set: every strategy, several seeds, equal numbers of
images.

    python benchmarks/strategies.py --seeds 0,1,2 --output outputs/strategies

Each training is a process of its own with one thread, ``--jobs`` of them at a time; those that are finished in the
output folder are not run again. Prints mean and standard deviation over seeds of AP for rare, common and frequent
classes (thirds by training images) and of each bin, and writes them as ``strategies.csv``. Extra ``--set name=value``
apply to every training.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd

from retinaflow.settings.commands import TrainConfig

ARMS: Mapping[str, Mapping[str, str]] = {
    "uniform, no augmentation": {"sampling": "uniform", "augment": "0", "rare_augment": "0"},
    "uniform": {"sampling": "uniform", "rare_augment": str(TrainConfig().augment)},
    "uniform, rare augmentation": {"sampling": "uniform"},
    "repeat-factor t=0.1": {"sampling": "repeat-factor", "repeat_threshold": "0.1"},
    "instance-repeat-factor t=0.1": {"sampling": "instance-repeat-factor", "repeat_threshold": "0.1"},
    "class-aware": {"sampling": "class-aware"},
    "binned": {"sampling": "binned"},
    "binned, second half": {"sampling": "binned", "balance_start": "0.5"},
    "binned, no augmentation": {"sampling": "binned", "augment": "0", "rare_augment": "0"},
}
SHOWN = ("mAP", "mAP_rare", "mAP_common", "mAP_frequent")


def main() -> None:
    arguments = parse()
    chosen = {name: ARMS[name] for name in arguments.arms.split(";")} if arguments.arms else ARMS
    extra = dict(item.split("=", 1) for item in arguments.set)
    work = [(name, seed) for seed in map(int, arguments.seeds.split(",")) for name in chosen]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        results = list(pool.map(lambda item: train(*item, {**ARMS[item[0]], **extra}, arguments.output), work))
    frame = pd.DataFrame(results)
    frame.to_csv(arguments.output / "strategies.csv", index=False)
    grouped = frame.groupby("arm", sort=False)[[*SHOWN, *[c for c in frame if c.startswith("mAP_bin")]]]
    mean, spread = grouped.mean(), grouped.std()
    shown = mean.map("{:.3f}".format) + " ± " + spread.map("{:.3f}".format)
    print(markdown(shown) if arguments.markdown else shown.to_string())


def markdown(shown: pd.DataFrame) -> str:
    columns = [name for name in ("mAP_bin_1", "mAP_rare", "mAP_common", "mAP_frequent", "mAP") if name in shown]
    rows = [["arm", *columns], ["---"] * (len(columns) + 1), *shown[columns].reset_index().to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def train(name: str, seed: int, settings: Mapping[str, str], output: Path) -> dict[str, object]:
    """One training in a process of its own; its aggregates."""
    folder = output / f"{name.replace(',', '').replace(' ', '-').replace('=', '')}-seed{seed}"
    result = folder / "train" / "metrics.json"
    if not result.is_file():
        flags = [part for key, value in settings.items() for part in (f"--{key}", value)]
        command = [sys.executable, "-m", "retinaflow", "train", "--track", "false", "--output", str(folder)]
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "log.txt").open("w") as log:
            subprocess.run(
                [*command, "--seed", str(seed), *flags],
                check=True,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
    metrics = json.loads(result.read_text())["metrics"]
    row = {"arm": name, "seed": seed, **{key.removeprefix("val/"): value for key, value in metrics.items()}}
    print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
    return row


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--output", type=Path, default=Path("outputs/strategies"))
    parser.add_argument("--arms", default="", help="names from ARMS separated by ; (all)")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], help="name=value for every training")
    parser.add_argument("--markdown", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
