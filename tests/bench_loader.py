"""Rows packed per second on one core, beside a straightforward version of the reference algorithm, on the cached data.

    uv run python tests/bench_loader.py [--rows 2048] [--repeats 5]

Both get the same encoded documents. The straightforward version keeps Python lists and scans its whole buffer for
every choice, as the upstream loader does. Runs alternate in one process; medians and their ratio are printed.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import prepare


def pack_rows_straightforward(
    batches: Iterator[tuple[list[list[int]], int]], num_rows: int, row_len: int, buffer_size: int = 1000
) -> Iterator[tuple[torch.Tensor, int]]:
    """The specification, word for word. Yields ((num_rows, row_len) int64, epoch)."""
    buffer, epoch = [], 1
    while True:
        rows = []
        for _ in range(num_rows):
            row = []
            while len(row) < row_len:
                while len(buffer) < buffer_size:
                    documents, epoch = next(batches)
                    buffer.extend(documents)
                space = row_len - len(row)
                longest, shortest = -1, 0
                for i, document in enumerate(buffer):
                    if len(document) <= space and (longest < 0 or len(document) > len(buffer[longest])):
                        longest = i
                    if len(document) < len(buffer[shortest]):
                        shortest = i
                row.extend(buffer.pop(longest) if longest >= 0 else buffer.pop(shortest)[:space])
            rows.append(row)
        yield torch.tensor(rows), epoch


def measure(rows: Iterator, num_batches: int) -> tuple[float, list[np.ndarray]]:
    """Seconds for `num_batches`, after one to fill the buffer; and the batches themselves."""
    batches = [next(rows)[0]]
    start = time.perf_counter()
    batches += [batch for batch, _ in itertools.islice(rows, num_batches)]
    return time.perf_counter() - start, [np.asarray(batch) for batch in batches]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2048, help="rows packed by each version in each repeat")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    B, row_len = 128, prepare.MAX_SEQ_LEN + 1
    num_batches = args.rows // B
    # Documents in memory beforehand, as lists for the one and as arrays for the other: packing alone is measured.
    needed = int(2.0 * args.rows * row_len)
    arrays, num_tokens = [], 0
    for documents, _ in prepare.read_document_batches("train"):
        arrays.append([np.array(d) for d in documents])
        num_tokens += sum(map(len, documents))
        if num_tokens > needed and len(arrays) > 20:
            break
    lists = [[d.tolist() for d in batch] for batch in arrays]
    seconds = {"straightforward": [], "ours": []}
    for _ in range(args.repeats):
        for name, pack, documents in (
            ("straightforward", pack_rows_straightforward, lists),
            ("ours", prepare.pack_rows, arrays),
        ):
            elapsed, batches = measure(pack(((b, 1) for b in itertools.cycle(documents)), B, row_len), num_batches)
            seconds[name].append(elapsed)
            if name == "straightforward":
                expected = batches
        assert all((a == b).all() for a, b in zip(expected, batches, strict=True)), "the two versions disagree"
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, median in medians.items():
        rate = num_batches * B / median
        print(f"{name:<16} {rate:>9.0f} rows/s {rate * (row_len - 1) / 1e6:>7.2f} M tokens/s")
    print(f"ratio of medians {medians['straightforward'] / medians['ours']:>9.1f}   ({args.repeats} repeats)")


if __name__ == "__main__":
    main()
