"""Comparisons that nobody asked for, and outcomes of runs that never were."""

from collections.abc import Sequence

from abtrain.commands.compare.arguments import parser
from abtrain.commands.compare.comparison import Comparison, checked
from abtrain.commands.compare.runs import ComparisonOutcome


def requested(arguments: Sequence[str]) -> Comparison:
    """Returns what a command line of `abtrain compare` requests."""
    return checked(parser().read(arguments))


def outcome(label: str, seed: int = 0, rate: int = 10**8, **values: object) -> ComparisonOutcome:
    known: dict[str, object] = {
        "top1": 90.0 + seed,
        "loss": 0.3,
        "seconds": 10.0,
        "sync_seconds": 2.0,
        "payload": 1000,
        "payload_by_phase": {"full": 1000},
        "wire_bytes": 1500.0,
        "compression": 1.0,
        "curve": ((1.0, 2.0), (10.0, 0.5)),
    }
    return ComparisonOutcome(label=label, seed=seed, rate=rate, **{**known, **values})  # type: ignore[arg-type]


def outcomes(seeds: int = 2) -> list[ComparisonOutcome]:
    """A comparison of the references, ab and ab_outer."""
    made = []
    for seed in range(seeds):
        made += [
            outcome("solo", seed, seconds=5.0, wire_bytes=100.0, payload=50, payload_by_phase={"setup": 50}, top1=80.0),
            outcome("ddp", seed, seconds=20.0 + seed, wire_bytes=4e6, payload=2_600_000),
            outcome("ddp:wire=bf16", seed, seconds=10.0, wire_bytes=2e6, payload=1_300_000),
            outcome("ab_outer", seed, seconds=6.0, wire_bytes=1e4, payload=6000, compression=5.0),
            outcome(
                "ab:sigma_cutoff=0.3",
                seed,
                seconds=15.0,
                wire_bytes=1e6,
                payload=600_000,
                payload_by_phase={"warmup": 400_000, "group": 50_000, "rebound": 150_000},
            ),
        ]
    return made
