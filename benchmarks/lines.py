"""The commands of the benchmarks: name -> (task, {label: arguments of `abtrain train`})."""

from __future__ import annotations

RATES = ("0.5e-3", "1e-3", "2e-3", "4e-3")

BENCHMARKS: dict[str, tuple[str, dict[str, str]]] = {
    "fashion-cnn": (
        "fashion-cnn",
        {
            "ddp": "ddp",
            "powersgd": "powersgd",
            "ab": "ab --sigma-cutoff 0.3",
            "local_sgd": "local_sgd",
            "diloco": "diloco",
            "diloco, int4": "diloco --wire int4",
            "ab_outer": "ab_outer",
        },
    ),
    "learning-rates": (
        "fashion-cnn",
        {
            f"{recipe}, {lr}": f"{arguments} --lr {lr}"
            for recipe, arguments in {
                "ddp": "ddp",
                "ab": "ab --sigma-cutoff 0.3",
                "diloco": "diloco",
                "ab_outer": "ab_outer",
            }.items()
            for lr in RATES
        },
    ),
}
