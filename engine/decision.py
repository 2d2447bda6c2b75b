from typing import NamedTuple
from engine.sequence import Sequence
class Part(NamedTuple):
    sequence: Sequence
    start: int
    count: int
    samples: bool
