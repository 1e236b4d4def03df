"""The barriers of the Hopper GEMM's ring of stages (csrc/cuda/gemm_s8_wgmma.cu), as a model under random schedules.

A producer fills stages; consumers, of several warps each, multiply the tiles of a block in turns. A wait for a parity
returns once the current phase has another one (PTX ISA, mbarrier.try_wait.parity), so that a wait two phases ahead
passes at once. A schedule is bad if a consumer multiplies another fill than its own, if a copy lands in a stage that is
still read, if a barrier gets more arrivals than it counts, or if nothing moves any more.
"""

import random
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field

import pytest

WARPS = 2
"""Of a consumer: enough to part ways."""

LATEST = 9
"""Most steps of a copy, and of an epilogue."""


class BadScheduleError(Exception):
    """What went wrong."""


@dataclass
class Barrier:
    """A barrier in shared memory: a phase ends with its last arrival."""

    count: int
    pending: int = field(init=False)
    parity: int = 0

    def __post_init__(self) -> None:
        self.pending = self.count

    def arrive(self) -> None:
        if self.pending == 0:
            raise BadScheduleError("too many arrivals")
        self.pending -= 1
        if self.pending == 0:
            self.pending, self.parity = self.count, self.parity ^ 1

    def passed(self, parity: int) -> bool:
        return self.parity != parity


@dataclass(frozen=True)
class Protocol:
    """How consumers keep their order; each flaw is one that a kernel could have."""

    turns: bool = True  # a main loop begins when the one before has waited for its last stage
    turn_ends_early: bool = False  # it lets the next one begin at its first stage
    releases_early: bool = False  # a stage is released when its products are queued, not when they are done
    counts_one_warp: bool = False  # a stage counts as free when the first warp is done with it


RIGHT = Protocol()
FLAWS = {
    "consumers_without_turns": Protocol(turns=False),
    "turn_ends_early": Protocol(turn_ends_early=True),
    "releases_early": Protocol(releases_early=True),
    "counts_one_warp": Protocol(counts_one_warp=True),
}


