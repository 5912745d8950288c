"""Plug-and-Play: another look for the same layout.

Tumanyan et al., CVPR 2023, arXiv 2211.12572. Early in the run the edited rows of the batch take queries, keys and one
residual block's output from the source row, see ``attention/features.py``; row 0 is the source. No further evaluation.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from ..attention.features import Features
from .contract import Edits, Guidance, GuidanceError, Setup, Step
from .editing import check_ends, check_reached, check_share, require_source


@dataclass(frozen=True, kw_only=True)
class PlugAndPlay(Guidance):
    """Share the source's features. The paper shares queries and keys in the first 0.5 of the run, the residual in the
    first 0.8.

    Args:
        blocks, feature: where, see ``attention.features.Features``; "" for the paper's places or their like.
        attention_until, feature_until: percent of the timesteps; 0 is never.
    """

    attention_until: float = 0.5
    feature_until: float = 0.8
    blocks: str = ""
    feature: str = ""

    title = "Same Layout, New Look (Plug-and-Play)"
    rank = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.title, attention_percent=self.attention_until, feature_percent=self.feature_until)
        check_ends(self.title, self.start, attention_percent=self.attention_until, feature_percent=self.feature_until)

    @property
    def edit(self) -> Features:
        return Features(blocks=self.blocks, feature=self.feature, attention_until=self.attention_until,
                        feature_until=self.feature_until)

    def check(self, setup: Setup) -> None:
        """Say what would not act: the edit as a whole needs just one of its sites."""
        for until, name, given, kinds in (
            (self.attention_until, "blocks", self.blocks, {"self", "joint"}),
            (self.feature_until, "feature_block", self.feature, {"residual"}),
        ):
            sites = [site for site in setup.sites if site.kind in kinds]
            if until > 0 and sites and not any(self.edit.acts_at(site) for site in sites):
                names = ", ".join(dict.fromkeys(site.name for site in sites))
                raise GuidanceError(f"{self.title}: {name} is '{given}', and none of these is called that: {names}.")
        residual = any(site.kind == "residual" for site in setup.sites)
        features = {"feature_percent": self.feature_until} if residual or not setup.sites else {}
        check_reached(self.title, setup, self.start, self.end, attention_percent=self.attention_until, **features)
        if self.feature_until > 0 and setup.sites and not residual:
            logging.getLogger("rudder").warning(
                "Rudder: %s: this model has no residual blocks, so queries and keys alone are the source's. Set "
                "feature_percent to 0 to say so.", self.title,
            )

    def edits(self, step: Step) -> Edits:
        require_source(self.title, step)
        edit, until = self.edit, max(self.attention_until, self.feature_until)
        return [(edit, ())] if step.before(until) else []
