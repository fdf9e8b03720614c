"""What helps the rare classes of a data set: sampling strategies x losses x copy-paste, several seeds, equal numbers of
images seen.

    python benchmarks/strategies.py --data DATA --strategies uniform,class-aware,binned --copy_paste 0,0.5 \\
        --losses focal,equalized-focal --seeds 0,1 --set image_size=160 --set epochs=8 --output outputs/strategies

Each training is a process of its own with ``--threads`` threads, ``--jobs`` of them at a time; one that is finished in
the output folder is not run again, and one that was interrupted is resumed. ``--arm "NAME: a=1 b=2"`` adds a
combination by its settings, ``--set`` applies to all. ``uniform`` augments all classes alike, as people do without
balancing; the first arm is the baseline.

Prints AP of the thirds of the classes (by training images) and of each bin, mean over seeds, and the difference from
the first arm with its paired 95% interval over images and seeds, by the code of ``compare``. Writes both as CSV.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd

from retinaflow.comparison.comparison import LETTERS, Comparison, Side, compare_runs
from retinaflow.comparison.stored_matches import read_matches
from retinaflow.settings.commands import TrainConfig

GROUPS = ("mAP_rare", "mAP_common", "mAP_frequent", "mAP")
Arms = dict[str, dict[str, str]]


def main() -> None:
    arguments = parse()
    arms, seeds = chosen_arms(arguments), arguments.seeds.split(",")
    shared = {"data": arguments.data, **settings_of(arguments.set)}
    work = list(itertools.product(seeds, arms))
    with ThreadPoolExecutor(arguments.jobs) as pool:
        done = pool.map(
            lambda item: train(
                arguments.output / folder_name(*item),
                {**shared, **arms[item[1]], "seed": item[0]},
                threads=arguments.threads,
            ),
            work,
        )
        folders = dict(zip(work, done, strict=True))
    runs = {name: tuple(read_matches(str(folders[seed, name])) for seed in seeds) for name in arms}
    baseline, *others = arms
    parts = [others[i : i + len(LETTERS) - 1] for i in range(0, len(others), len(LETTERS) - 1)] or [[]]
    tables = []
    for part in parts:
        sides = [Side(letter, name, runs[name]) for letter, name in zip(LETTERS, [baseline, *part], strict=False)]
        if len(sides) > 1:
            tables.append(arms_by_group(compare_runs(sides)))
    if tables:
        table = pd.concat(tables).drop_duplicates(["arm", "group"])
        table.to_csv(arguments.output / "strategies.csv", index=False)
        print(markdown(table, baseline))


def chosen_arms(arguments: argparse.Namespace) -> Arms:
    """Name -> settings: the grid of strategies, losses and copy-paste, then those that are given one by one."""
    arms: Arms = {}
    grid = itertools.product(
        arguments.strategies.split(",") if arguments.strategies else [],
        arguments.losses.split(","),
        arguments.copy_paste.split(","),
    )
    for strategy, loss, paste in grid:
        name = ", ".join(
            [strategy, *([loss] if loss != "focal" else []), *([f"copy-paste {paste}"] if float(paste) else [])]
        )
        arms[name] = {"sampling": strategy, "loss": loss, "copy_paste": paste}
    for text in arguments.arm:
        name, _, settings = text.partition(":")
        arms[name.strip()] = settings_of(settings.split())
    return arms


def settings_of(texts: Sequence[str]) -> dict[str, str]:
    return dict(text.split("=", 1) for text in texts)


def folder_name(seed: str, arm: str) -> str:
    return "".join(c if c.isalnum() or c in ".-" else "_" for c in arm) + f"-seed{seed}"


def train(folder: Path, settings: Mapping[str, str], *, threads: int) -> Path:
    """One training in a process of its own; the folder of its results."""
    own = dict(settings)
    if own.get("sampling") == "uniform":
        own["rare_augment"] = own.setdefault("augment", str(TrainConfig(data=own["data"]).augment))
    result = folder / "train"
    if not (result / "metrics.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        last = result / "checkpoints" / "last.pt"
        resume = ["--resume", str(last)] if last.is_file() else []
        flags = [part for key, value in own.items() for part in (f"--{key}", value)]
        command = [sys.executable, "-m", "retinaflow", "train", "--track", "false", "--output", str(folder)]
        with (folder / "log.txt").open("a") as log:
            subprocess.run(
                [*command, *flags, *resume],
                check=True,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            )
        print(f"finished: {folder.name}", file=sys.stderr, flush=True)
    return result


def arms_by_group(comparison: Comparison) -> pd.DataFrame:
    """One row per arm and group of classes: ap, difference, low, high (NaN for the first arm)."""
    rows = []
    for side in comparison.sides:
        for row in comparison.groups.to_dict("records"):
            ends = [row.get(f"{side.letter}_difference{end}") for end in ("", "_low", "_high")]
            rows.append([side.name, row["group"], row["classes"], row[side.letter], *ends])
    return pd.DataFrame(rows, columns=["arm", "group", "classes", "ap", "difference", "low", "high"])


def markdown(table: pd.DataFrame, baseline: str) -> str:
    """A row per arm; a cell is AP and, after the first arm, the difference with its interval."""
    bins = [name for name in table["group"].unique() if name.startswith("mAP_bin")]
    columns = [*[name for name in GROUPS if name in set(table["group"])], *bins]
    cells = {(row.arm, row.group): row for row in table.itertuples()}
    lines = [f"| arm | {' | '.join(columns)} |", "|" + " --- |" * (len(columns) + 1)]
    for arm in table["arm"].unique():
        texts = []
        for group in columns:
            row = cells[arm, group]
            shown = f"{row.ap:.3f}"
            if arm != baseline:
                shown += f" ({row.difference:+.3f} [{row.low:.3f}, {row.high:.3f}])"
            texts.append(shown)
        lines.append(f"| {arm} | {' | '.join(texts)} |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="demo")
    parser.add_argument("--strategies", default="", help="comma-separated; the first arm is the baseline")
    parser.add_argument("--losses", default="focal", help="focal, equalized-focal or both")
    parser.add_argument("--copy_paste", default="0", help="strengths, comma-separated")
    parser.add_argument("--arm", action="append", default=[], help='"NAME: setting=value ...", may be repeated')
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--output", type=Path, default=Path("outputs/strategies"))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], help="name=value for every training")
    return parser.parse_args()


if __name__ == "__main__":
    main()
