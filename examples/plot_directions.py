"""Plot where the refusal direction is in a model: the distance of two sets of prompts by layer.

    python examples/plot_directions.py [MODEL [PICTURE]]

Prints a table of layers and token positions, and draws it with matplotlib where that is installed
(``pip install 'abl-mlx[plot]'``).
"""

# %% Measure candidates at the last tokens of the prompt, in its chat template
import importlib.util
import sys

import numpy as np

import abl_mlx

name = sys.argv[1] if len(sys.argv) > 1 else "demo"
picture = sys.argv[2] if len(sys.argv) > 2 else None
model = abl_mlx.load(name)
prompts = abl_mlx.load_prompts(model=model)
positions = list(range(-min(model.chat.template_tail(), 4), 0))
candidates = abl_mlx.measure(model, prompts, positions=positions)

# %% The distance of the means, in units of the mean length of a state
harmful = np.array(candidates.harmful_mean)
harmless = np.array(candidates.harmless_mean)
lengths = np.linalg.norm(harmful + harmless, axis=-1) / 2
apart = np.linalg.norm(harmful - harmless, axis=-1) / lengths  # (layers, positions)
print("layer  " + "  ".join(f"{position:>6}" for position in positions))
for layer, row in enumerate(apart):
    print(f"{layer:>5}  " + "  ".join(f"{value:6.3f}" for value in row))

# %% How alike the directions of neighbouring layers are
units = np.array(candidates.bases)[:, -1, 0]  # at the last token: (layers, dimensions)
for layer, cosine in enumerate((units[1:] * units[:-1]).sum(axis=-1)):
    print(f"layers {layer} and {layer + 1}: cosine {cosine:+.3f}")

# %% Draw it
if picture is not None and importlib.util.find_spec("matplotlib"):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for index, position in enumerate(positions):
        axes.plot(apart[:, index], marker="o", label=f"token {position}")
    axes.set(xlabel="layer", ylabel="distance of the means / length of a state", title=name)
    axes.legend()
    figure.savefig(picture)
    print(f"drawn: {picture}")
