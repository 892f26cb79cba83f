"""A model in memory that can be released before another one is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.writers import Writer
from abl_mlx.support import arrays


class LoadedModel:
    """A model in MLX and its residual writers, until `let_go`.

    A reference to ``chat`` or ``writers`` kept elsewhere keeps the model in memory.
    """

    def __init__(self, chat: ChatModel, writers: Sequence[Writer]) -> None:
        self._held: tuple[ChatModel, Sequence[Writer]] | None = (chat, writers)

    @property
    def chat(self) -> ChatModel:
        """The model."""
        assert self._held is not None, "the model was let go"
        return self._held[0]

    @property
    def writers(self) -> Sequence[Writer]:
        """The model's residual writers, as modules."""
        assert self._held is not None, "the model was let go"
        return self._held[1]

    def hold(self, chat: ChatModel, writers: Sequence[Writer]) -> None:
        """Hold another model in place of the released one."""
        self._held = chat, writers

    def let_go(self) -> None:
        """Release the model and return its memory to the system."""
        self._held = None
        arrays.let_go()
