"""The commands of the benchmarks: name -> (task, {label: arguments of `abtrain train`})."""

from __future__ import annotations

RATES = ("0.5e-3", "1e-3", "2e-3", "4e-3")

RECIPES = {
    "ddp": "ddp",
    "ddp, 4e-3": "ddp --lr 4e-3",
    "ddp, bf16": "ddp:wire=bf16",
    "powersgd": "powersgd",
    "ab": "ab:sigma_cutoff=0.3",
    "local_sgd": "local_sgd",
    "diloco": "diloco",
    "diloco, int4": "diloco:wire=int4",
    "ab_outer": "ab_outer",
    "ab_local": "ab_local",
}
"""Every recipe with its shipped defaults, at the task's learning rate; DDP also at the best one of `RATES` for it."""

TUNED = ("ddp", "powersgd", "ab", "local_sgd", "diloco", "ab_outer")

_INT4 = "ab_outer:wire=int4"
MERGES = {
    "ab_outer": "ab_outer",
    "wire int4": _INT4,
    "wire int8": "ab_outer:wire=int8",
    "wire ternary": "ab_outer:wire=ternary",
    "wire ternary:int4": "ab_outer:wire=ternary:int4",
    "wire fp32": "ab_outer:wire=fp32",
    "outer 0.7, 0.9": f"{_INT4},outer_lr=0.7,outer_momentum=0.9",
    "outer 0.7, 0.9, wire int8": "ab_outer:outer_lr=0.7,outer_momentum=0.9,wire=int8",
    "outer 0.7, 0.9, wire fp32": "ab_outer:outer_lr=0.7,outer_momentum=0.9,wire=fp32",
    "delay 2": f"{_INT4},delay=2",
    "delay 2, in the warm-up too": f"{_INT4},delay=2,warmup_delay=2",
    "delay 5": f"{_INT4},delay=5",
    "delay 5, 4 fragments": f"{_INT4},delay=5,fragments=4",
    "every 40": f"{_INT4},every=40",
    "every 40, warm-up 10 %": f"{_INT4},every=40,warmup_steps=200",
    "every 80, warm-up every 20": f"{_INT4},every=80,warmup_every=20",
    "no preconditioner": f"{_INT4},damping=0",
    "factor_lr 1": f"{_INT4},factor_lr=1",
    "factor_lr 3": f"{_INT4},factor_lr=3",
    "optimizer state reset": f"{_INT4},optimizer_state=reset",
    "factored anew every 20 rounds": f"{_INT4},refactor_every=20",
    "energy:0.95": f"{_INT4},rank_rule=energy:0.95",
    "stable:4": f"{_INT4},rank_rule=stable:4",
}
"""`ab_outer` with its own wire, and in int4 with one thing changed at a time."""

ROLES = {
    "mean (the paper)": "ab:sigma_cutoff=0.3",
    "trained_only": "ab:sigma_cutoff=0.3,merge=trained_only",
    "weighted": "ab:sigma_cutoff=0.3,merge=weighted",
    "a_then_b": "ab:sigma_cutoff=0.3,trains=a_then_b",
    "all": "ab:sigma_cutoff=0.3,trains=all",
    "warm-up and rebound local": "ab:sigma_cutoff=0.3,warmup_every=10,rebound_every=5",
}
"""The paper's recipe with other merges and other splits of the work."""

EIGHT = {f"wire {wire}": f"ab_outer:wire={wire} --batch-size 16" for wire in ("auto", "int3", "int4")}
"""For `--workers 8`: half as many samples a worker, so that the global batch stays 128."""

