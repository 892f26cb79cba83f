"""The plain forward pass of one prompt, with which every faster way to run a model is compared.

A faster way (batches, padding, a cache, fewer output positions) is correct if it gives the same
distributions of the next token. mlx-lm has more than a hundred architectures, and each of these
ways is wrong for some of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from abl_mlx.models import heads, sweeps
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.distributions import kl_divergence, normalized
from abl_mlx.models.hooks import around
from abl_mlx.support.arrays import number
from convert.base.errors import UserError

#: The number of tokens in the longest prompt of a comparison, for usual and for long prompts.
USUAL, LONG = 64, 512

# Type in which a model computes -> the largest KL (nats) that rounding explains.
_ROUNDING = {mx.float32: 3e-5, mx.float16: 2e-3, mx.bfloat16: 1e-2}

# The least number of tokens in the longest prompt of a comparison; a shorter one is repeated.
_LEAST = 24


class Plain:
    """Computes next-token distributions of single prompts, with one pass and without padding.

    Attributes:
        cached: whether the pass uses a cache (`needs_cache`).
    """

    def __init__(self, chat: ChatModel, *, cached: bool | None = None):
        self.cached = needs_cache(chat) if cached is None else cached
        self._chat = chat
        self._dtype = mx.float32
        self._found: dict[tuple[int, ...], mx.array] = {}

    def __call__(self, tokens: Sequence[int], last: int = 1) -> mx.array:
        """Log-probabilities (last, V) float32 of the next token after each of the ``last`` tokens.

        Raises:
            UserError: when mlx-lm cannot run the model.
        """
        from mlx_lm.models.cache import make_prompt_cache

        model, whole = self._chat.model, mx.array([list(tokens)], mx.int32)
        counts, layers = [0] * len(self._chat.layers), self._chat.layers

        def count(index: int) -> Any:
            def wrapper(call: Any, *args: Any, **kwargs: Any) -> Any:
                counts[index] += 1
                return call(*args, **kwargs)

            return wrapper

        try:
            with around(
                [(layers[-1], self._look), *((one, count(n)) for n, one in enumerate(layers))]
            ):
                logits = (
                    model(whole, cache=make_prompt_cache(model)) if self.cached else model(whole)
                )
                found = normalized(logits[0, -last:])
                mx.eval(found)
            vars(self._chat)["_runs_again"] = max(counts) > 1
            vars(self._chat)["_vocabulary"] = int(found.shape[-1])
        except UserError:
            raise
        except Exception as error:  # mlx-lm's code may raise anything for this model
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"mlx-lm cannot run this {self._chat.model_type} model: {reason}"
            ) from None
        return found

    def prepare(self, prompts: Sequence[Sequence[int]], last: int) -> None:
        """Run prompts that `agrees` will be asked about, in one sweep of a streamed model."""
        if sweeps.of(self._chat.model) is not None:
            found = sweeps.each(self._chat.model, lambda one: self(one, last), prompts)
            for prompt, rows in zip(prompts, found, strict=True):
                key = last, *prompt
                self._found[key] = rows

    def _look(self, call: Any, *args: Any, **kwargs: Any) -> Any:
        output = call(*args, **kwargs)
        states = output[0] if isinstance(output, tuple | list) else output
        if isinstance(states, mx.array):
            self._dtype = states.dtype
        return output

    def agrees(self, tokens: Sequence[int], found: mx.array) -> bool:
        """Whether the distributions ``found``, (K, V), are those of this pass.

        They are if their mean KL from those of this pass is no larger than rounding explains.

        Args:
            tokens: a prompt.
            found: log-probabilities after the prompt's last K tokens.
        """
        key = found.shape[0], *tokens
        if key not in self._found:
            self._found[key] = self(tokens, found.shape[0])
        return self.near(self._found[key], found)

    def near(self, right: mx.array, found: mx.array) -> bool:
        """Whether two distributions, (K, V), differ by no more than rounding, as of `agrees`."""
        if right.shape != found.shape:
            return False
        apart = number(kl_divergence(right, normalized(found)).mean())
        return apart <= _ROUNDING.get(self._dtype, min(_ROUNDING.values()))


def runs_again(chat: ChatModel) -> bool:
    """Whether a pass runs some layer more than once; known after the first plain pass."""
    return bool(vars(chat).get("_runs_again"))


def needs_cache(chat: ChatModel) -> bool:
    """Whether a model computes its correct logits only with a cache; determined once per model.

    In some architectures (gemma3n) mlx-lm passes the keys and values that layers share through the
    cache. Without a cache it computes others, so the logits differ from those in generation.
    """
    known: dict[None, bool] = vars(chat).setdefault("_needs_cache", {})
    return sweeps.once(chat.model, known, None, lambda: _needs_cache(chat))


def _needs_cache(chat: ChatModel) -> bool:
    from mlx_lm.generate import generate_step

    tokens = list(range(1, 10))
    free, cached = Plain(chat, cached=False), Plain(chat, cached=True)
    # A streamed model runs both in one sweep; one in memory runs each where it is asked for.
    tries = sweeps.each(chat.model, lambda one: _tried(one, tokens), [cached, free])
    if (right := next(tries)) is None:
        return False
    if (found := next(tries)) is None:
        return True
    if free.near(found, right):
        return False
    try:
        steps = list(generate_step(mx.array(tokens), chat.model, max_tokens=2))
        said, rows = [int(token) for token, _ in steps], [row for _, row in steps]
        return cached.agrees([*tokens, said[0]], mx.stack(rows))
    except Exception:  # mlx-lm's code may raise anything; then there is only the pass without cache
        return False


def _tried(plain: Plain, tokens: Sequence[int]) -> mx.array | None:
    try:
        return plain(tokens)
    except UserError:
        return None


def reach(sequences: Sequence[Sequence[int]]) -> int:
    """Length in tokens of the prompts with which a comparison is valid for ``sequences``."""
    return USUAL if max(map(len, sequences)) <= 4 * USUAL else LONG


def sample(sequences: Sequence[Sequence[int]]) -> list[int]:
    """At most `reach` tokens of the longest sequence, for the prompts of a comparison."""
    longest = list(sequences[max(range(len(sequences)), key=lambda index: len(sequences[index]))])
    while len(longest) < _LEAST:
        longest += longest
    return longest[: reach(sequences)]


def vocabulary(chat: ChatModel) -> int:
    """V, the width of the model's logits; determined by the shapes of one forward pass."""
    known = vars(chat).get("_vocabulary")
    if known is None:
        with heads.unseen(chat.model), sweeps.asleep(chat.model):
            known = int(chat.model(mx.array([[0]])).shape[-1])
        object.__setattr__(chat, "_vocabulary", known)
    return int(known)
