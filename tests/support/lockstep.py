"""A rank that adds up arrays with others without an end, in a process of its own.

    python -m tests.support.lockstep OUT [RANK]

OUT is begun and never complete. The rank that is named fails.
"""

import os
import sys

import mlx.core as mx

from abl_mlx.support import lost_ranks, ranks
from convert.base.atomic import new_file
from convert.base.errors import UserError

if __name__ == "__main__":
    from pathlib import Path

    lost_ranks.GRACE = ranks._PATIENCE = 1.0
    try:
        with ranks.together(), new_file(Path(sys.argv[1])) as staged:
            staged.write_bytes(b"begun")
            ranks.in_lockstep()
            states = mx.ones((1000,))
            while True:
                for _ in range(8):  # as the layers of a split model
                    states = mx.distributed.all_sum(states) * 0.5
                mx.eval(states)
                print("runs", flush=True)
                if sys.argv[2:] == [os.environ["MLX_RANK"]]:
                    raise UserError("this layer has no memory.")
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)
