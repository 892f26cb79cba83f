"""What `abl-mlx show --sae` tells of a prompt: which features of an autoencoder are active."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from abl_mlx.commands import sae_choice
from abl_mlx.commands.session import Steered
from abl_mlx.directions.decomposition import cosine
from abl_mlx.directions.sae import Sae
from abl_mlx.models import capture
from abl_mlx.records.looks import ShownFeature, ShownSae
from abl_mlx.support.arrays import numpy_of

#: How many features are shown besides those of the direction.
MOST = 8


def features(
    steered: Steered, sae: Sae, tokens: Sequence[int], prompt: int, asked: Sequence[int] = ()
) -> ShownSae:
    """The features that are most active at a prompt's last token, and those of the direction.

    Args:
        steered: the model, and the direction that features are compared with.
        sae: the autoencoder, which fits the model.
        tokens: token ids of the prompt, and of a reply if there is one.
        prompt: how many of them are the prompt's.
        asked: features that are shown as well.

    Raises:
        UserError: when there is no feature that was asked for.
    """
    offsets = range(-len(tokens), 0)
    states = capture.after_layer(steered.chat, [tokens], sae.layer, offsets, label="features")[0]
    active = sae_choice.encode(sae, states)
    last = active[prompt - 1]
    first = [int(one) for one in np.argsort(-last, kind="stable")[:MOST] if last[one] > 0]
    chosen = steered.direction.metadata.get("summary", {}).get("features") or []
    own = [*asked, *(one for one in chosen if one < sae.count)]
    selected = steered.direction.selected
    basis = numpy_of(selected if selected.ndim == 2 else selected[sae.layer])
    return ShownSae(
        name=sae.name,
        architecture=sae.architecture,
        model=sae.model,
        layer=sae.layer,
        count=sae.count,
        prompt_tokens=prompt,
        features=[
            ShownFeature(
                feature=one,
                activations=active[:, one].astype(float).round(5).tolist(),
                cosine=cosine(numpy_of(sae.directions((one,))[0]), basis),
            )
            for one in dict.fromkeys([*own, *first])
        ],
    )
