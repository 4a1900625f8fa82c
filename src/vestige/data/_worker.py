"""The process that encodes parts for another: `python -m vestige.data._worker`, which exchanges pickles with it."""

import os
import pickle
import sys
import traceback

from vestige.data._parts import PartEncoder
from vestige.errors import VestigeError


def main() -> None:
    """Answer every chunk with its packed part, or with the error that it raised, until the input ends."""
    # What libraries print must not get between the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    encoder: PartEncoder = pickle.load(sys.stdin.buffer)
    while True:
        try:
            chunk = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = encoder.packed(chunk)
        except VestigeError as error:
            answer = error
        except Exception:
            answer = traceback.format_exc()
        pickle.dump(answer, answers, protocol=pickle.HIGHEST_PROTOCOL)
        answers.flush()


if __name__ == "__main__":
    main()
