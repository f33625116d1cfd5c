"""Fuzz for as long as one likes: ``python -m tests.fuzz.run --seconds 600``.

Every example comes from one number, printed when it fails: ``--seed N --examples 1`` runs it again. A file that breaks
a promise is written to the current folder; what was wrong with it belongs in a test, and the file in the corpus.
"""

from __future__ import annotations

import argparse
import collections
import random
import re
import sys
import time
from pathlib import Path

from tests.fuzz.corpus import load
from tests.fuzz.mutations import mutate
from tests.fuzz.oracle import check


def main(argv: list[str] | None = None) -> int:
    """Run; exit status 1 if a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.run", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to run (default 60)")
    parser.add_argument("--examples", type=int, default=None, help="stop after so many")
    parser.add_argument("--seed", type=int, default=None, help="number of the first example (default: at random)")
    args = parser.parse_args(argv)
    corpus = [*load().values()]
    check(corpus[0])  # so that nothing below pays for the first use of a library
    seed = first = random.SystemRandom().randrange(1 << 32) if args.seed is None else args.seed
    end = time.monotonic() + args.seconds
    kinds: collections.Counter[str] = collections.Counter()
    worst_memory, worst_seconds = (0, 0), (0.0, 0)
    while time.monotonic() < end and (args.examples is None or seed - first < args.examples):
        rng = random.Random(seed)
        data = mutate(rng.choice(corpus), rng.choice(corpus), rng)
        try:
            outcome = check(data)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                break
            path = Path(f"fuzz-{seed}.bin")
            path.write_bytes(data)
            print(f"seed {seed}: {type(error).__name__}: {error}; the bytes are in {path}", file=sys.stderr)
            return 1
        worst_memory = max(worst_memory, (outcome.extra_bytes - 2 * len(data), seed))
        worst_seconds = max(worst_seconds, (outcome.seconds, seed))
        kinds[_kind(outcome.message)] += 1
        seed += 1
    print(f"{seed - first} examples from seed {first}: all are artifacts or ArtifactErrors")
    print(f"most memory beyond twice the file's size: {worst_memory[0]} bytes (seed {worst_memory[1]})")
    print(f"slowest: {worst_seconds[0]:.3f} s (seed {worst_seconds[1]})")
    for kind, count in kinds.most_common(40):
        print(f"{count:8}  {kind}")
    return 0


def _kind(message: str) -> str:
    """The message without what differs from file to file."""
    return re.sub(r"'[^']*'|\[[^]]*\]|[0-9a-f]{16,}|\d+", "_", message)[:100] or "accepted"


if __name__ == "__main__":
    sys.exit(main())