_OFTEN = "ab_outer:wire=ternary,outer_lr=1,outer_momentum=0"
_MEANS = "ab_outer:outer_lr=1,outer_momentum=0"
_PLAIN = "factor_lr=1"
_RULES = ("sigma:0.22", "energy:0.9", "stable:4", "fixed:24")
TRANSFORMERS = {
    "ddp": "ddp",
    "ddp, bf16": "ddp:wire=bf16",
    "powersgd": "powersgd",
    "ab": "ab",
    "ab, head dense": "ab:exclude=head.weight",
    "ab_outer": "ab_outer",
    "ab_local": "ab_local",
    "ab_local, warm-up 1,000": "ab_local:warmup_steps=1000",
    "local_sgd, every 5, int4": "local_sgd:every=5,wire=int4",
    "local_sgd, every 5, ternary": "local_sgd:every=5,wire=ternary",
    "local_sgd, every 6, ternary": "local_sgd:every=6,wire=ternary",
    "every 10, outer 0.9, 0.8": f"{_INT4},every=10,rank_rule=energy:0.95",
    "every 10, outer 1, 0.5": f"{_INT4},every=10,outer_lr=1,outer_momentum=0.5,rank_rule=energy:0.95",
    "every 10, means": f"{_INT4},every=10,outer_lr=1,outer_momentum=0,rank_rule=energy:0.95",
    "diloco, every 5": "diloco:every=5",
    "diloco, every 6": "diloco:every=6",
    "diloco, every 6, ternary": "diloco:every=6,wire=ternary",
    "every 5, means, ternary": f"{_OFTEN},every=5",
    "every 6, means, ternary": f"{_OFTEN},every=6",
    "every 5, means, ternary, head dense": f"{_OFTEN},every=5,exclude=head.weight",
    "every 4, then 5, means, ternary, head dense": f"{_OFTEN},warmup_every=4,every=5,exclude=head.weight",
    "every 6, means, ternary, head dense": f"{_OFTEN},every=6,exclude=head.weight",
    **{f"every {n}, means, ternary, factor_lr 1": f"{_OFTEN},every={n},{_PLAIN}" for n in (2, 4, 5, 6, 10, 20)},
    **{
        f"every 5, means, {wire}, factor_lr 1": f"{_MEANS},wire={wire},every=5,{_PLAIN}"
        for wire in ("fp32", "bf16", "int8", "int4", "int3")
    },
    **{f"every 6, means, ternary, {rule}": f"{_OFTEN},every=6,rank_rule={rule}" for rule in _RULES},
    **{
        f"every 5, means, ternary, factor_lr 1, {rule}": f"{_OFTEN},every=5,{_PLAIN},rank_rule={rule}"
        for rule in _RULES
    },
    "every 4, then 12, means, ternary, head dense": f"{_OFTEN},warmup_steps=1000,warmup_every=4,every=12,"
    "exclude=head.weight",
    "every 4, then 12, means, ternary": f"{_OFTEN},warmup_steps=1000,warmup_every=4,every=12",
    "every 4, then rank 24 every 3, means, ternary": f"{_OFTEN},warmup_steps=600,warmup_every=4,every=3,"
    "rank_rule=fixed:24",
}
"""Settings for transformers from scratch; means are merges with outer 1, 0."""


ROUNDS = tuple((every, delay) for every in (6, 10, 20) for delay in (0, every // 2))
"""The steps between merges, and the steps during which a merge is sent, of the rows that `auto` chooses from."""
_LONGER = ((60, 0), (60, 30))
OPTIMIZERS = ("adamw", "muon")
_CHOICES = {
    "ddp": "ddp",
    "ddp, bf16": "ddp:wire=bf16",
    **{
        f"every {every}" + f", delay {delay}" * (delay > 0): f"local_sgd:every={every},wire=ternary"
        + f",delay={delay}" * (delay > 0)
        for every, delay in (*ROUNDS, *_LONGER)
    },
}
_FACTORS = {"factors, every 6": "ab_local:every=6,rank_rule=share:0.6"}
_PEERS = {"powersgd": "powersgd", "diloco, every 20": "diloco:every=20", "diloco, every 60": "diloco:every=60"}
FRONTIER = {
    f"{optimizer}, {label}": f"{arguments} --optimizer {optimizer}"
    for optimizer in OPTIMIZERS
    for label, arguments in (_CHOICES | _FACTORS | _PEERS).items()
}
"""Ways to synchronize, under each optimizer: those that `auto` chooses from, a smaller model, and other methods."""
_FRONTIER_RATES = (*RATES[1:], "8e-3", "16e-3", "32e-3")


def _at_rates(lines: dict[str, str], rates: tuple[str, ...]) -> dict[str, str]:
    return {f"{label}, {lr}": f"{arguments} --lr {lr}" for label, arguments in lines.items() for lr in rates}


BENCHMARKS: dict[str, tuple[str, dict[str, str]]] = {
    "fashion-cnn": ("fashion-cnn", RECIPES),
    "fashion-cnn-rates": (
        "fashion-cnn",
        _at_rates({recipe: RECIPES[recipe] for recipe in TUNED} | {"ab_outer": _INT4}, RATES),
    ),
    "fashion-cnn-merges": ("fashion-cnn", MERGES),
    "fashion-cnn-roles": ("fashion-cnn", ROLES),
    "fashion-cnn-eight": ("fashion-cnn", EIGHT),
    "fashion-vit": ("fashion-vit", RECIPES),
    "fashion-vit-settings": ("fashion-vit", _at_rates(TRANSFORMERS, RATES[1:])),
    "frontier-cnn": ("fashion-cnn", _at_rates(FRONTIER, _FRONTIER_RATES)),
    "frontier-gpt": ("pysrc-gpt", _at_rates(FRONTIER, _FRONTIER_RATES)),
    "frontier-vit": ("fashion-vit", _at_rates(FRONTIER, _FRONTIER_RATES)),
    "pysrc-gpt": ("pysrc-gpt", RECIPES),
    "pysrc-gpt-settings": ("pysrc-gpt", _at_rates(TRANSFORMERS, (*RATES[1:], "8e-3"))),
}
