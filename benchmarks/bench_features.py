"""What the options of the backbone that are not exact cost and give: ``python -m benchmarks.bench_features``.

For each option: seconds of a forward pass in turns with the default, and the share of test patches whose nearest bank row is another one than with the default,
in a bank of the default's features (1% coreset). ResNet18 on magnetic tiles with PATCHCORE_EXT_DATA and PATCHCORE_EXT_RESNET18, else it says so and ends.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch

from .harness import summary, write_readme, write_results

OPTIONS: dict[str, dict[str, Any]] = {"default": {}, "contiguous": {}, "bfloat16": {"precision": "bfloat16"}, "compile": {"compile": True}}


class Contiguous(torch.nn.Module):
    """A network in the plain layout, whatever comes in."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network.to(memory_format=torch.contiguous_format)

    def forward(self, images: torch.Tensor) -> Any:
        """What the network gives."""
        return self.network(images.contiguous())


def extractors(weights: str) -> dict[str, Any]:
    """One feature extractor an option; "contiguous" is the default without its channels-last layout."""
    from patchcore_ext.features import FeatureExtractor

    made = {name: FeatureExtractor("resnet18", weights=weights, **options) for name, options in OPTIONS.items()}
    made["contiguous"].network = Contiguous(made["contiguous"].network)
    return made


def images_of(folder: Path, count: int) -> torch.Tensor:
    """The first ``count`` images [count, 3, 224, 224] of a folder, transformed."""
    from patchcore_ext.data import load_batches
    from patchcore_ext.images import ImageTransform, list_images

    batches = load_batches(list_images(folder)[:count], ImageTransform(resize=(224, 224)), 16, 0)
    return torch.cat([batch.images for batch in batches])


def features_of(extractor: Any, images: torch.Tensor) -> torch.Tensor:
    """Patch features [N * P, D], 16 images at a time."""
    return torch.cat([extractor(part).features.flatten(0, 1) for part in images.split(16)])


def main() -> None:
    """Measures all options, prints the table, and writes results/features.json and the README's table."""
    parser = argparse.ArgumentParser(description="Options of the backbone that are not exact.")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--images", type=int, default=48, help="good images for the bank, and test images")
    arguments = parser.parse_args()
    folder, weights = os.environ.get("PATCHCORE_EXT_DATA"), os.environ.get("PATCHCORE_EXT_RESNET18")
    if not folder or not weights:
        print("bench_features: needs PATCHCORE_EXT_DATA and PATCHCORE_EXT_RESNET18; nothing measured.")
        return
    rows = measure(Path(folder) / "mtd", weights, arguments.images, arguments.repeats)
    note = "ResNet18 layer2 + layer3, magnetic tiles, 224 px; share of patches whose nearest row of a 1% bank is another than by default."
    print(table(rows))
    print(write_results("features", rows, note))
    write_readme("features", f"{note}\n\n{table(rows)}")


@torch.inference_mode()
def measure(tiles: Path, weights: str, num_images: int, repeats: int) -> list[dict[str, Any]]:
    """One row an option."""
    from patchcore_ext import CoresetSampler, PatchScorer

    made = extractors(weights)
    tests = images_of(tiles / "test", num_images)
    bank = CoresetSampler(0.01, progress=False).sample(features_of(made["default"], images_of(tiles / "train" / "good", num_images)))
    nearest = {name: PatchScorer(bank, score="max")(features_of(extractor, tests)).nearest_indices for name, extractor in made.items()}
    rows = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for batch in (1, 16):
            seconds: dict[str, list[float]] = {name: [] for name in made}
            for _ in range(repeats + 1):
                for name, extractor in made.items():
                    started = time.perf_counter()
                    extractor(tests[:batch])
                    seconds[name].append(time.perf_counter() - started)
            for name in made:
                took = summary(seconds[name][1:])
                changed = float((nearest[name] != nearest["default"]).double().mean())
                rows.append(
                    {"option": name, "threads": threads, "batch": batch, "ms_per_image": round(1000 * took["median"] / batch, 2), "changed_nearest": changed}
                )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| option | threads | images at once | ms an image | x default | other nearest row |", "|---|---|---|---|---|---|"]
    for row in rows:
        base = next(r["ms_per_image"] for r in rows if (r["option"], r["threads"], r["batch"]) == ("default", row["threads"], row["batch"]))
        lines.append(
            f"| {row['option']} | {row['threads']} | {row['batch']} | {row['ms_per_image']:.1f} | {row['ms_per_image'] / base:.2f} "
            f"| {row['changed_nearest']:.2%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
