"""Records of the refusal cliff of a model that thinks (``measure --refusal-cliff``)."""

from __future__ import annotations

from dataclasses import dataclass

from abl_mlx.records.record import Part


@dataclass(frozen=True, kw_only=True)
class SuppressionHead(Part):
    """What an attention head writes along the probe's weight behind a thought.

    Attributes:
        layer, head: which head, both counted from 0.
        written: the mean over harmful prompts, in log-odds of a refusal; negative for heads that
            suppress refusals.
    """

    layer: int
    head: int
    written: float


@dataclass(frozen=True, kw_only=True)
class RefusalCliff(Part):
    """How sure a probe is, token by token, that the reply will be a refusal.

    Attributes:
        layer: the layer after which the probe reads the stream.
        positions: tokens, counted from the end of the thought, -1 being the last one before the
            reply.
        harmful, harmless: the probe's mean probability of refusal at each of them, 0 to 1, over
            validation prompts with the model's own thoughts.
        accuracy: the probe's, on the ends of the thoughts of validation prompts, 0 to 1.
        plateau: the highest mean probability of harmful prompts before the last position.
        final: that at the last position.
        heads: the heads that suppress refusals most, the strongest first.
        suppressed: the share of all that the heads write against refusals that these heads write.
    """

    layer: int
    positions: list[int]
    harmful: list[float]
    harmless: list[float]
    accuracy: float
    plateau: float
    final: float
    heads: list[SuppressionHead]
    suppressed: float

    @property
    def height(self) -> float:
        """How far the probability falls at the end: plateau less final, 0 or more."""
        return max(0.0, self.plateau - self.final)
