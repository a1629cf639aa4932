"""How long the CUDA kernels must take at least: a model of the card, for predictions before a run and for the share of the roof after one.

``python -m benchmarks.gpu_roofs`` puts the predictions into benchmarks/README.md, marked as calculated. The steps of a method run one after the other; each
takes the longest of its int8 tensor products, its float64 operations, its traffic through L2 and its traffic through memory. Launches and waiting are left
out but for the coreset, where they count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .harness import write_readme

TILE = 128  # rows of the bank that a block of as many queries scans at a time
SEED_DEPTH, PREFIX_DEPTH = 64, 192  # bytes of a row of codes
CONTRACTION_OUTPUTS, CONTRACTION_PRODUCTS = 256, 4  # both prefixes; products of two planes with two planes
# Measured on the CPU on real features (magnetic tiles, ResNet18, D = 384): rows that a query has left after each step, and, over a whole selection of 10%,
# canonical distances a row, passes, rounds of the chain.
AFTER_PREFIX, AFTER_ALL_CODES = 8.9, 2.3
CANONICAL_A_ROW, PASSES, ROUNDS = 10, 22, 105
LAUNCHES_A_PASS, LAUNCH_SECONDS, ROUND_SECONDS = 15, 3e-6, 4e-6


@dataclass(frozen=True)
class Card:
    """What a card can do, a second."""

    name: str
    int8_products: float  # multiply-adds count two; what mma.sync reaches
    float64_operations: float
    l2_bytes: float
    memory_bytes: float
    source: str


CARDS = (
    Card("H100 SXM", 0.62 * 1979e12, 33.5e12, 5.5e12, 3.35e12, "int8: 62% of the data sheet's 1979 T, the part that mma.sync reaches without wgmma"),
    Card("H200", 0.62 * 1979e12, 33.5e12, 5.5e12, 4.8e12, "as H100 SXM, with faster memory"),
    Card("RTX 4090", 661e12, 1.29e12, 5.0e12, 1.008e12, "data sheet, dense"),
    Card("T4", 0.8 * 130e12, 0.254e12, 1.2e12, 0.32e12, "int8: 80% of the data sheet's 130 T, what its power limit leaves"),
)


@dataclass(frozen=True)
class Work:
    """What a step has to do, in all."""

    name: str
    int8_products: float = 0
    float64_operations: float = 0
    l2_bytes: float = 0
    memory_bytes: float = 0
    waiting: float = 0  # seconds, whatever the card

    def seconds(self, card: Card) -> float:
        """The longest of the four, and the waiting."""
        return self.waiting + max(
            self.int8_products / card.int8_products,
            self.float64_operations / card.float64_operations,
            self.l2_bytes / card.l2_bytes,
            self.memory_bytes / card.memory_bytes,
        )

    def limit(self, card: Card) -> str:
        """What decides."""
        parts = {
            "int8": self.int8_products / card.int8_products,
            "float64": self.float64_operations / card.float64_operations,
            "L2": self.l2_bytes / card.l2_bytes,
            "memory": self.memory_bytes / card.memory_bytes,
        }
        return max(parts, key=lambda name: parts[name])


def scan(name: str, queries: int, rows: int, depth: int) -> Work:
    """All pairs by their codes; a block keeps its queries and reads all rows through L2."""
    return Work(name, int8_products=2.0 * queries * rows * depth, l2_bytes=float(-(-queries // TILE) * rows * depth))


def canonical(name: str, pairs: float, dim: int) -> Work:
    """Distances in float64 of float32 features: a difference, a product, a sum a coordinate."""
    return Work(name, float64_operations=3.0 * pairs * dim, l2_bytes=8.0 * pairs * dim)


def search(queries: int, rows: int, dim: int) -> list[Work]:
    """The nearest rows of a prepared bank, by prefixes."""
    contraction = 2.0 * queries * dim * CONTRACTION_OUTPUTS * CONTRACTION_PRODUCTS
    return [
        Work("codes of the queries", float64_operations=4.0 * queries * dim, memory_bytes=7.0 * queries * dim),
        Work("prefixes of the queries", int8_products=contraction, memory_bytes=2.0 * queries * dim),
        scan("a near row, by 64 bytes", queries, rows, SEED_DEPTH),
        canonical("its distance", queries, dim),
        scan("filter, by 192 bytes", queries, rows, PREFIX_DEPTH),
        Work("all codes of what is left", l2_bytes=2.0 * queries * AFTER_PREFIX * dim),
        canonical("distances of what is left", queries * AFTER_ALL_CODES, dim),
    ]


def coreset(rows: int, dim: int, picks: int) -> list[Work]:
    """A greedy selection, many picks a pass."""
    depth = -(-dim // 64) * 64
    update = scan("rows against the picks", rows, picks, depth)
    return [
        Work("codes", float64_operations=4.0 * rows * dim, memory_bytes=5.0 * rows * dim),
        Work("candidates", l2_bytes=9.0 * 8 * rows * PASSES, waiting=PASSES * LAUNCHES_A_PASS * LAUNCH_SECONDS),
        Work("the chain", waiting=ROUNDS * ROUND_SECONDS),
        Work(update.name, int8_products=update.int8_products, l2_bytes=update.l2_bytes + float(rows) * depth * PASSES),
        canonical("distances of what is left", float(rows) * CANONICAL_A_ROW, dim),
    ]


SEARCH, CORESET = (25_088, 16_385, 1024), (163_856, 128, 16_385)


def total(works: Sequence[Work], card: Card) -> float:
    """Seconds."""
    return sum(work.seconds(card) for work in works)


def table(works: Sequence[Work]) -> str:
    """Milliseconds of each step on each card, and what limits it."""
    lines = ["| step | " + " | ".join(card.name for card in CARDS) + " |", "|---|" + "---|" * len(CARDS)]
    for work in works:
        cells = (f"{1e3 * work.seconds(card):.3g} ({'waiting' if 2 * work.waiting > work.seconds(card) else work.limit(card)})" for card in CARDS)
        lines.append(f"| {work.name} | " + " | ".join(cells) + " |")
    lines.append("| **sum** | " + " | ".join(f"**{1e3 * total(works, card):.3g}**" for card in CARDS) + " |")
    return "\n".join(lines)


def text() -> str:
    """The section of benchmarks/README.md."""
    queries, rows, dim = SEARCH
    count, short, picks = CORESET
    cards = "\n".join(
        f"| {card.name} | {card.int8_products / 1e12:.0f} | {card.float64_operations / 1e12:.3g} | {card.l2_bytes / 1e12:.2g} | "
        f"{card.memory_bytes / 1e12:.3g} | {card.source} |"
        for card in CARDS
    )
    return f"""**Calculated**, not measured: milliseconds by `benchmarks/gpu_roofs.py`, each step at the card's limit, and which limit that is. Real times are
longer.

Nearest rows of {queries:,} patches (32 images) in a bank of {rows:,}, D = {dim:,}, prefixes of 64 and 192 bytes; after the filter a
query has {AFTER_PREFIX} rows left, after all codes {AFTER_ALL_CODES} (measured on the CPU on real features, D = 384):

{table(search(*SEARCH))}

Greedy coreset of {picks:,} of {count:,} rows, D = {short}; {PASSES} passes, {ROUNDS} rounds, {CANONICAL_A_ROW} canonical distances a row (measured on the CPU),
{LAUNCHES_A_PASS} launches a pass of {1e6 * LAUNCH_SECONDS:.0f} us:

{table(coreset(*CORESET))}

Taken for the cards:

| card | int8 T/s | float64 T/s | L2 TB/s | memory TB/s | |
|---|---|---|---|---|---|
{cards}"""


def main() -> None:
    """Writes the section between the marks of benchmarks/README.md."""
    write_readme("gpu", text())
    print(text())


if __name__ == "__main__":
    main()
