"""Conditions: on which prompts an edit at runtime is made (conditional activation steering, CAST).

Lee et al. 2024 ("Programming Refusal with Conditional Activation Steering", arXiv 2409.05907)
compare a state h with its projection on a condition vector c, and steer where the cosine of the
two is on one side of a threshold. With the projection c cᵀh / cᵀc that cosine is |c·h| / (|c| |h|).
Here it keeps its sign, c·h / (|c| |h|), which tells more prompts apart; the paper's tanh of the
projection, which depends on the basis of the stream, is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from abl_mlx.models import capture
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.support.arrays import numpy_of


@dataclass(frozen=True)
class Condition:
    """A condition on the states of a prompt.

    Attributes:
        vector: (d,) float32, of unit length.
        layer: the layer after which states are read, counted from 0.
        tokens: how many of the prompt's last tokens are read; the mean of their states counts.
        threshold: of the cosine.
        above: whether the condition is met at and above the threshold, or below it.
    """

    vector: mx.array
    layer: int
    tokens: int
    threshold: float
    above: bool

    def met(self, scores: np.ndarray) -> np.ndarray:
        """Whether the condition is met, for each of some cosines (N,)."""
        over = scores >= self.threshold
        return over if self.above else ~over

    def scores(self, chat: ChatModel, sequences: Sequence[Sequence[int]]) -> np.ndarray:
        """The cosines of prompts, (N,), from a forward pass of the model as it runs now.

        Args:
            chat: the model, without any intervention.
            sequences: encoded prompts.
        """
        found = np.zeros(len(sequences))
        by_count: dict[int, list[int]] = {}
        for index, sequence in enumerate(sequences):
            by_count.setdefault(min(self.tokens, len(sequence)), []).append(index)
        vector = numpy_of(self.vector)
        for count, indices in by_count.items():
            some = [sequences[index] for index in indices]
            found[indices] = cosines(mean_states(chat, some, count)[:, self.layer], vector)
        return found


def cosines(states: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """c·h / (|c| |h|) in float64, (N, d), (d,) -> (N,)."""
    states, vector = np.asarray(states, np.float64), np.asarray(vector, np.float64)
    lengths = np.linalg.norm(states, axis=1) * np.linalg.norm(vector)
    return states @ vector / np.maximum(lengths, 1e-30)


def mean_states(
    chat: ChatModel, sequences: Sequence[Sequence[int]], tokens: int, label: str = "condition"
) -> np.ndarray:
    """The mean state of each prompt's last tokens after every layer, (N, L, d) float32.

    Raises:
        UserError: when a prompt has fewer tokens, or the states are no residual stream.
    """
    found = np.empty((len(sequences), len(chat.layers), chat.width), np.float32)
    for indices, states in capture.iterate(chat, sequences, range(-tokens, 0), label=label):
        found[indices] = numpy_of(states.mean(axis=2))
    return found
