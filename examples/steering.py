"""Steer a model at runtime: reduce its refusals step by step, or make it refuse.

    python examples/steering.py            # the demo model
    python examples/steering.py MODEL      # a folder, a .gguf, a repository, ollama:NAME

Nothing is written. Inside a ``with`` block the model computes as if the edit were in its weights;
after the block it is as before.
"""

# %% A model, its prompts and its direction
import sys

import abl_mlx
from abl_mlx.edits.steering import adding, steering

name = sys.argv[1] if len(sys.argv) > 1 else "demo"
model = abl_mlx.load(name)
prompts = abl_mlx.load_prompts(model=model)
direction = abl_mlx.choose(model, prompts)
harmful = prompts.harmful.test.texts[:4]
harmless = prompts.harmless.test.texts[:4]


def show(title, questions):
    """Print the replies that the model gives now."""
    print(f"\n{title}")
    for question, reply in zip(questions, model.reply(questions, 32), strict=True):
        print(f"  {question}\n    {reply}")


# %% Remove the direction in steps: strength 1 removes its whole component, 0.5 half of it
show("as it is", harmful)
for strength in (0.5, 1.0):
    with abl_mlx.ablation(model, abl_mlx.Edit(direction.selected, strength)):
        show(f"strength {strength:g}", harmful)

# %% Add the direction: the difference of the two means, unscaled, after its layer
summary = direction.metadata["summary"]
if summary.get("layer") is not None and direction.candidates is not None:
    layer, position = round(summary["layer"]), summary["position"]
    difference = direction.candidates.difference(layer, position)
    with steering(model.chat, adding(difference, layer)):
        show(f"added after layer {layer}", harmless)
