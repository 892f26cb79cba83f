"""Sparse autoencoders: what their features say of a residual state, and their decoder's directions.

A sparse autoencoder writes a state h as a sum of few of many feature directions, h ≈ a(h) W_dec +
b_dec with activations a(h) ≥ 0 (Bricken et al. 2023, "Towards Monosemanticity"; Cunningham et al.
2023, arXiv 2309.08600). Here activations are computed and decoder rows are taken as directions;
`abl_mlx.directions.sae_files` reads the files.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from abl_mlx.support.arrays import number
from convert.base.errors import UserError

#: The activation functions that `Sae.encode` knows.
ARCHITECTURES = ("standard", "gated", "jumprelu", "topk")

#: What may be done to a state before it is encoded, by the names that SAELens has for it.
NORMALIZATIONS = ("none", "constant_norm_rescale", "layer_norm")

# What SAELens adds to the deviation of a state in `layer_norm`.
_EPSILON = 1e-5


@dataclass(frozen=True)
class Gate:
    """The magnitudes of a gated autoencoder (Rajamanoharan et al. 2024, arXiv 2404.16014).

    Attributes:
        scale: (F,) r_mag: magnitudes are encoded with W_enc · exp(r_mag).
        bias: (F,) b_mag.
    """

    scale: mx.array
    bias: mx.array


@dataclass(frozen=True)
class Sae:
    """A sparse autoencoder of the residual stream with F features and width d.

    Attributes:
        name: its name for messages and records.
        architecture: one of `ARCHITECTURES`.
        layer: the layer after which it reads the stream, counted from 0.
        encoder: (d, F) float32, W_enc.
        bias: (F,) float32, b_enc; of a gated one b_gate.
        decoder: (F, d) float32, W_dec.
        decoder_bias: (d,) float32, b_dec.
        threshold: (F,) of JumpReLU.
        gate: of a gated one.
        k: of TopK, how many features are kept.
        by_decoder_norm: of TopK, whether pre-activations are multiplied by the decoder rows'
            lengths first.
        subtracts: whether b_dec is subtracted from a state before it is encoded.
        normalization: one of `NORMALIZATIONS`.
        centred: whether it was trained on states whose mean over the d elements is 0.
        model: the model it was trained on, if its files say so.
    """

    name: str
    architecture: str
    layer: int
    encoder: mx.array
    bias: mx.array
    decoder: mx.array
    decoder_bias: mx.array
    threshold: mx.array | None = None
    gate: Gate | None = None
    k: int | None = None
    by_decoder_norm: bool = False
    subtracts: bool = False
    normalization: str = "none"
    centred: bool = False
    model: str | None = None

    @property
    def width(self) -> int:
        """d."""
        return int(self.encoder.shape[0])

    @property
    def count(self) -> int:
        """F, the number of features."""
        return int(self.encoder.shape[1])

    def encode(self, states: mx.array) -> mx.array:
        """The activations of all features, (N, d) -> (N, F) float32.

        With x the state as `_input` prepares it and p = x W_enc + b_enc they are

        - standard: ReLU(p),
        - jumprelu: p where p > max(threshold, 0), else 0 (Rajamanoharan et al. 2024, arXiv
          2407.14435),
        - topk: ReLU(p) of the k features with the largest p, else 0 (Gao et al. 2024, arXiv
          2406.04093),
        - gated: ReLU(x (W_enc · exp(r_mag)) + b_mag) where p > 0, else 0.
        """
        states = self._input(states.astype(mx.float32))
        raw = states @ self.encoder
        pre = raw + self.bias
        if self.gate is not None:
            magnitudes = raw * mx.exp(self.gate.scale) + self.gate.bias
            return mx.where(pre > 0, mx.maximum(magnitudes, 0.0), 0.0)
        if self.threshold is not None:
            return mx.where(pre > self.threshold, mx.maximum(pre, 0.0), 0.0)
        if self.k is not None:
            return self._largest(pre, min(self.k, self.count))
        return mx.maximum(pre, 0.0)

    def directions(self, features: tuple[int, ...]) -> mx.array:
        """The decoder rows of some features as unit vectors, (k, d) float32.

        Raises:
            UserError: when there is no such feature, or its decoder row is zero.
        """
        for feature in features:
            if not 0 <= feature < self.count:
                raise UserError(
                    f"--feature {feature}: {self.name} has the features 0 to {self.count - 1}."
                )
        rows = self.decoder[mx.array(list(features))]
        lengths = mx.sqrt((rows * rows).sum(axis=-1, keepdims=True))
        if not number(lengths.min()) > 0:
            raise UserError(
                f"--feature {','.join(map(str, features))}: a decoder row in {self.name} is zero, "
                "so it is no direction; choose another feature."
            )
        return rows / lengths

    def check(self, width: int, layers: int, model: str) -> None:
        """Check that it fits a model.

        Args:
            width: of the model's residual stream.
            layers: how many layers the model has.
            model: the model's name.

        Raises:
            UserError: when it does not.
        """
        if self.width != width:
            raise UserError(
                f"{self.name} reads states of {self.width} dimensions, but the residual stream of "
                f"{model} has {width}: it was trained on another model{self._whose}."
            )
        if not 0 <= self.layer < layers:
            raise UserError(
                f"{self.name} reads the stream after layer {self.layer}, but {model} has the "
                f"layers 0 to {layers - 1}: it was trained on another model{self._whose}."
            )

    @property
    def _whose(self) -> str:
        return "" if self.model is None else f", {self.model}"

    def _input(self, states: mx.array) -> mx.array:
        """States as the encoder takes them: centred, normalized, b_dec subtracted."""
        if self.centred:
            states = states - states.mean(axis=-1, keepdims=True)
        if self.normalization == "constant_norm_rescale":
            lengths = mx.sqrt((states * states).sum(axis=-1, keepdims=True))
            states = states * (self.width**0.5 / mx.maximum(lengths, 1e-30))
        elif self.normalization == "layer_norm":
            states = states - states.mean(axis=-1, keepdims=True)
            squares = (states * states).sum(axis=-1, keepdims=True)
            states = states / (mx.sqrt(squares / (self.width - 1)) + _EPSILON)
        return states - self.decoder_bias if self.subtracts else states

    def _largest(self, pre: mx.array, k: int) -> mx.array:
        if self.by_decoder_norm:
            pre = pre * mx.sqrt((self.decoder * self.decoder).sum(axis=-1))
        inside = mx.argpartition(-pre, kth=k - 1, axis=-1)[..., :k]
        kept = mx.maximum(mx.take_along_axis(pre, inside, axis=-1), 0.0)
        return mx.put_along_axis(mx.zeros_like(pre), inside, kept, axis=-1)