class Ring:
    """A block: its barriers, what lies in each stage, and copies under way as (use, steps left)."""

    def __init__(self, protocol: Protocol, stages: int, steps: int, tiles: int, consumers: int, seed: int) -> None:
        self.protocol, self.stages, self.steps, self.tiles, self.consumers = protocol, stages, steps, tiles, consumers
        self.chance = random.Random(seed)
        self.full = [Barrier(1) for _ in range(stages)]
        self.empty = [Barrier(1 if protocol.counts_one_warp else WARPS) for _ in range(stages)]
        self.turns = [Barrier(WARPS) for _ in range(consumers)]
        self.content: list[int | None] = [None] * stages
        self.copies: list[list[int]] = []
        self.problems: set[str] = set()

    def parity(self, use: int) -> int:
        return use // self.stages % 2

    def wait(self, barrier: Barrier, parity: int) -> Iterator[bool]:
        """Yields False while it waits."""
        while not barrier.passed(parity):
            yield False

    def producer(self) -> Iterator[bool]:
        for use in range(self.tiles * self.steps):
            yield from self.wait(self.empty[use % self.stages], self.parity(use) ^ 1)
            self.copies.append([use, self.chance.randint(1, LATEST)])
            yield True

    def consumer(self, number: int) -> Iterator[bool]:
        """A warp of a consumer, as plain_tile and Ring::begin_turn, multiply, release and end_turn."""
        for turn in range(number, self.tiles, self.consumers):
            first_use = turn * self.steps
            if self.protocol.turns:
                first = turn % self.consumers == 0
                yield from self.wait(self.turns[number], (turn // self.consumers + first) % 2)
            for step in range(self.steps):
                use = first_use + step
                yield from self.wait(self.full[use % self.stages], self.parity(use))
                self.read(use)
                yield True
                if self.protocol.releases_early:
                    self.release(use)
                if step == 0 and self.protocol.turn_ends_early:
                    self.end_turn(turn)
                if step > 0:
                    self.end_reading(use - 1)
                yield True
            if not self.protocol.turn_ends_early:
                self.end_turn(turn)
            yield True
            self.end_reading(first_use + self.steps - 1)
            for _ in range(self.chance.randint(0, LATEST)):  # the epilogue
                yield True

    def read(self, use: int) -> None:
        if self.content[use % self.stages] != use:
            self.problems.add("wrong data")

    def end_reading(self, use: int) -> None:
        self.read(use)
        if not self.protocol.releases_early:
            self.release(use)

    def release(self, use: int) -> None:
        self.empty[use % self.stages].arrive()

    def end_turn(self, turn: int) -> None:
        if self.protocol.turns:
            self.turns[(turn + 1) % self.consumers].arrive()

    def land(self) -> bool:
        """A copy of those under way may land, in any order: whether any is under way."""
        under_way = bool(self.copies)
        for copy in list(self.copies):
            copy[1] -= 1
            if copy[1] <= 0:
                self.copies.remove(copy)
                self.content[copy[0] % self.stages] = copy[0]
                self.full[copy[0] % self.stages].arrive()
        return under_way

    def run(self) -> set[str]:
        """What goes wrong."""
        warps = [self.consumer(number) for number in range(self.consumers) for _ in range(WARPS)]
        live: list[Generator] = [self.producer(), *warps]
        pace = {id(actor): self.chance.choice((1.0, 0.5, 0.1, 0.03)) for actor in live}
        try:
            while live:
                moved, rested = self.land(), False
                for actor in self.chance.sample(live, len(live)):
                    if self.chance.random() > pace[id(actor)]:
                        rested = True
                        continue
                    went = next(actor, None)
                    if went is None:
                        live.remove(actor)
                    moved |= went is not False
                if not moved and not rested:
                    raise BadScheduleError("deadlock")
                if not moved:  # all that had a turn wait: look at the others
                    pace = dict.fromkeys(pace, 1.0) if self.chance.random() < 0.05 else pace
        except BadScheduleError as bad:
            self.problems.add(str(bad))
        return self.problems


SHAPES = [(4, 6), (6, 6), (4, 8), (6, 9), (4, 24), (6, 24), (4, 1), (6, 3)]
"""Stages of the ring, and steps of a tile: K = 768, 1024, 1152, 3072, and less than a ring."""


def bad_schedules(protocol: Protocol, stages: int, steps: int, tiles: int, consumers: int, seeds: int) -> list[set]:
    """What went wrong in those of so many schedules in which something did."""
    found = (Ring(protocol, stages, steps, tiles, consumers, seed).run() for seed in range(seeds))
    return [problems for problems in found if problems]


@pytest.mark.parametrize("consumers", [2, 3])
@pytest.mark.parametrize("tiles", [1, 2, 3, 7])
@pytest.mark.parametrize(("stages", "steps"), SHAPES)
def test_no_schedule_is_bad(stages, steps, tiles, consumers):
    assert bad_schedules(RIGHT, stages, steps, tiles, consumers, 20) == []


@pytest.mark.parametrize("flaw", FLAWS)
def test_each_flaw_shows_in_most_schedules(flaw):
    assert len(bad_schedules(FLAWS[flaw], 4, 24, 3, 2, 40)) > 20


@pytest.mark.parametrize(("stages", "steps"), [shape for shape in SHAPES if shape[1] >= shape[0]])
def test_consumers_without_turns_read_other_fills_and_block_each_other(stages, steps):
    found = bad_schedules(FLAWS["consumers_without_turns"], stages, steps, 7, 2, 60)
    assert len(found) > 30 and {"wrong data", "deadlock"} <= set().union(*found)


def test_a_block_of_one_tile_needs_no_turns():
    """Why no model of few images would have shown it."""
    assert bad_schedules(FLAWS["consumers_without_turns"], 4, 24, 1, 2, 60) == []
