"""Options that several recipes take: each with its type and its meaning for users."""

from __future__ import annotations

from typing import Annotated

from abtrain.recipes.factoring import RankRule
from abtrain.recipes.merges import MergeRule

Every = Annotated[int, "Steps between merges."]
PhaseEvery = Annotated[int, "Steps between merges in that phase; 0: gradients are averaged at every step."]
Merge = Annotated[
    MergeRule | str, "A rule of `abtrain.recipes.merges`, or its name: mean (the paper's), trained_only or weighted."
]
Temperature = Annotated[float, "Of the rule `weighted`, in the units of the loss."]
OuterLR = Annotated[float, "Learning rate of the outer optimizer."]
OuterMomentum = Annotated[float, "Momentum of the outer optimizer."]
Wire = Annotated[str, "How merges are sent: see `abtrain.recipes.sync.WeightSync`."]
Delay = Annotated[int, "Training steps that a merge is hidden behind; the last merge of a phase is waited for."]
Fragments = Annotated[int, "Parts of the model that merge in turns; at the end of a phase all merge at once."]
LocalLR = Annotated[float, "Multiplies the learning rate between merges: see `abtrain.recipes.phase.Phase`."]
Rule = Annotated[
    RankRule | str | None, "Replaces `SigmaCutoff(sigma_cutoff)`: a rule, or its name such as energy:0.95."
]
